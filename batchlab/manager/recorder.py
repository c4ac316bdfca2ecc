"""What reports need of the time while jobs ran: queues, fleet, scaling, instances, requests.

Invariants: a sample is taken from what the manager has in memory anyway, at most once a second, and
asks nobody. What is kept is bounded, and coarser the older it is. It is in the bucket once a minute
while there are jobs, and of a job that has ended along with its account, so that the next leader
goes on with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from batchlab.costs.meter import Account
from batchlab.errors import BackendError, NotFound
from batchlab.manager.autoscaler import Backlog
from batchlab.manager.live import LiveJob, Ports
from batchlab.manager.recorded import Doc, part_of
from batchlab.manager.registry import Registry
from batchlab.manager.series import Point, Series, latest, of_pool
from batchlab.model import (
    GroupView,
    Instance,
    JobId,
    JobState,
    LifecycleState,
    StageName,
)
from batchlab.ports import Depth
from batchlab.protocol import naming, wire

log = logging.getLogger(__name__)

SAMPLE_S = 1.0
REQUESTS_S = 10.0
"""How often a job's requests are noted."""
SAVE_S = 60.0
CLOSE_S = 1.0
SHORT_S = 5.0
FEW = 64
"""Instances, and workers, that a job shorter than `SHORT_S` tells of."""
MOST_DECISIONS = 2_000
MOST_INSTANCES = 20_000
MOST_JOBS = 200
"""So many jobs have their requests noted over time; of others only the total is known."""
HEARD = 4_096
"""Duplicates that are told apart from those heard before."""
_BOOTING = {
    LifecycleState.PENDING,
    LifecycleState.PENDING_WAIT,
    LifecycleState.PENDING_PROCEED,
}
_LEAVING = {
    LifecycleState.TERMINATING,
    LifecycleState.TERMINATING_WAIT,
    LifecycleState.TERMINATING_PROCEED,
}
_GONE = LifecycleState.TERMINATED


class _Seen:
    """A live job: since when it is there (seconds of the epoch), and what is its own."""

    def __init__(self, since_s: float, pools: Iterable[str]) -> None:
        self.since_s = since_s
        self.pools = sorted(set(pools))
        self.requests = Series(latest)
        self.duplicates: dict[str, dict[str, list[float]]] = {}
        """By stage and kind: how often, slot seconds."""


