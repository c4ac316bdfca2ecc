"""The AWS calls that a worker, the manager, and a user of a stack need, and calls that their roles must not allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.aws.ministack import ACCOUNT, REGION, Plane

TOPIC = f"arn:aws:sns:{REGION}:{ACCOUNT}:told"
OTHER_POOLS = "batchlab-tasks-gpu"
OTHER_TOPIC = f"arn:aws:sns:{REGION}:{ACCOUNT}:somebody-elses"


@dataclass
class Site:
    """A stack and the credentials of one of its roles."""

    root: Plane
    ids: dict[str, str]
    plane: Plane

    def __getattr__(self, service: str) -> Any:
        return self.plane.client(service)

    @property
    def bucket(self) -> str:
        return self.ids["Bucket"]

    def put(self, key: str, **options: str) -> object:
        return self.s3.put_object(Bucket=self.bucket, Key=key, Body=b"1", **options)

    def get(self, key: str) -> object:
        return self.s3.get_object(Bucket=self.bucket, Key=key)

    def queue(self, logical: str) -> str:
        name = self.ids[logical].rpartition("/")[2]
        return str(self.root.client("sqs").get_queue_url(QueueName=name)["QueueUrl"])

    def received(self, logical: str) -> dict[str, str]:
        """Receive an existing message with the role's credentials."""
        return _received(self.queue(logical), self.root, self.plane)

    def anothers(self) -> str:
        """Return the task queue of another pool."""
        return str(self.root.client("sqs").get_queue_url(QueueName=OTHER_POOLS)["QueueUrl"])

    def stolen_receipt(self) -> dict[str, str]:
        """Return a message of another pool, with the receipt of a worker of that pool."""
        return _received(self.anothers(), self.root, self.root)


def _received(url: str, sender: Plane, receiver: Plane) -> dict[str, str]:
    sender.client("sqs").send_message(QueueUrl=url, MessageBody="m")
    (message,) = receiver.client("sqs").receive_message(QueueUrl=url)["Messages"]
    return {"QueueUrl": url, "ReceiptHandle": message["ReceiptHandle"]}


Call = Callable[[Site], object]


def elses(site: Site) -> str:
    return str(site.root.client("sqs").get_queue_url(QueueName="somebody-elses")["QueueUrl"])


def together(site: Site, call: Callable[..., Any], facts: dict[str, int]) -> object:
    held = site.received("PoolTasks")
    entry = {"Id": "0", "ReceiptHandle": held["ReceiptHandle"], **facts}
    return call(QueueUrl=held["QueueUrl"], Entries=[entry])


def complete(site: Site, group: str) -> object:
    return site.autoscaling.complete_lifecycle_action(
        LifecycleHookName="batchlab-drain",
        AutoScalingGroupName=group,
        InstanceId="i-0123456789abcdef0",
        LifecycleActionResult="CONTINUE",
    )


def log_line(site: Site, stream: str) -> object:
    site.logs.create_log_stream(logGroupName="/batchlab/batchlab", logStreamName=stream)
    return site.logs.put_log_events(
        logGroupName="/batchlab/batchlab",
        logStreamName=stream,
        logEvents=[{"timestamp": int(time.time() * 1000), "message": "hello"}],
    )


def end_action(site: Site, group: str) -> object:
    named = {"AutoScalingGroupName": group, "ScheduledActionName": "batchlab-end"}
    at = datetime.now(UTC) + timedelta(hours=1)
    site.autoscaling.put_scheduled_update_group_action(**named, StartTime=at, MinSize=0, MaxSize=0, DesiredCapacity=0)
    return site.autoscaling.delete_scheduled_action(**named)


def multipart(site: Site, key: str) -> object:
    begun = site.s3.create_multipart_upload(Bucket=site.bucket, Key=key)
    named = {"Bucket": site.bucket, "Key": key, "UploadId": begun["UploadId"]}
    site.s3.upload_part(**named, PartNumber=1, Body=b"1")
    return site.s3.abort_multipart_upload(**named)


def in_parts(site: Site, key: str, **condition: str) -> object:
    begun = site.s3.create_multipart_upload(Bucket=site.bucket, Key=key)
    named = {"Bucket": site.bucket, "Key": key, "UploadId": begun["UploadId"]}
    part = site.s3.upload_part(**named, PartNumber=1, Body=b"1")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    return site.s3.complete_multipart_upload(**named, MultipartUpload=parts, **condition)


