"""Job performance data: what a job did, as Parquet in the bucket, and questions about it."""
