"""Wire protocol of EC2 Auto Scaling on top of the engine in `batchlab.fleet`.

The service parses requests and writes answers with botocore's model of the service, so no action needs code for that.
`batchlab.server.autoscaling_api.scheduled_changes` has the table with one row for each action.
"""
