"""What the manager keeps in memory: its ports and settings, and each job that has not ended.

Invariant: everything here can be thrown away at any moment; a new leader reads it from the ledger.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace

from batchlab.core.errors import Malformed, NotFound, Refused
from batchlab.core.eta import Pace
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import (
    Bundle,
    BundleId,
    Completion,
    Control,
    JobId,
    JobState,
    Outcome,
    StageName,
)
from batchlab.core.ports import (
    BundleRecord,
    Clock,
    Fleet,
    Ids,
    JobRecord,
    JobRows,
    Ledger,
    MoveJob,
    Objects,
    Queue,
    StageRecord,
)
from batchlab.core.pricing.cap import Budget
from batchlab.core.pricing.usage_meter import Account
from batchlab.core.protocol import bundle_size
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.messages import Beat, Held
from batchlab.core.retry import Patience
from batchlab.core.tracing import LINKS
from batchlab.manager.events.retained_outcomes import Retained

EARLY = 256
UNKNOWN_TASK_S = 1.0
"""Assumed for a task before any has been measured, or as long as the first has run for."""
PAGE = 1000
"""Jobs that are read from the ledger at once."""
RECENT = 32
"""Outcomes of a job kept in memory for those who wait for them."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything the manager may touch outside itself."""

    objects: Objects
    queue: Queue
    fleet: Fleet
    ledger: Ledger
    clock: Clock
    ids: Ids
    patience: Patience
    keys: CommitKeys = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", CommitKeys(self.objects, self.patience, self.ids))


@dataclass(slots=True)
class Outstanding:
    """A planned bundle without an outcome. `heard_s` (monotonic) is when it was last sent or
    named in a beat, or will be due where it was sent with a delay."""

    bundle: Bundle
    heard_s: float
    since_s: float = 0.0
    """Monotonic; when this manager has sent it, heard of it, or found it."""
    copies: int = 0
    """How often it was sent again because nothing was heard of it."""


