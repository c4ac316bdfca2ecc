"""Candidates of the planner (fleets and policies), and their trials in the simulator or the fast model.

For each seed, all candidates run with the same arrivals and task times (common random numbers). Differences between
results therefore come only from differences between candidates.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import mean, median
from types import MappingProxyType

from batchlab.core import instance_types
from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.model import Pool
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook
from batchlab.scenarios.forecast.results import minimum_usd
from batchlab.scenarios.model.distributions import Stream
from batchlab.scenarios.model.values import Fault, FaultName, Prewarm, Scenario, StageTemplate
from batchlab.scenarios.record import Record
from batchlab.scenarios.verdicts import MEASURES, Unknown, quantile
from batchlab.sim.process_pool import ProcessDeath, ProcessPool

BUSIEST_WINDOW = 0.25
"""Length of the window with the most work, as a share of the deadline."""


@dataclass(frozen=True, slots=True)
class Instance:
    """Instance type of a pool, and the slots and GPUs of each instance."""

    type: str
    slots: int
    gpus: int


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Size limits of one pool, and the pool's share of Spot Instances.

    `instance` is None unless the planner may choose the instance type, as for a pool whose tasks need GPUs.
    """

    pool: str
    min_size: int
    max_size: int
    spot: float = 0.0
    instance: Instance | None = None

    def to_json(self) -> dict[str, object]:
        own = self.instance
        kind = {"instance_type": own.type, "slots": own.slots, "gpus": own.gpus} if own else {}
        return {"min": self.min_size, "max": self.max_size, "spot": self.spot, **kind}


@dataclass(frozen=True, slots=True)
class Candidate:
    """Candidate of the planner: a fleet and a scaling policy.

    `drain_s` is the drain target in seconds, or None for the backend's default.
    """

    fleets: tuple[PoolConfig, ...]
    drain_s: float | None
    prewarm: tuple[Prewarm, ...] = ()

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Sort key that prefers the simpler of equally good candidates."""
        return (
            len(self.prewarm),
            sum(warm.min_size for warm in self.prewarm),
            sum(fleet.min_size for fleet in self.fleets),
            sum(fleet.max_size for fleet in self.fleets),
            sum(round(100 * fleet.spot) for fleet in self.fleets),
        )

    def to_json(self) -> dict[str, object]:
        pools = {fleet.pool: fleet.to_json() for fleet in self.fleets}
        prewarm = [
            {"pool": warm.pool, "min": warm.min_size, "at_s": warm.at_s, "until_s": warm.until_s}
            for warm in self.prewarm
        ]
        return {"pools": pools, "drain_target_s": self.drain_s, "prewarm": prewarm}


def current_candidate(scenario: Scenario) -> Candidate:
    """Return the scenario's own fleet and policy."""
    fleets = tuple(
        PoolConfig(
            plan.pool.name, plan.pool.min_size, plan.pool.max_size, plan.spot, _own_instance(scenario, plan.pool)
        )
        for plan in scenario.pools
    )
    return Candidate(fleets, scenario.policy.drain_target_s, scenario.prewarm)


def _own_instance(scenario: Scenario, pool: Pool) -> Instance | None:
    """Return the instance type of the pool, or None if the planner must not choose another type.

    The planner chooses only among types with GPUs, and only if the pool declares as many GPUs as its type has.
    """
    needs_gpus = pool.gpus and gpus_of_tasks(scenario, pool.name)
    if needs_gpus and pool.gpus == instance_types.load().gpus([pool.instance_type]):
        return Instance(pool.instance_type, pool.slots, pool.gpus)
    return None


def gpus_of_tasks(scenario: Scenario, pool: str) -> int:
    """Return the largest number of GPUs that a task of the pool needs."""
    return max((stage.gpus for stage in _stages(scenario, pool)), default=0)


def _stages(scenario: Scenario, pool: str) -> Iterator[StageTemplate]:
    return (stage for job in scenario.jobs.values() for stage in job.stages if stage.pool == pool)