def overwritten(site: Site, key: str) -> object:
    """Overwrite an existing object of another worker."""
    site.root.client("s3").put_object(Bucket=site.bucket, Key=key, Body=b"0", IfNoneMatch="*")
    return site.put(key)


# --- Required calls -----------------------------------------------------------------------------

WORKER_MAY: dict[str, Call] = {
    "fetch the release": lambda it: it.get("boot/a.tar.gz"),
    "read code": lambda it: it.get("code/a.zip"),
    "read raw data": lambda it: it.get("raw/j/0"),
    "read interim results": lambda it: it.get("files/j/s/0"),
    "read the leader beat": lambda it: it.get("grid/leader.json"),
    "commit": lambda it: it.put("jobs/j/s/outcomes/ab/b1.json", IfNoneMatch="*"),
    "write files": lambda it: it.put("files/j/s/ab/b/w/0/a.csv", IfNoneMatch="*"),
    "write a file in parts": lambda it: in_parts(it, "files/j/s/ab/b/w/0/large", IfNoneMatch="*"),
    "upload in parts": lambda it: multipart(it, "files/j/s/ab/b/w/0/big"),
    "write logs": lambda it: it.put("logs/j/s/ab/b/w.log", IfNoneMatch="*"),
    "write tails": lambda it: it.put("logs/j/.tails/w.json"),
    "tell its environment": lambda it: it.put("logs/.workers/w.json"),
    "say that it still runs": lambda it: it.put("jobs/j/s/running/b.json"),
    "mark a start": lambda it: it.put("jobs/j/s/starts/b/w-1", IfNoneMatch="*"),
    "list starts": lambda it: it.s3.list_objects_v2(Bucket=it.bucket, Prefix="jobs/j/s/starts/"),
    "find its queue": lambda it: it.sqs.get_queue_url(QueueName="batchlab-tasks-default"),
    "delete a message": lambda it: it.sqs.delete_message(**it.received("PoolTasks")),
    "delete messages": lambda it: together(it, it.sqs.delete_message_batch, {}),
    "give messages back": lambda it: together(it, it.sqs.change_message_visibility_batch, {"VisibilityTimeout": 0}),
    "extend a message": lambda it: it.sqs.change_message_visibility(**it.received("PoolTasks"), VisibilityTimeout=0),
    "send follow-on tasks": lambda it: it.sqs.send_message_batch(
        QueueUrl=it.queue("PoolTasks"), Entries=[{"Id": "0", "MessageBody": "m"}]
    ),
    "send tasks of the next stage to another pool": lambda it: it.sqs.send_message_batch(
        QueueUrl=it.anothers(), Entries=[{"Id": "0", "MessageBody": "m"}]
    ),
    "send events": lambda it: it.sqs.send_message(QueueUrl=it.queue("EventsQueue"), MessageBody="m"),
    "find the events queue": lambda it: it.sqs.get_queue_url(QueueName="batchlab-events"),
    "end its wait": lambda it: complete(it, "batchlab-pool-default"),
    "log": lambda it: log_line(it, "worker"),
}

MANAGER_MAY: dict[str, Call] = {
    "fetch the release": lambda it: it.get("boot/a.tar.gz"),
    "read logs": lambda it: it.get("logs/j/s/0"),
    "read results": lambda it: it.get("files/j/s/0"),
    "take in the code of a job that comes by the page": lambda it: it.put("code/m.zip"),
    "take in its input": lambda it: it.put("raw/m/0"),
    "take that in by parts": lambda it: multipart(it, "raw/m/big"),
    "admit a job": lambda it: it.put("jobs/m/spec.json", IfNoneMatch="*"),
    "change its control word": lambda it: it.put("jobs/m/control.json"),
    "plan": lambda it: it.put("jobs/m/s/plan/0000/manifest.json", IfNoneMatch="*"),
    "fail a dead letter": lambda it: it.put("jobs/m/s/outcomes/ab/b.json", IfNoneMatch="*"),
    "list jobs": lambda it: it.s3.list_objects_v2(Bucket=it.bucket, Prefix="jobs/"),
    "decide on a schedule": lambda it: it.put("grid/schedules/s.json", IfNoneMatch="*"),
    "note who is to be told": lambda it: it.put("grid/notifications.json"),
    "write a report": lambda it: it.put("reports/m/report.json"),
    "send tasks": lambda it: it.sqs.send_message(QueueUrl=it.queue("PoolTasks"), MessageBody="m"),
    "see depths": lambda it: it.sqs.get_queue_attributes(QueueUrl=it.queue("PoolTasks"), AttributeNames=["All"]),
    "give back a lost worker's message": lambda it: it.sqs.change_message_visibility(
        **it.received("PoolTasks"), VisibilityTimeout=0
    ),
    "collect": lambda it: it.sqs.delete_message(**it.received("EventsQueue")),
    "take up dead letters": lambda it: it.sqs.delete_message(**it.received("PoolDeadLetters")),
    "see groups": lambda it: it.autoscaling.describe_auto_scaling_groups(),
    "see activities": lambda it: it.autoscaling.describe_scaling_activities(
        AutoScalingGroupName="batchlab-pool-default"
    ),
    "scale": lambda it: it.autoscaling.set_desired_capacity(
        AutoScalingGroupName="batchlab-pool-default", DesiredCapacity=0
    ),
    "change a pool's limits": lambda it: it.autoscaling.update_auto_scaling_group(
        AutoScalingGroupName="batchlab-pool-default", MaxSize=3
    ),
    "see the scheduled end": lambda it: it.autoscaling.describe_scheduled_actions(
        AutoScalingGroupName="batchlab-pool-default"
    ),
    "postpone and delete the scheduled end": lambda it: end_action(it, "batchlab-pool-default"),
    "let a worker in": lambda it: complete(it, "batchlab-pool-default"),
    "know the token": lambda it: it.secretsmanager.get_secret_value(SecretId=it.ids["TokenSecret"]),
    "tell a topic that is named": lambda it: it.sns.publish(TopicArn=TOPIC, Message="m"),
    "log": lambda it: log_line(it, "manager"),
}