@dataclass(slots=True)
class LiveJob:
    """A job that has not ended."""

    record: JobRecord
    stages: dict[StageName, StageRecord]
    began_s: dict[StageName, float] = field(default_factory=dict)
    """Monotonic time when a worker was first heard to run something of the stage."""
    outstanding: dict[StageName, dict[BundleId, Outstanding]] = field(default_factory=dict)
    poke: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    control_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from reading the control word to having written the next: a slow "run" must not come
    after a "cancel" that has been acknowledged."""
    conducting: asyncio.Task[None] | None = None
    allowed: bool = False
    """Its control object is there."""
    forbidden: bool = False
    """The cancellation is acknowledged: no worker can start a task of it any more."""
    doubtful: bool = False
    """Its control object is to be read: somebody else has conducted the job before, or workers
    cancel tasks of it though nobody has asked us to."""
    trouble: str = ""
    """What the backend answered when the job was last conducted, where that failed."""
    unreadable: Malformed | None = None
    """The error of an object without which the job cannot go on."""
    retried_s: float | None = None
    """When its round was asked for (seconds of the epoch), where it is a retry that says so."""
    version: int = 0
    """Grows with everything a watcher could see, and never is what an earlier manager has shown."""
    folds: int = 0
    """Grows with every outcome that is folded here."""
    known_after: int | None = None
    """`recent` has every outcome folded after this seq; None where nothing is known of them."""
    recent: deque[tuple[BundleRecord, Retained | None]] = field(default_factory=deque)
    """The last outcomes folded: those who wait for results need not ask the ledger for them, nor
    the bucket for those that are small."""
    listeners: int = 0
    """How many wait for its first outcomes, who need not be counted for that."""
    told: list[Retained] = field(default_factory=list)
    """Those first ones, up to RECENT, while somebody waits and none has been folded."""
    early: dict[tuple[StageName, BundleId], None] = field(default_factory=dict)
    """The last bundles of which an outcome came before anybody had said that they were planned:
    short ones that follow from a bundle are quicker than its own event."""
    paces: dict[StageName, tuple[int, float]] = field(default_factory=dict)
    """(tasks, seconds) of what was folded here; see `pace_s`."""
    measured: dict[StageName, Pace] = field(default_factory=dict)
    """What tasks took, of what was folded here."""
    spans: dict[StageName, str] = field(default_factory=dict)
    """Where the trace of each stage goes on that was planned here, a traceparent."""
    traced: dict[StageName, deque[str]] = field(default_factory=dict)
    """The last outcomes of each stage in the job's trace, for a gather to be linked to."""
    account: Account = field(default_factory=Account)
    """What it has used, as AWS would bill it."""
    budget: Budget | None = None
    """What a cap on cost leaves for more work of it; None where there is no cap."""
    is_held: bool = False
    """A cap does not even pay for its next task: nothing more is launched or cut for it."""
    capped: str = ""
    """Which cap that is, and how far it is spent: said until it pays for all that is not cut yet,
    since one that is nearly spent holds the job back again and again."""
    round: int = field(init=False)
    """The only one that is conducted here; the record may already show a later one."""
    _news: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    def __post_init__(self) -> None:
        self.round = self.record.round

    @property
    def job(self) -> JobDef:
        return self.record.job

    @property
    def id(self) -> JobId:
        return self.record.job.id

    @property
    def is_through(self) -> bool:
        """Whether every task is terminal, as far as the ledger has heard."""
        return all(stage.counts.ended for stage in self.stages.values())

    def end(self) -> None:
        """Conduct it no more: this round is over."""
        self.ended.set()
        self.poke.set()

    def take(self, rows: JobRows) -> None:
        """What the ledger says now."""
        # Together: somebody who looks in between must not see an ended job with old counters.
        self.record = rows.job
        self.stages = {s.counts.stage: s for s in rows.stages}
        self.changed()

    def changed(self) -> None:
        """A watcher could see something new: everybody who waits for news wakes."""
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()

    async def news(self, version: int) -> None:
        """Wait until `version` is not the latest."""
        while self.version == version:
            await self._news.wait()

    def tell(self, outcome: Retained) -> bool:
        """Tell who waits for the first outcomes of one that is committed and not yet folded;
        whether anybody does."""
        if not self.listeners or self.folds or len(self.told) >= RECENT:
            return False
        self.told.append(outcome)
        self.changed()
        return True

    @property
    def first_outcomes(self) -> list[Outcome]:
        """The outcomes that were told and are still in memory."""
        return [one.outcome for one in self.told if one.outcome]

    @property
    def has_news_of_outcomes(self) -> bool:
        """Whether outcomes were told or folded, or none will be."""
        return bool(self.first_outcomes or self.folds) or self.record.state.ended

    def forget_outcomes(self, seq: int) -> None:
        """Somebody else may have folded outcomes up to this seq."""
        self.release_outcomes()
        self.recent.clear()
        self.known_after = seq

    def release_outcomes(self) -> None:
        """Remove the outcomes of the job from memory."""
        for _, one in self.recent:
            if one:
                one.release()

    def timed(self, done: Completion) -> None:
        """Note how long the tasks of a completion took, and its attempts that failed."""
        tasks, seconds = self.paces.get(done.bundle.stage, (0, 0.0))
        count = len(done.succeeded)
        seconds += bundle_size.weight_s(count, done.run_s)
        self.paces[done.bundle.stage] = tasks + count, seconds
        pace = self.measured.get(done.bundle.stage, Pace())
        self.measured[done.bundle.stage] = pace.with_bundle(count, done.run_s)

        self.account.bundles += 1
        if done.failed or done.retried:
            stage = self.job.stage(done.bundle.stage)
            failed_s = max(0.0, done.ended_s - done.started_s - done.run_s)
            self.account.fail(stage.pool, failed_s * stage.slots)

    def pace_s(self, stage: StageName) -> float | None:
        """Seconds per task of a stage, as they count for a bundle's size; None where unknown."""
        tasks, seconds = self.paces.get(stage, (0, 0.0))
        return seconds / tasks if tasks else self.stages[stage].counts.mean_s

    def trace(self, stage: StageName, context: str) -> None:
        """Note where in the trace an outcome of the stage was folded."""
        self.traced.setdefault(stage, deque(maxlen=LINKS)).append(context)

    def remember(self, record: BundleRecord, outcome: Retained | None) -> None:
        """What was folded just now, and the outcome itself where that is small."""
        self.recent.append((record, outcome))
        if len(self.recent) > RECENT:
            oldest, its = self.recent.popleft()
            self.known_after = oldest.seq
            if its:
                its.release()

    def outcomes_after(self, seq: int | None) -> list[tuple[BundleRecord, Outcome | None]] | None:
        """What was folded after `seq`, None where only the ledger knows."""
        if self.known_after is None or (seq or 0) < self.known_after:
            return None
        return [
            (record, one.outcome if one else None)
            for record, one in self.recent
            if (record.seq or 0) > (seq or 0)
        ]

    def expect(self, bundles: Iterable[tuple[Bundle, float]]) -> None:
        """Note (bundle, monotonic time it is due) as outstanding."""
        for bundle, heard_s in bundles:
            waiting = self.outstanding.setdefault(bundle.stage, {})
            waiting[bundle.id] = Outstanding(bundle, heard_s, heard_s)

    def settled(self, bundle: Bundle) -> None:
        if self.outstanding.get(bundle.stage, {}).pop(bundle.id, None) is None:
            self.early[bundle.stage, bundle.id] = None
            while len(self.early) > EARLY:
                del self.early[next(iter(self.early))]

    def all_outstanding(self) -> list[Outstanding]:
        return [one for stage in self.outstanding.values() for one in stage.values()]

    def task_s(self, stage: StageDef, now_s: float) -> float:
        """Slot seconds that one task takes, or the first has run for (monotonic)."""
        # Not `pace_s`, in which a long task counts for less.
        mean_s = self.stages[stage.name].counts.mean_s
        if mean_s is None:
            # While instances boot nothing is out, and they must not call for more of them.
            mean_s = max(UNKNOWN_TASK_S, now_s - self.began_s.get(stage.name, now_s))
        return mean_s * stage.slots

    def has_work(self, pool: str) -> bool:
        """Whether instances of the pool wait for it: not for what a cap holds back."""
        if self.record.control is not Control.RUN or self.record.state is JobState.SCHEDULED:
            return False
        for stage in self.job.stages:
            if stage.pool != pool:
                continue
            counts = self.stages[stage.name].counts
            if self.is_held:
                if self.outstanding.get(stage.name):
                    return True
            elif counts.planned is not None and counts.planned > counts.terminal:
                return True
        return False

    @property
    def lacks_bundles(self) -> bool:
        """Whether no bundle is outstanding or left to cut, though planned tasks have not ended."""
        if any(self.outstanding.values()):
            return False
        stages = (self.stages[stage.name] for stage in self.job.stages)
        first = next((one for one in stages if not one.counts.ended), None)
        return first is not None and first.counts.planned is not None and not first.left

    def cut_tasks(self, stage: StageName) -> int:
        """Tasks of a stage that are in outstanding bundles."""
        return sum(len(one.bundle.tasks) for one in self.outstanding.get(stage, {}).values())

    def is_left(self, pool: str) -> bool:
        """Whether tasks of stages in `pool` are planned but not yet cut into bundles."""
        for stage in self.record.job.stages:  # asked of every job, whenever one is to be cut
            if stage.pool == pool and self.stages[stage.name].left.ranges:
                return True
        return False


