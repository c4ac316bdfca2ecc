"""Job performance data: Parquet files in the bucket that describe a job, and SQL queries over the files."""