USER_MAY: dict[str, Call] = {
    "upload code": lambda it: it.put("code/b.zip", IfNoneMatch="*"),
    "upload raw data": lambda it: it.put("raw/u/0"),
    "write an item of an executor's map": lambda it: it.put("jobs/u/s/plan/0000/part-000000.json"),
    "commit an executor's map": lambda it: it.put("jobs/u/s/plan/0000/manifest.json", IfNoneMatch="*"),
    "fetch results": lambda it: it.get("files/j/s/0"),
    "read logs": lambda it: it.get("logs/j/s/0"),
    "list": lambda it: it.s3.list_objects_v2(Bucket=it.bucket, Prefix="jobs/"),
    "know the token": lambda it: it.secretsmanager.get_secret_value(SecretId=it.ids["TokenSecret"]),
    "find the manager": lambda it: it.autoscaling.describe_auto_scaling_groups(),
    "find the stack": lambda it: it.cloudformation.describe_stacks(StackName="batchlab"),
    "count messages": lambda it: it.sqs.get_queue_attributes(
        QueueUrl=it.queue("PoolTasks"), AttributeNames=["ApproximateNumberOfMessages"]
    ),
}

# --- Forbidden calls ----------------------------------------------------------------------------

WORKER_MUST_NOT: dict[str, Call] = {
    "forge a job": lambda it: it.put("jobs/j/spec.json", IfNoneMatch="*"),
    "cancel a job": lambda it: it.put("jobs/j/control.json"),
    "end a job": lambda it: it.put("jobs/j/final/0000.json", IfNoneMatch="*"),
    "change a plan": lambda it: it.put("jobs/j/s/plan/0000/part-000000.json"),
    "cut": lambda it: it.put("jobs/j/s/plan/0000/cuts/00000000.json", IfNoneMatch="*"),
    "change code": lambda it: it.put("code/a.zip"),
    "change the release": lambda it: it.put("boot/a.tar.gz"),
    "change raw data": lambda it: it.put("raw/j/0"),
    "read what others printed": lambda it: it.get("logs/j/s/0"),
    "read a choice of tasks to retry": lambda it: it.get("jobs/j/retries/0001.json"),
    "read how a job ended": lambda it: it.get("jobs/j/final/0000.json"),
    "read a cut": lambda it: it.get("jobs/j/s/plan/0000/cuts/00000000.json"),
    "read a start marker": lambda it: it.get("jobs/j/s/starts/b/w-1"),
    "delete an outcome": lambda it: it.s3.delete_object(Bucket=it.bucket, Key="jobs/j/s/outcomes/ab/b1.json"),
    "overwrite an outcome": lambda it: overwritten(it, "jobs/j/s/outcomes/ab/b9.json"),
    "overwrite a file": lambda it: overwritten(it, "files/j/s/ab/b/w/0/taken.csv"),
    "overwrite a file in parts": lambda it: in_parts(it, "files/j/s/0"),
    "overwrite a log": lambda it: overwritten(it, "logs/j/s/ab/b/taken.log"),
    "overwrite a start marker": lambda it: overwritten(it, "jobs/j/s/starts/b/w-9"),
    "delete a start marker": lambda it: it.s3.delete_object(Bucket=it.bucket, Key="jobs/j/s/starts/b/w-1"),
    "delete files": lambda it: it.s3.delete_object(Bucket=it.bucket, Key="files/j/s/0"),
    "lift the bucket's policy": lambda it: it.s3.delete_bucket_policy(Bucket=it.bucket),
    "open the bucket": lambda it: it.s3.delete_public_access_block(Bucket=it.bucket),
    "change the lifecycle": lambda it: it.s3.delete_bucket_lifecycle(Bucket=it.bucket),
    "read another bucket": lambda it: it.s3.get_object(Bucket="somebody-elses", Key="a"),
    "write another bucket": lambda it: it.s3.put_object(Bucket="somebody-elses", Key="b"),
    "list buckets": lambda it: it.s3.list_buckets(),
    "take events": lambda it: it.sqs.receive_message(QueueUrl=it.queue("EventsQueue")),
    "take dead letters": lambda it: it.sqs.receive_message(QueueUrl=it.queue("PoolDeadLetters")),
    "send dead letters": lambda it: it.sqs.send_message(QueueUrl=it.queue("PoolDeadLetters"), MessageBody="m"),
    "send dead letters together": lambda it: it.sqs.send_message_batch(
        QueueUrl=it.queue("PoolDeadLetters"), Entries=[{"Id": "0", "MessageBody": "m"}]
    ),
    "send to another queue together": lambda it: it.sqs.send_message_batch(
        QueueUrl=elses(it), Entries=[{"Id": "0", "MessageBody": "m"}]
    ),
    "take from another queue": lambda it: it.sqs.receive_message(QueueUrl=elses(it)),
    "take tasks of another pool": lambda it: it.sqs.receive_message(QueueUrl=it.anothers()),
    "delete a task of another pool": lambda it: it.sqs.delete_message(**it.stolen_receipt()),
    "hold a task of another pool": lambda it: it.sqs.change_message_visibility(
        **it.stolen_receipt(), VisibilityTimeout=43_200
    ),
    "purge its queue": lambda it: it.sqs.purge_queue(QueueUrl=it.queue("PoolTasks")),
    "delete its queue": lambda it: it.sqs.delete_queue(QueueUrl=it.queue("PoolTasks")),
    "make a queue": lambda it: it.sqs.create_queue(QueueName="batchlab-tasks-mine"),
    "change its queue": lambda it: it.sqs.set_queue_attributes(
        QueueUrl=it.queue("PoolTasks"), Attributes={"VisibilityTimeout": "1"}
    ),
    "scale": lambda it: it.autoscaling.set_desired_capacity(
        AutoScalingGroupName="batchlab-pool-default", DesiredCapacity=9
    ),
    "see groups": lambda it: it.autoscaling.describe_auto_scaling_groups(),
    "schedule the end of its group": lambda it: end_action(it, "batchlab-pool-default"),
    "protect itself from scale-in": lambda it: it.autoscaling.set_instance_protection(
        AutoScalingGroupName="batchlab-pool-default", InstanceIds=["i-1"], ProtectedFromScaleIn=True
    ),
    "change the leader beat": lambda it: it.put("grid/leader.json"),
    "read the grid's secret": lambda it: it.get("grid/commit-secret.json"),
    "complete another group's hook": lambda it: complete(it, "batchlab-manager"),
    "complete the hook of another pool": lambda it: complete(it, "batchlab-pool-gpu"),
    "launch an instance": lambda it: it.ec2.run_instances(ImageId="ami-1", MinCount=1, MaxCount=1),
    "know the token": lambda it: it.secretsmanager.get_secret_value(SecretId=it.ids["TokenSecret"]),
    "know another secret": lambda it: it.secretsmanager.get_secret_value(SecretId="somebody-elses"),
    "read a parameter": lambda it: it.ssm.get_parameter(Name="/somebody/elses"),
    "tell a topic": lambda it: it.sns.publish(TopicArn=TOPIC, Message="m"),
    "give itself more": lambda it: it.iam.put_role_policy(
        RoleName=it.ids["PoolRole"], PolicyName="more", PolicyDocument="{}"
    ),
    "become the manager": lambda it: it.sts.assume_role(
        RoleArn=f"arn:aws:iam::000000000000:role/{it.ids['ManagerRole']}", RoleSessionName="me"
    ),
    "change the stack": lambda it: it.cloudformation.delete_stack(StackName="batchlab"),
    "silence an alarm": lambda it: it.cloudwatch.delete_alarms(AlarmNames=["batchlab-manager-down"]),
    "delete the logs": lambda it: it.logs.delete_log_group(logGroupName="/batchlab/batchlab"),
    "log elsewhere": lambda it: it.logs.create_log_stream(logGroupName="/elsewhere", logStreamName="a"),
}

