"""Rollback of faults in processes, in manager and ledger, in groups, and in queues, at every cancellation."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.core.operating_system.processes import is_stopped
from batchlab.core.ports import Outgoing, QueueSpec
from batchlab.runtime import aws_deployment, factory, manager_process
from batchlab.runtime.aws_deployment import AwsDeployment, Database
from batchlab.runtime.home import Home, ManagerRecord
from batchlab.scenarios.faults import aws_stack, processes, services, target_grid
from batchlab.scenarios.faults.aws_stack import StackFaults
from batchlab.scenarios.faults.proxy import FaultProxy
from batchlab.scenarios.faults.target_grid import EffectNotSeen, FaultResult, NothingHit
from batchlab.scenarios.model.values import Fault, FaultName
from tests.scenarios.test_fault_table import grid
from tests.support.grid.local_grid import processes_of
from tests.support.scenarios.cancelled_faults import CALL_S, Manager, at_every_wait

SHORT = 0.01


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_grid, "POLL_S", 0.001)
    monkeypatch.setattr(target_grid, "PAUSE_S", 0.001)


class Machine:
    """A process that simulates an instance, and a proxy before an endpoint."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.scene = target_grid.TargetGrid(factory.load("ministack"), Home(folder), Manager("w-1"))
        self.there = processes.ProcessFaults(self.scene)
        self.front = FaultProxy("http://127.0.0.1:1")
        self.pid = pid

    def stands(self) -> list[str]:
        found = [f"{self.pid} stands still"] if is_stopped(self.pid) else []
        if self.front.rate or self.front._cut:
            found.append("the front refuses or cuts")
        return found + [
            " ".join(words)[:40]
            for words in processes_of(self.scene.home.scratch).values()
            if processes.WRITER_PROGRAM in words
        ]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as one:
        monkeypatch.setattr(processes, "living", lambda _: {"w-1": one.pid})
        yield one.pid
        assert not is_stopped(one.pid)
        one.kill()


@pytest.mark.parametrize("name", [FaultName.PAUSE, FaultName.PARTITION, FaultName.S3_ERRORS, FaultName.SLOW_DISK])
def test_paused_processes_resume_after_any_cancellation(
    name: FaultName, tmp_path: Path, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "WRITER_COUNTS", (1,))
    monkeypatch.setattr(processes, "_PROBES", 2)
    monkeypatch.setattr(processes, "MIN_SLOWDOWN", 0.0)

    def do(world: Machine) -> Coroutine[Any, Any, FaultResult]:
        fault = Fault(name, 0.0, for_s=SHORT)
        if name is FaultName.PAUSE:
            return world.there.pause(fault)
        if name is FaultName.PARTITION:
            return world.there.partition(world.front, fault)
        if name is FaultName.S3_ERRORS:
            return processes.s3_errors(world.scene, world.front, fault)
        return processes.slow_disk(world.scene, fault)

    assert at_every_wait(lambda: Machine(tmp_path, worker), do) > 1


def test_slow_and_full_disk_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WRITER_COUNTS", (1,))
    monkeypatch.setattr(processes, "fsync_s", lambda _: 0.004)
    there = target_grid.TargetGrid(factory.load("local"), Home(tmp_path), Manager("w-1"))
    fault = Fault(FaultName.SLOW_DISK, 0.0, for_s=SHORT)
    with pytest.raises(EffectNotSeen, match=r"not 2 times as slow: .* 4.00 ms before and 4.00 ms during"):
        asyncio.run(processes.slow_disk(there, fault))

    def full(_: Path) -> float:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(processes, "fsync_s", full)
    with pytest.raises(BackendError, match="could not be kept busy: No space left on device"):
        asyncio.run(processes.slow_disk(there, fault))


