"""Wire protocol of EC2 Auto Scaling on top of the engine in `batchlab.fleet`.

The service parses requests and writes answers with botocore's model of the service, so actions need no code to parse
and write. `batchlab.server.autoscaling_api.scheduled_changes` has a table with one row for each action.
"""