class Recorder:
    """The leader's."""

    def __init__(self, ports: Ports, lives: Mapping[JobId, LiveJob], registry: Registry) -> None:
        self._ports = ports
        self._lives = lives
        self._registry = registry
        self._pools: dict[str, Series] = {}
        self._slots: dict[str, tuple[int, str]] = {}
        """By pool: slots of an instance, its type."""
        self._decisions: deque[list[Any]] = deque(maxlen=MOST_DECISIONS)
        self._instances: dict[str, list[Any]] = {}
        self._workers: dict[str, list[Any]] = {}
        self._jobs: dict[JobId, _Seen] = {}
        self._earlier: dict[JobId, Doc] = {}
        """Of jobs that are run again, what was recorded in the rounds before."""
        self._heard: dict[str, None] = {}
        self._sampled_s: float | None = None
        """Monotonic."""
        self._asked_s: float | None = None
        self._is_due = False

    # --- What is seen ----------------------------------------------------------------------------

    def observe(
        self,
        views: Mapping[str, GroupView],
        depths: Mapping[str, Depth],
        backlog_of: Callable[[str], Backlog],
    ) -> None:
        """Take a sample, where it is time for one."""
        now_s, monotonic_s = self._ports.clock.now_s(), self._ports.clock.monotonic_s()
        self._note_jobs()
        self._note_instances(views, now_s)
        if not self._jobs:
            self._sampled_s = None
            self._forget(now_s)
            return
        if self._sampled_s is not None and monotonic_s - self._sampled_s < SAMPLE_S:
            return
        step_s = monotonic_s - self._sampled_s if self._sampled_s is not None else 0.0
        self._sampled_s = monotonic_s
        self._is_due = True
        self._note_workers(now_s)
        for name, view in views.items():
            depth = depths.get(name, Depth(0, 0, 0))
            point = self._point(view, depth, backlog_of(name), now_s, step_s)
            self._pools.setdefault(name, Series(of_pool)).add(point)
        if self._asked_s is None or monotonic_s - self._asked_s >= REQUESTS_S:
            step_s = monotonic_s - self._asked_s if self._asked_s is not None else 0.0
            self._asked_s = monotonic_s
            self._note_requests(now_s, step_s)

    def _note_jobs(self) -> None:
        """Begin with jobs that have come, and forget those that have ended."""
        for live in self._lives.values():
            self.adopt(live)
        for job in [one for one in self._jobs if one not in self._lives]:
            del self._jobs[job]
            self._earlier.pop(job, None)

    def adopt(self, live: LiveJob) -> None:
        """A job is conducted from now on: it may have ended before the next look."""
        if live.id not in self._jobs and live.record.state is not JobState.SCHEDULED:
            self._begin(live)

    def _begin(self, live: LiveJob) -> _Seen:
        now_s = round(self._ports.clock.now_s(), 3)
        seen = self._jobs[live.id] = _Seen(now_s, (stage.pool for stage in live.job.stages))
        return seen

    def close(self, job: JobId, account: Account) -> Doc:
        """What was recorded of a job that has ended, to be kept along with its account."""
        seen, now_s = self._jobs.get(job), self._ports.clock.now_s()
        if seen:
            self._note_workers(now_s)
            seen.requests.add(_asked(account, now_s, 0.0))
        part = part_of(self._to_doc(), job)
        # Now, and not at the next look: a retry may come before that, and begins anew.
        self._jobs.pop(job, None)
        self._earlier.pop(job, None)
        if seen and now_s - seen.since_s < SHORT_S:
            # There may be very many of them, and each would tell of the whole fleet.
            for name in ("instances", "workers"):
                part[name] = dict(list(part[name].items())[:FEW])
        return part

    def took_s(self, job: JobId) -> float:
        """For how long it has been seen; 0 where it has not."""
        seen = self._jobs.get(job)
        return self._ports.clock.now_s() - seen.since_s if seen else 0.0

    def _point(
        self, view: GroupView, depth: Depth, backlog: Backlog, now_s: float, step_s: float
    ) -> Point:
        states = [instance.state for instance in view.instances]
        in_service = sum(state is LifecycleState.IN_SERVICE for state in states)
        holding, busy_slots = self._busy(view.pool.name)
        return [
            *(round(now_s, 3), round(step_s, 3)),
            *(depth.visible, depth.in_flight, depth.delayed, backlog.tasks),
            view.desired,
            sum(state in _BOOTING for state in states),
            in_service,
            sum(state in _LEAVING for state in states),
            holding,
            in_service * view.pool.slots,
            busy_slots,
        ]

    def _busy(self, pool: str) -> tuple[int, float]:
        """Instances that hold a bundle, and slots that run one, as their last beats say."""
        holding, slots = 0, 0.0
        for seen in self._registry.workers.values():
            if seen.beat.pool != pool or not seen.beat.held:
                continue
            holding += 1
            for held in seen.beat.held:
                live = self._lives.get(held.job)
                if held.running and live:
                    slots += next((s.slots for s in live.job.stages if s.name == held.stage), 1)
        return holding, slots

    def _note_instances(self, views: Mapping[str, GroupView], now_s: float) -> None:
        there: set[str] = set()
        for name, view in views.items():
            self._slots[name] = view.pool.slots, view.pool.instance_type
            for instance in view.instances:
                there.add(instance.id)
                self._note_instance(instance, view, now_s)
        for one, known in self._instances.items():
            if one not in there and known[6] is None:
                known[6], known[7] = round(now_s, 3), _GONE.value

    def _note_instance(self, instance: Instance, view: GroupView, now_s: float) -> None:
        known = self._instances.get(instance.id)
        if known is None:
            since_s = min((seen.since_s for seen in self._jobs.values()), default=now_s)
            if instance.state is _GONE and instance.launched_s < since_s:
                return  # of a time when nobody looked: a group tells of its dead for a while
            launched_s = round(instance.launched_s, 3)
            known = [instance.pool, "", "", "", launched_s, None, None, "", "", view.pool.slots]
            self._instances[instance.id] = known
        machine = instance.machine
        spot = instance.id in self._registry.spot
        type_ = machine.type or view.pool.instance_type
        known[1:4] = type_, machine.zone, "spot" if spot else machine.market.value
        known[7] = instance.state.value
        known[8] = instance.note or known[8]
        if instance.state is LifecycleState.IN_SERVICE and known[5] is None:
            known[5] = round(now_s, 3)
        if instance.state is _GONE and known[6] is None:
            known[6] = round(now_s, 3)

    def _note_workers(self, now_s: float) -> None:
        for seen in self._registry.workers.values():
            beat = seen.beat
            known = self._workers.get(beat.worker)
            if known is None:
                known = [beat.instance, beat.pool, beat.slots, round(now_s, 3), 0.0]
                self._workers[beat.worker] = known
            known[4] = round(now_s, 3)

    def _note_requests(self, now_s: float, step_s: float) -> None:
        for n, (job, seen) in enumerate(self._jobs.items()):
            if n < MOST_JOBS and (live := self._lives.get(job)):
                seen.requests.add(_asked(live.account, now_s, step_s))

    def samples(self, since_s: float) -> dict[str, list[Point]]:
        """Each pool's points after that moment, as `_point` makes them."""
        return {name: series.since(since_s) for name, series in self._pools.items()}

    # --- What is told ----------------------------------------------------------------------------

    def decided(self, view: GroupView, desired: int, why: str, backlog: Backlog) -> None:
        """A pool's desired capacity is to be another."""
        now_s = round(self._ports.clock.now_s(), 3)
        in_service = sum(one.state is LifecycleState.IN_SERVICE for one in view.instances)
        self._decisions.append(
            [
                *(view.pool.name, now_s, view.desired, desired, in_service),
                *(backlog.tasks, round(backlog.seconds, 3), why),
            ]
        )
        self._is_due = True

    def repeated(self, job: JobId, stage: StageName) -> None:
        """An outcome was heard of that had been counted."""
        self._count(job, stage, "event", 0.0)

    def told(self, duplicates: Iterable[wire.Duplicate]) -> None:
        """Workers have met something twice."""
        for one in duplicates:
            if one.execution not in self._heard:
                self._heard[one.execution] = None
                self._count(one.job, one.stage, one.kind, one.slot_s)
        while len(self._heard) > HEARD:
            del self._heard[next(iter(self._heard))]

    def _count(self, job: JobId, stage: StageName, kind: str, slot_s: float) -> None:
        seen = self._jobs.get(job)
        if seen is None:
            live = self._lives.get(job)
            if live is None:
                return  # its end has been recorded
            seen = self._begin(live)
        counted = seen.duplicates.setdefault(stage, {}).setdefault(kind, [0, 0.0])
        counted[0] += 1
        counted[1] = round(counted[1] + slot_s, 6)

    def reopened(self, job: JobId, earlier: Doc) -> None:
        """A job runs again, of which that was recorded before."""
        self._earlier[job] = earlier

    # --- The bucket ------------------------------------------------------------------------------

    def _forget(self, now_s: float) -> None:
        """Drop what no live job needs."""
        since_s = min((seen.since_s for seen in self._jobs.values()), default=now_s)
        for series in self._pools.values():
            series.forget(since_s)
        while self._decisions and self._decisions[0][1] < since_s - SAVE_S:
            self._decisions.popleft()
        ended = [n for n, one in self._instances.items() if one[6] is not None]
        too_many = len(self._instances) - MOST_INSTANCES
        for name in ended:
            if self._instances[name][6] < since_s or too_many > 0:
                del self._instances[name]
                too_many -= 1
        living = {seen.beat.worker for seen in self._registry.workers.values()}
        gone = [n for n, one in self._workers.items() if n not in living]
        too_many = len(self._workers) - MOST_INSTANCES
        for name in gone:
            if self._workers[name][4] < since_s or too_many > 0:
                del self._workers[name]
                too_many -= 1

    def _to_doc(self) -> Doc:
        return {
            "pools": {
                name: {
                    "slots": slots,
                    "type": type_,
                    "series": self._pools[name].points if name in self._pools else [],
                }
                for name, (slots, type_) in self._slots.items()
            },
            "scaling": list(self._decisions),
            "instances": self._instances,
            "workers": self._workers,
            "jobs": {
                job: {
                    "since_s": seen.since_s,
                    "requests": seen.requests.points,
                    "duplicates": seen.duplicates,
                    "pools": seen.pools,
                }
                for job, seen in self._jobs.items()
            },
            "earlier": self._earlier,
        }

    async def load(self) -> None:
        """Take over what the leader before us has written down."""
        get = partial(self._ports.objects.get, naming.RECORD)
        try:
            doc = wire.loads(await self._ports.patience(get))
            self._take_over(doc)
        except NotFound:
            return
        except (BackendError, KeyError, TypeError, ValueError) as error:
            # One that a later release has written must not keep anybody from leading.
            log.warning("what was recorded of queues and fleet cannot be read: %r", error)

    def _take_over(self, doc: Doc) -> None:
        for name, pool in doc["pools"].items():
            self._slots[name] = pool["slots"], pool["type"]
            self._pools[name] = Series(of_pool, pool["series"])
        self._decisions.extend(doc["scaling"])
        self._instances = {name: list(one) for name, one in doc["instances"].items()}
        self._workers = {name: list(one) for name, one in doc["workers"].items()}
        for job, one in doc["jobs"].items():
            seen = self._jobs[JobId(job)] = _Seen(one["since_s"], one["pools"])
            seen.requests = Series(latest, one["requests"])
            seen.duplicates = one["duplicates"]
        self._earlier = {JobId(job): one for job, one in doc["earlier"].items()}

    async def leave(self) -> None:
        """Write down what there is, if the bucket takes it soon; the next leader goes on."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.save()

    async def keep(self) -> None:
        """Write it down now and then, for ever; no tick waits for that."""
        while True:
            await asyncio.sleep(SAVE_S)
            await self.save()

    async def save(self) -> None:
        """Write it down, where there is something new."""
        if not self._is_due:
            return
        self._is_due = False
        self._forget(self._ports.clock.now_s())
        data = wire.to_bytes({"v": wire.VERSION, **self._to_doc()})
        try:
            await self._ports.patience(partial(self._ports.objects.put, naming.RECORD, data))
        except BackendError as error:
            log.warning("what was recorded of queues and fleet is not written down yet: %s", error)
            self._is_due = True


def _asked(account: Account, now_s: float, step_s: float) -> Point:
    made = account.requests
    return [
        *(round(now_s, 3), round(step_s, 3)),
        *(made.sqs, made.sqs_empty, made.s3_puts, made.s3_gets, made.s3_deletes),
    ]
