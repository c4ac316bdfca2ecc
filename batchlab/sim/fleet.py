"""Fleet of the managers in the simulator, with a state that outlives the managers and with checks of decisions.

The service of the groups performs scheduled actions at their times, whether or not a manager runs.

Invariant: only the manager that read the fleet's state last can change the state. The change of any other manager is
refused, as by a conditional put, and the manager must read the state again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from batchlab.adapters.memory.launcher import MemoryState
from batchlab.core.errors import BackendError
from batchlab.core.model import LifecycleState, ScheduledEnd
from batchlab.core.ports import Clock, Ids, Launcher
from batchlab.fleet.changes import Changes
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.fleet.group_state import ActivityLog, Group
from batchlab.fleet.saved_state import decode
from batchlab.manager.worker_registry import WorkerRegistry
from batchlab.sim import invariants
from batchlab.sim.actors import SimulationError, Violated

Fail = Callable[[SimulationError], None]
BusyAndIdle = Callable[[str], tuple[set[str], set[str]]]
"""Function that returns the busy and the idle instances of a pool from the registry of the pool's manager."""
OnReplace = Callable[[str, str], None]
"""Function called with an instance and the reason why a manager replaces the instance."""
OnEnd = Callable[[str], None]
"""Function called with a pool whose scheduled action is performed."""
SERVICE_S = 5.0
"""Interval in seconds of the service that performs scheduled actions."""


class FleetState:
    """State of the fleet, which all managers of a world share.

    `loads` counts how often managers have loaded the state.
    """

    def __init__(self) -> None:
        self.store = MemoryState()
        self.loads = 0
        self._decoded: tuple[bytes | None, Sequence[Group]] = (None, ())

    def groups(self) -> Sequence[Group]:
        """Return the saved groups without a load of the state. The caller must not change the groups."""
        saved = self.store.load()
        # The services of a world read the state every second, and the state rarely changes.
        if saved is not self._decoded[0]:
            self._decoded = (saved, tuple(decode(saved)[0].values()) if saved else ())
        return self._decoded[1]


class _ManagerStore:
    """Store of the fleet's state for one manager.

    After a load of the state, the next save of any other manager fails.
    """

    def __init__(self, state: FleetState, on_conflict: Callable[[], None]) -> None:
        self._state = state
        self._on_conflict = on_conflict
        self._load_number = 0

    def load(self) -> bytes | None:
        self._state.loads += 1
        self._load_number = self._state.loads
        return self._state.store.load()

    def save(self, data: bytes) -> None:
        if self._load_number != self._state.loads:
            self._on_conflict()
            raise BackendError("Another manager has loaded the fleet since.")
        self._state.store.save(data)


class SimFleet:
    """The Fleet port of one manager.

    SimFleet reads the fleet's state at first use, because the state of a standby manager would become outdated.
    """

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        ids: Ids,
        state: FleetState,
        *,
        drain_s: float,
        fail: Fail,
        on_replace: OnReplace,
        on_end: OnEnd,
        service_clock: Clock,
        is_managed_service: bool,
        one_machine: bool = False,
    ) -> None:
        self.scheduling = _Scheduling(self)
        """The calls that change scheduled actions. The world may wrap them with faults."""
        self.is_managed_service = is_managed_service
        self.registry: WorkerRegistry | None = None
        """The manager's registry of workers, set after the fleet is created."""
        self._fleet: _CheckedFleet | None = None
        self._launcher, self._clock, self._ids = launcher, clock, ids
        self._state, self._drain_s, self._fail = state, drain_s, fail
        self._on_replace, self._on_end = on_replace, on_end
        self._service_clock = service_clock
        self._one_machine = one_machine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loaded(), name)

    def loaded(self) -> _CheckedFleet:
        """Return the fleet with its loaded state."""
        if self._fleet is None:
            self._fleet = _CheckedFleet(
                self._launcher,
                self._clock,
                self._ids,
                _ManagerStore(self._state, self._forget),
                drain_s=self._drain_s,
                fail=self._fail,
                busy_and_idle=self._busy_and_idle,
                on_replace=self._on_replace,
                on_end=self._on_end,
                service_clock=self._service_clock,
                one_machine=self._one_machine,
            )
        return self._fleet

    async def schedule_end(self, pool: str, after_s: float | None) -> ScheduledEnd:
        """See `Fleet.schedule_end`."""
        return await self.scheduling.schedule_end(pool, after_s)

    def _forget(self) -> None:
        """Drop the loaded state of the fleet.

        A manager may have lost and regained the lease without noticing the change.
        """
        self._fleet = None

    def _busy_and_idle(self, pool: str) -> tuple[set[str], set[str]]:
        if self.registry is None:
            return set(), set()
        return set(self.registry.busy(pool)), set(self.registry.idle(pool))


