"""Launchers, clocks, and workers for the contract suites of the Fleet and Launcher ports, and
the adapters that the suites run on.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest

from batchlab.adapters.docker.container import Template
from batchlab.adapters.local.processes import ProcessLauncher
from batchlab.adapters.local.state_files import StateFile
from batchlab.adapters.memory.launcher import MemoryState, SimLauncher
from batchlab.core.errors import BackendError
from batchlab.core.model import GroupView, Instance, LifecycleState, Machine, Pool
from batchlab.core.ports import ANY_MACHINE, Clock, Fleet, Launcher
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from tests.support.docker.containers import ABSENT_IMAGE, DockerGrid, docker_grid, shell

W = TypeVar("W")

STEADY = Pool("steady", max_size=4)
"""An instance of this pool drains at once when it is asked to end."""
STUBBORN = Pool("stubborn", max_size=4)
"""An instance of this pool ignores a request to end."""
BROKEN = Pool("broken", max_size=4)
"""An instance of this pool ends by itself at once, with exit code 3."""
ABSENT = Pool("absent", max_size=4)
"""An instance of this pool cannot be launched."""

DEADLINE_S = 10.0


class ManualClock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.time_s = 1_000.0

    def now_s(self) -> float:
        return 1_700_000_000.0 + self.time_s

    def monotonic_s(self) -> float:
        return self.time_s


class LoopClock:
    """A clock that returns the running event loop's time."""

    def now_s(self) -> float:
        return 1_700_000_000.0 + asyncio.get_running_loop().time()

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()


class CountedIds:
    """An id generator that returns w-0001, w-0002, and so on."""

    def __init__(self) -> None:
        self.count = 0

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{kind}-{self.count:04d}"


async def _nothing(_: str) -> None:
    pass


@dataclass
class TableLauncher:
    """A launcher whose instances are rows of a table. `refuse` makes launches fail, and `deaf` makes workers ignore a
    request to end.

    `on_launch` runs after an instance was added and before `launch` returns. `on_terminate` runs before an instance
    ends. Both callbacks may raise.
    """

    known: dict[str, str | None] = field(default_factory=dict)
    launched: list[str] = field(default_factory=list)
    terminated: list[tuple[str, float]] = field(default_factory=list)
    refuse: str = ""
    deaf: bool = False
    on_launch: Callable[[str], Awaitable[None]] = _nothing
    on_terminate: Callable[[str], Awaitable[None]] = _nothing

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        if self.refuse:
            raise BackendError(self.refuse)
        self.launched.append(instance)
        self.known[instance] = None
        await self.on_launch(instance)

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        await self.on_terminate(instance)
        self.terminated.append((instance, grace_s))
        if not self.deaf and instance in self.known:
            self.known[instance] = self.known[instance] or "exit 0"

    async def running(self) -> Mapping[str, str | None]:
        return dict(self.known)

    def crash(self, instance: str, how: str = "killed by SIGKILL, exit -9") -> None:
        self.known[instance] = how


class ScriptedInstance:
    """A simulated worker that behaves as its pool's name says."""

    def __init__(self, pool: Pool, instance: str) -> None:
        self.ended: str | None = "exit 3" if pool.name == BROKEN.name else None
        self._deaf = pool.name == STUBBORN.name

    def stop(self, grace_s: float) -> None:
        if not self._deaf:
            self.ended = self.ended or "exit 0"

    def kill(self, reason: str) -> None:
        self.ended = self.ended or reason


_SHELL = {STUBBORN.name: "trap '' TERM; echo up; exec sleep 100", BROKEN.name: "exit 3"}
_DRAINS = "trap 'exit 0' TERM; echo up; sleep 100 & wait"


def worker_argv(pool: Pool, instance: str) -> list[str]:
    """Return the command of a real worker that behaves as its pool's name says. The worker prints `up` when it is
    ready."""
    if pool.name == ABSENT.name:
        return ["/nonexistent/worker"]
    return ["/bin/sh", "-c", _SHELL.get(pool.name, _DRAINS), instance]


