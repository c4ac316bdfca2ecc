"""Whether an endpoint of S3, SQS or Auto Scaling keeps the rules that batchlab relies on.

`CHECKS` is the table, `run` tries it against an `Endpoint`, `report` says what came of it.
"""
