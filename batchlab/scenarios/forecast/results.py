"""Results of a simulated run: counts from outcomes, samples of the grid, and the cost.

Results are counted from the outcomes in the bucket, so the counts include tasks that the ledger lost and tasks that ran
twice. Sampling of the grid does not change the simulated run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from batchlab.core.pricing.bill import PoolFacts, StageUse, bill, usd_per_s
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.pricing.usage import Kind, Meter
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.service_settings import ManagerSettings
from batchlab.runtime.descriptor import Calibration
from batchlab.runtime.factory import Backend
from batchlab.scenarios.forecast.simulated_work import Machines, SimulatedWork, calibrate_pool
from batchlab.scenarios.model.values import Job, Scenario, StageTemplate
from batchlab.scenarios.record import InstanceRun, JobRun, PoolSample, Record, Sample, StageRun
from batchlab.scenarios.verdicts import end_s
from batchlab.sim.world import World

SAMPLE_SIZE = 200
"""Maximum number of task times of a stage in the record."""
_BUFFER_SIZE = 1 << 15

NEVER_SUBMITTED = "never submitted"
"""State of a job that no manager has accepted."""


async def read_outcomes(objects: Objects, job: JobId) -> AsyncIterator[Outcome]:
    """Yield the committed outcomes of a job in key order."""
    try:
        key = await CommitKeys(objects).stored(job)
    except NotFound:
        return
    async for page in objects.list(object_keys.committed(job)):
        for info in page:
            if object_keys.is_genuine(info.key, key):
                yield outcome_at(info.key, await objects.get(info.key), key)


class EvenSample:
    """Sample of a stream of numbers whose members are evenly spread over the stream."""

    def __init__(self) -> None:
        self._numbers: list[float] = []
        self._every = 1
        self._skip = 0

    def add(self, numbers: Sequence[float]) -> None:
        self._numbers += numbers[self._skip :: self._every]
        self._skip = (self._skip - len(numbers)) % self._every
        while len(self._numbers) > _BUFFER_SIZE:
            self._numbers = self._numbers[::2]
            self._every *= 2

    def spread(self) -> tuple[float, ...]:
        """Return at most SAMPLE_SIZE of the numbers, sorted and evenly spread."""
        ordered = sorted(self._numbers)
        if len(ordered) <= SAMPLE_SIZE:
            return tuple(ordered)
        last = len(ordered) - 1
        return tuple(ordered[round(n * last / (SAMPLE_SIZE - 1))] for n in range(SAMPLE_SIZE))


@dataclass(slots=True)
class StageTotals:
    """Totals of one stage of one job template."""

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
    """Counted results of a simulated run.

    `failed_s` has the slot seconds of failed attempts, and `thrown_s` the slot seconds of executions without a
    committed outcome, both by pool.
    """

    jobs: list[JobRun] = field(default_factory=list)
    lost: int = 0
    duplicates: int = 0
    bundles: int = 0
    failed_s: dict[str, float] = field(default_factory=dict)
    thrown_s: dict[str, float] = field(default_factory=dict)
    totals: dict[tuple[str, str], StageTotals] = field(default_factory=dict)

    @property
    def again_s(self) -> float:
        """Return the slot seconds of failed attempts and of executions without a committed outcome."""
        return sum(self.failed_s.values()) + sum(self.thrown_s.values())

    def stages(self, jobs: Sequence[Job]) -> tuple[StageRun, ...]:
        """Return the totals of each template and stage, in the order of the scenario."""
        templates = {job.template.name: job.template for job in jobs}
        return tuple(
            StageRun(
                template=name,
                stage=stage.name,
                pool=stage.pool,
                slots=stage.slots,
                tasks=totals.tasks,
                bundles=totals.bundles,
                run_s=totals.run_s,
                declared_s=totals.declared_s,
                span_s=totals.span_s,
                task_s=totals.times.spread(),
                over_s=totals.over.spread(),
                stretch=totals.stretch.spread(),
                gpus=stage.gpus,
            )
            for name, template in templates.items()
            for stage in template.stages
            for totals in (self.totals.get((name, stage.name), StageTotals()),)
        )


@dataclass(slots=True)
class ResultCounter:
    """Counter of the results of one run, which started at `begin_s` (epoch) and `base_s` (monotonic)."""

    objects: Objects
    ledger: Ledger
    work: SimulatedWork
    begin_s: float
    base_s: float
    results: Results = field(default_factory=Results)

    async def count(self, jobs: Sequence[Job], submitted_s: Mapping[str, float], end_s: float) -> Results:
        """Count the results of `jobs`.

        `submitted_s` has the submission time of each job in run seconds. A job ends at least `end_s` seconds after its
        last task.
        """
        spans = dict(self.work.spans)
        for job in jobs:
            await self._count_job(job, submitted_s.get(job.id, job.due_s), spans, end_s)
        for pool, span_s in spans.values():
            self.results.thrown_s[pool] = self.results.thrown_s.get(pool, 0.0) + span_s
        return self.results

    async def _count_job(self, job: Job, submitted_s: float, spans: dict[str, tuple[str, float]], end_s: float) -> None:
        name = JobId(job.id)
        outcomes: dict[str, list[Outcome]] = {}
        last_s = 0.0
        async for outcome in read_outcomes(self.objects, name):
            self._add(job, outcome, spans)
            # The shortened outcome omits the values and times of single tasks, because values and times need much
            # memory.
            slim = Outcome(outcome.bundle, outcome.execution, "", 0.0, 0.0, outcome.succeeded, failed=outcome.failed)
            outcomes.setdefault(outcome.bundle.stage, []).append(slim)
            last_s = max(last_s, outcome.ended_s)
        try:
            record: JobRecord | None = await self.ledger.job(name)
            counts = [stage.counts for stage in (await self.ledger.rows(name)).stages]
        except NotFound:
            record, counts = None, []
        by_stage = {str(count.stage): count for count in counts}
        for stage in job.template.stages:
            stage_outcomes = outcomes.get(stage.name, [])
            self._count_lost(job, stage, by_stage.get(stage.name), stage_outcomes, record)
        ended_s = None
        if record is not None and record.state.ended and record.ended_s is not None:
            ended_s = max(record.ended_s, last_s + end_s) - self.begin_s
        first_s = self.work.first_s.get(name)
        self.results.jobs.append(
            JobRun.of(
                job,
                submitted_s=submitted_s,
                started_s=None if first_s is None else first_s - self.base_s,
                ended_s=ended_s,
                state=record.state.value if record else NEVER_SUBMITTED,
                planned=sum(count.planned or 0 for count in counts),
                succeeded=sum(count.succeeded for count in counts),
                failed=sum(count.failed for count in counts),
                cancelled=sum(count.cancelled for count in counts),
                retried=sum(count.retried for count in counts),
                done_s=last_s - self.begin_s if last_s else None,
            )
        )

    def _add(self, job: Job, outcome: Outcome, spans: dict[str, tuple[str, float]]) -> None:
        results, name = self.results, str(outcome.bundle.stage)
        stage = self.work.stage(JobId(job.id), name)
        totals = results.totals.setdefault((job.template.name, name), StageTotals())
        # If a bundle was split after worker losses, the process that wrote the bundle's outcome did not run the bundle.
        has_run = spans.pop(outcome.execution, None) is not None
        results.bundles += 1
        run_s = sum(outcome.run_s)
        totals.tasks += len(outcome.succeeded)
        totals.run_s += run_s
        totals.declared_s += run_s / stage.stretch
        if has_run:
            totals.bundles += 1
            span_s = outcome.ended_s - outcome.started_s
            totals.span_s += span_s
            totals.over.add([max(0.0, span_s - run_s)])
        totals.times.add(outcome.run_s)
        totals.stretch.add([stage.stretch] * len(outcome.run_s))
        failed_s = sum(failure.run_s for failure in outcome.failed) * stage.template.slots
        if failed_s:
            pool = stage.template.pool
            results.failed_s[pool] = results.failed_s.get(pool, 0.0) + failed_s

    def _count_lost(
        self,
        job: Job,
        stage: StageTemplate,
        counts: StageCounts | None,
        outcomes: Sequence[Outcome],
        record: JobRecord | None,
    ) -> None:
        succeeded = TaskSet.union(outcome.succeeded for outcome in outcomes)
        self.results.duplicates += sum(len(outcome.succeeded) for outcome in outcomes) - len(succeeded)
        failed = TaskSet.from_indices(
            failure.task for outcome in outcomes for failure in outcome.failed if failure.final
        )
        planned = counts.planned if counts else None
        if planned is None:
            # A job that ended with a failed dependency was never planned.
            is_lost = not stage.after and not (record is not None and job.after and record.state.ended)
            planned = job.tasks if is_lost else 0
        # Tasks that never ran because of an earlier failure are missing from the outcomes.
        cancelled = counts.cancelled if counts else 0
        ended = len(TaskSet.union((succeeded, failed))) + cancelled
        self.results.lost += max(0, planned - ended)


MAX_QUIET_SAMPLES = 1000
"""Maximum number of samples in which no group changed. If more such samples exist, every second such sample is dropped.
"""

_PENDING_STATES = {LifecycleState.PENDING, LifecycleState.PENDING_WAIT, LifecycleState.PENDING_PROCEED}

Counts = tuple[int, int, int]
"""Numbers of a group: desired capacity, instances in service, and pending instances."""


@dataclass(slots=True)
class GridSampler:
    """Sampler of the groups in the view of the leading manager.

    `spacing_s` is the initial distance in seconds between samples of unchanged groups. `base_s` is the time of the
    event loop at second 0 of the run.
    """

    world: World
    machines: Machines
    spacing_s: float
    base_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    _quiet: list[int] = field(default_factory=list)
    """Indexes of samples in which no group had changed."""
    _last: dict[str, Counts] = field(default_factory=dict)

    def begin(self, base_s: float) -> None:
        self.base_s = base_s
        self.samples, self._quiet, self._last = [], [], {}

    async def look(self) -> None:
        """Take a sample if a group has changed or if the latest sample is old enough."""
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
        for name, pool_counts in counts.items():
            backlog = manager.autoscaler.backlog(name)
            pools[name] = PoolSample(*pool_counts, backlog.tasks, backlog.seconds)
            depth: Depth = await self.world.queue.depth(object_keys.tasks_queue(name))
            waiting += depth.visible + depth.delayed
            in_flight += depth.in_flight
        if not is_new:
            self._quiet.append(len(self.samples))
        self.samples.append(Sample(now_s, pools, waiting, in_flight))
        if len(self._quiet) > MAX_QUIET_SAMPLES:
            dropped = set(self._quiet[::2])
            rest = [(n, sample) for n, sample in enumerate(self.samples) if n not in dropped]
            quiet = set(self._quiet) - dropped
            self.samples = [sample for _, sample in rest]
            self._quiet = [place for place, (n, _) in enumerate(rest) if n in quiet]
            self.spacing_s *= 2

    def _counts(self, view: GroupView, now_s: float) -> Counts:
        in_service = pending = 0
        for instance in view.instances:
            if instance.state is LifecycleState.IN_SERVICE:
                in_service += 1
                life = self.machines.lives[instance.id]
                life.ready_s = now_s if life.ready_s is None else life.ready_s
            elif instance.state in _PENDING_STATES:
                pending += 1
        return view.desired, in_service, pending


@dataclass(frozen=True, slots=True)
class ForecastSetup:
    """Scenario and seed of a forecast, with the backend's settings, the calibration, and the price book."""

    scenario: Scenario
    seed: int
    backend: Backend
    calibration: Calibration
    book: PriceBook

    def pools(self) -> dict[str, Pool]:
        """Return the pools with their measured boot times."""
        return {plan.pool.name: calibrate_pool(plan, self.calibration) for plan in self.scenario.pools}

    def manager(self) -> ManagerSettings:
        """Return the manager's settings with the scaling policy of the scenario."""
        return replace(self.backend.manager, **self.scenario.policy.settings())

    def record(
        self,
        *,
        results: Results,
        jobs: tuple[JobRun, ...],
        stages: tuple[StageRun, ...],
        samples: Sequence[Sample],
        instances: tuple[InstanceRun, ...],
        end_s: float,
        **rest: Any,
    ) -> Record:
        """Return the record of a run that ended at `end_s`, with the cost of the run.

        An instance that is alive at the end of the run counts until `end_s`.
        """
        pools, worker, manager = self.pools(), self.backend.worker, self.manager()
        meter = Meter()
        for instance in instances:
            last_s = end_s if instance.ended_s is None else instance.ended_s
            machine = Machine(instance.type, instance.zone, Market(instance.market))
            meter.bill_instance(
                pools[instance.pool],
                Instance(instance.id, instance.pool, LifecycleState.IN_SERVICE, 0.0, machine=machine),
                now_s=last_s - instance.launched_s,
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
        uses = [StageUse(stage.stage, stage.pool, stage.run_s, stage.slots) for stage in stages]
        facts = {name: PoolFacts(pool.slots, pool.instance_type) for name, pool in pools.items()}
        pace = Pace(worker.control_lease_s, worker.visibility_s, worker.beat_s, manager.tick_s)
        cost = bill(uses, account, facts, self.book, pace=pace)
        return Record(
            scenario=self.scenario.name,
            digest=self.scenario.digest,
            seed=self.seed,
            backend=self.backend.name,
            compressed=self.scenario.compressed,
            pools={name: (pool.min_size, pool.max_size, pool.slots) for name, pool in pools.items()},
            gpus={name: pool.gpus for name, pool in pools.items() if pool.gpus},
            jobs=jobs,
            stages=stages,
            samples=tuple(samples),
            instances=instances,
            usd=cost.usd.typical,
            usd_items={item.what: item.usd.typical for item in cost.items},
            shares=self.scenario.shares,
            simulated=True,
            **rest,
        )


def minimum_usd(record: Record, until_s: float, book: PriceBook) -> float:
    """Return the cost of the pools' minimum sizes from the run's end until `until_s`.

    The computation assumes that living instances stay and that each missing instance is an On-Demand Instance.
    """
    rest_s = until_s - end_s(record)
    if rest_s <= 0:
        return 0.0
    usd = 0.0
    for pool, (least, _, slots) in record.pools.items():
        lives = [instance for instance in record.instances if instance.pool == pool]
        kinds = [Kind(pool, life.type, Market(life.market)) for life in lives if life.ended_s is None]
        usual = Kind(pool, lives[0].type if lives else "")
        for kind in [*kinds, *[usual] * least][:least]:
            usd += usd_per_s({kind: 1.0}, PoolFacts(slots, kind.type), book).typical * rest_s
    return usd
