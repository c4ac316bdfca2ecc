"""The API of Auto Scaling for tests: batchlab's endpoint over a launcher, and moto's server."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.model import OperationModel

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.fleet import Ec2Fleet
from batchlab.adapters.aws.group_descriptions import GroupParameters
from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.memory.launcher import MemoryState
from batchlab.core.model import Machine, Pool
from batchlab.core.ports import ANY_MACHINE, Clock, Launcher
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.runtime.home import listen
from batchlab.server.autoscaling_api.cloudwatch import MetricStore
from batchlab.server.autoscaling_api.engine_loop import application, run
from batchlab.server.autoscaling_api.launch_templates import TemplateFile
from tests.support.aws.botocore_shapes import answer_differences
from tests.support.fleet import (
    ABSENT,
    BROKEN,
    STUBBORN,
    FleetCheck,
    FleetRig,
    TableLauncher,
    pid_of,
    process_launcher,
    worker_argv,
)

if TYPE_CHECKING:
    from mypy_boto3_autoscaling import AutoScalingClient

T = TypeVar("T")

TEMPLATE = "worker"
ZONE = "us-east-1a"
TEMPLATES = """\
[worker]
default = 1
[[worker.version]]
type = "m7i.large"
command = ["/bin/true"]
[[worker.version]]
type = "c7i.large"
slots = 2
command = ["/bin/true"]
"""


def autoscaling(endpoint: Endpoint) -> AutoScalingClient:
    """Return a boto3 client that makes each call once."""
    return aws(endpoint, "autoscaling")  # type: ignore[no-any-return]


def aws(endpoint: Endpoint, service: str, **config: Any) -> Any:
    make: Any = boto3.client
    return make(
        service,
        endpoint_url=endpoint.url,
        region_name=endpoint.region,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        config=Config(retries={"total_max_attempts": 1}, proxies={}, **config),
    )


@dataclass
class Behaving:
    """A TableLauncher whose instances behave as the name of their group's pool says."""

    table: TableLauncher
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        kind = _kind(pool)
        self.table.refuse = "no capacity" if kind.name == ABSENT.name else ""
        await self.table.launch(pool, instance, machine)
        if kind.name == BROKEN.name:
            self.crash(instance, "exit 3")
        if kind.name == STUBBORN.name:
            self.stubborn.add(instance)

    stubborn: set[str] = field(default_factory=set)

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        if instance not in self.stubborn:
            await self.table.terminate(instance, grace_s=grace_s)
            self.changed.set()

    async def running(self) -> Mapping[str, str | None]:
        return await self.table.running()

    def crash(self, instance: str, how: str = "killed by SIGKILL, exit -9") -> None:
        self.table.crash(instance, how)
        self.changed.set()


def _kind(pool: Pool) -> Pool:
    """Return the pool under its own name, without the prefix of a group name."""
    return Pool(pool.name.rpartition(".")[2], pool.min_size, pool.max_size)


@dataclass
class Served:
    """batchlab's Auto Scaling endpoint while it is running."""

    endpoint: Endpoint
    engine: AutoScaling


@asynccontextmanager
async def served(
    launcher: Launcher, changed: asyncio.Event, folder: Path, clock: Clock | None = None
) -> AsyncIterator[Served]:
    """Serve batchlab's Auto Scaling endpoint in this event loop."""
    file = folder / "templates.toml"
    file.write_text(TEMPLATES)
    clock = clock or WallClock()
    metrics = MetricStore(clock)
    engine = AutoScaling(
        launcher,
        clock,
        RandomIds(),
        MemoryState(),
        templates=TemplateFile(file),
        metrics=metrics,
        zones=[ZONE],
        alarm_period_s=0.2,
    )
    listener = listen("127.0.0.1", 0)
    app = application(engine, clock, changed, metrics=metrics)
    stop = asyncio.Event()
    running = asyncio.create_task(run(engine, app, listener, changed, stop))
    try:
        yield Served(Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}"), engine)
    finally:
        stop.set()
        await running


async def _check(
    check: FleetCheck,
    endpoint: Endpoint,
    crash: Callable[[str], None],
    rest: Callable[[], Awaitable[None]],
    *,
    told: str = "health check",
) -> None:
    form = GroupParameters(TEMPLATE, zones=(ZONE,), drain_s=0)
    fleet = Ec2Fleet(endpoint, WallClock(), form, prefix=f"{uuid4().hex}.")
    try:
        await check(FleetRig(fleet, crash, fleet.ready, rest, told=told))
    finally:
        await fleet.close()


def endpoint_world(check: FleetCheck, folder: Path) -> None:
    """Run a check on batchlab's endpoint with a table as launcher."""

    async def main() -> None:
        launcher = Behaving(TableLauncher())
        async with served(launcher, launcher.changed, folder) as up:
            await _check(check, up.endpoint, launcher.crash, lambda: asyncio.sleep(0.03))

    asyncio.run(main())


def processes_world(check: FleetCheck, folder: Path) -> None:
    """Run a check on batchlab's endpoint with processes as instances."""

    async def main() -> None:
        launcher = process_launcher(folder, argv=lambda pool, i: worker_argv(_kind(pool), i))
        try:
            async with served(launcher, launcher.changed, folder) as up:
                await _check(
                    check,
                    up.endpoint,
                    lambda instance: os.kill(pid_of(folder, instance), 9),
                    lambda: asyncio.sleep(0.02),
                )
        finally:
            await launcher.close(kill=True)

    asyncio.run(main())


