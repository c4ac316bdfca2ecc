"""Processes of the manager, the worker, and the Auto Scaling endpoint, with the HTTP API, the web
page, and the metrics."""