MANAGER_MUST_NOT: dict[str, Call] = {
    "change the release": lambda it: it.put("boot/a.tar.gz"),
    "write files": lambda it: it.put("files/j/s/0"),
    "delete code": lambda it: it.s3.delete_object(Bucket=it.bucket, Key="code/0123.zip"),
    "overwrite a definition without a condition": lambda it: it.put("jobs/j/spec.json"),
    "tell another topic": lambda it: it.sns.publish(TopicArn=OTHER_TOPIC, Message="m"),
    "delete the bucket": lambda it: it.s3.delete_bucket(Bucket=it.bucket),
    "read another bucket": lambda it: it.s3.get_object(Bucket="somebody-elses", Key="a"),
    "send events": lambda it: it.sqs.send_message(QueueUrl=it.queue("EventsQueue"), MessageBody="m"),
    "make a queue": lambda it: it.sqs.create_queue(QueueName="batchlab-tasks-mine"),
    "delete a queue": lambda it: it.sqs.delete_queue(QueueUrl=it.queue("PoolTasks")),
    "purge a queue": lambda it: it.sqs.purge_queue(QueueUrl=it.queue("PoolTasks")),
    "send to another queue": lambda it: it.sqs.send_message(QueueUrl=elses(it), MessageBody="m"),
    "scale its own group": lambda it: it.autoscaling.set_desired_capacity(
        AutoScalingGroupName="batchlab-manager", DesiredCapacity=1
    ),
    "schedule the end of its own group": lambda it: end_action(it, "batchlab-manager"),
    "change its own group": lambda it: it.autoscaling.update_auto_scaling_group(
        AutoScalingGroupName="batchlab-manager", MaxSize=1000
    ),
    "delete a pool": lambda it: it.autoscaling.delete_auto_scaling_group(AutoScalingGroupName="batchlab-pool-default"),
    "launch an instance": lambda it: it.ec2.run_instances(ImageId="ami-1", MinCount=1, MaxCount=1),
    "change a launch template": lambda it: it.ec2.create_launch_template_version(
        LaunchTemplateId=it.ids["PoolTemplate"], LaunchTemplateData={"ImageId": "ami-1"}
    ),
    "change the token": lambda it: it.secretsmanager.put_secret_value(SecretId=it.ids["TokenSecret"], SecretString="x"),
    "know another secret": lambda it: it.secretsmanager.get_secret_value(SecretId="somebody-elses"),
    "read a parameter": lambda it: it.ssm.get_parameter(Name="/somebody/elses"),
    "give itself more": lambda it: it.iam.put_role_policy(
        RoleName=it.ids["ManagerRole"], PolicyName="more", PolicyDocument="{}"
    ),
    "change the stack": lambda it: it.cloudformation.delete_stack(StackName="batchlab"),
    "delete the logs": lambda it: it.logs.delete_log_group(logGroupName="/batchlab/batchlab"),
}


USER_MUST_NOT: dict[str, Call] = {
    "forge a result": lambda it: it.put("jobs/j/s/outcomes/ab/b2.json", IfNoneMatch="*"),
    "cancel by the back door": lambda it: it.put("jobs/j/control.json"),
    "change files": lambda it: it.put("files/j/s/0"),
    "change the release": lambda it: it.put("boot/a.tar.gz"),
    "delete a job": lambda it: it.s3.delete_object(Bucket=it.bucket, Key="jobs/j/spec.json"),
    "send tasks": lambda it: it.sqs.send_message(QueueUrl=it.queue("PoolTasks"), MessageBody="m"),
    "scale": lambda it: it.autoscaling.set_desired_capacity(
        AutoScalingGroupName="batchlab-pool-default", DesiredCapacity=9
    ),
    "know another secret": lambda it: it.secretsmanager.get_secret_value(SecretId="somebody-elses"),
    "become the manager": lambda it: it.sts.assume_role(
        RoleArn=f"arn:aws:iam::000000000000:role/{it.ids['ManagerRole']}", RoleSessionName="me"
    ),
    "change the stack": lambda it: it.cloudformation.delete_stack(StackName="batchlab"),
}
