"""Measures of each run and of each of its stages, for comparisons between runs.

Invariant: the seed alone determines all random values, so a repeated comparison has equal results.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.reports.queries import named_queries, store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

DRAWS = 200
"""Resamples of a run's tasks. A comparison draws more samples of the runs (see `comparison`)."""
FEW = 5
"""A stage with fewer tasks gets percentiles without resamples."""
QUANTILES: Mapping[str, float] = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_COLUMNS = (("", "run_s"), ("wait_", "wait_s"))


@dataclass(frozen=True, slots=True)
class Measure:
    """Definition of a measure.

    `unit` is "s", "usd", or "" for a number. `more_is_better` is None if neither direction is
    better. A gate cannot use such a measure.
    """

    name: str
    unit: str
    meaning: str
    more_is_better: bool | None = False


MEASURES: Mapping[str, Measure] = {
    one.name: one
    for one in (
        Measure("took", "s", "from submission to end"),
        Measure("tasks_per_s", "", "tasks that succeeded per second", more_is_better=True),
        Measure("cost", "usd", "cost per 1,000 tasks that succeeded"),
        Measure("p50", "s", "median run time of a task"),
        Measure("p95", "s", "95th percentile of the run time"),
        Measure("p99", "s", "99th percentile of the run time"),
        Measure("wait_p50", "s", "median time from ready to started"),
        Measure("wait_p95", "s", "95th percentile of that"),
        Measure("retries", "", "attempts per 1,000 tasks that failed and were tried again"),
        Measure("failed", "", "tasks per 1,000 that failed for good"),
        Measure("wasted", "s", "slot time per 1,000 tasks of attempts that came to nothing"),
        Measure("tasks", "", "tasks", more_is_better=None),
        Measure("span", "s", "from a stage's first start to its last end", more_is_better=None),
        Measure("instances", "", "most instances in service", more_is_better=None),
        Measure("scaling_lag", "s", "median time from wanting to having", more_is_better=None),
    )
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Value of a measure in one run, with values of resamples of the run's tasks."""

    value: float
    draws: Sequence[float] = ()


Key = tuple[str, str]
"""Measure and stage. The stage is "" for the whole run."""


@dataclass(slots=True)
class Run:
    """Measures of one job."""

    job: str
    name: str
    is_final: bool
    stages: list[str] = field(default_factory=list)
    samples: dict[Key, Sample] = field(default_factory=dict)

    def put(self, measure: str, stage: str, value: float | None) -> None:
        if value is not None:
            self.samples[measure, stage] = Sample(float(value))

    def count(self, measure: str, stage: str, number: int, of: int, rng: random.Random) -> None:
        """Store a rate per 1,000, with draws that express the uncertainty of a count."""
        draws = tuple(1000 * rng.gammavariate(number + 0.5, 1.0) / of for _ in range(DRAWS))
        self.samples[measure, stage] = Sample(1000 * number / of, draws)


def runs(folders: Sequence[Path], seed: int) -> list[Run]:
    """Return every run in the folders in the order of submission. Raise UsageError if data is
    missing.
    """
    with store.opened(folders) as connection:
        found = {run.job: run for run in _jobs(connection, seed)}
        for run in found.values():
            _stages(connection, run, seed)
            for stage in run.stages:
                _tasks(connection, run, stage, _rng(seed, run.job, stage, "tasks"))
        _fleet(connection, found)
        return list(found.values())


def _rng(*of: object) -> random.Random:
    return random.Random("/".join(map(str, of)))  # noqa: S311 - statistics


def _rows(
    connection: DuckDBPyConnection, sql: str, parameters: Sequence[object] = ()
) -> Iterator[dict[str, Any]]:
    done = connection.execute(sql, list(parameters))
    names = [column[0] for column in done.description or ()]
    for row in done.fetchall():
        yield dict(zip(names, row, strict=True))


def _jobs(connection: DuckDBPyConnection, seed: int) -> Iterator[Run]:
    for row in _rows(connection, "SELECT * FROM jobs ORDER BY submitted_s, job"):
        run = Run(row["job"], row["name"], row["is_final"])
        run.put("took", "", row["took_s"])
        if row["took_s"]:
            run.put("tasks_per_s", "", row["succeeded"] / row["took_s"])
        wasted_s = row["failed_run_s"] + row["lost_slot_s"]
        _per_1000(run, "", row, wasted_s, _rng(seed, run.job))
        yield run


def _stages(connection: DuckDBPyConnection, run: Run, seed: int) -> None:
    sql = "SELECT * FROM stages WHERE job = ? ORDER BY position"
    for row in _rows(connection, sql, [run.job]):
        stage = row["stage"]
        run.stages.append(stage)
        wasted_s = row["failed_run_s"] * row["slots"]
        _per_1000(run, stage, row, wasted_s, _rng(seed, run.job, stage))
        if row["started_s"] is not None:
            run.put("span", stage, row["ended_s"] - row["started_s"])


def _per_1000(
    run: Run, stage: str, row: Mapping[str, Any], wasted_s: float, rng: random.Random
) -> None:
    run.put("tasks", stage, row["planned"])
    if row["planned"]:
        run.count("retries", stage, row["retried"], row["planned"], rng)
        run.count("failed", stage, row["failed"], row["planned"], rng)
        run.put("wasted", stage, 1000 * wasted_s / row["planned"])
    if row["succeeded"] and row["cost_usd"] is not None:
        run.put("cost", stage, 1000 * float(row["cost_usd"]) / row["succeeded"])


def _tasks(connection: DuckDBPyConnection, run: Run, stage: str, rng: random.Random) -> None:
    """Store the quantiles of a stage's tasks and of resamples.

    A resample's quantile equals the value at a random rank, so the function draws ranks instead of
    building resamples. DuckDB computes all of them in one pass.
    """
    where = "FROM tasks WHERE job = ? AND stage = ? AND state = 'SUCCEEDED'"
    (count,) = _rows(connection, f"SELECT count(*) AS n {where}", [run.job, stage])
    if not (n := count["n"]):
        return
    ranks: list[float] = []
    for share in QUANTILES.values():
        ranks.append(share)
        ranks += [rng.betavariate(n * share + 1, n * (1 - share) + 1) for _ in range(DRAWS)]
    wanted = ", ".join(repr(min(1.0, max(0.0, rank))) for rank in ranks)
    columns = ", ".join(f"quantile_cont({c}, [{wanted}]) AS {c}" for _, c in _COLUMNS)
    (row,) = _rows(connection, f"SELECT {columns} {where}", [run.job, stage])
    for prefix, column in _COLUMNS:
        values = row[column]
        for i, name in enumerate(QUANTILES):
            measure = f"{prefix}{name}"
            if values is not None and measure in MEASURES:
                first = i * (DRAWS + 1)
                draws = tuple(values[first + 1 : first + 1 + DRAWS]) if n >= FEW else ()
                run.samples[measure, stage] = Sample(values[first], draws)


def _fleet(connection: DuckDBPyConnection, found: Mapping[str, Run]) -> None:
    most = (
        "SELECT job, sum(most) AS instances FROM (SELECT job, pool, max(in_service) AS most "
        "FROM fleet GROUP BY job, pool) GROUP BY job"
    )
    for row in _rows(connection, most):
        found[row["job"]].put("instances", "", row["instances"])
    for row in _rows(connection, named_queries.named("scaling_lag").sql):
        run, lag_s = found[row["job"]], row["lag_p50_s"]
        known = run.samples.get(("scaling_lag", ""))
        if lag_s is not None and (known is None or lag_s > known.value):
            run.put("scaling_lag", "", lag_s)
