"""Fair share: the grid's policy, the use of each share, and the places of each share in a pool's window.

Invariants: without a policy, the manager feeds jobs as if shares did not exist. The use of a share is derived from the
folded completions. The leader stores the use regularly, so a crash loses at most the use of the last SAVE_S. A tick
does not read waiting jobs, because the sums in `live_jobs` contain the work of each share.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from batchlab.core.api_usage_types import ShareView
from batchlab.core.errors import BackendError, Malformed, Refused, UsageError
from batchlab.core.fair_share import MAX_ENTRIES, ShareLoad, SharePolicy, is_identifier, places, share_of
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Completion, JobId, StageName
from batchlab.core.ports import Cut
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.field_checks import MAX_S, figure
from batchlab.core.text import count
from batchlab.manager.live_jobs import PoolWork
from batchlab.manager.state import Backlog, LiveJob, running_bundles
from batchlab.manager.versioned_document import VersionedDocument

if TYPE_CHECKING:
    from batchlab.manager.context import Context

log = logging.getLogger(__name__)

SAVE_S = 15.0
"""Interval between writes of the use of shares while jobs run. Each write is billed."""
CLOSE_S = 2.0
"""Maximum time that an exiting manager waits for the write of the use."""
MIN_USE_S = 0.001
"""Use in slot seconds below which the use of a share is forgotten."""
RESERVE_S = 60.0
"""Time in seconds after which a stage reserves the slots that become free below a limit. The stage waits because its
tasks need more slots than are free."""

REMOVE = "Use the release of batchlab that wrote the policy, or remove the policy with `batchlab share remove --all`."

Scope = tuple[str, str | None]
"""Scope of a limit of slots: a pool and a share with a limit, or a pool and None for the pool's compute reservation."""
StageKey = tuple[JobId, StageName]
Change = Callable[[SharePolicy], SharePolicy]
_NOTHING: Counter[str] = Counter()


@dataclass(slots=True)
class Use:
    """Use of a share in a pool: the slot seconds at the monotonic time `at_s`, without the decay since then.

    The last bundle of the share ended at the monotonic time `active_s`.
    """

    use_s: float = 0.0
    at_s: float = 0.0
    active_s: float = 0.0


def policy_of(content: bytes) -> SharePolicy | None:
    """Return the policy in the stored document, or None after a removal. Raise Malformed for other content."""
    doc = json_format.loads(content)["policy"]
    try:
        return None if doc is None else SharePolicy.from_json(doc)
    except UsageError as error:
        raise Malformed(f"The fair-share policy cannot be read: {error.message}") from error


