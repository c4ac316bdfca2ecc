"""Wire protocol of EC2 Auto Scaling on top of the engine in `batchlab.fleet`.

The service parses requests and writes answers by botocore's model of EC2 Auto Scaling, so an action does not contain
code for its format. `batchlab.server.autoscaling_api.scheduled_changes` has a table with one row for each action.
"""