class Books:
    """A fake manager process and a fake ledger, with the descriptions that both return."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.client = Manager("w-1")
        self.scene = target_grid.TargetGrid(factory.load("local"), Home(folder), self.client)
        self.runs, self.number = True, 1
        self.lost_at = -1
        patch.setattr(Home, "record", lambda _: self.record())
        patch.setattr(manager_process, "kill_manager", lambda _: self.kill())
        patch.setattr(manager_process, "start_manager", lambda *_, **more: self.start(**more))
        patch.setattr(factory.Backend, "open_ledger", lambda *_: self)

    def record(self) -> ManagerRecord | None:
        there = ManagerRecord("http://127.0.0.1:81", self.number, f"m-{self.number}", "local")
        return there if self.runs else None

    def kill(self) -> None:
        time.sleep(CALL_S)
        self.runs = False

    def start(self, *, port: int, **_: object) -> ManagerRecord:
        time.sleep(CALL_S)
        if not self.runs:
            assert port == 81
            self.runs, self.number = True, self.number + 1
        found = self.record()
        assert found
        return found

    async def forget(self) -> None:
        await asyncio.sleep(CALL_S)
        self.lost_at = self.client.rebuilds

    async def jobs(self, **_: object) -> list[str]:
        await asyncio.sleep(CALL_S)
        return ["j-1"]

    async def close(self) -> None:
        return

    def stands(self) -> list[str]:
        found = [] if self.runs else ["there is no manager"]
        lost = self.client.rebuilds <= self.lost_at
        return [*found, "the ledger is lost"] if lost else found


def test_manager_and_ledger_recover_after_any_cancellation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(FaultName.MANAGER_CRASH, 0.0, for_s=SHORT)

    def world() -> Books:
        return Books(tmp_path, monkeypatch)

    assert at_every_wait(world, lambda there: services.crash_manager(there.scene, fault)) > 3
    assert at_every_wait(world, lambda there: services.lose_ledger(there.scene, fault)) > 4


def test_ledger_without_jobs_is_not_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(**_: object) -> list[str]:
        return []

    books = Books(tmp_path, monkeypatch)
    monkeypatch.setattr(books, "jobs", none)
    with pytest.raises(NothingHit, match=r"^The ledger had no jobs.$"):
        asyncio.run(services.lose_ledger(books.scene, Fault(FaultName.DATABASE_LOSS, 0.0)))
    assert (books.lost_at, books.client.rebuilds) == (-1, 0)


def test_database_on_aws_is_rebuilt_after_any_cancellation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(FaultName.DATABASE_LOSS, 0.0, for_s=SHORT)
    home = Home(tmp_path)
    at = AwsDeployment(
        stack="s",
        region="us-east-1",
        bucket="b",
        prefix="s-",
        manager_group="s-manager",
        token_secret="arn",
        pools=(Pool("default"),),
        ledger="postgres",
        database=Database("db.example", 5432, "batchlab", "arn"),
    )
    aws_deployment.write(home, at)

    def do(books: Books) -> Coroutine[Any, Any, FaultResult]:
        there = StackFaults(target_grid.TargetGrid(factory.load("aws"), home, books.client))

        async def rebooted(_: str) -> str:
            await books.forget()
            await asyncio.sleep(CALL_S)
            return "rebooted"

        monkeypatch.setattr(there, "_reboot", rebooted)
        return there.lose_database(fault)

    assert at_every_wait(lambda: Books(tmp_path, monkeypatch), do) > 3


class Pools(Manager):
    def grid(self) -> Any:
        return grid(wide=[], narrow=[])


class Groups:
    """EC2 Auto Scaling with subnets and two groups, one of which is in a single zone."""

    def __init__(self, folder: Path) -> None:
        self.scene = target_grid.TargetGrid(factory.load("aws"), Home(folder), Pools())
        self.subnets = {"s-wide": "n-a,n-b", "s-narrow": "n-a"}
        self.suspended: set[str] = set()

    def describe_auto_scaling_groups(self, *, AutoScalingGroupNames: list[str]) -> Any:  # noqa: N803 - boto3's own
        time.sleep(CALL_S)
        return {
            "AutoScalingGroups": [
                {
                    "AutoScalingGroupName": name,
                    "VPCZoneIdentifier": self.subnets[name],
                    "AvailabilityZones": [one[-1] for one in self.subnets[name].split(",")],
                    "SuspendedProcesses": [{"ProcessName": "Launch"}] * (name in self.suspended),
                }
                for name in AutoScalingGroupNames
            ]
        }

    def describe_subnets(self, **_: object) -> Any:
        return {"Subnets": [{"SubnetId": f"n-{one}", "AvailabilityZone": one} for one in ("a", "b")]}

    def update_auto_scaling_group(
        self,
        *,
        AutoScalingGroupName: str,  # noqa: N803 - boto3's own
        VPCZoneIdentifier: str,  # noqa: N803 - boto3's own
    ) -> None:
        time.sleep(CALL_S)
        self.subnets[AutoScalingGroupName] = VPCZoneIdentifier

    def suspend_processes(self, *, AutoScalingGroupName: str, **_: object) -> None:  # noqa: N803 - boto3's own
        time.sleep(CALL_S)
        self.suspended.add(AutoScalingGroupName)

    def resume_processes(self, *, AutoScalingGroupName: str, **_: object) -> None:  # noqa: N803 - boto3's own
        time.sleep(CALL_S)
        self.suspended.discard(AutoScalingGroupName)

    def close(self) -> None:
        return

    def stands(self) -> list[str]:
        found = [f"{one} launches nothing" for one in self.suspended]
        return found + ["a zone is lost"] * (self.subnets["s-wide"] != "n-a,n-b")


def test_zones_of_groups_are_restored_after_any_cancellation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(FaultName.ZONE_LOSS, 0.0, for_s=SHORT)

    async def inside(_: str) -> list[str]:
        return ["i-1"]

    async def kill(_: Sequence[str]) -> list[str]:
        return ["i-1: terminated"]

    def do(world: Groups) -> Coroutine[Any, Any, FaultResult]:
        monkeypatch.setattr(aws_stack, "client", lambda *_, **__: world)
        there = aws_stack.ZoneOutage(Endpoint(), prefix="s-")
        return there.lose(world.scene, fault, inside=inside, kill=kill)

    assert at_every_wait(lambda: Groups(tmp_path), do) > 5


COUNT = 4


class Post:
    """A queue of the backend `local` with some messages."""

    def __init__(self, folder: Path) -> None:
        Post.number += 1
        self.scene = target_grid.TargetGrid(factory.load("local"), Home(folder / str(Post.number)), Manager("w-1"))
        asyncio.run(self._fill())

    number = 0

    async def _open(self) -> Any:
        return self.scene.backend.open_queue(self.scene.home, self.scene.backend.open_clock())

    async def _fill(self) -> None:
        queue = await self._open()
        await queue.ensure(QueueSpec("tasks-a"))
        await queue.send("tasks-a", [Outgoing(str(number)) for number in range(COUNT)])
        await queue.close()

    def stands(self) -> list[str]:
        async def seen() -> set[str]:
            queue, found = await self._open(), set()
            while batch := await queue.receive("tasks-a", wait_s=0):
                found |= {one.body for one in batch}
            await queue.close()
            return found

        missing = {str(number) for number in range(COUNT)} - asyncio.run(seen())
        return [f"{one} is kept back" for one in missing]


@pytest.mark.parametrize("do", [services.duplicates, services.delays])
def test_messages_are_released_after_any_cancellation(do: Any, tmp_path: Path) -> None:
    fault = Fault(FaultName.SQS_DELAYS, 0.0, pool="a", for_s=0.15, rate=0.6)
    assert at_every_wait(lambda: Post(tmp_path), lambda there: do(there.scene, fault)) > 3
