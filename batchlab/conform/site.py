"""Access of a single check to the endpoint, with keys, queues, and Auto Scaling groups that belong to the check.

Invariants: checks do not share resources, so checks can run at the same time and in any order. Every wait of a check
has a deadline. To test that an event does not happen, a check waits for a fixed time such as `QUIET_S`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from batchlab.adapters.aws.sqs import SqsQueue
from batchlab.conform.check import Answer, Differs, Untried, answer, snake

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from batchlab.adapters.obstore_objects import ObstoreObjects
    from batchlab.conform.target import Target
    from batchlab.core.ports import QueueSpec

WAKES_S = 8.0
"""Time limit in seconds in which a long poll must return a new message.

The time limit includes a reserve for a busy machine. If the long poll exceeds the limit, the endpoint breaks the rule.
"""

T = TypeVar("T")

_COUNTS = {
    "ApproximateNumberOfMessages": "visible",
    "ApproximateNumberOfMessagesNotVisible": "in flight",
    "ApproximateNumberOfMessagesDelayed": "delayed",
}


@dataclass(frozen=True, slots=True)
class Received:
    """Message that a call of ReceiveMessage returned.

    `times_ms` contains the time of the message's send and the time of its first receive, in epoch milliseconds.
    """

    id: str
    body: str
    receipt: str
    count: int
    times_ms: tuple[int, int]
    raw: Mapping[str, Any]


class Site:
    """Access of the check `name` to the endpoint `target`. `again` is true if the check runs a second time after a
    server error.
    """

    def __init__(self, target: Target, name: str, *, again: bool = False) -> None:
        self.target = target
        self.lag_s = target.lag_s
        self.arrives_s = target.arrives_s
        self._name = name
        self._prefix = f"{target.run}/{name}/{'again/' if again else ''}"
        self._numbers = itertools.count(1_000 if again else 0)

    # --- S3 ---------------------------------------------------------------------------------------

    def named(self, key: str) -> dict[str, str]:
        """Return the parameters `Bucket` and `Key` of a request for one of the check's objects."""
        return {"Bucket": self.target.bucket, "Key": self._prefix + key}

    def _call_s3(self, action: str, key: str, client: S3Client, **more: Any) -> Answer:
        request: Any = {**self.named(key), **more}
        return answer(action, lambda: getattr(client, snake(action))(**request))

    def put(self, key: str, data: bytes, *, if_absent: bool = False, **more: str) -> Answer:
        """Call PutObject. If `if_absent` is true, the request contains `If-None-Match: *`."""
        if if_absent:
            more["IfNoneMatch"] = "*"
        return self._call_s3("PutObject", key, self.target.s3, Body=data, **more)

    def get(self, key: str, **more: str) -> Answer:
        """Call GetObject, and read the whole body. `get` does not use the connections of `put`."""
        return self._call_s3("GetObject", key, self.target.other_s3, **more)

    def head(self, key: str) -> Answer:
        """Call HeadObject. `head` does not use the connections of `put`."""
        return self._call_s3("HeadObject", key, self.target.other_s3)

    def delete(self, key: str) -> Answer:
        return self._call_s3("DeleteObject", key, self.target.s3)

    def delete_many(self, keys: Sequence[str]) -> Answer:
        request: Any = {"Bucket": self.target.bucket, "Delete": {"Objects": [{"Key": self.own(key)} for key in keys]}}
        return answer("DeleteObjects", lambda: self.target.s3.delete_objects(**request))

    def page(self, prefix: str = "", *, after: str = "", token: str = "", most: int = 0) -> Answer:
        """Call ListObjectsV2 once, and return a page of the check's keys."""
        request: Any = {"Bucket": self.target.bucket, "Prefix": self._prefix + prefix}
        if after:
            request["StartAfter"] = self._prefix + after
        if token:
            request["ContinuationToken"] = token
        if most:
            request["MaxKeys"] = most
        return answer("ListObjectsV2", lambda: self.target.other_s3.list_objects_v2(**request)).expect_accepted()

    def keys_of(self, page: Answer) -> list[str]:
        """Return the keys on a page of a listing. The common prefix of the check's keys is removed."""
        return [entry["Key"].removeprefix(self._prefix) for entry in page.data.get("Contents", ())]

    def keys(self, prefix: str = "", *, after: str = "", most: int = 0) -> list[str]:
        keys: list[str] = []
        token = ""
        for _ in range(200):
            page = self.page(prefix, after=after, token=token, most=most)
            keys += self.keys_of(page)
            token = page.data.get("NextContinuationToken", "")
            if not page.data.get("IsTruncated"):
                return keys
        raise Differs("the pages of a listing never end")

    def own(self, key: str) -> str:
        """Return the full key of one of the check's objects. batchlab's own S3 adapter needs the full key."""
        return self._prefix + key

    @property
    def objects(self) -> ObstoreObjects:
        return self.target.objects

    # --- SQS --------------------------------------------------------------------------------------

    def new_name(self) -> str:
        return f"{self.target.run}-{self._name}-{next(self._numbers)}"

    def queue(self, name: str = "", **attributes: str) -> OwnQueue:
        name = name or self.new_name()
        response = self.target.create_queue(name, attributes)
        return OwnQueue(self.target, name, response["QueueUrl"])

    def queue_with(self, *bodies: str, name: str = "", **attributes: str) -> OwnQueue:
        """Create a queue, and send messages with the given bodies."""
        queue = self.queue(name, **attributes)
        (queue.send(bodies[0]) if len(bodies) == 1 else queue.send_batch(*bodies)).expect_accepted()
        return queue

    def received_message(self, **attributes: str) -> tuple[OwnQueue, Received]:
        """Create a queue, send a message, and receive the message."""
        queue = self.queue_with("a", **attributes)
        return queue, queue.one()

    @asynccontextmanager
    async def port(self) -> AsyncIterator[SqsQueue]:
        """Yield batchlab's own SQS adapter. The adapter adds the check's prefix to the names of queues."""
        queue = _PortQueue(self.target, f"{self.new_name()}-")
        try:
            yield queue
        finally:
            await queue.close()

    def until(self, holds: Callable[[], bool]) -> bool:
        """Wait at most `settles_s` seconds until `holds` returns true. Return whether `holds` returned true in time."""
        ends_s = time.monotonic() + self.target.settles_s
        while not holds():
            if time.monotonic() > ends_s:
                return False
            time.sleep(0.2)
        return True


