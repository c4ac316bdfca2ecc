"""Job performance data: Parquet files in the bucket that describe a job, and queries over them."""