def moto_world(endpoint: Endpoint, check: FleetCheck) -> None:
    """Run a check on moto's server, which has instances only as table rows."""
    ec2 = aws(endpoint, "ec2")
    launch_template(ec2)

    def crash(instance: str) -> None:
        ec2.terminate_instances(InstanceIds=[instance])

    rest = lambda: asyncio.sleep(0)  # noqa: E731
    asyncio.run(_check(check, endpoint, crash, rest, told="no longer in its group"))


def launch_template(ec2: Any) -> None:
    """Create the launch template of the tests' groups if it does not exist."""
    known = ec2.describe_launch_templates()["LaunchTemplates"]
    if not any(one["LaunchTemplateName"] == TEMPLATE for one in known):
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        ec2.create_launch_template(
            LaunchTemplateName=TEMPLATE, LaunchTemplateData={"ImageId": image, "InstanceType": "t2.micro"}
        )


def checks_of(module: Any) -> Sequence[tuple[str, FleetCheck]]:
    """Return the checks of a suite that `fleet_rigs.everywhere` has turned into tests."""
    return [
        (name, test.check) for name, test in vars(module).items() if name.startswith("test_") and hasattr(test, "check")
    ]


# --- boto3 itself against an endpoint -------------------------------------------------------------


class Thread:
    """batchlab's endpoint with a table as launcher, in a thread with its own event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._up: Future[Endpoint] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> Thread:
        self._thread.start()
        self.endpoint = self._up.result(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def crash(self, instance: str) -> None:
        """End an instance without telling its group."""
        self._loop.call_soon_threadsafe(self._launcher.crash, instance)

    def command(self, do: Callable[[AutoScaling], Any]) -> Any:
        """Return the result of a direct call of the Auto Scaling engine."""

        async def call() -> Any:
            return do(self.engine)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(20)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._launcher = Behaving(TableLauncher())
        async with served(self._launcher, self._launcher.changed, self._folder) as up:
            self.engine = up.engine
            self._up.set_result(up.endpoint)
            await self._stop.wait()


@dataclass
class Wire:
    """A boto3 client of an endpoint, with group names that no other test uses."""

    asg: AutoScalingClient
    crash: Callable[[str], None]
    limit_s: float = 10.0
    name: str = field(default_factory=lambda: f"g-{uuid4().hex[:12]}")
    made: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    """Operations whose answers `check_answers` has checked."""

    def check_answers(self) -> None:
        """Check each further answer to a request of this client against botocore's model."""

        def check(operation_model: OperationModel, response_dict: Mapping[str, Any], **_: Any) -> None:
            if response_dict["status_code"] == 200:
                differences = answer_differences(operation_model, response_dict["body"])
                assert not differences, differences
                self.answered.add(operation_model.name)

        events: Any = self.asg.meta.events
        events.register("before-parse.auto-scaling", check)

    def create(self, name: str | None = None, /, **more: Any) -> str:
        """Create a group from the tests' template, with 0 to 4 instances by default."""
        name = name or self.name
        asked: dict[str, Any] = {
            "AutoScalingGroupName": name,
            "MinSize": 0,
            "MaxSize": 4,
            "AvailabilityZones": [ZONE],
            "LaunchTemplate": {"LaunchTemplateName": TEMPLATE, "Version": "1"},
        }
        self.asg.create_auto_scaling_group(**{**asked, **more})
        self.made.append(name)
        return name

    def group(self, name: str | None = None) -> Any:
        """Return the current description of the group, or None if the group does not exist."""
        found = self.asg.describe_auto_scaling_groups(AutoScalingGroupNames=[name or self.name])
        return next(iter(found["AutoScalingGroups"]), None)

    def instances(self, state: str = "InService") -> list[str]:
        """Return the ids of the group's instances in this state."""
        group = self.group()
        return [i["InstanceId"] for i in group["Instances"] if i["LifecycleState"] == state]

    def until(self, condition: Callable[[], T], *, limit_s: float | None = None) -> T:
        """Wait until `condition` returns a true value, and return this value."""
        deadline_s = time.monotonic() + (limit_s or self.limit_s)
        while not (found := condition()):
            if time.monotonic() > deadline_s:
                pytest.fail(f"never came about; at last: {self.group()}")
            time.sleep(0.02)
        return found

    def grow(self, size: int, **more: Any) -> list[str]:
        """Create a group, and wait until it has `size` instances in service."""
        self.create(DesiredCapacity=size, **more)
        return self.until(lambda: len(found := self.instances()) == size and found) or []

    def close(self) -> None:
        """Delete the group and its instances, so that the next test starts clean."""
        for name in self.made:
            with suppress(ClientError):
                self.asg.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
        self.asg.close()


@contextmanager
def refused(code: str, message: str = "") -> Iterator[None]:
    """Check that the block raises this error code of AWS, with `message` in the error's text."""
    with pytest.raises(ClientError) as told:
        yield
    error = told.value.response["Error"]
    assert error["Code"] == code
    assert message in error["Message"]
