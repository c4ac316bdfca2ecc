"""Injection of a scenario's faults into a running grid, and the table of supported faults.

The injector undoes each fault, also on a cancellation, and reports a failed rollback. Faults that would affect the same
part of the grid run one after another. The command `scenario faults` shows the table of supported faults.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchlab.client.http import Client
from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.model import Pool
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.faults.target_grid import FaultAction, FaultResult, NothingHit, RunEnded, TargetGrid
from batchlab.scenarios.model.values import Fault, FaultName
from batchlab.scenarios.record import InjectedFault
from batchlab.scenarios.replay.run_state import RUN_ENDED

if TYPE_CHECKING:
    from batchlab.scenarios.faults.proxy import FaultProxy

BACKENDS = ("local", "ministack", "localstack", "aws")
"""Backends that support fault injection. On any other backend, a replay skips every fault."""


@dataclass(frozen=True, slots=True)
class FaultSupport:
    """Support of one fault on one backend.

    `how` describes the injection of the fault, and `why_not` is the reason why an injection is impossible.
    """

    how: str = ""
    why_not: str = ""

    @property
    def possible(self) -> bool:
        return bool(self.how)


def _impossible(why: str) -> FaultSupport:
    return FaultSupport(why_not=why)


_KILLED = FaultSupport("SIGKILL to the worker's process and all its child processes")
_STOPPED = FaultSupport("SIGSTOP to the worker's processes, and SIGCONT at the end of the fault")
_ASKED = FaultSupport(
    "SIGTERM, which the launcher also uses to drain an instance, and SIGKILL at the end of the notice; processes do "
    "not have a market, so the fault hits any instance"
)
_RESTARTED = FaultSupport(
    "SIGKILL to the manager's process; at the end of the fault, another manager starts at the same address"
)
_FORGOTTEN = FaultSupport(
    "every row of the ledger is deleted; at the end of the fault, the manager rebuilds the ledger from the bucket"
)
_TWICE = FaultSupport(
    "the replay receives messages, sends a copy of each message, and returns the original message to the queue"
)
_LATE = FaultSupport(
    "the replay receives messages and keeps the messages invisible until the end of the fault, for at most 15 minutes"
)
_UNSUPPORTED = _impossible("No fault is implemented for this backend.")
_NO_ZONES = _impossible("Instances are processes of one machine, and do not have a zone.")
_HOG = FaultSupport("programs write and call fsync without a pause, on the disk of the workers' folders")

TABLE: Mapping[FaultName, Mapping[str, FaultSupport]] = {
    FaultName.KILL: {
        "local": _KILLED,
        "ministack": _KILLED,
        "localstack": FaultSupport("docker kill, which sends SIGKILL to the first process of the container"),
        "aws": FaultSupport("EC2 TerminateInstances that skips the shutdown of the operating system"),
    },
    FaultName.PAUSE: {
        "local": _STOPPED,
        "ministack": _STOPPED,
        "localstack": FaultSupport("docker pause, and docker unpause at the end of the fault"),
        "aws": _impossible(
            "EC2 does not have a call that freezes and resumes an instance, and the stack does "
            "not allow commands on its workers."
        ),
    },
    FaultName.PARTITION: {
        "local": _impossible(
            "The bucket and the queues are files on the same machine, so a network cannot be interrupted."
        ),
        "ministack": FaultSupport(
            "a proxy in front of the grid's endpoint does not answer requests of the instances until the end of the "
            "fault"
        ),
        "localstack": FaultSupport("docker network disconnect, and docker network connect at the end of the fault"),
        "aws": _impossible(
            "A security group does not end existing connections, and a network ACL affects whole "
            "subnets, including the manager's."
        ),
    },
    FaultName.SPOT_WAVE: {
        "local": _ASKED,
        "ministack": _ASKED,
        "localstack": FaultSupport(
            "the Auto Scaling endpoint sends an interruption notice to Spot Instances, and terminates the remaining "
            "Spot Instances at the end of the notice"
        ),
        "aws": FaultSupport(
            "TerminateInstanceInAutoScalingGroup, which the instance reads in its metadata as its "
            "target state, and EC2 TerminateInstances at the end of the notice; EC2 sends a real "
            "Spot interruption only through an AWS FIS experiment"
        ),
    },
    FaultName.ZONE_LOSS: {
        "local": _NO_ZONES,
        "ministack": _NO_ZONES,
        "localstack": FaultSupport(
            "UpdateAutoScalingGroup removes the zone from the groups (SuspendProcesses if a group has only this "
            "zone), and docker kill ends all containers in the zone; the zone is restored at the end of the fault"
        ),
        "aws": FaultSupport(
            "UpdateAutoScalingGroup removes the zone's subnets from the groups (SuspendProcesses if a group has "
            "only these subnets), and EC2 TerminateInstances ends all instances in the zone; the subnets are "
            "restored at the end of the fault"
        ),
    },
    FaultName.S3_ERRORS: {
        "local": _impossible("The bucket is a folder, so it cannot answer with 503."),
        "ministack": FaultSupport(
            "a proxy in front of the grid's endpoint answers a share of the requests with 503 SlowDown"
        ),
        "localstack": FaultSupport(
            "a proxy takes LocalStack's address on the grid's network and answers a share of the requests with 503 "
            "SlowDown; LocalStack gets its address back at the end of the fault"
        ),
        "aws": _impossible(
            "The user does not control a component between the instances and S3, and S3 cannot be "
            "made to answer with 503."
        ),
    },
    FaultName.SQS_DUPLICATES: dict.fromkeys(BACKENDS, _TWICE),
    FaultName.SQS_DELAYS: dict.fromkeys(BACKENDS, _LATE),
    FaultName.SLOW_DISK: {
        "local": _HOG,
        "ministack": _HOG,
        "localstack": _impossible(
            "An instance writes only to memory (its root is read-only, and /tmp is a tmpfs), so it does not use a disk."
        ),
        "aws": _impossible("The stack does not allow commands on its workers."),
    },
    FaultName.MANAGER_CRASH: {
        "local": _RESTARTED,
        "ministack": _RESTARTED,
        "localstack": FaultSupport(
            "SIGKILL to the first process of the manager's container, which Docker restarts immediately"
        ),
        "aws": FaultSupport("EC2 TerminateInstances for the manager's instance, which its Auto Scaling group replaces"),
    },
    FaultName.DATABASE_LOSS: {
        "local": _FORGOTTEN,
        "ministack": _FORGOTTEN,
        "localstack": FaultSupport(
            "PostgreSQL is killed and restarted by Docker, and every row of the ledger is deleted; at the end of "
            "the fault, the manager rebuilds the ledger from the bucket"
        ),
        "aws": FaultSupport(
            "RDS is rebooted, a SimpleDB ledger is emptied, or an SQLite ledger is lost with the manager's "
            "instance; at the end of the fault, the manager rebuilds the ledger from the bucket"
        ),
    },
}


def support_of(fault: FaultName, backend: str) -> FaultSupport:
    """Return a description of the fault's injection on the backend, or the reason why the injection is impossible."""
    return TABLE[fault].get(backend, _UNSUPPORTED)