def sim_launcher(started: list[str] | None = None) -> SimLauncher:
    """Return a launcher of simulated workers. Each booted worker adds its id to `started`."""

    def start(pool: Pool, instance: str) -> ScriptedInstance:
        if started is not None:
            started.append(instance)
        return ScriptedInstance(pool, instance)

    launcher = SimLauncher(start, Random(1))
    launcher.refuse = lambda pool, _: "no capacity" if pool.name == ABSENT.name else None
    return launcher


def process_launcher(
    root: Path,
    clock: Clock | None = None,
    argv: Callable[[Pool, str], Sequence[str]] = worker_argv,
    scratch: Path | None = None,
) -> ProcessLauncher:
    env = {"PATH": os.environ["PATH"]}
    return ProcessLauncher(root, argv, clock or LoopClock(), env, scratch=scratch)


def pid_of(launcher_root: Path, instance: str) -> int:
    return int(json.loads((launcher_root / "instances" / f"{instance}.json").read_text())["pid"])


@dataclass
class FleetRig:
    """A fleet, and functions for its faults, heartbeats, and time."""

    fleet: Fleet
    crash: Callable[[str], None]
    """Ends an instance without telling the fleet."""
    report: Callable[[str], Awaitable[None]]
    """Sends an instance's first heartbeat."""
    rest: Callable[[], Awaitable[None]]
    """Waits for changes before the next look."""
    told: str = "killed by SIGKILL, exit -9"
    """The reason that the fleet reports for a crashed instance."""
    dead: list[Instance] = field(default_factory=list)
    """All instances that the ticks returned."""

    async def until(self, condition: Callable[[GroupView], bool], pool: str = STEADY.name) -> GroupView:
        """Tick and report Pending instances until the pool's group satisfies the condition."""
        view = None
        for _ in range(500):
            self.dead += await self.fleet.tick()
            view = await self.view(pool)
            if condition(view):
                return view
            for instance in view.instances:
                if instance.state is LifecycleState.PENDING:
                    await self.report(instance.id)
            await self.rest()
        pytest.fail(f"never came about; at last: {view}")

    async def view(self, pool: str = STEADY.name) -> GroupView:
        return next(v for v in await self.fleet.describe() if v.pool.name == pool)

    async def grow(self, pool: Pool, size: int) -> list[str]:
        """Create the pool, bring `size` instances into service, and return their ids, oldest first."""
        await self.fleet.ensure(pool)
        await self.fleet.set_desired(pool.name, size, cause="a user request")
        return in_service(await self.until(lambda v: len(in_service(v)) == size, pool.name))


def in_service(view: GroupView) -> list[str]:
    return [i.id for i in view.instances if i.state is LifecycleState.IN_SERVICE]


def counted(view: GroupView) -> list[str]:
    states = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)
    return [i.id for i in view.instances if i.state in states]


FleetCheck = Callable[[FleetRig], Awaitable[None]]


def _table_world(check: FleetCheck, _: Path) -> None:
    async def main() -> None:
        launcher, clock = TableLauncher(), ManualClock()
        fleet = ManagedFleet(launcher, clock, CountedIds(), MemoryState())

        async def rest() -> None:
            clock.time_s += 0.1

        await check(FleetRig(fleet, launcher.crash, fleet.ready, rest))

    asyncio.run(main())


def _sim_world(check: FleetCheck, _: Path) -> None:
    loop = SimLoop()

    async def main() -> None:
        launcher = sim_launcher()
        fleet = ManagedFleet(launcher, SimClock(loop, 1.7e9), CountedIds(), MemoryState())
        await check(FleetRig(fleet, launcher.crash, fleet.ready, lambda: asyncio.sleep(1)))

    loop.run(main(), limit_s=3_600)


def _process_world(check: FleetCheck, root: Path) -> None:
    async def main() -> None:
        launcher = process_launcher(root)
        fleet = ManagedFleet(launcher, LoopClock(), CountedIds(), StateFile(root / "fleet.json"))
        try:
            await check(
                FleetRig(
                    fleet, lambda instance: os.kill(pid_of(root, instance), 9), fleet.ready, lambda: asyncio.sleep(0.01)
                )
            )
        finally:
            await launcher.close(kill=True)

    asyncio.run(main())


FLEET_WORLDS: Mapping[str, Callable[[FleetCheck, Path], None]] = {
    "table": _table_world,
    "sim": _sim_world,
    "process": _process_world,
}


