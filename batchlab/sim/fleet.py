"""The fleet of the managers in the simulator. Its state outlives them, and its decisions are
checked.

Invariant: only the manager that read the state last can change it. Any other manager's change is
refused, as by a conditional put, and that manager must read the state again.
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
from batchlab.manager.worker_registry import WorkerRegistry
from batchlab.sim import invariants
from batchlab.sim.actors import SimulationError, Violated

Fail = Callable[[SimulationError], None]
BusyAndIdle = Callable[[str], tuple[set[str], set[str]]]
"""Return the instances of a pool from the registry of its manager."""
OnReplace = Callable[[str, str], None]
"""Called with an instance and the reason for which a manager replaces it."""


class FleetState:
    """State of the fleet, which all managers of a world share. `turns` counts the managers that
    loaded it."""

    def __init__(self) -> None:
        self.store = MemoryState()
        self.turns = 0


class _Turn:
    """The Store of one manager. Loading takes the state from the manager before, whose next save
    fails."""

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
            raise BackendError("Another manager has loaded the fleet since.")
        self._state.store.save(data)


class SimFleet:
    """The Fleet port of one manager. It reads its state at first use, because a standby manager's
    state would become old."""

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
        """Return the workers that the manager considers busy. The property is set after the fleet
        is made."""
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
        """Drop the state. A manager may have lost and regained leadership without noticing."""
        self._made = None

    def _busy_and_idle(self, pool: str) -> tuple[set[str], set[str]]:
        if self.registry is None:
            return set(), set()
        return set(self.registry.busy(pool)), set(self.registry.idle(pool))


class _Watched(ManagedFleet):
    """Check I5 after every change and at every choice."""

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
        """Replace instances as the port defines. The world checks each instance that a manager
        replaces."""
        self._on_replace(instance, cause)
        await super().set_health(instance, healthy=healthy, cause=cause)

    def _save(self, *, changed: bool = False) -> None:
        super()._save(changed=changed)
        try:
            invariants.check_bounds([group.view() for group in self._groups.values()])
        except Violated as error:
            self._fail(error)


class _WatchedChanges(Changes):
    def __init__(self, log: ActivityLog, clock: Clock, ids: Ids, report: Fail, busy_and_idle: BusyAndIdle) -> None:
        super().__init__(log, clock, ids)
        self._report = report
        self._busy_and_idle = busy_and_idle

    def scale_in(self, group: Group) -> None:
        """Check that no busy worker is chosen while an idle one exists, as far as the manager can
        see."""
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