def instance_choices(scenario: Scenario, book: PriceBook) -> dict[str, tuple[Instance, ...]]:
    """Return the instance types among which the planner chooses, by pool whose tasks need GPUs.

    All types of a pool are of one family, because the GPUs of another family would change the times of the tasks. The
    slots of a type are in proportion to its vCPUs. Each type has enough slots, GPUs, and memory for each task of the
    pool.
    """
    catalog, priced = instance_types.load().types, book.blocks["on_demand"].table
    choices = {}
    for fleet in current_candidate(scenario).fleets:
        if (own := fleet.instance) is None:
            continue
        most_slots = max(stage.slots for stage in _stages(scenario, fleet.pool))
        most_gpus = gpus_of_tasks(scenario, fleet.pool)
        most_bytes = max(stage.memory_bytes or 0 for stage in _stages(scenario, fleet.pool))
        slots_per_vcpu = own.slots / catalog[own.type].vcpu
        others = [
            Instance(one.name, max(1, round(one.vcpu * slots_per_vcpu)), one.gpus)
            for one in catalog.values()
            if one.memory_mib * 2**20 >= most_bytes
            if one.name != own.type and _family(one.name) == _family(own.type) and one.name in priced
        ]
        enough = [one for one in others if one.slots >= most_slots and one.gpus >= most_gpus]
        choices[fleet.pool] = (own, *enough)
    return choices


def _family(name: str) -> str:
    return name.partition(".")[0]


def apply_candidate(scenario: Scenario, candidate: Candidate, wave_s: float | None = None) -> Scenario:
    """Return the scenario with the candidate's fleet and policy.

    If the fleet has Spot Instances, AWS interrupts all Spot Instances once at `wave_s`.
    """
    fleets = {fleet.pool: fleet for fleet in candidate.fleets}
    pools = []
    for plan in scenario.pools:
        fleet = fleets[plan.pool.name]
        pool = replace(plan.pool, min_size=fleet.min_size, max_size=fleet.max_size)
        if own := fleet.instance:
            pool = replace(pool, instance_type=own.type, slots=own.slots, gpus=own.gpus)
        pools.append(replace(plan, pool=pool, spot=fleet.spot))
    faults = scenario.faults
    if wave_s is not None and any(fleet.spot for fleet in candidate.fleets):
        faults = tuple(sorted((*faults, Fault(FaultName.SPOT_WAVE, wave_s)), key=lambda fault: fault.at_s))
    policy = replace(scenario.policy, drain_target_s=candidate.drain_s)
    return replace(scenario, pools=tuple(pools), policy=policy, prewarm=candidate.prewarm, faults=faults)


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """Observed demand of a pool.

    `work_s` is the work in slot seconds, and `gpu_s` in GPU seconds. `slots` and `gpus` are the numbers of slots and
    GPUs that all tasks would use if they ran at once. `rise_s` is the time at which the desired capacity first reached
    half of its peak. `boot_s` is the median boot time of the pool's instances.
    """

    work_s: float
    slots: int
    rise_s: float | None
    boot_s: float
    gpu_s: float = 0.0
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Goal:
    """Goal of a plan: a deadline and a budget.

    The last job must end within `deadline_s` seconds after the first job's due time, and a run must cost at most
    `budget_usd`.
    """

    deadline_s: float
    budget_usd: float | None = None

    def met(self, result: TrialResult) -> bool:
        """Return whether a run finished all work within the deadline and the budget."""
        return self.in_time(result) and self.in_budget(result)

    def in_time(self, result: TrialResult) -> bool:
        return result.finish_s <= self.deadline_s

    def in_budget(self, result: TrialResult) -> bool:
        return self.budget_usd is None or result.usd <= self.budget_usd


@dataclass(frozen=True, slots=True)
class TrialResult:
    """Result of a trial with one seed.

    `finish_s` is the time from the first job's due time to the last job's end. `finish_s` is infinite if a job never
    ended, tasks were lost, or too many jobs failed. `usd` is the cost of the run, plus the cost of the pools' minimum
    sizes until the deadline. `hit` is True if a Spot wave hit an instance, and None without a Spot wave. `busiest_s` is
    the start of the busiest window, in seconds from the start of the run.
    """

    seed: int
    finish_s: float
    usd: float
    late: int
    failed_jobs: int
    lost: int
    peak: int
    pools: Mapping[str, PoolDemand]
    hit: bool | None = None
    busiest_s: float = 0.0

    @property
    def is_done(self) -> bool:
        return math.isfinite(self.finish_s)


