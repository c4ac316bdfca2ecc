"""The managers' fleet in the simulator: its state outlives them, and its decisions are looked at.

Invariant: only the manager that read the state last can change it; another one is refused, as by a
conditional put, and reads it again before its next change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchlab.adapters.memory.launcher import MemoryState
from batchlab.core.errors import BackendError
from batchlab.core.model import LifecycleState
from batchlab.core.ports import Clock, Ids, Launcher
from batchlab.fleet.changes import Changes
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.fleet.group_state import ActivityLog, Group
from batchlab.manager.scaling.worker_registry import WorkerRegistry
from batchlab.sim import invariants
from batchlab.sim.actors import SimulationError
from batchlab.sim.runtime_checks import Violated

Fail = Callable[[SimulationError], None]
BusyAndIdle = Callable[[str], tuple[set[str], set[str]]]
"""Instances of a pool, as the registry of its manager has them."""
OnReplace = Callable[[str, str], None]
"""Called with an instance and the reason for which a manager has it replaced."""


class FleetState:
    """What all managers of one world share; `turns` counts who has taken it."""

    def __init__(self) -> None:
        self.store = MemoryState()
        self.turns = 0


class _Turn:
    """One manager's Store. Loading it takes it from whoever had it, who is told when it saves."""

    def __init__(self, state: FleetState, taken: Callable[[], None]) -> None:
        self._state = state
        self._taken = taken
        self._turn = 0

    def load(self) -> bytes | None:
        self._state.turns += 1
        self._turn = self._state.turns
        return self._state.store.load()

    def save(self, data: bytes) -> None:
        if self._turn != self._state.turns:
            self._taken()
            raise BackendError("Another manager keeps the fleet now.")
        self._state.store.save(data)


class SimFleet:
    """The Fleet port of one manager. Its state is read when it is first used, since a manager that
    stands by would know an old one."""

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        ids: Ids,
        state: FleetState,
        *,
        drain_s: float,
        fail: Fail,
        on_replace: OnReplace = lambda *_: None,
    ) -> None:
        self.registry: WorkerRegistry | None = None
        """Who the manager believes to be busy; it is made after its fleet."""
        self._made: _Watched | None = None
        self._launcher, self._clock, self._ids = launcher, clock, ids
        self._state, self._drain_s, self._fail = state, drain_s, fail
        self._on_replace = on_replace

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = _Watched(
                self._launcher,
                self._clock,
                self._ids,
                _Turn(self._state, self._forget),
                drain_s=self._drain_s,
                fail=self._fail,
                busy_and_idle=self._busy_and_idle,
                on_replace=self._on_replace,
            )
        return getattr(self._made, name)

    def _forget(self) -> None:
        """What was read is old. A manager may have lost the lead and got it back unnoticed."""
        self._made = None

    def _busy_and_idle(self, pool: str) -> tuple[set[str], set[str]]:
        if self.registry is None:
            return set(), set()
        return set(self.registry.busy(pool)), set(self.registry.idle(pool))


class _Watched(ManagedFleet):
    """I5: looked at after every change and at every choice."""

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        ids: Ids,
        store: _Turn,
        *,
        drain_s: float,
        fail: Fail,
        busy_and_idle: BusyAndIdle,
        on_replace: OnReplace,
    ) -> None:
        super().__init__(launcher, clock, ids, store, drain_s=drain_s)
        self._fail, self._on_replace = fail, on_replace
        dead = self._changes.dead
        self._changes = _WatchedChanges(self._changes.log, clock, ids, fail, busy_and_idle)
        self._changes.dead = dead

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """As the port says. The world looks at each instance that a manager has replaced."""
        self._on_replace(instance, cause)
        await super().set_health(instance, healthy=healthy, cause=cause)

    def _save(self) -> None:
        super()._save()
        try:
            invariants.check_bounds([group.view() for group in self._groups.values()])
        except Violated as error:
            self._fail(error)


class _WatchedChanges(Changes):
    def __init__(
        self,
        log: ActivityLog,
        clock: Clock,
        ids: Ids,
        report: Fail,
        busy_and_idle: BusyAndIdle,
    ) -> None:
        super().__init__(log, clock, ids)
        self._report = report
        self._busy_and_idle = busy_and_idle

    def scale_in(self, group: Group) -> None:
        """No busy worker is chosen while an idle one exists, by what the manager knows."""
        before = {m.instance.id for m in group.counted() if m.state is LifecycleState.IN_SERVICE}
        super().scale_in(group)
        kept = before & {m.instance.id for m in group.counted()}
        if kept == before:
            return
        busy, idle = self._busy_and_idle(group.pool.name)
        wrong, spared = sorted((before - kept) & busy), sorted(kept & idle)
        if wrong and spared:
            facts = f"{wrong} are busy and chosen, {spared} are idle and stay"
            self._report(Violated(f"I5 is violated: {facts}"))
