"""Conformance checks of S3, SQS, and Auto Scaling endpoints against the rules that batchlab needs.

`check_table.CHECKS` is the table of conformance checks. `run.run` runs checks against an endpoint, and
`check_table.section` formats the results of the checks.
"""
