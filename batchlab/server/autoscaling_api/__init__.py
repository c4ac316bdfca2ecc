"""EC2 Auto Scaling's wire protocol over the engine in `batchlab.fleet`.

A request is parsed and an answer written from botocore's model of the service: no action has code
of its own for that. What an action means is one row of a table in `batchlab.server.autoscaling_api.scheduled_changes`.
"""