def impossible(backend: str) -> dict[FaultName, str]:
    """Return the faults that cannot be injected on the backend, each with the reason as a part of a sentence."""
    cells = {fault: support_of(fault, backend) for fault in FaultName}
    return {fault: cell.why_not.removesuffix(".") for fault, cell in cells.items() if not cell.possible}


def rows(backends: tuple[str, ...] = BACKENDS) -> Iterator[tuple[FaultName, str, FaultSupport]]:
    """Yield every fault on each backend, in the order of FaultName."""
    for fault in FaultName:
        for backend in backends:
            yield fault, backend, support_of(fault, backend)


class FaultInjector:
    """Injector of the faults of one backend."""

    def __init__(self, grid: TargetGrid, actions: Mapping[FaultName, FaultAction]) -> None:
        self._grid = grid
        self._actions = actions
        self._active: dict[asyncio.Task[FaultResult], Fault] = {}

    async def inject(self, fault: Fault, at_s: float) -> InjectedFault:
        """Inject the fault, hold the fault for `for_s` seconds, undo the fault, and return the observed result.

        A cancellation first undoes the current fault. The field `trouble` of the result has an error of the injection,
        the observation, or the rollback of the fault. A fault waits until a conflicting fault has ended, and then lasts
        for its full duration.
        """
        row = support_of(fault.name, self._grid.backend.name)
        action = self._actions.get(fault.name)
        if not row.possible or action is None:
            return InjectedFault(fault.name, at_s, impossible=row.why_not.removesuffix("."))
        begun_s = time.monotonic()
        while conflicts := [task for task, other in self._active.items() if fault.shares(other)]:
            await asyncio.wait(conflicts)
            await asyncio.sleep(0)  # the pause lets the caller of the conflicting fault run first
            at_s, begun_s = at_s + time.monotonic() - begun_s, time.monotonic()
        if self._grid.over.is_set():
            return InjectedFault(fault.name, at_s, impossible=RUN_ENDED)
        task = asyncio.ensure_future(action(fault))
        self._active[task] = fault
        try:
            result = await task
        except (RunEnded, NothingHit) as error:
            return InjectedFault(fault.name, at_s, impossible=error.message.removesuffix("."))
        except BatchlabError as error:
            return InjectedFault(fault.name, at_s, trouble=error.message)
        except OSError as error:  # an OSError means that this machine lacks disk space, processes, or sockets
            return InjectedFault(fault.name, at_s, trouble=f"This machine refused it: {error}.")
        finally:
            del self._active[task]
        return InjectedFault(fault.name, at_s, result.targets, result.evidence)

    async def undo(self) -> None:
        """Undo all current faults and do not inject other faults. After the rollback, every call of `inject`
        returns.
        """
        self._grid.over.set()
        if self._active:
            await asyncio.wait(set(self._active))

    async def close(self) -> None:
        """Undo all faults and close the used resources. The caller of `injector_for` closes the client."""
        await self.undo()
        await self._grid.leaving.aclose()


def injector_for(
    backend: Backend,
    home: Home,
    client: Client,
    *,
    pools: Sequence[Pool] = (),
    parent: bool = False,
    front: FaultProxy | None = None,
) -> FaultInjector:
    """Create the injector of a running grid, inside an event loop.

    `pools` and `parent` are the arguments with which the grid's manager was started. A restarted manager gets the same
    address, so that `client` continues to work. `front` is the proxy before the grid's endpoint (see `with_proxy`).
    Raise UsageError if the backend does not run real processes.
    """
    if backend.capabilities.simulated:
        raise UsageError(
            f"Nothing real runs on the backend {backend.name}.",
            remedy="`batchlab scenario simulate` injects every fault itself.",
        )
    grid = TargetGrid(backend, home, client, tuple(pools), parent)
    return FaultInjector(grid, _actions(grid, front))


def _actions(grid: TargetGrid, front: FaultProxy | None) -> Mapping[FaultName, FaultAction]:
    # The modules of the faults are imported only when needed, because the Docker SDK and boto3 are slow to import.
    if grid.backend.capabilities.stack:
        from batchlab.scenarios.faults import aws_stack

        return aws_stack.actions(grid)
    if grid.backend.capabilities.container_manager:
        from batchlab.scenarios.faults import containers

        return containers.actions(grid)
    from batchlab.scenarios.faults import processes

    return processes.actions(grid, front)
