"""Processes of the manager, the worker, and the Auto Scaling endpoint, and the manager's HTTP API, web page, and
metrics.
"""
