"""Wait times, run times, CPU times, and peak memory of tasks by stage: percentiles and histograms.

Invariant: a histogram contains every task that the table counts for its stage. Percentiles are exact, with linear
interpolation between neighboring values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.job_definition import task_name
from batchlab.core.text import capital, count, size, span
from batchlab.reports.html import charts
from batchlab.reports.html.charts import Chart, Data, Key, LogAxis, Scale, Shape, count_ticks
from batchlab.reports.html.source import ReportRun, Row, share, visible

MAX_HISTOGRAMS = 8
"""Maximum number of histograms. Only the stages with the most time get a histogram, but the table has all stages."""
MAX_SORTED_TASKS = 15
"""Number of rows in the table of tasks in each order."""
SORT_COLUMNS = {
    "run_s": "run time",
    "cpu_s": "CPU time",
    "memory_bytes": "peak memory",
    "input_bytes": "input size",
    "output_bytes": "output size",
    "wait_s": "waiting time",
    "attempts": "attempts",
}
"""Columns by which the table of tasks can be sorted, with their names on the page."""
HEIGHT = 110.0
MIN_TASKS = 5
"""Minimum number of tasks in a stage that gets a histogram."""
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Measure:
    """Column of the table of tasks whose distribution the page shows.

    A histogram counts values below `least` as `least`. `shown` returns a value as text.
    """

    column: str
    name: str
    least: float
    scale: Scale
    shown: Callable[[float], str]


RUN = Measure("run_s", "run time", 0.0001, charts.TIMES, span)
WAIT = Measure("wait_s", "waiting time", 0.001, charts.TIMES, span)
CPU = Measure("cpu_s", "CPU time", 0.0001, charts.TIMES, span)
MEMORY = Measure("memory_bytes", "peak memory", 1024.0, charts.SIZES, size)


@dataclass(frozen=True, slots=True)
class Spread:
    """Distribution of a measure in one stage. `bins` maps a bin of a LogAxis to its tasks."""

    stage: str
    tasks: int
    mean: float
    most: float
    percentiles: Mapping[int, float]
    bins: Mapping[int, int]

    @property
    def total(self) -> float:
        return self.mean * self.tasks


def spreads(run: ReportRun, measure: Measure) -> list[Spread]:
    """Return the spread of a measure for each stage, in the order of the job's stages.

    Stages without values are skipped.
    """
    column = measure.column
    points = ", ".join(f"{p / 100}" for p in PERCENTILES)
    rows = run.rows(
        f"""SELECT stage, count(*) AS tasks, avg({column}) AS mean,
                   max({column}) AS most, quantile_cont({column}, [{points}]) AS points
            FROM tasks WHERE job = $job AND {column} IS NOT NULL GROUP BY stage"""
    )
    bins: dict[str, dict[int, int]] = {}
    for row in run.rows(
        f"""SELECT stage, floor(log10(greatest({column}, $least)) * $per)::INTEGER AS bin,
                   count(*) AS tasks
            FROM tasks WHERE job = $job AND {column} IS NOT NULL GROUP BY ALL""",
        least=measure.least,
        per=measure.scale.per_decade,
    ):
        bins.setdefault(row["stage"], {})[row["bin"]] = row["tasks"]
    spread_rows = {row["stage"]: row for row in rows}
    return [
        _spread(spread_rows[stage], bins[stage])
        for stage in (row["stage"] for row in run.stages)
        if stage in spread_rows
    ]


def _spread(row: Row, bins: Mapping[int, int]) -> Spread:
    points = dict(zip(PERCENTILES, row["points"], strict=True))
    return Spread(row["stage"], row["tasks"], row["mean"], row["most"], points, bins)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Distribution of a measure: the table of all stages, and the histograms of the largest stages."""

    title: str
    table: Data
    charts: Sequence[Chart]


def distribution(run: ReportRun, measure: Measure, spreads: Sequence[Spread]) -> Distribution:
    title = f"{capital(measure.name)} of tasks"
    return Distribution(title, _table(measure, spreads), draw_histograms(run, measure, spreads))


def _table(measure: Measure, spreads: Sequence[Spread]) -> Data:
    """Return the table of all stages with their percentiles."""
    rows = tuple(
        (
            visible(spread.stage, 60),
            f"{spread.tasks:,}",
            measure.shown(spread.mean),
            *(measure.shown(spread.percentiles[p]) for p in PERCENTILES),
            measure.shown(spread.most),
        )
        for spread in spreads
    )
    names = ("# median", *(f"# {p}%" for p in PERCENTILES[1:]))
    return Data(("stage", "# tasks", "# mean", *names, "# maximum"), rows)


@dataclass(frozen=True, slots=True)
class TaskOrder:
    """Table of the first tasks in one order. `id` is the order's name in the page's HTML."""

    id: str
    name: str
    table: Data


