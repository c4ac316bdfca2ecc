"""In-memory state of the manager: its ports, its time constants, and each job that has not ended.

Invariants: the state in memory can be discarded at any moment, because a new leader reads the ledger. Retained outcomes
take at most MAX_RETAINED_BYTES. The manager releases the oldest retained outcome first, and clients read released
outcomes from the bucket.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappush

from batchlab.core.errors import Malformed, NotFound, Refused
from batchlab.core.eta import Pace
from batchlab.core.job_definition import Dependency, JobDef, StageDef
from batchlab.core.model import Bundle, BundleId, Completion, Control, JobId, JobState, Outcome, StageCounts, StageName
from batchlab.core.port_retries import Patience
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
from batchlab.core.pricing.usage import Account, Budget
from batchlab.core.protocol import settlement
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.messages import Beat, HeldBundle
from batchlab.core.tracing import LINKS
from batchlab.core.visibility_timeouts import MAX_SAMPLES, MIN_SAMPLES, expected_run_s

MAX_RETAINED_BYTES = 16 * 1024**2
"""Maximum size of the retained outcomes of all jobs together, in bytes of JSON."""
MIN_OUTCOME_BYTES = 1024
"""Minimum size in bytes that is counted for a retained outcome. The minimum limits the number of retained outcomes."""


@dataclass(slots=True)
class RetainedOutcome:
    """An outcome that the manager keeps in memory for clients until the total size of outcomes exceeds a limit."""

    outcome: Outcome | None
    size_bytes: int

    def release(self) -> None:
        self.outcome = None


class RetainedOutcomes:
    """Retained outcomes of all jobs of a grid, sorted from oldest to newest."""

    def __init__(self) -> None:
        self._order: deque[RetainedOutcome] = deque()
        self.size_bytes = 0

    def add(self, outcome: Outcome, size_bytes: int) -> RetainedOutcome:
        """Retain an outcome whose JSON has about `size_bytes` bytes, and release the oldest outcomes above the
        limit."""
        retained_outcome = RetainedOutcome(outcome, max(size_bytes, MIN_OUTCOME_BYTES))
        self._order.append(retained_outcome)
        self.size_bytes += retained_outcome.size_bytes
        while self.size_bytes > MAX_RETAINED_BYTES:
            oldest = self._order.popleft()
            oldest.release()
            self.size_bytes -= oldest.size_bytes
        return retained_outcome


MAX_EARLY_BUNDLES = 256
UNKNOWN_TASK_S = 1.0
"""Assumed duration of a task before the first measurement, unless the first task has run longer."""
PAGE = 1000
MAX_RECENT_OUTCOMES = 32
"""Number of recent outcomes of a job that stay in memory for waiting clients."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Interfaces to the external systems that the manager uses, such as objects, queues, and the ledger."""

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
    """A planned bundle without an outcome. `heard_s` is the monotonic time of the bundle's last send or heartbeat, or
    the due time of the bundle's delayed message."""

    bundle: Bundle
    heard_s: float
    since_s: float = 0.0
    """Monotonic time when this manager sent or found the bundle."""
    resends: int = 0
    """Number of times that the reconciler sent the bundle again because the bundle was silent."""
    copied_from: str = ""
    """Worker that held the bundle when the manager sent a speculative copy, or "" without a speculative copy."""
    winner: str = ""
    """Worker of the folded outcome, or "" while the bundle is outstanding."""

    def hear(self, now_s: float) -> None:
        """Restart the bundle's silence at the monotonic time `now_s`."""
        self.heard_s = max(self.heard_s, now_s)

    def bundle_to_resend(self) -> Bundle:
        """Return the bundle to send again. A worker checks for an outcome before it runs a bundle with losses."""
        return replace(self.bundle, losses=max(1, self.bundle.losses))


