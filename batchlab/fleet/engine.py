"""Engine that runs groups on a launcher: requests change the state of groups, and `tick` applies the state to the
instances.

Invariant (I5): desired capacity is within [min, max] after every call. The number of Pending and InService instances is
at most the group's maximum, with two exceptions. Instances with scale-in protection stay after the limits were lowered,
and instances of an Auto Scaling group stay until their replacements are InService.

The steps of a tick, and the effect of a crash after each step:

1. Read the running instances from the launcher, then replace instances and scale in. A crash after step 1 loses
nothing. 2. Save the state, then request that the launcher ends Terminating instances. After a crash, the next tick
repeats the requests. 3. Save the new instances as Pending, then launch the new instances. After a crash, the next tick
replaces instances that were not launched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.errors import BackendError
from batchlab.core.model import Instance, LifecycleState
from batchlab.core.ports import Clock, Ids, Launcher
from batchlab.fleet import health, instance_refresh, lifecycle_hooks, placement, scaling_policies, warm_pool
from batchlab.fleet import warm_pool as warm
from batchlab.fleet.api_types import Fault, Metrics, Process, StoppableLauncher
from batchlab.fleet.changes import Changes
from batchlab.fleet.group_state import ENDING, STARTING, ActivityLog, Group, Member, Store, weigh
from batchlab.fleet.placement import Placement, Sources
from batchlab.fleet.saved_state import decode, encode
from batchlab.fleet.termination import shortfall


@dataclass(frozen=True, slots=True)
class PendingLaunch:
    """Launch of a member in the current tick. `place` is None in a pool of the Fleet port."""

    group: Group
    member: Member
    place: Placement | None = None
    asleep: bool = False
    """Whether the instance is stopped in the warm pool and must be started."""


def admit_members(
    changes: Changes, group: Group, missing: int, now_s: float, sources: Sources | None, *, fills_warm_pool: bool
) -> list[PendingLaunch]:
    """Add members for `missing` units of capacity, and return their launches. With `fills_warm_pool`, also add members
    to the warm pool."""
    if group.asg is None or sources is None:
        size = len(group.counted_members())
        return [PendingLaunch(group, changes.admit(group, size + n, now_s, None)) for n in range(missing)]
    if group.asg.deleting or group.suspended(Process.LAUNCH):
        return []
    missing -= weigh(warm.take_for_launch(changes, group, missing))
    fresh = [
        PendingLaunch(group, member, asleep=True)
        for member in group.members.values()
        if member.state is LifecycleState.PENDING and member.asg.asleep
    ]
    while missing > 0:
        launch = _admit_member(changes, group, now_s, sources)
        if launch is None:
            break
        fresh.append(launch)
        missing -= launch.member.asg.weight
    for _ in range(warm.room(group, now_s) if fills_warm_pool else 0):
        launch = _admit_member(changes, group, now_s, sources, warm_pool=True)
        if launch is None:
            break
        fresh.append(launch)
    return fresh


def _admit_member(
    changes: Changes, group: Group, now_s: float, sources: Sources, *, warm_pool: bool = False
) -> PendingLaunch | None:
    """Add one instance to the group.

    If the template of the instance does not exist, record a failed activity and return None.
    """
    assert group.asg is not None
    try:
        place = placement.choose(group, group.asg, sources, changes.steady.now_s(), warm=warm_pool)
    except Fault as fault:
        # A missing template counts as a failed launch, and is recorded once for every wait of the crash loop.
        reason = f"{fault.message} Launching EC2 instance failed."
        changes.count_failure(group, reason)
        what = f"Launching a new EC2 instance.  Status Reason: {reason}"
        changes.note(group.pool.name, what, changes.cause_text(group.asg, "an instance was started"), "Failed")
        return None
    size = weigh(group.staying())
    return PendingLaunch(group, changes.admit(group, size, now_s, place), place)


def _record_failed_launch(changes: Changes, fresh: PendingLaunch, error: str) -> None:
    """Record a failed launch, and avoid the capacity pool of the failed launch for `AVOID_S` seconds."""
    group, member = fresh.group, fresh.member
    if group.asg is not None:
        placement.avoid(group.asg, member.instance.machine, changes.steady.now_s())
    # A request may have made the instance Terminating during its launch.
    if member.state not in ENDING:
        changes.fail_launch(group, member, f"its launch failed: {error}")


def _run_processes(
    changes: Changes,
    group: Group,
    sources: Sources,
    metrics: Metrics | None,
    alarm_period_s: float,
    *,
    ends_first: bool,
) -> None:
    """Run all processes of an Auto Scaling group once, in a fixed order. With `ends_first`, the group terminates an
    instance before it launches the replacement."""
    asg = group.asg
    assert asg is not None
    lifecycle_hooks.expire(changes, group)
    health.finish_standby(changes, group)
    health.kill_interrupted(changes, group)
    health.replace_unhealthy(changes, group)
    scaling_policies.run_due(changes, group)
    scaling_policies.track(changes, group, asg, metrics, alarm_period_s)
    instance_refresh.step(changes, group)
    warm_pool.trim(changes, group, asg)
    health.continue_replacements(changes, group, sources, ends_first=ends_first)
    _update_cooldown(changes, group)


def _update_cooldown(changes: Changes, group: Group) -> None:
    """Start the cooldown, and clear causes and failures, after the group has reached desired capacity."""
    asg = group.asg
    assert asg is not None
    members = group.members.values()
    now_s = changes.steady.now_s()
    busy = any(member.state in STARTING or member.state in ENDING for member in members)
    if asg.cooling and not busy and weigh(group.staying()) == group.desired:
        asg.cooled_s, asg.cooling = now_s + asg.cooling, 0
        changes.unsaved = True
    if (asg.cause or asg.replacing) and weigh(group.staying()) == group.desired:
        asg.cause, asg.replacing = "", []
        changes.unsaved = True
    if group.failures and any(
        lifecycle_hooks.has_started(member, now_s) and (member.asg.in_service_s or 0.0) >= group.last_failure_s
        for member in members
    ):
        group.reset_failures()


DRAIN_S = 30.0
_TO_END = frozenset({LifecycleState.TERMINATING, LifecycleState.TERMINATING_PROCEED})


class Engine:
    """Engine of pools of the Fleet port and of Auto Scaling groups. The engine is the only user of the launcher.

    An engine with Auto Scaling groups needs `sources`, and target-tracking policies need `metrics`. In a pool of the
    Fleet port, the engine replaces an instance that does not send a heartbeat within `health.GRACE_S` plus `boot_s`
    seconds after its launch. A terminated instance has `drain_s` seconds to finish before the launcher kills the
    instance. With `one_machine`, all instances use the GPUs of one machine. An instance with GPUs then starts only
    after all other instances with GPUs have ended, because the tasks of an ending instance still use its GPUs. So a
    group with GPUs ends an instance before it launches the replacement, and does not fill its warm pool.
    """

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        ids: Ids,
        store: Store,
        *,
        drain_s: float = DRAIN_S,
        sources: Sources | None = None,
        metrics: Metrics | None = None,
        alarm_period_s: float = 60.0,
        one_machine: bool = False,
    ) -> None:
        self._launcher = launcher
        self._clock = clock
        self._store = store
        self._drain_s = drain_s
        self._sources = sources
        self._metrics = metrics
        self._alarm_period_s = alarm_period_s
        self._one_machine = one_machine
        self._groups: dict[str, Group] = {}
        log = ActivityLog()
        saved = store.load()
        if saved is not None:
            self._groups, log = decode(saved)
        self._changes = Changes(log, clock, ids)
        self._disowned: set[str] = set()
        self._ticking = asyncio.Lock()
        for _, member in self._members():
            member.since_s = clock.monotonic_s()
            # Ends of instances are reported again, because the previous manager may have died before acting on the end
            # of an instance.
            if member.state is LifecycleState.TERMINATED:
                self._changes.dead.append(member.instance)

    async def tick(self) -> Sequence[Instance]:
        """Run one tick, and return the instances that ended since the last call. The engine reports the end of an
        instance at least once, and again after a restart. Raise BackendError if the launcher or the store fails. The
        next tick continues after a BackendError."""
        async with self._ticking:
            instances = await self._launcher.running()
            now_s = self._clock.monotonic_s()
            for group in list(self._groups.values()):
                health.update_from_launcher(self._changes, group, instances, now_s)
                if group.asg is not None:
                    self._run_asg(group)
                if group.end_s is not None and group.end_s <= self._schedule_clock_s():
                    self._changes.end(group)
                self._changes.scale_in(group)
            self._save()
            await self._end(self._orphans(instances))
            await self._stop_instances()
            await self._launch(now_s, instances)
            for group in self._groups.values():
                self._changes.forget_terminated(group, now_s)
            self._save()
            dead, self._changes.dead = self._changes.dead, []
            return dead

    def _schedule_clock_s(self) -> float:
        """Return the time of the clock of scheduled actions in epoch seconds."""
        return self._clock.now_s()

    def _run_asg(self, group: Group) -> None:
        """Run the processes of an Auto Scaling group. Remove a deleted group after all its instances have ended."""
        assert self._sources is not None, "an Auto Scaling group needs its sources"
        ends_first = self._shares_gpus(group)
        _run_processes(self._changes, group, self._sources, self._metrics, self._alarm_period_s, ends_first=ends_first)
        is_empty = all(member.state is LifecycleState.TERMINATED for member in group.members.values())
        if group.asg is not None and group.asg.deleting and is_empty:
            self._remove(group.pool.name)

    def _remove(self, name: str) -> None:
        del self._groups[name]
        self._changes.log.forget(self._groups)
        self._changes.unsaved = True

    def _orphans(self, instances: Mapping[str, str | None]) -> list[str]:
        """Return newly found orphans: running instances that do not belong to a group. An instance becomes an orphan if
        the saved state is older than the instance. An instance also becomes an orphan if its launch was reported as
        failed."""
        return [name for name in self._strangers(instances) if name not in self._disowned]

    def _strangers(self, instances: Mapping[str, str | None]) -> list[str]:
        """Return all running instances that do not belong to a group."""
        living = {member.instance.id for _, member in self._living()}
        return [name for name, ended in instances.items() if ended is None and name not in living]

    async def _end(self, orphans: Sequence[str]) -> None:
        """Request that the launcher ends instances. All requests are sent before an error is raised."""

        async def end(member: Member) -> None:
            await self._launcher.terminate(member.instance.id, grace_s=self._drain_s)
            member.end_requested = True

        async def kill(member: Member) -> None:
            await self._launcher.terminate(member.instance.id, grace_s=0.0)
            member.end_requested = member.killed = True

        async def disown(name: str) -> None:
            await self._launcher.terminate(name, grace_s=self._drain_s)
            self._disowned.add(name)
            self._changes.disown(name)

        forced = [
            member
            for _, member in self._members()
            if member.asg.force and not member.killed and member.state is not LifecycleState.TERMINATED
        ]
        ending = [
            member
            for _, member in self._members()
            if member.state in _TO_END and not member.end_requested and not member.asg.force
        ]
        if not (forced or ending or orphans):
            return
        results = await asyncio.gather(
            *(kill(member) for member in forced),
            *(end(member) for member in ending),
            *(disown(name) for name in orphans),
            return_exceptions=True,
        )
        for result in results:
            if result is not None:
                raise result

    async def _launch(self, now_s: float, instances: Mapping[str, str | None]) -> None:
        fresh: list[PendingLaunch] = []
        for group in self._groups.values():
            self._changes.back_off(group, now_s)
            missing = shortfall(group, now_s, self._changes.steady.now_s())
            shares_gpus = self._shares_gpus(group)
            if shares_gpus:
                waits = missing > 0 and self._uses_gpus(instances)
                self._changes.wait_for_gpus(group, self._gpu_users() if waits else ())
                missing = 0 if waits else min(missing, 1)
            fresh += admit_members(self._changes, group, missing, now_s, self._sources, fills_warm_pool=not shares_gpus)
        self._save()
        if not fresh:
            return
        async with asyncio.TaskGroup() as tasks:
            for launch in fresh:
                tasks.create_task(self._start(launch))

    def _uses_gpus(self, instances: Mapping[str, str | None]) -> bool:
        """Return whether a living instance may use GPUs. A running instance without a group may have had GPUs."""
        return bool(self._gpu_users() or self._strangers(instances))

    def _gpu_users(self) -> list[Member]:
        """Return the living members of groups with GPUs."""
        with_gpus = {group.pool.name for group, _ in self._living() if self._gpus_of(group)}
        return [member for group, member in self._living() if group.pool.name in with_gpus]

    def _shares_gpus(self, group: Group) -> bool:
        """Return whether the group's next instance uses GPUs that other instances also use."""
        return self._one_machine and self._gpus_of(group) > 0

    def _gpus_of(self, group: Group) -> int:
        """Return the number of GPUs of the group's next instance, or 0 if its launch template does not exist."""
        if group.asg is None or self._sources is None:
            return group.pool.gpus
        try:
            return placement.template_of(placement.configuration(group.asg), self._sources.templates).gpus
        except Fault:
            return 0

    async def _start(self, fresh: PendingLaunch) -> None:
        group, member = fresh.group, fresh.member
        try:
            if fresh.asleep:
                await self._resting().start(member.instance.id)
            elif fresh.place is None:
                await self._launcher.launch(group.pool, member.instance.id)
            else:
                place = fresh.place
                await self._launcher.launch(place.pool, member.instance.id, place.machine)
        except BackendError as error:
            _record_failed_launch(self._changes, fresh, str(error))
            now_s = self._clock.monotonic_s()
            self._changes.record_end(group, member, note=member.instance.note, now_s=now_s)
        else:
            member.running, member.asg.asleep = True, False
            self._changes.arrive(group, member)

    async def _stop_instances(self) -> None:
        for group, member in list(self._members()):
            if member.asg.resting:
                hibernate = warm_pool.hibernates(group)
                await self._resting().stop(member.instance.id, hibernate=hibernate)
                warm_pool.mark_stopped(self._changes, group, member)

    def _resting(self) -> StoppableLauncher:
        assert isinstance(self._launcher, StoppableLauncher), "checked when the warm pool was put"
        return self._launcher

    def _members(self) -> Iterator[tuple[Group, Member]]:
        for group in self._groups.values():
            for member in group.members.values():
                yield group, member

    def _living(self) -> Iterator[tuple[Group, Member]]:
        return ((group, member) for group, member in self._members() if member.state is not LifecycleState.TERMINATED)

    def _find(self, instance: str) -> tuple[Group, Member] | None:
        for group in self._groups.values():
            if instance in group.members:
                return group, group.members[instance]
        return None

    def _save(self, *, changed: bool = False) -> None:
        if changed or self._changes.unsaved:
            self._store.save(encode(self._groups, self._changes.log))
            self._changes.unsaved = False