class _PortQueue(SqsQueue):
    """batchlab's SQS adapter, extended to record each new queue for removal after the run."""

    def __init__(self, target: Target, prefix: str) -> None:
        super().__init__(target.endpoint, prefix=prefix)
        self._target = target
        self._prefix_of_all = prefix

    async def ensure(self, spec: QueueSpec) -> None:
        with self._target.creating():
            self._target.record_queue(self._prefix_of_all + spec.name)
            await super().ensure(spec)


class OwnQueue:
    """Queue that belongs to a single check.

    Most methods return the endpoint's response, even if the response is an error.
    """

    def __init__(self, target: Target, name: str, url: str) -> None:
        self.sqs = target.sqs
        self.arrives_s = target.arrives_s
        self.name = name
        self.url = url

    def call(self, name: str, **request: Any) -> Answer:
        """Call the SQS action with AWS's name `name`, such as "SendMessage", for the queue."""
        method = getattr(self.sqs, snake(name))
        return answer(name, lambda: method(QueueUrl=self.url, **request))

    def send(self, body: str, **more: Any) -> Answer:
        return self.call("SendMessage", MessageBody=body, **more)

    def send_batch(self, *bodies: str, **more: Any) -> Answer:
        """Call SendMessageBatch. The ids of the entries are "0", "1", and so on."""
        entries = [{"Id": str(i), "MessageBody": body, **more} for i, body in enumerate(bodies)]
        return self.call("SendMessageBatch", Entries=entries)

    def receive(self, most: int = 10, *, wait_s: int = 0, **more: Any) -> list[Received]:
        """Call ReceiveMessage once, and return the received messages."""
        response = self.call(
            "ReceiveMessage",
            MaxNumberOfMessages=most,
            WaitTimeSeconds=wait_s,
            MessageSystemAttributeNames=["All"],
            **more,
        ).expect_accepted()
        return [_receive(message) for message in response.data.get("Messages", ())]

    def take(self, count: int = 1, *, after_s: float = 0.0, **more: Any) -> list[Received]:
        """Receive `count` messages that become visible within `after_s` seconds.

        Raise Differs if fewer messages arrive.
        """
        messages: list[Received] = []
        ends_s = time.monotonic() + after_s + self.arrives_s
        while len(messages) < count:
            messages += self.receive(min(10, count - len(messages)), wait_s=1, **more)
            if len(messages) < count and time.monotonic() > ends_s:
                raise Differs(f"{len(messages)} of {count} messages arrive")
        return messages

    def one(self, **more: Any) -> Received:
        return self.take(**more)[0]

    def empty(self, wait_s: int = 1) -> bool:
        return not self.receive(wait_s=wait_s)

    def delete(self, receipt: str) -> Answer:
        return self.call("DeleteMessage", ReceiptHandle=receipt)

    def hide(self, receipt: str, seconds: int) -> Answer:
        return self.call("ChangeMessageVisibility", ReceiptHandle=receipt, VisibilityTimeout=seconds)

    def attributes(self) -> Mapping[str, str]:
        response = self.call("GetQueueAttributes", AttributeNames=["All"]).expect_accepted()
        return cast("Mapping[str, str]", response.data.get("Attributes", {}))

    def counts(self) -> dict[str, int]:
        attributes = self.attributes()
        return {name: int(attributes.get(key, -1)) for key, name in _COUNTS.items()}

    def arn(self) -> str:
        """Return the queue's ARN, which a redrive policy needs."""
        arn = self.attributes().get("QueueArn")
        if arn is None:
            raise Untried("GetQueueAttributes does not return QueueArn")
        return arn