class FairShare:
    """Fair share of the leader. Only a manager of a full grid reads and stores the policy (`is_enabled`)."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._clock = context.ports.clock
        self._lives = context.lives
        self.is_enabled = False
        self.policy: SharePolicy | None = None
        self._use: dict[str, dict[str, Use]] = {}
        """Use by pool and share."""
        self._policy_document = VersionedDocument(
            context.ports, object_keys.SHARES, self._merge_policy, keeps_unreadable=True
        )
        self._use_document = VersionedDocument(context.ports, object_keys.SHARE_USE, self._merge_use)
        self._lock = asyncio.Lock()
        self._pending: dict[tuple[str, str], Counter[str]] = {}
        """Numbers of bundles, slots, and GPUs of cuts that are not committed yet, by pool and share."""
        self._waiting: dict[Scope, dict[StageKey, float]] = {}
        """Stages whose tasks need more slots than are free below a limit, and the monotonic time when each began to
        wait. The stage that has waited longest is first."""
        self._is_changed = False
        self._saved_s: float | None = None

    # --- Policy and use in the bucket ------------------------------------------------------------

    async def load(self) -> None:
        """Read the policy and the use that an earlier leader has stored."""
        if not self.is_enabled:
            return
        # The policy in memory stays until another policy is read, because requests may submit jobs during the read.
        await self._policy_document.load()
        if self.policy is not None:
            await self._use_document.load()

    @property
    def problem(self) -> str:
        """Return a sentence about a stored policy that this manager cannot read, or ""."""
        if self._policy_document.is_readable:
            return ""
        force = "no policy is in force" if self.policy is None else "the last policy that it has read stays in force"
        return f"The manager cannot read the stored fair-share policy, so {force}."

    def check_share(self, share: str) -> None:
        """Raise UsageError if the policy does not permit new jobs of the share."""
        if self.policy is not None:
            self.policy.check_share(share)

    async def change(self, change: Change | None) -> None:
        """Change the policy, or remove the policy if `change` is None. Raise UsageError for an impossible change."""
        if not self.is_enabled:
            raise Refused(
                "This manager does not divide its pools by shares.",
                remedy="Use a manager that `batchlab grid up` starts.",
            )

        after: SharePolicy | None = None

        def encode() -> bytes:
            nonlocal after
            after = None if change is None else change(self.policy or SharePolicy())
            return json_format.to_bytes(
                {"v": json_format.VERSION, "policy": None if after is None else after.to_json()}
            )

        async with self._lock:
            if change is not None and not self._policy_document.is_readable:
                # Another manager or the user may have replaced the unreadable policy.
                await self._policy_document.load()
            try:
                await self._policy_document.write(encode, replaces_unreadable=change is None)
            except Refused as error:
                raise Refused(self.problem, remedy=REMOVE) from error
            self._set(after)
        self._context.wake.set()

    def _merge_policy(self, content: bytes) -> None:
        self._set(policy_of(content))

    def _set(self, policy: SharePolicy | None) -> None:
        now_s = self._clock.monotonic_s()
        if self.policy is not None and policy is not None:
            # The decay until now follows the old policy.
            for uses in self._use.values():
                for use in uses.values():
                    use.use_s, use.at_s = self._decayed_s(use, now_s), now_s
        elif policy is None:
            self._use = {}
        if policy != self.policy:
            self._waiting.clear()
        self.policy = policy
        self._lives.divide_by_share(is_divided=policy is not None)

    async def save(self) -> None:
        """Store the use of the shares if the use has changed and the last write is old."""
        now_s = self._clock.monotonic_s()
        if self.policy is None or not self._is_changed:
            return
        if self._saved_s is not None and now_s - self._saved_s < SAVE_S:
            return
        self._saved_s, self._is_changed = now_s, False
        try:
            await self._use_document.write(self._use_to_bytes)
        except BackendError as error:
            log.warning("the use of the shares is not stored yet: %s", error)
            self._is_changed = True

    async def close(self) -> None:
        """Store the use of the shares before the manager exits."""
        if self.policy is None:
            return
        self._saved_s = None
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.save()

    def _use_to_bytes(self) -> bytes:
        monotonic_s, now_s = self._clock.monotonic_s(), self._clock.now_s()
        pools = {
            pool: {
                share: [use.use_s, now_s - (monotonic_s - use.at_s)]
                for share, use in uses.items()
                if self._decayed_s(use, monotonic_s) >= MIN_USE_S
            }
            for pool, uses in self._use.items()
        }
        return json_format.to_bytes({"v": json_format.VERSION, "pools": pools})

    def _merge_use(self, content: bytes) -> None:
        """Merge the use that another leader has stored. For a share that both leaders counted, keep the larger use."""
        monotonic_s, now_s = self._clock.monotonic_s(), self._clock.now_s()
        for pool, shares in json_format.loads(content)["pools"].items():
            for share, (use_s, at_s) in list(shares.items())[:MAX_ENTRIES]:
                if not is_identifier(share):
                    raise ValueError("a share identifier is expected")
                stored_s = monotonic_s - max(0.0, now_s - figure(at_s, MAX_S))
                stored = Use(figure(use_s), stored_s, stored_s)
                counted = self._use.setdefault(pool, {}).get(share, Use())
                if self._decayed_s(stored, monotonic_s) > self._decayed_s(counted, monotonic_s):
                    self._use[pool][share] = stored

    # --- Use -------------------------------------------------------------------------------------

    def add_use(self, job: JobDef, done: Completion) -> None:
        """Count the use of an ended bundle. The caller counts each bundle once."""
        if self.policy is None:
            return
        stage, now_s = job.stage(done.bundle.stage), self._clock.monotonic_s()
        if more_s := self.policy.use_of(stage.slots, done.ended_s - done.started_s):
            uses = self._use.setdefault(stage.pool, {})
            share = share_of(job)
            uses[share] = Use(self._use_s(stage.pool, share, now_s) + more_s, now_s, now_s)
            self._is_changed = True
            if len(uses) > MAX_ENTRIES:
                del uses[min(uses, key=lambda one: (uses[one].active_s, one))]

    def _use_s(self, pool: str, share: str, now_s: float) -> float:
        use = self._use.get(pool, {}).get(share)
        return 0.0 if use is None else self._decayed_s(use, now_s)

    def _decayed_s(self, use: Use, now_s: float) -> float:
        return 0.0 if self.policy is None else self.policy.decayed(use.use_s, now_s - use.at_s)

    # --- Places in the window --------------------------------------------------------------------

    def room(self, live: LiveJob, stage: StageDef, tasks: int) -> int:
        """Return the number of bundles of the stage that may be sent now. The stage has `tasks` uncut tasks.

        Shares come first, and priorities order the jobs within a share, as in AWS Batch. The jobs of the highest
        priority in a share divide the places of the share evenly.
        """
        assert self.policy is not None
        pool, share, priority = stage.pool, share_of(live.job), live.job.priority
        works = self._works(pool, share)
        work = works[share]
        if work.has_higher(priority):
            return 0
        bundles, window = self._bundles(pool, share, work), self._context.window(pool)
        if not self._may_cut(pool, share, bundles, window):
            return 0
        outstanding = live.outstanding_in(pool) - live.delayed_in(pool)
        is_counted = self._lives.may_cut(live, pool)
        places_of = places(self._loads(pool, works, {} if is_counted else {share: tasks}), window)
        share_places = places_of[share]
        room = share_places - bundles
        peers = work.peers(priority) + (not is_counted)
        if peers > 1:
            room = min(room, max(1, share_places // peers) - outstanding)
        if room <= 0:
            return 0
        limits: list[tuple[Scope, int, int]] = []
        if (limit := self._limit(share)) is not None:
            limits.append(((pool, share), limit, self._slots(pool, share, work)))
        if self.policy.reservation:
            limits.append(((pool, None), self._usable_slots(pool, share), self._slots_in(pool, works)))
        key = live.id, stage.name
        for scope, limit, used in limits:
            # One bundle is always allowed, because a job must end even if the limit is below the slots of its tasks.
            room = min(room, max((limit - used) // stage.slots, 0 if used else 1))
            if room <= 0:
                if stage.slots > 1:
                    self._waiting.setdefault(scope, {}).setdefault(key, self._clock.monotonic_s())
                return 0
            if self._reserving_job(scope, stage.slots, places_of):
                return 0
        if limits:
            self._end_wait(key)
        return room if self._is_worth_its_cost(pool, share, bundles, room, share_places) else 0

    def _may_cut(self, pool: str, share: str, bundles: int, window: int) -> bool:
        """Return whether the share could cut bundles if it had all places of the window.

        If not, the manager does not need to compute the places of the shares, which takes longer.
        """
        return self._is_worth_its_cost(pool, share, bundles, window - bundles, window)

    def _is_worth_its_cost(self, pool: str, share: str, bundles: int, room: int, share_places: int) -> bool:
        """Return whether a cut of `room` bundles is worth its cost. The share has `bundles` outstanding bundles.

        A cut costs the same for any number of bundles, so the manager waits until the share has room for one bundle per
        slot. A smaller cut is worth its cost if the share has at most one bundle per slot, because its slots would be
        idle soon. It is also worth its cost below a limit or a reservation, because the room may never become larger.
        """
        assert self.policy is not None
        share_slots = self._context.slots.get(pool, 1) * share_places // self._context.window(pool)
        has_limit = bool(self.policy.reservation) or self._limit(share) is not None
        return room >= share_slots or bundles <= share_slots or has_limit

    def _reserving_job(self, scope: Scope, slots: int, places_of: Mapping[str, int]) -> JobId | None:
        """Return the job that reserves the free slots below the limit, or None if a task with `slots` slots may use
        them.

        A stage reserves the slots if it has waited for RESERVE_S and its tasks need more than `slots` slots. A stage
        reserves nothing while its share has no free place in the window, because the other shares come first.
        """
        first = self._first_waiting(scope)
        if first is None or self._clock.monotonic_s() - self._waiting[scope][first] < RESERVE_S:
            return None
        (pool, _), (job, stage) = scope, first
        share = share_of(self._lives[job].job)
        is_larger = self._lives[job].job.stage(stage).slots > slots
        has_place = places_of[share] > self._bundles(pool, share, self._works(pool, share)[share])
        return job if is_larger and has_place else None

    def _first_waiting(self, scope: Scope) -> StageKey | None:
        """Return the stage that has waited longest for slots below the limit, or None.

        Remove stages that may no longer cut bundles, and stages of jobs below the highest priority of their share.
        """
        pool, _ = scope
        while waiting := self._waiting.get(scope):
            job, stage = key = next(iter(waiting))
            live = self._lives.get(job)
            if live is not None and live.stages[stage].left.ranges and self._lives.may_cut(live, pool):
                share = share_of(live.job)
                if not self._works(pool, share)[share].has_higher(live.job.priority):
                    return key
            self._end_wait(key)
        return None

    def _end_wait(self, key: StageKey) -> None:
        for scope in [scope for scope, waiting in self._waiting.items() if key in waiting]:
            del self._waiting[scope][key]
            if not self._waiting[scope]:
                del self._waiting[scope]

    @contextmanager
    def pending(self, job: JobDef, cut: Cut) -> Iterator[None]:
        """Count the bundles of the cut while the caller commits and sends the cut.

        The bundles are not outstanding before the commit, and the manager may cut other jobs meanwhile.
        """
        stage, number = job.stage(cut.stage), len(cut.bundles)
        if not number:
            # The end of another cut deletes a counter that has only zeros, so an empty cut must not use a counter.
            yield
            return
        key = stage.pool, share_of(job)
        added = Counter(bundles=number, slots=number * stage.slots, gpus=number * stage.gpus)
        self._pending.setdefault(key, Counter()).update(added)
        try:
            yield
        finally:
            self._pending[key].subtract(added)
            if not any(self._pending[key].values()):
                del self._pending[key]

    def pending_gpus(self, pool: str) -> int:
        """Return the number of GPUs of the pool's cuts that are not committed yet."""
        return sum(counts["gpus"] for (name, _), counts in self._pending.items() if name == pool)

    def _works(self, pool: str, share: str) -> dict[str, PoolWork]:
        """Return the work of each share in the pool. The result contains `share` even without live jobs."""
        works = self._shares(pool)
        return works if share in works else {share: PoolWork(), **works}

    def _shares(self, pool: str) -> dict[str, PoolWork]:
        """Return the work of each share that has live jobs in the pool."""
        return self._lives.shares(pool, self._clock.monotonic_s())

    def _bundles(self, pool: str, share: str, work: PoolWork) -> int:
        return work.active_bundles + self._pending.get((pool, share), _NOTHING)["bundles"]

    def _slots(self, pool: str, share: str, work: PoolWork) -> int:
        return work.slots + self._pending.get((pool, share), _NOTHING)["slots"]

    def _slots_in(self, pool: str, works: Mapping[str, PoolWork]) -> int:
        return sum(self._slots(pool, share, work) for share, work in works.items())

    def ready(self, pool: str) -> list[LiveJob]:
        """Return the jobs that may cut bundles now."""
        works = self._shares(pool)
        if self.policy is None:
            return []
        window = self._context.window(pool)
        bundles = {share: self._bundles(pool, share, work) for share, work in works.items() if work.uncut}
        bundles = {share: number for share, number in bundles.items() if self._may_cut(pool, share, number, window)}
        if not bundles:
            return []
        share_places = places(self._loads(pool, works), window)
        scopes = [scope for scope in self._waiting if scope[0] == pool]
        ready = {first[0]: self._lives[first[0]] for scope in scopes if (first := self._first_waiting(scope))}
        for share, number in bundles.items():
            room = share_places[share] - number
            if self._is_worth_its_cost(pool, share, number, room, share_places[share]):
                ready |= {live.id: live for live in works[share].first(room)}
        return list(ready.values())

    def wake(self, pools: set[str]) -> None:
        """Wake the jobs that may cut bundles after the end of bundles in the pools."""
        for pool in sorted(pools) if self.policy else ():
            for live in self.ready(pool):
                live.wake.set()

    def _loads(
        self, pool: str, works: Mapping[str, PoolWork], more_tasks: Mapping[str, int] = MappingProxyType({})
    ) -> dict[str, ShareLoad]:
        """Return the load of each share in the pool. `more_tasks` are uncut tasks that `works` does not count yet."""
        assert self.policy is not None
        now_s = self._clock.monotonic_s()
        active_bundles = sum(work.active_bundles for work in works.values())
        sent_us = sum(work.sent_us for work in works.values())
        usual_s = sent_us / 1e6 / active_bundles if active_bundles else settlement.TARGET_S
        loads: dict[str, ShareLoad] = {}
        for share, work in works.items():
            bundles, slots = self._bundles(pool, share, work), self._slots(pool, share, work)
            rule = self.policy.rule(share)
            max_places = bundles + work.uncut_tasks + more_tasks.get(share, 0)
            if rule.max_slots is not None:
                max_places = min(max_places, bundles + max(rule.max_slots - slots, 0 if slots else 1))
            place_s = work.sent_us / 1e6 / work.active_bundles if work.active_bundles else usual_s
            loads[share] = ShareLoad(rule.weight, self._use_s(pool, share, now_s), place_s, max_places)
        return loads

    def _limit(self, share: str) -> int | None:
        return None if self.policy is None else self.policy.rule(share).max_slots

    def _usable_slots(self, pool: str, share: str = "") -> int:
        """Return the slots of the pool that the active shares, including `share`, may use."""
        assert self.policy is not None
        return self.policy.usable_slots(self._max_slots(pool), len(self._active(pool) | ({share} if share else set())))

    def _max_slots(self, pool: str) -> int:
        view = self._context.groups.get(pool)
        settings = view.pool if view else self._context.pools.get(pool)
        return settings.max_size * settings.slots if settings else 1

    def _active(self, pool: str) -> set[str]:
        """Return the shares that have jobs with work, or whose last bundle ended less than the decay time ago."""
        assert self.policy is not None
        since_s = self._clock.monotonic_s() - self.policy.decay_s
        recent = {share for share, use in self._use.get(pool, {}).items() if use.active_s >= since_s}
        return recent | {share for share, work in self._shares(pool).items() if work.working}

    def limit_backlog(self, pool: str, backlog: Backlog) -> Backlog:
        """Return the backlog without the tasks that limits of shares or the reservation prevent from running.

        An instance for these tasks would be idle.
        """
        if self.policy is None or not backlog.tasks:
            return backlog
        tasks, now_s = backlog.tasks, self._clock.monotonic_s()
        for share, work in self._shares(pool).items():
            if (limit := self._limit(share)) is not None:
                tasks -= max(0, self._lives.backlog_of(work, pool, now_s).tasks - limit)
        if self.policy.reservation:
            tasks = min(tasks, self._usable_slots(pool))
        tasks = max(1, tasks)
        return replace(
            backlog, tasks=tasks, gpu_tasks=min(backlog.gpu_tasks, backlog.gpu_tasks * tasks // backlog.tasks)
        )

    # --- Views -----------------------------------------------------------------------------------

    def wait_reason(self, live: LiveJob, pool: str) -> str:
        """Return a clause about why uncut tasks of the job wait for the job's share in the pool, or "" if they do
        not."""
        if self.policy is None or not live.has_uncut_tasks(pool):
            return ""
        share = share_of(live.job)
        works, limit = self._works(pool, share), self._limit(share)
        slots = self._slots(pool, share, works[share])
        needed = min(one.slots for one in live.job.stages if one.pool == pool)
        if limit is not None and slots + needed > limit and slots:
            return f"share {share} uses {slots} of at most {count(limit, 'slot')} in pool {pool}"
        max_slots, usable, used = self._max_slots(pool), self._usable_slots(pool, share), self._slots_in(pool, works)
        if used and used + needed > usable:
            reserved = f"{max_slots - usable} of {max_slots} slots of pool {pool}"
            return f"the compute reservation keeps {reserved} free for other shares"
        loads, bundles = self._loads(pool, works), self._bundles(pool, share, works[share])
        places_of = places(loads, self._context.window(pool))
        share_places = places_of[share]
        for scope in ((pool, share), (pool, None)):
            if (job := self._reserving_job(scope, needed, places_of)) not in (None, live.id):
                return f"the slots that become free are reserved for job {job}, whose tasks need more slots"
        rivals = [name for name, load in loads.items() if name != share and load.max_places]
        if bundles < share_places or not rivals:
            return ""
        uses = {name: loads[name].weight * loads[name].use_s for name in (share, *rivals)}
        first = min(rivals, key=lambda name: (uses[name], name))
        return (
            f"share {share} has {count(bundles, 'bundle')} outstanding in pool {pool}, and "
            f"{count(share_places, 'place')}. The weighted use of share {share} is {uses[share]:.0f} slot seconds, and "
            f"that of share {first} is {uses[first]:.0f}"
        )

    def status(self) -> list[ShareView]:
        """Return the state of each share in each pool in which the share has an entry, jobs, or use."""
        if self.policy is None:
            return []
        now_s = self._clock.monotonic_s()
        named = [one.identifier for one in self.policy.shares if not one.identifier.endswith("*")]
        running: Counter[tuple[str, str]] = Counter()
        running_slots: Counter[tuple[str, str]] = Counter()
        for bundle in running_bundles(self._lives, self._context.registry.workers.values()):
            job = self._lives[bundle.job].job
            stage = job.stage(bundle.stage)
            running[stage.pool, share_of(job)] += 1
            running_slots[stage.pool, share_of(job)] += stage.slots
        result: list[ShareView] = []
        for pool in sorted(self._context.pools):
            works = self._shares(pool)
            active = self._active(pool)
            share_places = places(self._loads(pool, works), self._context.window(pool))
            busy = {share for share, work in works.items() if work.working or work.bundles}
            shares = {share: self.policy.attributes(share) for share in sorted({*named, *active, *busy})}
            active_total = sum(1 / shares[share].weight for share in active)
            for share, attributes in shares.items():
                work, claim = works.get(share) or PoolWork(), 1 / attributes.weight
                result.append(
                    {
                        "share": share,
                        "pool": pool,
                        "weight": attributes.weight,
                        "max_slots": attributes.max_slots,
                        "part": claim / (active_total if share in active else active_total + claim),
                        "use_s": self._use_s(pool, share, now_s),
                        "bundles": work.bundles,
                        "slots": work.slots,
                        "places": share_places.get(share, 0),
                        "jobs": len(work.working),
                        "waiting_tasks": work.uncut_tasks,
                        "running_slots": running_slots[pool, share],
                        "waiting_bundles": work.bundles - running[pool, share],
                    }
                )
        return result
