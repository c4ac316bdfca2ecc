"""Forecasts compared with independent results: traces replayed in first-come, first-served order, Erlang's waiting
formula, and AWS's worked example of target tracking.

The results are in `reference/` of the shared data, with their sources.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import pytest

from batchlab.core.model import GroupView, Instance, LifecycleState, Pool
from batchlab.fleet.api_types import ScalingPolicy, TargetTracking
from batchlab.manager.autoscaler import desired_capacity
from batchlab.manager.state import Backlog
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model.arrivals import Poisson
from batchlab.scenarios.model.distributions import Constant, Exponential
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Scenario
from batchlab.scenarios.record import Record
from batchlab.scenarios.traces.source import Trace, TraceFormat
from tests.support.autoscaling_group import CONFIG, GROUP, World, in_aws
from tests.support.scenarios.ideal_grid import IN_ORDER, LIKE, NOTHING, servers

ALL = "BATCHLAB_GOLDEN"
"""Environment variable that selects every row of the results, which takes minutes."""

FILES = {"nasa-ipsc": "NASA-iPSC-1993-3.1-cln.swf.gz", "hpc2n-head": "hpc2n-2002-head.swf"}


def rows(shared_data: Path, name: str) -> list[dict[str, str]]:
    with (shared_data / "reference" / name).open(newline="") as file:
        return list(csv.DictReader(file))


# --- Traces, first come first served -------------------------------------------------------------


@dataclass(frozen=True)
class Replayed:
    """The reference result of a trace on a number of slots."""

    jobs: int
    total_runtime_s: float
    mean_wait_s: float
    waits_s: tuple[float, ...]
    """The p50, p95, p99, and maximum of the waits. A quantile p is the sorted wait at index int(p × n)."""
    jobs_waiting: int
    makespan_s: float


def source(shared_data: Path, trace: str, limit: int | None = None) -> Trace:
    path = shared_data / "traces" / FILES[trace]
    return Trace(template="job", path=path, format=TraceFormat.SWF, limit=limit)


def replayed(shared_data: Path, trace: str, slots: int) -> Replayed:
    plan = servers(source(shared_data, trace), slots)
    record = simulate(plan, like=LIKE, calibration=NOTHING, options=IN_ORDER)
    assert (record.lost, record.duplicates, record.cut) == (0, 0, "")
    runs_s = {job.id: job.task_s or 0.0 for job in expand(plan).jobs}
    waits_s = sorted(waits_of(record))
    longest_s = round(waits_s[-1], 6)
    ends_s = [(job.started_s or 0.0) + runs_s[job.id] for job in record.jobs]
    return Replayed(
        len(record.jobs),
        round(sum(stage.run_s for stage in record.stages), 3),
        round(fmean(waits_s), 6),
        (*(round(waits_s[int(p * len(waits_s))], 6) for p in (0.5, 0.95, 0.99)), longest_s),
        sum(wait_s > 1e-6 for wait_s in waits_s),
        round(max(ends_s) - record.jobs[0].due_s, 6),
    )


def golden(shared_data: Path, trace: str, slots: int) -> dict[str, str]:
    (row,) = (
        one
        for one in rows(shared_data, "fifo_replay_golden.csv")
        if (one["trace"], one["workers"]) == (trace, str(slots))
    )
    return row


def waits_of(record: Record) -> list[float]:
    return [job.started_s - job.due_s for job in record.jobs if job.started_s is not None]


@pytest.mark.parametrize(
    ("trace", "slots"),
    [
        pytest.param("hpc2n-head", 16, marks=pytest.mark.slow),
        pytest.param("hpc2n-head", 8, marks=pytest.mark.slow),
        *(("nasa-ipsc", slots) for slots in (8, 4, 3, 2)),
    ],
)
def test_waits_of_a_trace_match_two_independent_replays(shared_data: Path, trace: str, slots: int) -> None:
    """The reference results of SimPy and of the Kiefer-Wolfowitz recursion agree on every job."""
    if (trace, slots) not in QUICK and not os.environ.get(ALL):
        pytest.skip(f"takes minutes: {ALL} asks for it")
    row = golden(shared_data, trace, slots)
    assert replayed(shared_data, trace, slots) == Replayed(
        int(row["jobs"]),
        float(row["total_runtime_s"]),
        float(row["mean_wait_s"]),
        tuple(float(row[name]) for name in ("p50", "p95", "p99", "max_wait_s")),
        int(row["jobs_waiting"]),
        float(row["makespan_s"]),
    )


QUICK = {("hpc2n-head", 16), ("hpc2n-head", 8)}


def recursion(plan: Scenario, slots: int, task_s: float = 0.0) -> Iterator[float]:
    """Return the wait of each job until a slot is free, in the order of arrival, by the recursion of Kiefer and
    Wolfowitz. A job without a run time takes `task_s`."""
    free_s = [0.0] * slots
    for job in expand(plan).jobs:
        begins_s = max(job.due_s, free_s[0])
        heapreplace(free_s, begins_s + (job.task_s or task_s))
        yield begins_s - job.due_s


@pytest.mark.parametrize("slots", [8, 4, 3, 2])
def test_recursion_matches_the_reference_for_a_whole_trace(shared_data: Path, slots: int) -> None:
    """The recursion can therefore replace the reference for other numbers of slots."""
    row = golden(shared_data, "nasa-ipsc", slots)
    waits_s = sorted(recursion(servers(source(shared_data, "nasa-ipsc"), slots), slots))
    assert len(waits_s) == int(row["jobs"])
    assert sum(wait_s > 1e-6 for wait_s in waits_s) == int(row["jobs_waiting"])
    assert round(fmean(waits_s), 6) == float(row["mean_wait_s"])
    assert round(waits_s[-1], 6) == float(row["max_wait_s"])


@pytest.mark.slow
@pytest.mark.parametrize("slots", [4, 2])
def test_waits_of_a_busy_month_match_the_recursion(shared_data: Path, slots: int) -> None:
    """The test compares every job, which takes minutes for all three months."""
    plan = servers(source(shared_data, "nasa-ipsc", 2000), slots)
    record = simulate(plan, like=LIKE, calibration=NOTHING, options=IN_ORDER)
    expected_s = list(recursion(plan, slots))
    assert [round(wait_s, 6) for wait_s in waits_of(record)] == [round(e, 6) for e in expected_s]
    assert sum(wait_s > 1 for wait_s in expected_s) > 100


@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_waits_of_short_jobs_match_the_recursion(slots: int) -> None:
    """The test compares every job. A slot that becomes free while its worker begins another job takes the next job at
    once."""
    arrivals = Poisson(template="job", per_hour=72_000.0 * slots, until_s=30.0)
    plan = servers(arrivals, slots, Constant(0.04))
    record = simulate(plan, like=LIKE, calibration=NOTHING, options=IN_ORDER)
    expected_s = list(recursion(plan, slots, 0.04))
    late = [
        (round(wait_s, 6), round(right_s, 6))
        for wait_s, right_s in zip(waits_of(record), expected_s, strict=True)
        if abs(wait_s - right_s) > 1e-5
    ]
    assert not late


# --- Erlang --------------------------------------------------------------------------------------

T_95 = {4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262}
"""Student's t for a confidence of 95%, by degrees of freedom."""

