"""Whether an S3 and SQS endpoint keeps the rules that batchlab relies on.

`CHECKS` is the table, `run` tries it against an `Endpoint`, `report` says what came of it.
"""