class Superseded(Refused):
    """The round that is conducted here is over, and a retry has begun the next one."""

    def __init__(self, live: LiveJob) -> None:
        super().__init__(
            f"Round {live.round} of job {live.id} has ended, and the job was retried since.",
            remedy="`batchlab job show` tells how it is now.",
        )


async def all_jobs(ports: Ports, *, active: bool = False) -> AsyncIterator[JobRecord]:
    """The jobs of the ledger, newest first, read in pages; `active` leaves out those that ended.
    Where the last job of a page ends or is forgotten meanwhile, the reading begins anew."""
    last: JobId | None = None
    while True:
        try:
            page = await ports.ledger.jobs(active=active, limit=PAGE, before=last)
        except NotFound:
            last = None
            continue
        for record in page:
            yield record
        if len(page) < PAGE:
            return
        last = page[-1].job.id


async def move(ports: Ports, live: LiveJob, state: JobState) -> None:
    """Move the job to `state`, where it may; memory then says what the ledger says.

    "No" may be the answer to a second try, after the first one's answer was lost.
    """
    if not (await ports.ledger.apply(MoveJob(live.id, state, live.round))).is_new:
        record = await ports.ledger.job(live.id)
        if record.round != live.round:
            live.end()
            return
        state = record.state
    if live.record.state is not state:
        live.record = replace(live.record, state=state)
        live.changed()


def in_pool(lives: Mapping[JobId, LiveJob], pool: str) -> int:
    """Outstanding bundles of all jobs in one pool."""
    return sum(
        len(live.outstanding.get(stage.name, {}))
        for live in lives.values()
        for stage in live.job.stages
        if stage.pool == pool
    )


@dataclass(slots=True)
class Seen:
    """A worker as its last beat told it."""

    beat: Beat
    heard_s: float
    """Monotonic."""
    since_s: Mapping[Held, float]
    """Of what it runs, when that was first heard (monotonic)."""