SLOTS, SERVICE_S, PER_HOUR = 14, 180.0, 200.0
SEEDS, HOURS, WARMUP_S = 6, 5.0, 1800.0


@dataclass(frozen=True)
class Interval:
    """The mean of independent runs, and the half-width of its confidence interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Interval:
        half = T_95[len(numbers) - 1] * stdev(numbers) / sqrt(len(numbers))
        return cls(fmean(numbers), half)

    def __contains__(self, number: float) -> bool:
        return abs(number - self.mean) <= self.half


@pytest.mark.slow
def test_waits_match_the_erlang_formula(shared_data: Path) -> None:
    """The system is M/M/14 with 100 arrivals in half an hour, each of 180 s."""
    published = {
        row["quantity"]: float(row["published"])
        for row in rows(shared_data, "queueing_reference.csv")
        if row["model"] == "M/M/c"
    }
    until_s = WARMUP_S + HOURS * 3600
    arrivals = Poisson(template="job", per_hour=PER_HOUR, until_s=until_s)
    plan = servers(arrivals, SLOTS, Exponential(SERVICE_S))
    waiting, mean_s, soon, used = [], [], [], []
    for seed in range(SEEDS):
        record = simulate(plan, seed=seed, like=LIKE, calibration=NOTHING, options=IN_ORDER)
        # The grid is empty at the start, so the first half hour is skipped.
        waits_s = [
            job.started_s - job.due_s for job in record.jobs if job.started_s is not None and job.due_s >= WARMUP_S
        ]
        waiting.append(fmean(wait_s > 1e-6 for wait_s in waits_s))
        mean_s.append(fmean(waits_s))
        soon.append(fmean(wait_s <= 20 for wait_s in waits_s))
        used.append(sum(stage.run_s for stage in record.stages) / SLOTS / until_s)
    assert published["P(wait) Erlang C"] in Interval.of(waiting)
    assert published["mean wait s"] in Interval.of(mean_s)
    assert published["P(wait<=20 s)"] in Interval.of(soon)
    assert published["utilisation"] in Interval.of(used)
    assert Interval.of(waiting).half < 0.1, "an interval that says something"
    assert Interval.of(mean_s).half < published["mean wait s"]


# --- AWS's example -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """AWS's example: 1,500 messages of 0.1 s on 10 instances, with an acceptable latency of 10 s."""

    messages: int = 1500
    instances: int = 10
    message_s: float = 0.1
    latency_s: float = 10.0

    @property
    def target(self) -> float:
        """Return the acceptable backlog per instance."""
        return self.latency_s / self.message_s

    @property
    def backlog(self) -> float:
        """Return the current backlog per instance."""
        return self.messages / self.instances