@dataclass(slots=True)
class JobChanges:
    """Changes of jobs that the sums in `live_jobs` do not include yet."""

    marked: dict[JobId, LiveJob] = field(default_factory=dict)
    sent: list[tuple[LiveJob, Outstanding]] = field(default_factory=list)
    """Bundles that became outstanding."""
    delays: list[tuple[float, JobId, StageName, BundleId]] = field(default_factory=list)
    """Heap of the delayed bundles by the monotonic time at which each delay ends."""


@dataclass(slots=True)
class LiveJob:
    """In-memory state of a job that has not ended."""

    record: JobRecord
    stages: dict[StageName, StageRecord]
    began_s: dict[StageName, float] = field(default_factory=dict)
    """Monotonic time of the first heartbeat in which a worker ran a bundle of the stage."""
    outstanding: dict[StageName, dict[BundleId, Outstanding]] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    control_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock held from a read of the job's control object to the next write of the control object, because a slow "run"
    must not overwrite an acknowledged "cancel"."""
    conducting: asyncio.Task[None] | None = None
    forbidden: bool = False
    """Whether the job's cancellation is acknowledged, after which no worker can start a task of the job."""
    must_read_control: bool = False
    """Whether the manager must read the control object again. The flag is set, for example, for a job from an earlier
    leader, or if workers cancel tasks without a request to this manager."""
    trouble: str = ""
    """Error message of the job's last step, or "" after a successful step."""
    unreadable: Malformed | None = None
    retried_s: float | None = None
    """Time of the user's request for the retry that began this round (seconds since the epoch), or None if unknown."""
    version: int = 0
    """Number of visible changes of the job. The version starts above the version of any earlier manager."""
    folds: int = 0
    """Number of outcomes that this manager has folded."""
    complete_after: int | None = None
    """Sequence number after which `recent` has every folded outcome, or None if `recent` may have gaps."""
    recent: deque[tuple[BundleRecord, RetainedOutcome | None]] = field(default_factory=deque)
    """The job's most recently folded outcomes. Clients receive the records without a read of the ledger, and small
    outcomes without a read of the bucket."""
    listeners: int = 0
    """Number of clients that wait for the job's first outcomes. Waiting clients may receive the first outcomes before
    the fold."""
    early_outcomes: list[RetainedOutcome] = field(default_factory=list)
    """The job's first outcomes, at most MAX_RECENT_OUTCOMES, collected while a client waits and before the first
    fold."""
    early_bundles: dict[tuple[StageName, BundleId], None] = field(default_factory=dict)
    """The last bundles whose outcome arrived before the manager knew the bundles. A short follow-up bundle may finish
    before the manager receives the event of the previous bundle."""
    paces: dict[StageName, tuple[int, float]] = field(default_factory=dict)
    """Number of tasks and seconds of run time in the outcomes that this manager folded, by stage (see `pace_s`)."""
    measured: dict[StageName, Pace] = field(default_factory=dict)
    run_times_s: dict[StageName, deque[float]] = field(default_factory=dict)
    """Seconds per task of the most recent outcomes, by stage. Visibility timeouts, speculative copies, and warnings
    about task sizes follow from these times. No time is longer than the time for which this manager waited for the
    bundle, because a worker may report any run time."""
    earlier_s: dict[StageName, float] = field(default_factory=dict)
    """Mean seconds per task in the ledger when this manager adopted the job of an earlier leader or round, by
    stage."""
    spans: dict[StageName, str] = field(default_factory=dict)
    traced: dict[StageName, deque[str]] = field(default_factory=dict)
    """Traceparents of the last outcomes of each stage. The trace of a gather links to these traceparents of its
    upstream stages."""
    account: Account = field(default_factory=Account)
    """Usage of the job, as AWS would bill it."""
    budget: Budget | None = None
    """Remaining budget under a cost cap, or None without a cap."""
    is_held: bool = False
    """Whether the remaining budget of a cost cap is too small for the job's next task. The manager does not launch
    instances and does not cut bundles for a held job."""
    capped: str = ""
    """Text that names the cap that holds the job back, and the spent part of the cap. The text stays until the cap
    covers all uncut tasks of the job, because a nearly spent cap holds the job back repeatedly."""
    waits_for: tuple[Dependency, ...] = field(init=False)
    """Dependencies whose condition did not hold at the last check. Before the first check, `waits_for` has all
    dependencies of a job that has not begun."""
    delayed: dict[StageName, dict[BundleId, float]] = field(default_factory=dict)
    """Monotonic time until which each delayed bundle uses no place of its share. A retry waits for its backoff."""
    round: int = field(init=False)
    """The job's round that this object represents. The job record may already show a later round."""
    number: int = 0
    """Number of the job in the order of adoption."""
    _news: asyncio.Event | None = field(default=None, init=False)
    """Event of the next visible change, or None if no client waits. An event takes a kilobyte, and most jobs have no
    client that waits."""
    _changes: JobChanges = field(default_factory=JobChanges, init=False, repr=False)

    def __post_init__(self) -> None:
        self.round = self.record.round
        has_begun = any(stage.counts.planned is not None for stage in self.stages.values())
        self.waits_for = () if has_begun else self.job.after

    def join(self, changes: JobChanges) -> None:
        """Record this job's changes in `changes` from now on."""
        self._changes = changes
        self.mark()
        changes.sent += [(self, outstanding) for outstanding in self.all_outstanding()]
        for stage, delayed in self.delayed.items():
            for bundle, until_s in delayed.items():
                heappush(changes.delays, (until_s, self.id, stage, bundle))

    def mark(self) -> None:
        """Mark the job, so that the next read of a sum computes the job's contribution again."""
        self._changes.marked[self.id] = self

    @property
    def job(self) -> JobDef:
        return self.record.job

    @property
    def id(self) -> JobId:
        return self.record.job.id

    @property
    def must_wait(self) -> bool:
        """Return whether the job has not begun, because it waits for its start time or for another job."""
        return self.record.state is JobState.SCHEDULED or bool(self.waits_for)

    @property
    def is_complete(self) -> bool:
        """Return whether every task of the job has ended, according to the ledger."""
        return all(counts.ended for counts in self.counts)

    @property
    def counts(self) -> list[StageCounts]:
        return [stage.counts for stage in self.stages.values()]

    def end(self) -> None:
        self.ended.set()
        self.wake.set()

    def update_rows(self, rows: JobRows) -> None:
        # The job's record and stages are replaced together, because a reader must not see an ended job with old
        # counters.
        self.record = rows.job
        self.stages = {s.counts.stage: s for s in rows.stages}
        self.notify()

    def notify(self) -> None:
        """Wake all clients that wait for a visible change, and mark the job."""
        self.mark()
        self.version += 1
        if self._news:
            self._news.set()
            self._news = None

    async def wait_for_change(self, version: int) -> None:
        while self.version == version:
            self._news = self._news or asyncio.Event()
            await self._news.wait()

    def add_early_outcome(self, outcome: RetainedOutcome) -> bool:
        """Pass an outcome that is committed but not folded to clients that wait for first outcomes. Return whether the
        outcome was passed on."""
        if not self.listeners or self.folds or len(self.early_outcomes) >= MAX_RECENT_OUTCOMES:
            return False
        self.early_outcomes.append(outcome)
        self.notify()
        return True

    @property
    def first_outcomes(self) -> list[Outcome]:
        """Return the job's first outcomes in `early_outcomes` that the manager has not released from memory."""
        return [retained_outcome.outcome for retained_outcome in self.early_outcomes if retained_outcome.outcome]

    def forget_outcomes(self, seq: int) -> None:
        """Remove the recent outcomes of the job, because another manager may have folded outcomes up to `seq`."""
        self.release_outcomes()
        self.recent.clear()
        self.complete_after = seq

    def release_outcomes(self) -> None:
        for _, retained_outcome in self.recent:
            if retained_outcome:
                retained_outcome.release()

    def record_pace(self, done: Completion, now_s: float) -> None:
        """Record how long the tasks of a completion took, and the completion's failed attempts. `now_s` is the
        monotonic time."""
        tasks, seconds = self.paces.get(done.bundle.stage, (0, 0.0))
        count = len(done.succeeded)
        seconds += settlement.weight_s(count, done.run_s)
        self.paces[done.bundle.stage] = tasks + count, seconds
        pace = self.measured.get(done.bundle.stage, Pace())
        self.measured[done.bundle.stage] = pace.with_bundle(count, done.run_s)
        outstanding = self.outstanding.get(done.bundle.stage, {}).get(done.bundle.id)
        if count and outstanding:
            times_s = self.run_times_s.setdefault(done.bundle.stage, deque(maxlen=MAX_SAMPLES))
            # The bundle may have run under an earlier leader, so a run of the mean length is also believed.
            earlier_s = self.earlier_s.get(done.bundle.stage, 0.0)
            times_s.append(min(done.run_s / count, max((now_s - outstanding.since_s) / count, earlier_s)))
        self.account.bundles += 1
        if done.failed or done.retried:
            stage = self.job.stage(done.bundle.stage)
            failed_s = max(0.0, done.ended_s - done.started_s - done.run_s)
            self.account.fail(stage.pool, failed_s * stage.slots)

    def learn_run_times(self) -> None:
        """Take the mean run time of each stage from the ledger, if enough tasks have succeeded."""
        for name, stage in self.stages.items():
            if stage.counts.mean_s is not None and stage.counts.succeeded >= MIN_SAMPLES:
                self.earlier_s[name] = stage.counts.mean_s

    def samples_s(self, stage: StageName) -> Sequence[float]:
        """Return the last MAX_SAMPLES run times of the stage in seconds per task. The run times of an adopted job begin
        with MIN_SAMPLES times the mean in the ledger."""
        times_s = self.run_times_s.get(stage, ())
        earlier = [self.earlier_s[stage]] * MIN_SAMPLES if stage in self.earlier_s else []
        return [*earlier, *times_s][-MAX_SAMPLES:]

    def pace_s(self, stage: StageName) -> float | None:
        """Return the measured seconds per task of a stage, or None before the first measurement. Bundle sizes depend on
        the result."""
        tasks, seconds = self.paces.get(stage, (0, 0.0))
        return seconds / tasks if tasks else self.stages[stage].counts.mean_s

    def expected_s(self, stage: StageName) -> dict[StageName, float]:
        """Return the expected run time in seconds of one task of the stage, and of the stages that are chained after
        it. A stage without enough measured tasks is missing."""
        times_s: dict[StageName, float] = {}
        names = [stage]
        for name in names:
            if (run_s := expected_run_s(self.samples_s(name))) is not None:
                times_s[name] = round(run_s, 3)
            names += [chained.name for chained in self.job.chained_after(name)]
        return times_s

    def trace(self, stage: StageName, context: str) -> None:
        self.traced.setdefault(stage, deque(maxlen=LINKS)).append(context)

    def retain(self, record: BundleRecord, outcome: RetainedOutcome | None) -> None:
        """Retain the record of a folded outcome, and the outcome itself if the outcome is small."""
        self.recent.append((record, outcome))
        if len(self.recent) > MAX_RECENT_OUTCOMES:
            oldest, released = self.recent.popleft()
            self.complete_after = oldest.seq
            if released:
                released.release()

    def outcomes_after(self, seq: int | None) -> list[tuple[BundleRecord, Outcome | None]] | None:
        """Return the outcomes folded after `seq`, or None if the memory does not have all outcomes after `seq`."""
        if self.complete_after is None or (seq or 0) < self.complete_after:
            return None
        return [
            (record, retained_outcome.outcome if retained_outcome else None)
            for record, retained_outcome in self.recent
            if (record.seq or 0) > (seq or 0)
        ]

    def add_outstanding(self, bundles: Iterable[tuple[Bundle, float]]) -> None:
        """Add bundles with their monotonic due times to the outstanding bundles."""
        for bundle, heard_s in bundles:
            outstanding = Outstanding(bundle, heard_s, heard_s)
            self.outstanding.setdefault(bundle.stage, {})[bundle.id] = outstanding
            self._changes.sent.append((self, outstanding))
        self.mark()

    def delay(self, bundles: Iterable[tuple[Bundle, float]]) -> None:
        """Record outstanding bundles that wait for their backoff, with the monotonic due times of their messages. Each
        bundle uses a place again one task time before its due time, so that the running bundles can end until then."""
        for bundle, due_s in bundles:
            mean_s = self.stages[bundle.stage].counts.mean_s
            until_s = due_s - (UNKNOWN_TASK_S if mean_s is None else mean_s)
            self.delayed.setdefault(bundle.stage, {})[bundle.id] = until_s
            heappush(self._changes.delays, (until_s, self.id, bundle.stage, bundle.id))
        self.mark()

    def end_delay(self, stage: StageName, bundle: BundleId, until_s: float) -> None:
        """Let the bundle use a place again, unless its delay has changed or the bundle has ended since."""
        if self.delayed.get(stage, {}).get(bundle) == until_s:
            del self.delayed[stage][bundle]
            self.mark()

    def remove_outstanding(self, bundle: Bundle, winner: str = "") -> None:
        """Remove a bundle whose outcome the worker `winner` has committed."""
        self.mark()
        self.delayed.get(bundle.stage, {}).pop(bundle.id, None)
        if outstanding := self.outstanding.get(bundle.stage, {}).pop(bundle.id, None):
            outstanding.winner = winner
        else:
            self.early_bundles[bundle.stage, bundle.id] = None
            while len(self.early_bundles) > MAX_EARLY_BUNDLES:
                del self.early_bundles[next(iter(self.early_bundles))]

    def all_outstanding(self) -> list[Outstanding]:
        return [outstanding for stage in self.outstanding.values() for outstanding in stage.values()]

    def task_s(self, stage: StageDef, now_s: float) -> float:
        """Return the estimated slot seconds of one task. Before the first measurement, the estimate is the time for
        which the stage's first bundle has run."""
        # The estimate does not use `pace_s`, because `pace_s` gives less weight to long tasks.
        mean_s = self.stages[stage.name].counts.mean_s
        if mean_s is None:
            # The estimate starts with the stage's first running bundle. If the estimate included the boot time of
            # instances, the autoscaler would launch too many instances.
            mean_s = max(UNKNOWN_TASK_S, now_s - self.began_s.get(stage.name, now_s))
        return mean_s * stage.slots

    def has_work(self, pool: str) -> bool:
        """Return whether the job has work for the pool's instances. Work that a cost cap holds back does not count."""
        if self.record.control is not Control.RUN or self.must_wait:
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
        """Return whether planned tasks have not ended, although no bundle is outstanding or left to cut."""
        if any(self.outstanding.values()):
            return False
        stages = (self.stages[stage.name] for stage in self.job.stages)
        first = next((stage_record for stage_record in stages if not stage_record.counts.ended), None)
        return first is not None and first.counts.planned is not None and not first.left

    @property
    def is_restless(self) -> bool:
        """Return whether the job needs a step at each tick, because its next step depends on the time, on a budget, or
        on objects in the bucket."""
        if self.must_read_control or self.lacks_bundles or self.is_complete or self.record.control is Control.CANCEL:
            return True
        if self.record.control is Control.PAUSE or self.must_wait:
            return False
        if self.budget is not None and any(stage.left.ranges for stage in self.stages.values()):
            return True
        return any(self._can_plan(stage) for stage in self.job.stages)

    def _can_plan(self, stage: StageDef) -> bool:
        """Return whether the stage is not planned yet, although nothing prevents its plan."""
        if self.stages[stage.name].counts.planned is not None:
            return False
        upstream = [self.stages[name].counts for name in stage.after]
        return all(counts.planned is not None if stage.chained else counts.ended for counts in upstream)

    def cut_tasks(self, stage: StageName) -> int:
        """Return the number of the stage's tasks in outstanding bundles."""
        return sum(len(outstanding.bundle.tasks) for outstanding in self.outstanding.get(stage, {}).values())

    def has_uncut_tasks(self, pool: str) -> bool:
        """Return whether planned tasks of stages in `pool` are not yet cut into bundles."""
        return any(stage.pool == pool and self.stages[stage.name].left.ranges for stage in self.record.job.stages)

    def outstanding_in(self, pool: str) -> int:
        """Return the number of the job's outstanding bundles in the pool."""
        return sum(len(self.outstanding.get(stage.name, ())) for stage in self.job.stages if stage.pool == pool)

    def delayed_in(self, pool: str) -> int:
        """Return the number of the job's delayed bundles in the pool."""
        return sum(len(self.delayed.get(stage.name, ())) for stage in self.job.stages if stage.pool == pool)


