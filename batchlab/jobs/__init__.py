"""Job files, submission, results, and attempts."""
