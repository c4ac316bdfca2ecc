"""Code of a replay's jobs. The workers receive the whole folder `standin`."""