class Superseded(Refused):
    """Error raised for a live job whose round has ended because a retry began the job's next round."""

    def __init__(self, live: LiveJob) -> None:
        super().__init__(
            f"Round {live.round} of job {live.id} has ended, and the job was retried since.",
            remedy="`batchlab job show` shows its current state.",
        )


async def pages_of_jobs(ports: Ports, *, active: bool = False) -> AsyncIterator[Sequence[JobRows]]:
    """Yield the pages of the ledger's jobs, sorted from newest to oldest. With `active`, the listing skips ended jobs.
    If the last job of a page is removed during the listing, the listing starts again."""
    last: JobId | None = None
    while True:
        try:
            page = await ports.ledger.jobs(active=active, limit=PAGE, before=last)
        except NotFound:
            last = None
            continue
        yield page
        if len(page) < PAGE:
            return
        last = page[-1].id


async def set_job_state(ports: Ports, live: LiveJob, state: JobState) -> None:
    """Move the job to `state` if the transition is allowed, and copy the ledger's state to memory. The ledger may
    refuse the second attempt of a call whose first response was lost."""
    if not (await ports.ledger.apply(MoveJob(live.id, state, live.round))).is_new:
        record = await ports.ledger.job(live.id)
        if record.round != live.round:
            live.end()
            return
        state = record.state
    if live.record.state is not state:
        live.record = replace(live.record, state=state)
        live.notify()


