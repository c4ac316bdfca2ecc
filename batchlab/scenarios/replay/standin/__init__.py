"""Code of a replay's jobs. The whole folder is sent to the workers."""