def _receive(raw: Mapping[str, Any]) -> Received:
    facts = raw.get("Attributes", {})
    times = ("SentTimestamp", "ApproximateFirstReceiveTimestamp")
    return Received(
        raw["MessageId"],
        raw["Body"],
        raw["ReceiptHandle"],
        int(facts.get("ApproximateReceiveCount", 0)),
        (int(facts.get(times[0], 0)), int(facts.get(times[1], 0))),
        raw,
    )


QUIET_S = 2.0
"""Time in seconds for which a check watches for an event that must not happen."""

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"

IN_SERVICE = "InService"


class OwnGroup:
    """Auto Scaling group that belongs to a single check. The constructor does not create the group at the endpoint."""

    def __init__(self, site: Site) -> None:
        self._target = site.target
        self.name = site.new_name()

    @classmethod
    def create_group(cls, site: Site, **more: Any) -> OwnGroup:
        group = cls(site)
        group.create(**more).expect_accepted()
        return group

    def create(self, **more: Any) -> Answer:
        """Call CreateAutoScalingGroup. By default, the group has 0 to 3 instances of the run's launch template."""
        request = {
            "MinSize": 0,
            "MaxSize": 3,
            "AvailabilityZones": [self._target.zone],
            "LaunchTemplate": {"LaunchTemplateName": self._target.template},
            # A cooldown of the group would delay most checks.
            "DefaultCooldown": 0,
            "HealthCheckGracePeriod": 0,
            **more,
        }
        return answer("CreateAutoScalingGroup", lambda: self._target.create_group(self.name, request))

    @classmethod
    def create_grown_group(cls, site: Site, size: int, **more: Any) -> tuple[OwnGroup, list[str]]:
        """Create a group with `size` instances.

        Return the group and the ids of the instances as soon as all instances are InService.
        """
        group = cls.create_group(site, DesiredCapacity=size, **more)
        return group, group.has(size)

    def call(self, action: str, **request: Any) -> Answer:
        """Call the Auto Scaling action with AWS's name `action` for the group."""
        return self.ask(action, AutoScalingGroupName=self.name, **request)

    def ask(self, action: str, **request: Any) -> Answer:
        """Call the Auto Scaling action with AWS's name `action`. The request contains only the given parameters."""
        method = getattr(self._target.asg, snake(action))
        return answer(action, lambda: method(**request))

    def size(self, desired: int, *, cooldown: bool = False) -> Answer:
        return self.call("SetDesiredCapacity", DesiredCapacity=desired, HonorCooldown=cooldown)

    def terminate(self, instance: str, *, decrement: bool) -> Answer:
        return self.ask(
            "TerminateInstanceInAutoScalingGroup", InstanceId=instance, ShouldDecrementDesiredCapacity=decrement
        )

    def protect(self, *instances: str) -> Answer:
        return self.call("SetInstanceProtection", InstanceIds=list(instances), ProtectedFromScaleIn=True)

    def complete(self, hook: str, instance: str) -> Answer:
        """Call CompleteLifecycleAction with the result CONTINUE."""
        return self.call(
            "CompleteLifecycleAction", LifecycleHookName=hook, InstanceId=instance, LifecycleActionResult="CONTINUE"
        )

    def describe(self) -> list[dict[str, Any]]:
        """Return the descriptions that DescribeAutoScalingGroups returns for the group's name."""
        response = self.ask("DescribeAutoScalingGroups", AutoScalingGroupNames=[self.name])
        return list(response.expect_accepted().data["AutoScalingGroups"])

    def now(self) -> dict[str, Any]:
        """Return the current description of the group. Raise Differs unless the endpoint returns exactly one group."""
        groups = self.describe()
        if len(groups) != 1:
            raise Differs(f"DescribeAutoScalingGroups returns {len(groups)} groups for one name")
        return groups[0]

    @property
    def desired(self) -> int:
        return int(self.now()["DesiredCapacity"])

    def ids(self, state: str = "") -> list[str]:
        """Return the ids of the group's instances in a lifecycle state, or of all instances if `state` is ""."""
        instances = self.now().get("Instances", ())
        return [instance["InstanceId"] for instance in instances if state in ("", instance["LifecycleState"])]

    def until(self, holds: Callable[[], T], otherwise: str) -> T:
        """Call `holds` repeatedly until `holds` returns a true value, and return the value.

        If `holds` does not return a true value before the deadline, raise Differs with the text `otherwise`.
        """
        ends_s = time.monotonic() + self._target.appears_s
        while not (value := holds()):
            if time.monotonic() > ends_s:
                raise Differs(otherwise)
            time.sleep(0.1)
        return value

    def has(self, size: int) -> list[str]:
        """Wait until the group has exactly `size` instances, and all instances are InService. Return the ids of the
        instances.
        """
        self.until(
            lambda: len(self.ids()) == len(self.ids(IN_SERVICE)) == size,
            f"the group never has exactly {size} instances, all {IN_SERVICE}",
        )
        return self.ids(IN_SERVICE)

    def waits(self, state: str) -> str:
        """Return the id of the only instance that reaches the lifecycle state and stays in the state for `QUIET_S`
        seconds.
        """
        self.until(lambda: self.ids(state), f"no instance reaches {state}")
        time.sleep(QUIET_S)
        ids = self.ids(state)
        if len(ids) != 1:
            raise Differs(f"the instance does not stay in {state}")
        return ids[0]

    def activities(self) -> Sequence[dict[str, Any]]:
        return list(self.call("DescribeScalingActivities").expect_accepted().data["Activities"])


def hook(name: str, transition: str) -> dict[str, Any]:
    """Return a lifecycle hook whose timeout is longer than any check."""
    return {
        "LifecycleHookName": name,
        "LifecycleTransition": transition,
        "HeartbeatTimeout": 600,
        "DefaultResult": "CONTINUE",
    }
