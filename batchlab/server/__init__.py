"""The manager process as its clients see it: HTTP API, web page, metrics, and the Auto Scaling
endpoint."""