class _Scheduling:
    def __init__(self, fleet: SimFleet) -> None:
        self._fleet = fleet

    async def schedule_end(self, pool: str, after_s: float | None) -> ScheduledEnd:
        return await self._fleet.loaded().schedule_end(pool, after_s)


class AutoScalingService:
    """Service of the groups without a manager. `fleet` returns the fleet with a newly loaded state, and `is_led`
    returns whether a manager leads."""

    def __init__(self, fleet: Callable[[], SimFleet], state: FleetState, clock: Clock, is_led: Callable[[], bool]):
        self._new_fleet = fleet
        self._state = state
        self._clock = clock
        self._is_led = is_led

    async def run(self) -> None:
        """Perform the due actions, and end the instances of ended groups while no manager leads, forever."""
        while True:
            await asyncio.sleep(SERVICE_S)
            groups, now_s = self._state.groups(), self._clock.now_s()
            is_due = any(group.end_s is not None and group.end_s <= now_s for group in groups)
            if is_due or (not self._is_led() and any(self._is_ending(group) for group in groups)):
                with suppress(BackendError):  # A manager has changed the state during the tick.
                    await self._new_fleet().tick()

    @staticmethod
    def _is_ending(group: Group) -> bool:
        members = group.members.values()
        return not group.pool.max_size and any(m.state is not LifecycleState.TERMINATED for m in members)


class _CheckedFleet(ManagedFleet):
    """Fleet that checks after every change, and at every scale-in, that no busy instance is terminated (promise I5)."""

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        ids: Ids,
        store: _ManagerStore,
        *,
        drain_s: float,
        fail: Fail,
        busy_and_idle: BusyAndIdle,
        on_replace: OnReplace,
        on_end: OnEnd,
        service_clock: Clock,
        one_machine: bool,
    ) -> None:
        super().__init__(launcher, clock, ids, store, drain_s=drain_s, one_machine=one_machine)
        self._fail, self._on_replace = fail, on_replace
        self._service_clock = service_clock
        dead = self._changes.dead
        self._changes = _CheckedChanges(self._changes.log, clock, ids, fail, busy_and_idle, on_end)
        self._changes.dead = dead

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """See `Fleet.set_health`. The world checks each replacement of an instance."""
        self._on_replace(instance, cause)
        await super().set_health(instance, healthy=healthy, cause=cause)

    def _schedule_clock_s(self) -> float:
        """Return the time of the service, because a managed service performs scheduled actions by its own clock."""
        return self._service_clock.now_s()

    def _save(self, *, changed: bool = False) -> None:
        is_changed = changed or self._changes.unsaved
        super()._save(changed=changed)
        if not is_changed:
            return
        try:
            invariants.check_bounds([group.view() for group in self._groups.values()])
        except Violated as error:
            self._fail(error)


class _CheckedChanges(Changes):
    def __init__(
        self, log: ActivityLog, clock: Clock, ids: Ids, report: Fail, busy_and_idle: BusyAndIdle, on_end: OnEnd
    ) -> None:
        super().__init__(log, clock, ids)
        self._report = report
        self._busy_and_idle = busy_and_idle
        self._on_end = on_end

    def end(self, group: Group) -> None:
        """Report a performed scheduled action to the world."""
        self._on_end(group.pool.name)
        super().end(group)

    def scale_in(self, group: Group) -> None:
        """Check that scale-in does not select a busy worker while the manager knows an idle worker."""
        before = {m.instance.id for m in group.counted_members() if m.state is LifecycleState.IN_SERVICE}
        super().scale_in(group)
        after = before & {m.instance.id for m in group.counted_members()}
        if after == before:
            return
        busy, idle = self._busy_and_idle(group.pool.name)
        wrong, spared = sorted((before - after) & busy), sorted(after & idle)
        if wrong and spared:
            facts = f"{wrong} are busy and chosen, {spared} are idle and stay"
            self._report(Violated(f"I5 is violated: {facts}"))
