"""Auto Scaling groups over a launcher: requests change the state, `tick` carries it out.

Invariant (I5): desired capacity is within [min, max] after every call, and Pending plus InService
instances are never more than max, save for protected ones that lowered limits left behind.

A tick, in order, and what a crash after each step costs:
1. ask the launcher who lives; bury, replace and scale in accordingly: nothing;
2. save, then ask the launcher to end who is Terminating: it is asked again after the restart;
3. save the new instances as Pending, then launch them: those not launched are found missing and
   replaced. Launching first would leave instances that no state knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from batchlab.errors import BackendError, Refused
from batchlab.fleet.changes import Changes
from batchlab.fleet.decisions import clamp, shortfall
from batchlab.fleet.state import ActivityLog, Group, Member, Store, decode, encode
from batchlab.model import Activity, GroupView, Instance, LifecycleState, Pool
from batchlab.ports import Clock, Ids, Launcher

MOST_INSTANCES = 99_999
"""Of one pool: more is a slip."""
HEALTH_GRACE_S = 60.0
DRAIN_S = 30.0


class ManagedFleet:
    """The Fleet port over a launcher that no one else uses, plus `ready`.

    An instance that sends no heartbeat within `health_grace_s` plus its pool's `boot_s` of its
    launch is replaced. One that is terminated has `drain_s` to finish before it is killed.
    Activities are AWS's: one per launch and one per termination, whose status settles later, and
    one per change of desired capacity.
    """

    def __init__(
        self,
        launcher: Launcher,
        clock: Clock,
        ids: Ids,
        store: Store,
        *,
        health_grace_s: float = HEALTH_GRACE_S,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._launcher = launcher
        self._clock = clock
        self._store = store
        self._health_grace_s = health_grace_s
        self._drain_s = drain_s
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
            # The manager before may have died between hearing of a death and acting on it.
            if member.state is LifecycleState.TERMINATED:
                self._changes.dead.append(member.instance)

    async def ensure(self, pool: Pool) -> None:
        """Create the group with desired = min, or change it; Refused unless 0 ≤ min ≤ max, and
        max is a number that somebody could mean."""
        limits = f"min: {pool.min_size}, max: {pool.max_size}"
        if not 0 <= pool.min_size <= pool.max_size <= MOST_INSTANCES:
            raise Refused(
                f"The pool {pool.name!r} cannot have the limits {limits}.",
                remedy=f"Give it 0 ≤ min ≤ max ≤ {MOST_INSTANCES}.",
            )
        group = self._groups.get(pool.name)
        if group is None:
            self._groups[pool.name] = self._changes.found(pool)
        elif group.pool != pool:
            group.pool = pool
            group.calm()
            cause = f"a user request that set limits to {limits}"
            self._changes.want(group, clamp(pool, group.desired), cause)
        self._save()

    async def describe(self) -> Sequence[GroupView]:
        """As the port says."""
        return [group.view() for group in self._groups.values()]

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        """As the port says. Who leaves is chosen at once; the next tick asks them to."""
        group = self._group(pool)
        if clamp(group.pool, desired) != desired:
            raise Refused(
                f"desired capacity {desired} of pool {pool!r} is outside"
                f" [{group.pool.min_size}, {group.pool.max_size}]"
            )
        self._changes.want(group, desired, cause)
        self._save()

    async def terminate(
        self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str
    ) -> None:
        """As the port says, protected or not.

        Refused, and nothing done, where an instance is unknown or `decrement` would take desired
        capacity below min. An instance that is ending already is left alone.
        """
        group = self._group(pool)
        named = {name: self._member(group, name) for name in instances}
        leaving = [member for member in named.values() if member.counted]
        if decrement and group.desired - len(leaving) < group.pool.min_size:
            raise Refused(
                f"terminating {len(leaving)} of pool {pool!r} would take its desired capacity"
                f" from {group.desired} below its min of {group.pool.min_size}"
            )
        for member in leaving:
            self._changes.retire(group, member, why=cause, note=f"terminated: {cause}")
        if decrement:
            self._changes.want(group, group.desired - len(leaving), cause)
        self._save()

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        """As the port says; Refused, and nothing done, unless all are InService, as on EC2.

        Saved by the next tick, because protection may change with every bundle.
        """
        group = self._group(pool)
        members = [self._member(group, name) for name in instances]
        for member in members:
            if member.state is not LifecycleState.IN_SERVICE:
                raise Refused(f"instance {member.instance.id} is {member.state}, not InService")
        for member in members:
            self._changes.protect(member, on=on)
        if group.stuck:
            self._changes.scale_in(group)

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """As the port says; Refused where it is unknown. One that is ending stays unhealthy."""
        found = self._find(instance)
        if found is None:
            raise Refused(f"there is no instance {instance!r}")
        group, member = found
        if member.counted and not healthy:
            self._changes.fail(group, member, cause, note=f"terminated: unhealthy: {cause}")
            self._save()

    async def ready(self, instance: str) -> None:
        """The worker in `instance` reported for work; once is enough, again is harmless.

        Silently nothing for an instance that is unknown or ending: a heartbeat may come late.
        """
        found = self._find(instance)
        if found is not None:
            group, member = found
            member.ready = True
            self._changes.arrive(group, member)

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """As the port says; pool "" has those of no group (orphans that were terminated)."""
        return self._changes.log.newest(pool, limit)

    async def tick(self) -> Sequence[Instance]:
        """As the port says. A death is reported at least once: after a restart, again.

        BackendError where the launcher or the store fails; the next tick goes on from there.
        """
        async with self._ticking:
            known = await self._launcher.running()
            now_s = self._clock.monotonic_s()
            for group in self._groups.values():
                self._look(group, known, now_s)
                self._changes.scale_in(group)
            self._save()
            await self._end(self._orphans(known))
            await self._launch(now_s)
            for group in self._groups.values():
                self._changes.forget(group, now_s)
            self._save()
            dead, self._changes.dead = self._changes.dead, []
            return dead

    def _look(self, group: Group, known: Mapping[str, str | None], now_s: float) -> None:
        """Bring the state up to what the launcher says."""
        grace_s = self._health_grace_s + group.pool.boot_s
        for name, member in group.members.items():
            ended = known.get(name, "its launcher does not know it")
            if member.state is LifecycleState.TERMINATED:
                continue
            if ended is None:
                member.running = True
                self._changes.arrive(group, member)
                if member.state is LifecycleState.PENDING and now_s - member.since_s > grace_s:
                    silent = f"no heartbeat within {grace_s:g} s of its launch"
                    self._changes.fail(group, member, silent, note=f"terminated: {silent}")
                continue
            note = f"{member.instance.note} ({ended})"
            if member.counted:
                note = ended
                self._changes.fail(group, member, ended, note=ended)
            self._changes.bury(group, member, note=note, now_s=now_s)

    def _orphans(self, known: Mapping[str, str | None]) -> list[str]:
        """Living instances that the state does not know, newly found: the state is older than
        they are, or a launch that was reported as failed did start something."""
        ours = {
            m.instance.id for _, m in self._members() if m.state is not LifecycleState.TERMINATED
        }
        strangers = [name for name, ended in known.items() if ended is None and name not in ours]
        return [name for name in strangers if name not in self._disowned]

    async def _end(self, orphans: Sequence[str]) -> None:
        """Ask the launcher to end whom it was not yet asked about; one failure stops no other."""

        async def end(member: Member) -> None:
            await self._launcher.terminate(member.instance.id, grace_s=self._drain_s)
            member.asked = True

        async def disown(name: str) -> None:
            await self._launcher.terminate(name, grace_s=self._drain_s)
            self._disowned.add(name)
            self._changes.disown(name)

        ending = [
            member
            for _, member in self._members()
            if member.state is LifecycleState.TERMINATING and not member.asked
        ]
        results = await asyncio.gather(
            *(end(member) for member in ending),
            *(disown(name) for name in orphans),
            return_exceptions=True,
        )
        for result in results:
            if result is not None:
                raise result

    async def _launch(self, now_s: float) -> None:
        fresh: list[tuple[Group, Member]] = []
        for group in self._groups.values():
            self._changes.back_off(group, now_s)
            size = len(group.counted())
            fresh += [
                (group, self._changes.admit(group, size + n, now_s))
                for n in range(shortfall(group, now_s))
            ]
        self._save()
        async with asyncio.TaskGroup() as tasks:
            for group, member in fresh:
                tasks.create_task(self._start(group, member))

    async def _start(self, group: Group, member: Member) -> None:
        try:
            await self._launcher.launch(group.pool, member.instance.id)
        except BackendError as error:
            # A request may have made it Terminating while its launch was under way.
            if member.counted:
                self._changes.fail_launch(group, member, f"its launch failed: {error}")
            now_s = self._clock.monotonic_s()
            self._changes.bury(group, member, note=member.instance.note, now_s=now_s)
        else:
            member.running = True
            self._changes.arrive(group, member)

    def _members(self) -> Iterator[tuple[Group, Member]]:
        for group in self._groups.values():
            for member in group.members.values():
                yield group, member

    def _group(self, pool: str) -> Group:
        if pool not in self._groups:
            raise Refused(f"there is no pool {pool!r}")
        return self._groups[pool]

    def _member(self, group: Group, instance: str) -> Member:
        if instance not in group.members:
            raise Refused(f"there is no instance {instance!r} in pool {group.pool.name!r}")
        return group.members[instance]

    def _find(self, instance: str) -> tuple[Group, Member] | None:
        for group in self._groups.values():
            if instance in group.members:
                return group, group.members[instance]
        return None

    def _save(self) -> None:
        if self._changes.unsaved:
            self._store.save(encode(self._groups, self._changes.log))
            self._changes.unsaved = False