def task_orders(run: ReportRun) -> list[TaskOrder]:
    """Return the tasks with the largest values, in one table for each column by which a reader may sort.

    A column without values does not have a table. Each run time is compared with the median of the task's stage.
    """
    orders = []
    for column, name in SORT_COLUMNS.items():
        rows = run.rows(
            f"""WITH typical AS (
                 SELECT stage, median(run_s) AS median_s FROM tasks
                 WHERE job = $job AND run_s IS NOT NULL GROUP BY stage
               ), most AS (
                 SELECT * FROM tasks WHERE job = $job AND {column} > 0
                 ORDER BY {column} DESC, stage, task LIMIT $most
               )
               SELECT t.*, m.median_s, coalesce(w.instance, t.worker, '') AS place
               FROM most t LEFT JOIN typical m ON m.stage = t.stage
               LEFT JOIN workers w ON w.job = t.job AND w.worker = t.worker
               ORDER BY t.{column} DESC, t.stage, t.task""",
            most=MAX_SORTED_TASKS,
        )
        if rows:
            orders.append(TaskOrder(column.replace("_", "-"), name, Data(_TASK_COLUMNS, tuple(map(_task_row, rows)))))
    return orders


_TASK_COLUMNS = (
    "task",
    "state",
    "# attempts",
    "# ran",
    "# times the median",
    "# waited",
    "# CPU time",
    "# peak memory",
    "# input",
    "# output",
    "input file",
    "instance",
)


def _task_row(row: Row) -> tuple[str, ...]:
    def known(value: float | None, shown: Callable[[float], str]) -> str:
        return "–" if value is None else shown(value)

    return (
        task_name(visible(row["stage"], 60), row["task"]),
        visible(row["state"], 20),
        f"{row['attempts']:,}",
        known(row["run_s"], span),
        f"{row['run_s'] / row['median_s']:,.1f}" if row["run_s"] is not None and row["median_s"] else "–",
        known(row["wait_s"], span),
        known(row["cpu_s"], span),
        *(known(row[column], size) for column in ("memory_bytes", "input_bytes", "output_bytes")),
        visible(row["input"] or "–", 60),
        visible(row["place"], 60),
    )


def draw_histograms(run: ReportRun, measure: Measure, candidates: Sequence[Spread]) -> list[Chart]:
    """Return a histogram for each of the stages with the largest totals. All histograms have the same axis."""
    spreads = [spread for spread in candidates if spread.tasks >= MIN_TASKS]
    if not spreads:
        return []
    keys = [k for spread in spreads for k in spread.bins]
    first, last = min(keys), max(keys)
    axis = LogAxis(first - 1, max(last + 1, first + measure.scale.per_decade), measure.scale)
    most = sorted(spreads, key=lambda spread: -spread.total)[:MAX_HISTOGRAMS]
    return [_histogram(run, measure, spread, axis) for spread in spreads if spread in most]


def _histogram(run: ReportRun, measure: Measure, spread: Spread, axis: LogAxis) -> Chart:
    heights = [float(spread.bins.get(axis.first + k, 0)) for k in range(axis.bins)]
    top, y = count_ticks(max(heights), 3)
    name, shown = visible(spread.stage, 60), measure.shown
    median, most = shown(spread.percentiles[50]), shown(spread.percentiles[95])
    shapes = [Shape(charts.columns(heights, top, HEIGHT), f"fill {run.looks[spread.stage]}")]
    for percentile, look in ((50, "line strong"), (95, "line dashed")):
        x = charts.number(axis.at(spread.percentiles[percentile]) * charts.WIDTH)
        shapes.append(Shape(f"M{x} 0V{charts.number(HEIGHT)}", look))
    rows = []
    for k, tasks in enumerate(heights):
        if not tasks:
            continue
        interval = f"{shown(axis.edge(axis.first + k))} to {shown(axis.edge(axis.first + k + 1))}"
        shapes.append(
            Shape(
                charts.box(k / axis.bins, (k + 1) / axis.bins, 0, HEIGHT),
                "hover",
                f"{interval}: {count(int(tasks), 'task')}, {share(tasks, spread.tasks)}",
            )
        )
        rows.append((interval, f"{int(tasks):,}", share(tasks, spread.tasks)))
    return Chart(
        f"{measure.column}-{[row['stage'] for row in run.stages].index(spread.stage)}",
        name,
        f"{capital(measure.name)} of {count(spread.tasks, 'task')} of {name}, on a logarithmic axis: half of them at "
        f"most {median}, 95% at most {most}, the maximum {shown(spread.most)}.",
        HEIGHT,
        axis.ticks(),
        y,
        tuple(shapes),
        keys=(Key("stroke strong", f"median {median}"), Key("stroke dashed", f"95% {most}")),
        data=Data(("from – to", "# tasks", "# share"), tuple(rows)),
        quiet=True,
    )