@dataclass(slots=True)
class WorkerStatus:
    """The last heartbeat of a worker."""

    beat: Beat
    heard_s: float
    """Monotonic time when the manager received the heartbeat."""
    since_s: Mapping[HeldBundle, float]
    """Monotonic time when the worker first reported each running bundle."""


def running_bundles(lives: Mapping[JobId, LiveJob], workers: Iterable[WorkerStatus]) -> Iterator[Bundle]:
    """Yield the bundles of the jobs that workers run according to their heartbeats. A bundle that several workers run
    is yielded once."""
    running = {
        (held.job, held.stage, held.bundle)
        for worker_status in workers
        for held in worker_status.beat.held
        if held.running and held.job in lives
    }
    for job, stage, bundle in running:
        # A bundle whose outcome arrived after the heartbeat is no longer outstanding.
        if outstanding := lives[job].outstanding.get(stage, {}).get(bundle):
            yield outstanding.bundle


@dataclass(frozen=True, slots=True)
class Backlog:
    """Remaining work of a pool: the sum of task time × slots in `seconds`, and the number of parallel tasks in
    `tasks`. `gpu_s` and `gpu_tasks` are the same sums with the GPUs of each task in place of its slots."""

    seconds: float = 0.0
    tasks: int = 0
    gpu_s: float = 0.0
    gpu_tasks: int = 0
