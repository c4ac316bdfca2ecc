"""Adapters of the ports: files, SQLite, S3, SQS, EC2, Docker, PostgreSQL, SimpleDB, memory."""
