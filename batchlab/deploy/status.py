"""Status of a stack, and the deployment file for `--backend aws` that results from the stack's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.core.protocol import object_keys
from batchlab.deploy.account import Account, aws_errors
from batchlab.deploy.settings import RELEASE, from_stack
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import Cause, State
from batchlab.runtime import aws_deployment, factory
from batchlab.runtime.aws_deployment import AwsDeployment, Database
from batchlab.runtime.home import Home

IAM_USER = "batchlab_iam"
"""Name of the template's database user that signs in with IAM authentication."""


def output_of(state: State, name: str) -> str:
    """Return the value of the stack output with the name `name`. Raise BackendError if the stack lacks the output."""
    if value := state.outputs.get(name):
        return value
    raise BackendError(
        f"The stack {state.name} lacks the output {name}.",
        remedy="The stack may have an older template. `batchlab deploy apply` updates it.",
    )


def pool_groups(state: State) -> list[str]:
    """Return the names of the Auto Scaling groups of the stack's workers."""
    return [name for name in state.outputs.get("PoolGroups", "").split(",") if name]


def deployment_of(state: State, region: str, python: str = "") -> AwsDeployment:
    """Return the AwsDeployment that the outputs and the parameters of a stack describe. `python` is the Python version
    of the stack's release.

    The Python version is an argument, because the outputs of a stack do not contain the Python version. Raise
    BackendError if an output is missing.
    """
    ledger = output_of(state, "Ledger")
    database = None
    if ledger == "postgres":
        by_iam = state.parameters.get("DatabaseLogin") == "iam"
        database = Database(
            output_of(state, "DatabaseHost"),
            int(output_of(state, "DatabasePort")),
            output_of(state, "DatabaseName"),
            "" if by_iam else output_of(state, "DatabaseSecret"),
            IAM_USER if by_iam else "",
            by_iam,
        )
    return AwsDeployment(
        stack=state.name,
        region=state.outputs.get("Region", region),
        bucket=output_of(state, "Bucket"),
        prefix=output_of(state, "QueuePrefix"),
        manager_group=output_of(state, "ManagerGroup"),
        token_secret=output_of(state, "TokenSecret"),
        pools=_pools(state, region),
        ledger=ledger,
        database=database,
        domain=output_of(state, "Domain") if ledger == "simpledb" else "",
        log_group=state.outputs.get("LogGroup", ""),
        python=python,
        egress="own" if state.parameters.get("VpcId") else state.parameters.get("Egress", ""),
    )


def _pools(state: State, region: str) -> tuple[Pool, ...]:
    settings, _ = from_stack(state.name, region, state.parameters)
    (usual,) = factory.load("aws").pools
    return tuple(
        Pool(
            pool.name,
            pool.min_size,
            pool.max_size,
            pool.slots,
            usual.boot_s,
            instance_type=pool.types[0] if pool.types else usual.instance_type,
            gpus=int(dict(pool.parameters).get("PoolGpus", 0)),
            image=dict(pool.parameters).get("PoolImage") or state.parameters.get("ContainerImage", ""),
        )
        for pool in settings.pools
    )


ALARMS = ("waits", "dead-letters", "down", "does-not-collect")
"""Suffixes of alarm names. An alarm name begins with the name of an Auto Scaling group."""


@dataclass(frozen=True, slots=True)
class StackGroup:
    """Auto Scaling group of a stack.

    `instances` contains the ids of the instances that are InService, and `others` is the number of all other instances.
    `refresh` is the status of the group's last instance refresh, or "" if an instance refresh was never started.
    """

    name: str
    smallest: int
    largest: int
    desired: int
    instances: tuple[str, ...]
    others: int
    refresh: str


@dataclass(frozen=True, slots=True)
class Queue:
    """SQS queue of a stack, with the approximate numbers of its messages."""

    name: str
    visible: int
    in_flight: int
    delayed: int


@dataclass(frozen=True, slots=True)
class Alarm:
    name: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Status:
    """Status of a stack. `drift` lists the fields in which the deployment file in the grid's folder differs from the
    stack.
    """

    state: State
    cause: Cause | None
    deployment: AwsDeployment | None
    drift: tuple[str, ...]
    groups: tuple[StackGroup, ...]
    queues: tuple[Queue, ...]
    alarms: tuple[Alarm, ...]

    @property
    def manager(self) -> str:
        """Id of the instance on which the manager runs, or "" if the instance is not InService."""
        name = self.deployment.manager_group if self.deployment else ""
        return next((group.instances[0] for group in self.groups if group.name == name and group.instances), "")

    def to_json(self) -> dict[str, Any]:
        return {
            "stack": self.state.name,
            "id": self.state.id,
            "status": self.state.status,
            "changed_s": self.state.changed_s,
            "protected": self.state.is_protected,
            "release": self.state.parameters.get(RELEASE, ""),
            "cause": asdict(self.cause) if self.cause else None,
            "manager": self.manager or None,
            "drift": list(self.drift),
            "outputs": dict(self.state.outputs),
            "groups": [asdict(group) for group in self.groups],
            "queues": [asdict(queue) for queue in self.queues],
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }


def read_status(stack: Stack, state: State, home: Home) -> Status:
    """Return the status of a stack. The function does not change files in the grid's folder."""
    account = stack.account
    cause = None
    if not state.has_succeeded and not state.is_moving and not state.is_new:
        cause = stack.cause(state.id, stack.last_operation(state.id)[1])
    deployment = None
    if state.outputs.get("Bucket"):
        deployment = deployment_of(state, account.region, _python(home))
    names = [deployment.manager_group, *pool_groups(state)] if deployment else []
    return Status(
        state,
        cause,
        deployment,
        tuple(drift(home, deployment)) if deployment else (),
        tuple(_groups(account, names)),
        tuple(_queues(account, deployment)) if deployment else (),
        tuple(_alarms(account, deployment)) if deployment else (),
    )


def _python(home: Home) -> str:
    """Return the Python version from the deployment file in the grid's folder, because the stack does not store the
    version.
    """
    try:
        deployment = aws_deployment.read(home)
    except BackendError:
        return ""
    return deployment.python if deployment else ""


def drift(home: Home, expected: AwsDeployment) -> Iterator[str]:
    """Yield the names of the fields in which the deployment file in the grid's folder differs from `expected`."""
    try:
        deployment = aws_deployment.read(home)
    except BackendError:
        yield "the whole file"
        return
    if deployment is None:
        yield "no file"
        return
    for field in fields(AwsDeployment):
        if getattr(deployment, field.name) != getattr(expected, field.name):
            yield field.name


def _groups(account: Account, names: list[str]) -> Iterator[StackGroup]:
    for group in account.groups(names):
        name, instances = group["AutoScalingGroupName"], group.get("Instances") or ()
        ids = tuple(instance["InstanceId"] for instance in instances if instance["LifecycleState"] == "InService")
        with aws_errors(f"Auto Scaling group {name!r}"):
            response = account.client("autoscaling").describe_instance_refreshes(
                AutoScalingGroupName=name, MaxRecords=1
            )
        refreshes = response.get("InstanceRefreshes")
        refresh = refreshes[0]["Status"] if refreshes else ""
        smallest, largest, desired = (group[size] for size in ("MinSize", "MaxSize", "DesiredCapacity"))
        yield StackGroup(name, smallest, largest, desired, ids, len(instances) - len(ids), refresh)


def _queues(account: Account, deployment: AwsDeployment) -> Iterator[Queue]:
    pools = [pool.name for pool in deployment.pools]
    queues = [object_keys.EVENTS, *map(object_keys.tasks_queue, pools), *map(object_keys.dead_letters, pools)]
    names = {f"{deployment.prefix}{queue}" for queue in queues}
    sqs = account.client("sqs")
    counts = (
        "ApproximateNumberOfMessages",
        "ApproximateNumberOfMessagesNotVisible",
        "ApproximateNumberOfMessagesDelayed",
    )
    for url in account.pages("sqs", "list_queues", "QueueUrls", QueueNamePrefix=deployment.prefix):
        # Skip the queues of other stacks. If the name of another stack begins with the name of this stack, its queues
        # have the same prefix.
        if url.rpartition("/")[2] not in names:
            continue
        with aws_errors(f"Queue {url!r}"):
            attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=list(counts))["Attributes"]
        yield Queue(url.rpartition("/")[2], *(int(attributes.get(name, 0)) for name in counts))


def _alarms(account: Account, deployment: AwsDeployment) -> Iterator[Alarm]:
    groups = [deployment.manager_group, *(f"{deployment.groups_prefix}{pool.name}" for pool in deployment.pools)]
    names = {f"{group}-{suffix}" for group in groups for suffix in ALARMS}
    for alarm in account.pages("cloudwatch", "describe_alarms", "MetricAlarms", AlarmNamePrefix=deployment.prefix):
        if alarm["AlarmName"] in names:
            yield Alarm(alarm["AlarmName"], alarm["StateValue"], alarm.get("StateReason", ""))
