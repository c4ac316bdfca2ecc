"""Whether an S3 and SQS endpoint keeps the rules that batchlab relies on."""