def published(shared_data: Path) -> dict[str, float]:
    return {
        row["quantity"]: float(row["published"])
        for row in rows(shared_data, "queueing_reference.csv")
        if row["model"] == "SQS target tracking"
    }


def test_the_grids_own_policy_adds_what_aws_adds(shared_data: Path) -> None:
    """The policy's drain target is AWS's acceptable latency."""
    example, told = Example(), published(shared_data)
    assert example.target == told["acceptable backlog per instance (target)"]
    assert example.backlog == told["current backlog per instance"]
    alive = tuple(Instance(f"i-{n}", "default", LifecycleState.IN_SERVICE, 0.0) for n in range(example.instances))
    view = GroupView(Pool("default", 0, 100, 1), example.instances, alive)
    backlog = Backlog(example.messages * example.message_s, example.messages)
    desired, why = desired_capacity(backlog, view, example.latency_s)
    assert desired - example.instances == told["instances added"], why


def test_target_tracking_adds_what_aws_adds(shared_data: Path) -> None:
    example, told = Example(), published(shared_data)

    @in_aws
    async def check(w: World) -> None:
        await w.group(example.instances, replace(CONFIG, max_size=100, default_instance_warmup=0))
        metric = '{"MetricName": "backlog", "Namespace": "x", "Statistic": "Average"}'
        tracking = TargetTracking(example.target, customized_metric_specification=metric)
        policy = ScalingPolicy(GROUP, "backlog", "TargetTrackingScaling", target_tracking_configuration=tracking)
        w.asg.put_scaling_policy(policy)
        for _ in range(4):
            w.metrics.put("backlog", example.backlog)
            await w.tick(60.0)
        added = w.view().desired_capacity - example.instances
        assert added == told["instances added"]

    check()
