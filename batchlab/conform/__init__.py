"""Conformance checks of S3, SQS, and Auto Scaling endpoints against the rules that batchlab needs.

`CHECKS` is the table of checks, `run` runs them against an endpoint, and `report` shows the results.
"""
