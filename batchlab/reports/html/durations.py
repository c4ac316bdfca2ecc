"""Wait times and run times of tasks by stage: percentiles and histograms.

Invariant: a histogram contains every task that the table counts for its stage. Percentiles are exact, with linear
interpolation between neighboring values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.job_definition import task_name
from batchlab.core.text import count, size, span
from batchlab.reports.html import charts
from batchlab.reports.html.charts import Chart, Data, Key, LogAxis, Shape, count_ticks
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
MIN_TIMES_S = {"run_s": 0.0001, "wait_s": 0.001}
"""Minimum time in seconds in a histogram, by column. The histogram counts shorter times as the minimum time."""
MIN_TASKS = 5
"""Minimum number of tasks in a stage that gets a histogram."""
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Run times or wait times of one stage, in seconds. `bins` maps a bin of a LogAxis to its tasks."""

    stage: str
    tasks: int
    mean_s: float
    most_s: float
    percentiles_s: Mapping[int, float]
    bins: Mapping[int, int]

    @property
    def sum_s(self) -> float:
        return self.mean_s * self.tasks


def spreads(run: ReportRun, column: str) -> list[Spread]:
    """Return the spread of the column `run_s` or `wait_s` for each stage, in the order of the job's stages.

    Stages without values in the column are skipped.
    """
    points = ", ".join(f"{p / 100}" for p in PERCENTILES)
    rows = run.rows(
        f"""SELECT stage, count(*) AS tasks, avg({column}) AS mean_s,
                   max({column}) AS most_s, quantile_cont({column}, [{points}]) AS points
            FROM tasks WHERE job = $job AND {column} IS NOT NULL GROUP BY stage"""
    )
    bins: dict[str, dict[int, int]] = {}
    for row in run.rows(
        f"""SELECT stage, floor(log10(greatest({column}, $least)) * $per)::INTEGER AS bin,
                   count(*) AS tasks
            FROM tasks WHERE job = $job AND {column} IS NOT NULL GROUP BY ALL""",
        least=MIN_TIMES_S[column],
        per=LogAxis.PER_DECADE,
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
    return Spread(row["stage"], row["tasks"], row["mean_s"], row["most_s"], points, bins)


def table(spreads: Sequence[Spread]) -> Data:
    """Return the table of all stages with their percentiles."""
    rows = tuple(
        (
            visible(spread.stage, 60),
            f"{spread.tasks:,}",
            span(spread.mean_s),
            *(span(spread.percentiles_s[p]) for p in PERCENTILES),
            span(spread.most_s),
        )
        for spread in spreads
    )
    names = ("# median", *(f"# {p}%" for p in PERCENTILES[1:]))
    return Data(("stage", "# tasks", "# mean", *names, "# longest"), rows)


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


def draw_histograms(run: ReportRun, candidates: Sequence[Spread], column: str) -> list[Chart]:
    """Return a histogram for each of the stages with the most time. All histograms have the same axis."""
    spreads = [spread for spread in candidates if spread.tasks >= MIN_TASKS]
    if not spreads:
        return []
    keys = [k for spread in spreads for k in spread.bins]
    first, last = min(keys), max(keys)
    axis = LogAxis(first - 1, max(last + 1, first + LogAxis.PER_DECADE))
    most = sorted(spreads, key=lambda spread: -spread.sum_s)[:MAX_HISTOGRAMS]
    return [_histogram(run, spread, axis, column) for spread in spreads if spread in most]


def _histogram(run: ReportRun, spread: Spread, axis: LogAxis, column: str) -> Chart:
    heights = [float(spread.bins.get(axis.first + k, 0)) for k in range(axis.bins)]
    top, y = count_ticks(max(heights), 3)
    name, verb = visible(spread.stage, 60), "ran" if column == "run_s" else "waited"
    p = spread.percentiles_s
    shapes = [Shape(charts.columns(heights, top, HEIGHT), f"fill {run.looks[spread.stage]}")]
    for percentile, look in ((50, "line strong"), (95, "line dashed")):
        x = charts.number(axis.at(p[percentile]) * charts.WIDTH)
        shapes.append(Shape(f"M{x} 0V{charts.number(HEIGHT)}", look))
    rows = []
    for k, tasks in enumerate(heights):
        low, high = axis.edge_s(axis.first + k), axis.edge_s(axis.first + k + 1)
        if not tasks:
            continue
        interval = f"{span(low)} to {span(high)}"
        shapes.append(
            Shape(
                charts.box(k / axis.bins, (k + 1) / axis.bins, 0, HEIGHT),
                "hover",
                f"{interval}: {count(int(tasks), 'task')}, {share(tasks, spread.tasks)}",
            )
        )
        rows.append((interval, f"{int(tasks):,}", share(tasks, spread.tasks)))
    return Chart(
        f"{column}-{[row['stage'] for row in run.stages].index(spread.stage)}",
        name,
        f"How long {count(spread.tasks, 'task')} of {name} {verb}, on a logarithmic axis: half of "
        f"them at most {span(p[50])}, 95% at most {span(p[95])}, the longest {span(spread.most_s)}.",
        HEIGHT,
        axis.ticks(),
        y,
        tuple(shapes),
        keys=(Key("stroke strong", f"median {span(p[50])}"), Key("stroke dashed", f"95% {span(p[95])}")),
        data=Data(("from – to", "# tasks", "# share"), tuple(rows)),
        quiet=True,
    )