def trial_result(
    record: Record,
    book: PriceBook,
    deadline_s: float = 0.0,
    allowed_failures: Mapping[str, float] = MappingProxyType({}),
) -> TrialResult:
    """Derive the trial's result from the record of a run. Raise UsageError for a record without a cost."""
    if record.usd is None:
        raise UsageError(
            f"The forecast of {record.scenario} has no cost, and a plan needs it.",
            remedy="Name instance types that are in the price book: see `batchlab cost prices`.",
        )
    otherwise = math.inf if "" in allowed_failures else 0.0
    limits = {**{job.template: otherwise for job in record.jobs}, **allowed_failures}
    has_failed = any(_measure(record, "failed_jobs", 0.0, template) > most for template, most in limits.items())
    finish_s = _measure(record, "makespan", math.inf)
    first_s = min((job.due_s for job in record.jobs), default=0.0)
    waves = [fault for fault in record.faults if fault.name == FaultName.SPOT_WAVE]
    return TrialResult(
        record.seed,
        math.inf if record.cut or record.lost or has_failed else finish_s,
        record.usd + minimum_usd(record, first_s + deadline_s, book),
        int(_measure(record, "late", 0.0)),
        int(_measure(record, "failed_jobs", 0.0)),
        record.lost,
        int(_measure(record, "peak_fleet", 0.0)),
        {name: _pool_demand(record, name) for name in record.pools},
        any(not wave.impossible for wave in waves) if waves else None,
        _busiest_s(record, first_s, deadline_s),
    )


def _busiest_s(record: Record, first_s: float, deadline_s: float) -> float:
    """Return the start of the window of the run with the most work.

    If several windows are equally busy, return the earliest start, because faster runs are busy in the earliest window
    too.
    """
    moments = [sample.at_s for sample in record.samples]
    busy = [
        float(sum(pool.in_service for pool in sample.pools.values() if pool.backlog_tasks)) for sample in record.samples
    ]
    areas = [0.0]
    for count, (at_s, next_s) in zip(busy, pairwise(moments), strict=False):
        areas.append(areas[-1] + count * (next_s - at_s))

    def until(at_s: float) -> float:
        """Return the instance seconds until `at_s` in which the instance's pool had a backlog."""
        i = bisect_right(moments, at_s) - 1
        if i < 0:
            return 0.0
        return areas[i] + (busy[i] * (at_s - moments[i]) if i + 1 < len(busy) else 0.0)

    width_s = BUSIEST_WINDOW * deadline_s
    last_s = first_s + deadline_s - width_s
    starts = [first_s, *(at_s for at_s in moments if first_s < at_s <= last_s)]
    return max(starts, key=lambda at_s: (round(until(at_s + width_s) - until(at_s), 6), -at_s))


def allowed_failures(scenario: Scenario) -> dict[str, float]:
    """Return the allowed number of failed jobs by template ("" for all jobs), from the scenario's expectations.

    Without an expectation about failed jobs, the allowed number is 0.
    """
    limits: dict[str, float] = {}
    for expectation in scenario.expect:
        if expectation.measure == "failed_jobs" and expectation.most is not None:
            limits[expectation.template] = min(expectation.most, limits.get(expectation.template, math.inf))
    return limits


def _measure(record: Record, name: str, otherwise: float, template: str = "") -> float:
    value = MEASURES[name].of(record, template)
    return otherwise if isinstance(value, Unknown) else value


def _pool_demand(record: Record, pool: str) -> PoolDemand:
    stages = [stage for stage in record.stages if stage.pool == pool]
    desired = [(sample.at_s, sample.pools[pool].desired) for sample in record.samples if pool in sample.pools]
    peak = max((count for _, count in desired), default=0)
    boots = [life.boot_s for life in record.instances if life.pool == pool and life.boot_s is not None]
    return PoolDemand(
        work_s=sum(stage.run_s * stage.slots for stage in stages),
        slots=sum(stage.tasks * stage.slots for stage in stages),
        rise_s=next((at_s for at_s, count in desired if peak and 2 * count >= peak), None),
        boot_s=median(boots) if boots else 0.0,
        gpu_s=sum(stage.run_s * stage.gpus for stage in stages),
        gpus=sum(stage.tasks * stage.gpus for stage in stages),
    )


@dataclass(frozen=True, slots=True)
class EvaluatedCandidate:
    """Candidate with its results for at least one seed."""

    candidate: Candidate
    outcomes: tuple[TrialResult, ...]

    @property
    def usd(self) -> float:
        """Return the mean cost of a run."""
        return mean(outcome.usd for outcome in self.outcomes)

    @property
    def finish_s(self) -> float:
        """Return the latest finish time of the runs with all seeds, because a mean does not show missed deadlines."""
        return max(outcome.finish_s for outcome in self.outcomes)

    @property
    def peak(self) -> int:
        """Return the largest number of instances in service."""
        return max(outcome.peak for outcome in self.outcomes)

    def met(self, goal: Goal) -> int:
        """Count the seeds that meet the goal."""
        return sum(map(goal.met, self.outcomes))

    def to_json(self) -> dict[str, object]:
        return {
            **self.candidate.to_json(),
            "usd": self.usd,
            "finish_s": self.finish_s if math.isfinite(self.finish_s) else None,
            "seeds": len(self.outcomes),
            "peak_fleet": self.peak,
        }


QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "most": 1.0}


def quantiles(numbers: Sequence[float]) -> dict[str, float | None]:
    """Return quantiles of the numbers by name. None replaces an infinite quantile, because JSON cannot express
    infinity.
    """
    values = {name: quantile(numbers, share) for name, share in QUANTILES.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


Forecaster = Callable[[Scenario, int], Record]
"""Function that forecasts a scenario with a seed. The function is pickled and sent to several processes."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of one candidate.

    `wave_s` is the time of the Spot wave. If `rough` is True, the trial uses the fast model.
    """

    candidate: Candidate
    index: int
    seed: int
    wave_s: float | None
    rough: bool = False


@dataclass(frozen=True, slots=True)
class _TrialTask:
    """Function that runs a trial in any process and returns only its result."""

    scenario: Scenario
    run: Forecaster
    sketch: Forecaster | None
    book: PriceBook
    deadline_s: float
    allowed_failures: Mapping[str, float]

    def __call__(self, trial: Trial) -> TrialResult | BatchlabError:
        run = self.sketch if trial.rough and self.sketch is not None else self.run
        try:
            record = run(apply_candidate(self.scenario, trial.candidate, trial.wave_s), trial.seed)
            return trial_result(record, self.book, self.deadline_s, self.allowed_failures)
        except BatchlabError as error:
            return error


@dataclass(slots=True)
class TrialRunner:
    """Runner of trials. The processes of the runner exist until the runner is closed."""

    scenario: Scenario
    goal: Goal
    run: Forecaster
    sketch: Forecaster | None = None
    processes: int = 1
    book: PriceBook = field(default_factory=price_book.load)
    window_s: float = 0.0
    """Start of the window in which the Spot wave occurs, in seconds from the start of the run."""
    _pool: ProcessPool[Trial, TrialResult | BatchlabError] | None = None
    _work: _TrialTask = field(init=False)

    def __post_init__(self) -> None:
        self._work = _TrialTask(
            self.scenario, self.run, self.sketch, self.book, self.goal.deadline_s, allowed_failures(self.scenario)
        )

    @property
    def waves(self) -> bool:
        """Return whether the runner adds a Spot wave to the scenario, because the scenario does not contain a Spot
        wave.
        """
        return all(fault.name is not FaultName.SPOT_WAVE for fault in self.scenario.faults)

    def trial(self, candidate: Candidate, index: int, *, rough: bool = False) -> Trial:
        """Return a trial of the candidate. The seed of the trial is the scenario's seed plus `index`."""
        seed = self.scenario.seed + index
        wave_s = None
        if self.waves:
            width_s = BUSIEST_WINDOW * self.goal.deadline_s
            wave_s = self.window_s + width_s * Stream(seed, "plan", "spot-wave").unit()
        return Trial(candidate, index, seed, wave_s, rough)

    def base(self) -> TrialResult:
        """Run the unchanged scenario without an added Spot wave, in the fast model if the runner has a fast model."""
        start, rough = current_candidate(self.scenario), self.sketch is not None
        return _result_or_raise(self._work(Trial(start, 0, self.scenario.seed, None, rough)))

    def results(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, TrialResult]]:
        """Yield each trial with its result, in the order of completion. Raise BatchlabError for a failed run or a
        process that died.
        """
        if self.processes <= 1 or len(trials) <= 1:
            for trial in trials:
                yield trial, _result_or_raise(self._work(trial))
            return
        if self._pool is None:
            self._pool = ProcessPool(self._work, self.processes)
        with closing(self._pool.each(trials)) as results:
            for trial, result in results:
                yield trial, _result_or_raise(result)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _result_or_raise(result: TrialResult | BatchlabError | ProcessDeath) -> TrialResult:
    if isinstance(result, ProcessDeath):
        raise BatchlabError(
            f"The process of a simulated run ended with exit code {result.exit_code} and without a result.",
            remedy="Plan again with --jobs 1, and on a machine with more memory.",
        )
    if isinstance(result, BatchlabError):
        raise result
    return result