@dataclass
class LauncherRig:
    """A launcher, and functions for its faults and time."""

    launcher: Launcher
    changed: asyncio.Event
    crash: Callable[[str], None]
    up: Callable[[str], bool]
    """Returns whether the instance's worker is ready."""
    slack_s: float
    """The maximum delay until an immediate change is visible."""
    moment_s: float = 0.15
    """A time longer than a request to end an instance takes."""

    async def start(self, pool: Pool, instance: str) -> None:
        """Launch an instance, and wait until its worker is ready."""
        await self.launcher.launch(pool, instance)
        await self.until(lambda _: self.up(instance))

    async def ended(self, instance: str) -> str:
        """Wait until the instance has ended, and return how it ended."""
        known = await self.until(lambda known: known[instance] is not None)
        return str(known[instance])

    async def until(self, condition: Callable[[Mapping[str, str | None]], bool]) -> Mapping[str, str | None]:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + DEADLINE_S
        while True:
            known = await self.launcher.running()
            if condition(known):
                return known
            if loop.time() > deadline_s:
                pytest.fail(f"never came about; at last: {known}")
            await asyncio.sleep(0.005)


LauncherCheck = Callable[[LauncherRig], Awaitable[None]]


def _sim_launcher_world(check: LauncherCheck, _: Path) -> None:
    async def main() -> None:
        started: list[str] = []
        launcher = sim_launcher(started)
        await check(LauncherRig(launcher, launcher.changed, launcher.crash, started.__contains__, slack_s=0.0))

    SimLoop().run(main(), limit_s=3_600)


def _process_launcher_world(check: LauncherCheck, root: Path) -> None:
    async def main() -> None:
        launcher = process_launcher(root)

        def up(instance: str) -> bool:
            return (root / "logs" / f"{instance}.log").read_text() == "up\n"

        def crash(instance: str) -> None:
            os.kill(pid_of(root, instance), 9)

        try:
            await check(LauncherRig(launcher, launcher.changed, crash, up, slack_s=1.0))
        finally:
            await launcher.close(kill=True)

    asyncio.run(main())


def behaving(pool: Pool) -> Template:
    """Return the template of a container that behaves as its pool's name says."""
    if pool.name == ABSENT.name:
        return Template(ABSENT_IMAGE, ("true",))
    return shell(_SHELL.get(pool.name, _DRAINS))


def _container_launcher_world(check: LauncherCheck, root: Path) -> None:
    async def main(grid: DockerGrid) -> None:
        launcher = grid.launcher(behaving, LoopClock())

        def crash(instance: str) -> None:
            grid.api.kill(grid.name(instance))

        def up(instance: str) -> bool:
            return grid.printed(instance) == "up\n"

        try:
            await check(LauncherRig(launcher, launcher.changed, crash, up, slack_s=8.0, moment_s=1.0))
        finally:
            await launcher.close(kill=True)

    with docker_grid(root) as grid:
        asyncio.run(main(grid))


LAUNCHER_WORLDS: Mapping[str, Callable[[LauncherCheck, Path], None]] = {
    "sim": _sim_launcher_world,
    "process": _process_launcher_world,
    "container": _container_launcher_world,
}


def everywhere(worlds: Mapping[str, Callable[[Any, Path], None]]) -> Callable[[Any], Any]:
    """Turn an async check of a rig into a test that runs in each of these worlds."""

    def decorate(check: Callable[[Any], Awaitable[None]]) -> Callable[[str, Path], None]:
        @pytest.mark.parametrize("world", list(worlds))
        def test(world: str, tmp_path: Path) -> None:
            worlds[world](check, tmp_path)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        test.check = check  # type: ignore[attr-defined]
        return test

    return decorate


def names(instances: Sequence[Instance]) -> list[str]:
    return [instance.id for instance in instances]


def checked_in(make: Callable[[], W]) -> Callable[[Callable[[W], Awaitable[None]]], Callable[[], None]]:
    """Return a decorator that turns an async check of a world from `make` into a test."""

    def decorate(check: Callable[[W], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            async def main() -> None:
                await check(make())

            asyncio.run(main())

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate
