"""What a simulated run came to, read from where the grid has it: its bucket and its ledger.

Invariant: results are counted from the outcomes in the bucket, so neither a task that the ledger
has lost nor one that was done twice goes unseen.

What a forecast sees of its grid as time goes by: fleet, queues and backlog.

Invariant: looking changes nothing. Every change of a fleet is kept; between changes samples are as
far apart as keeps them few.

What a forecast's instances and requests would cost on AWS, by the grid's own meter and bill.

Invariant: an instance second costs what that instance does, by its own type and market.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from batchlab.core.commit import outcome_at
from batchlab.core.errors import NotFound
from batchlab.core.model import (
    GroupView,
    Instance,
    JobId,
    LifecycleState,
    Machine,
    Market,
    Outcome,
    Pool,
    StageCounts,
    TaskSet,
)
from batchlab.core.ports import Depth, JobRecord, Ledger, Objects
from batchlab.core.pricing.bill import Bill, PoolFacts, StageUse, bill, usd_per_s
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.pricing.usage_meter import Kind, Meter
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.manager.settings import ManagerSettings
from batchlab.scenarios.forecast.jobs import SimulatedWork
from batchlab.scenarios.forecast.machines import Machines
from batchlab.scenarios.model.values import Job, StageTemplate
from batchlab.scenarios.record import InstanceRun, JobRun, PoolSample, Record, Sample, StageRun
from batchlab.scenarios.verdicts import end_s
from batchlab.sim.world import World
from batchlab.worker.settings import WorkerSettings

SAMPLE_SIZE = 200
"""Task times of a stage that the record keeps."""
_BUFFER_SIZE = 1 << 15

NEVER_SUBMITTED = "never submitted"
"""The state of a job that no manager has accepted."""


async def read_outcomes(objects: Objects, job: JobId) -> AsyncIterator[Outcome]:
    """Every committed outcome of a job, in key order."""
    try:
        key = await CommitKeys(objects).stored(job)
    except NotFound:
        return
    async for page in objects.list(object_keys.committed(job)):
        for info in page:
            if object_keys.is_genuine(info.key, key):
                yield outcome_at(info.key, await objects.get(info.key), key)


class EvenSample:
    """An even sample of numbers, of however many."""

    def __init__(self) -> None:
        self._kept: list[float] = []
        self._every = 1
        self._skip = 0

    def add(self, numbers: Sequence[float]) -> None:
        """Take some more."""
        self._kept += numbers[self._skip :: self._every]
        self._skip = (self._skip - len(numbers)) % self._every
        while len(self._kept) > _BUFFER_SIZE:
            self._kept = self._kept[::2]
            self._every *= 2

    def spread(self) -> tuple[float, ...]:
        """At most SAMPLE_SIZE of them, evenly over the sorted ones."""
        ordered = sorted(self._kept)
        if len(ordered) <= SAMPLE_SIZE:
            return tuple(ordered)
        last = len(ordered) - 1
        return tuple(ordered[round(n * last / (SAMPLE_SIZE - 1))] for n in range(SAMPLE_SIZE))


@dataclass(slots=True)
class StageTotals:
    """All outcomes of one stage of one template."""

    tasks: int = 0
    bundles: int = 0
    run_s: float = 0.0
    declared_s: float = 0.0
    span_s: float = 0.0
    times: EvenSample = field(default_factory=EvenSample)
    over: EvenSample = field(default_factory=EvenSample)
    stretch: EvenSample = field(default_factory=EvenSample)


@dataclass(slots=True)
class Results:
    """All of a run's jobs, counted. `failed_s` and `thrown_s` are slot seconds by pool: of
    attempts that failed, and of executions of which nothing was committed."""

    jobs: list[JobRun] = field(default_factory=list)
    lost: int = 0
    duplicates: int = 0
    bundles: int = 0
    failed_s: dict[str, float] = field(default_factory=dict)
    thrown_s: dict[str, float] = field(default_factory=dict)
    sums: dict[tuple[str, str], StageTotals] = field(default_factory=dict)

    @property
    def again_s(self) -> float:
        """Slot seconds that were spent for nothing."""
        return sum(self.failed_s.values()) + sum(self.thrown_s.values())

    def stages(self, jobs: Sequence[Job]) -> tuple[StageRun, ...]:
        """By template and stage, as the scenario lists them."""
        templates = {job.template.name: job.template for job in jobs}
        found = []
        for name, template in templates.items():
            for stage in template.stages:
                sums = self.sums.get((name, stage.name), StageTotals())
                found.append(
                    StageRun(
                        template=name,
                        stage=stage.name,
                        pool=stage.pool,
                        slots=stage.slots,
                        tasks=sums.tasks,
                        bundles=sums.bundles,
                        run_s=sums.run_s,
                        declared_s=sums.declared_s,
                        span_s=sums.span_s,
                        task_s=sums.times.spread(),
                        over_s=sums.over.spread(),
                        stretch=sums.stretch.spread(),
                    )
                )
        return tuple(found)


class ResultCounter:
    """Counts the jobs of one run, which began at `begin_s` of the epoch, `base_s` by the monotonic
    clock."""

    def __init__(
        self, objects: Objects, ledger: Ledger, plays: SimulatedWork, begin_s: float, base_s: float
    ) -> None:
        self._objects = objects
        self._ledger = ledger
        self._plays = plays
        self._begin_s = begin_s
        self._base_s = base_s
        self._results = Results()

    async def all(
        self,
        jobs: Sequence[Job],
        submitted_s: Mapping[str, float],
        end_s: float,
    ) -> Results:
        """Count these jobs; `submitted_s` by job, of the run. No job ends sooner than `end_s`
        after its last task."""
        spans = dict(self._plays.spans)
        for job in jobs:
            await self._job(job, submitted_s.get(job.id, job.due_s), spans, end_s)
        for pool, span_s in spans.values():
            self._results.thrown_s[pool] = self._results.thrown_s.get(pool, 0.0) + span_s
        return self._results

    async def _job(
        self, job: Job, submitted_s: float, spans: dict[str, tuple[str, float]], end_s: float
    ) -> None:
        name = JobId(job.id)
        found: dict[str, list[Outcome]] = {}
        last_s = 0.0
        async for outcome in read_outcomes(self._objects, name):
            self._take(job, outcome, spans)
            slim = Outcome(
                outcome.bundle,
                outcome.execution,
                outcome.worker,
                outcome.started_s,
                outcome.ended_s,
                outcome.succeeded,
                failed=outcome.failed,
            )
            found.setdefault(outcome.bundle.stage, []).append(slim)
            last_s = max(last_s, outcome.ended_s)
        try:
            record: JobRecord | None = await self._ledger.job(name)
            counts = [s.counts for s in (await self._ledger.rows(name)).stages]
        except NotFound:
            record, counts = None, []
        by_stage = {str(one.stage): one for one in counts}
        for stage in job.template.stages:
            self._compare(job, stage, by_stage.get(stage.name), found.get(stage.name, []))
        ended_s = None
        if record is not None and record.state.ended and record.ended_s is not None:
            ended_s = max(record.ended_s, last_s + end_s) - self._begin_s
        first_s = self._plays.first_s.get(name)
        self._results.jobs.append(
            JobRun(
                job.index,
                job.id,
                job.template.name,
                job.tenant,
                job.due_s,
                submitted_s,
                None if first_s is None else first_s - self._base_s,
                ended_s,
                record.state.value if record else NEVER_SUBMITTED,
                sum(one.planned or 0 for one in counts),
                sum(one.succeeded for one in counts),
                sum(one.failed for one in counts),
                sum(one.cancelled for one in counts),
                sum(one.retried for one in counts),
                None if job.template.deadline_s is None else job.due_s + job.template.deadline_s,
                job.label,
                job.tasks,
                done_s=last_s - self._begin_s if last_s else None,
            )
        )

    def _take(self, job: Job, outcome: Outcome, spans: dict[str, tuple[str, float]]) -> None:
        results, name = self._results, str(outcome.bundle.stage)
        stage = self._plays.stage(JobId(job.id), name)
        sums = results.sums.setdefault((job.template.name, name), StageTotals())
        # What was cut in two for its worker's losses was not run by whoever wrote that.
        ran = spans.pop(outcome.execution, None) is not None
        results.bundles += 1
        run_s = sum(outcome.run_s)
        sums.tasks += len(outcome.succeeded)
        sums.run_s += run_s
        sums.declared_s += run_s / stage.stretch
        if ran:
            sums.bundles += 1
            span_s = outcome.ended_s - outcome.started_s
            sums.span_s += span_s
            sums.over.add([max(0.0, span_s - run_s)])
        sums.times.add(outcome.run_s)
        sums.stretch.add([stage.stretch] * len(outcome.run_s))
        failed_s = sum(one.run_s for one in outcome.failed) * stage.template.slots
        if failed_s:
            pool = stage.template.pool
            results.failed_s[pool] = results.failed_s.get(pool, 0.0) + failed_s

    def _compare(
        self,
        job: Job,
        stage: StageTemplate,
        counts: StageCounts | None,
        found: Sequence[Outcome],
    ) -> None:
        """Count what is missing of a stage, and what is there twice."""
        succeeded = TaskSet.union(one.succeeded for one in found)
        self._results.duplicates += sum(len(one.succeeded) for one in found) - len(succeeded)
        failed = TaskSet.of(one.task for each in found for one in each.failed if one.final)
        planned = counts.planned if counts else None
        if planned is None:
            planned = 0 if stage.after else job.tasks
        # What never ran, since its job or what it follows had failed, has no outcome.
        cancelled = counts.cancelled if counts else 0
        ended = len(TaskSet.union((succeeded, failed))) + cancelled
        self._results.lost += max(0, planned - ended)


MAX_QUIET_SAMPLES = 1000
"""Samples without a change that are kept; beyond, every second one goes."""

_PENDING_STATES = {
    LifecycleState.PENDING,
    LifecycleState.PENDING_WAIT,
    LifecycleState.PENDING_PROCEED,
}

Counts = tuple[int, int, int]
"""Desired capacity, instances in service and instances that come."""


@dataclass(slots=True)
class GridSampler:
    """Looks at the leading manager's groups; `spacing_s` is how far quiet samples are apart at
    first, `base_s` the loop's time at the run's second 0."""

    world: World
    machines: Machines
    spacing_s: float
    base_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    _quiet: list[int] = field(default_factory=list)
    """Places of samples that show no change."""
    _last: dict[str, Counts] = field(default_factory=dict)

    def begin(self, base_s: float) -> None:
        """The run begins now: what was seen before is no part of it."""
        self.base_s = base_s
        self.samples, self._quiet, self._last = [], [], {}

    async def look(self) -> None:
        """Take a sample where there is something to see."""
        manager = self.world.manager
        if manager is None or not manager.is_leader.is_set() or not manager.groups:
            return
        now_s = self.world.clock.monotonic_s() - self.base_s
        counts = {name: self._counts(view, now_s) for name, view in manager.groups.items()}
        is_new = counts != self._last
        if not is_new and self.samples and now_s - self.samples[-1].at_s < self.spacing_s:
            return
        self._last = counts
        pools = {}
        waiting = in_flight = 0
        for name, (desired, there, coming) in counts.items():
            backlog = manager.autoscaler.backlog(name)
            pools[name] = PoolSample(desired, there, coming, backlog.tasks, backlog.seconds)
            depth: Depth = await self.world.queue.depth(object_keys.tasks_queue(name))
            waiting += depth.visible + depth.delayed
            in_flight += depth.in_flight
        if not is_new:
            self._quiet.append(len(self.samples))
        self.samples.append(Sample(now_s, pools, waiting, in_flight))
        if len(self._quiet) > MAX_QUIET_SAMPLES:
            self._thin()

    def _counts(self, view: GroupView, now_s: float) -> Counts:
        there = coming = 0
        lives = self.machines.lives
        for instance in view.instances:
            if instance.state is LifecycleState.IN_SERVICE:
                there += 1
                life = lives[instance.id]
                if life.ready_s is None:
                    life.ready_s = now_s
            elif instance.state in _PENDING_STATES:
                coming += 1
        return view.desired, there, coming

    def _thin(self) -> None:
        gone = set(self._quiet[::2])
        kept = [(n, one) for n, one in enumerate(self.samples) if n not in gone]
        quiet = set(self._quiet) - gone
        self.samples = [one for _, one in kept]
        self._quiet = [place for place, (n, _) in enumerate(kept) if n in quiet]
        self.spacing_s *= 2


def compute_bill(
    pools: Mapping[str, Pool],
    instances: Sequence[InstanceRun],
    stages: Sequence[StageRun],
    results: Results,
    book: PriceBook,
    manager: ManagerSettings,
    worker: WorkerSettings,
    over_s: float,
) -> Bill:
    """The bill of a run that was over at `over_s`; instances that still lived then count until
    then."""
    meter = Meter()
    for one in instances:
        last_s = over_s if one.ended_s is None else one.ended_s
        machine = Machine(one.type, one.zone, Market(one.market))
        meter.see(
            pools[one.pool],
            Instance(one.id, one.pool, LifecycleState.IN_SERVICE, 0.0, machine=machine),
            now_s=last_s - one.launched_s,
            monotonic_s=last_s,
            shares={},
            accounts={},
        )
    account = meter.total
    account.bundles = results.bundles
    for pool, failed_s in results.failed_s.items():
        account.fail(pool, failed_s)
    for pool, thrown_s in results.thrown_s.items():
        account.lose(pool, thrown_s)
    uses = [StageUse(one.stage, one.pool, one.run_s, one.slots) for one in stages]
    facts = {name: PoolFacts(pool.slots, pool.instance_type) for name, pool in pools.items()}
    pace = Pace(worker.control_lease_s, worker.visibility_s, worker.beat_s, manager.tick_s)
    return bill(uses, account, facts, book, pace=pace)


def minimum_usd(record: Record, until_s: float, book: PriceBook) -> float:
    """What the pools' minima cost from the run's end until `until_s`. Those that are still there
    stay on, as what they are; what a minimum lacks then is bought on demand."""
    left_s = until_s - end_s(record)
    if left_s <= 0:
        return 0.0
    usd = 0.0
    for pool, (least, _, slots) in record.pools.items():
        mine = [one for one in record.instances if one.pool == pool]
        there = [Kind(pool, one.type, Market(one.market)) for one in mine if one.ended_s is None]
        usual = Kind(pool, mine[0].type if mine else "")
        for kind in [*there, *[usual] * least][:least]:
            usd += usd_per_s({kind: 1.0}, PoolFacts(slots, kind.type), book).typical * left_s
    return usd
