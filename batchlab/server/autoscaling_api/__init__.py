"""EC2 Auto Scaling's wire protocol over the engine in `batchlab.fleet`.

Requests are parsed and answers are written from botocore's model of the service, so no action has
code for that. `batchlab.server.autoscaling_api.scheduled_changes` has one row for each action.
"""
