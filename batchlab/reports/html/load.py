"""Work and fleet of a run over time: running tasks, slots, remaining tasks, and scaling decisions.

Invariant: the area under the running tasks equals the slot time of the run's bundles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from batchlab.core.text import count
from batchlab.reports.html import charts
from batchlab.reports.html.charts import Chart, Data, Key, Mark, Shape, count_ticks, time_ticks
from batchlab.reports.html.source import PLACED, PLACES, ReportRun, Row, at, offset, visible

BINS = 120
ROWS = 24
"""Number of rows in the table of a chart."""
HEIGHT = 150.0
MIN_OTHERS_RATIO = 1.1
"""Minimum ratio of all jobs' tasks to the job's own tasks for which the chart shows the tasks of all jobs."""
MAX_DECISIONS = 40
"""Maximum number of scaling decisions on the page. The page prefers the decisions with the largest changes."""

_WAITS = """(SELECT ready_s, coalesce(started_s, $b) AS begun_s, tasks FROM bundles
             WHERE job = $job AND (started_s IS NOT NULL OR state = 'PLANNED'))"""

Levels = list[float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """Figures of the run in `BINS` equal intervals.

    `running` contains the busy slots by stage, and `slots` contains the slots in service. `waiting` counts the tasks
    that are ready. `left` counts the job's tasks that had not ended at the interval's end, and `left_of_all` counts the
    remaining tasks of all jobs of the grid. `desired`, `in_service`, and `pending` count instances. A value is None if
    nothing was recorded.
    """

    running: dict[str, list[float]]
    slots: list[float]
    waiting: list[float]
    left: list[float]
    left_of_all: list[float | None]
    desired: list[float | None]
    in_service: list[float | None]
    pending: list[float | None]

    @property
    def in_flight(self) -> list[float]:
        return [sum(levels) for levels in zip(*self.running.values(), strict=True)] or [0.0] * BINS


def series(run: ReportRun) -> Series:
    """Return the figures of the run that the charts show."""
    running = {row["stage"]: [0.0] * BINS for row in run.stages}
    for row in run.over(PLACED, "started_s", "ended_s", "slots", "stage", BINS):
        running.setdefault(row["stage"], [0.0] * BINS)[row["bin"]] = row["amount"]
    return Series(
        running,
        _whole(run.over(PLACES, "begin_s", "end_s", "slots", "1 AS one", BINS)),
        _whole(run.over(_WAITS, "ready_s", "begun_s", "tasks", "1 AS one", BINS)),
        _left(run),
        *_seen(run, "queues", ("backlog_tasks",)),
        *_seen(run, "fleet", ("desired", "in_service", "pending")),
    )


def _whole(rows: Sequence[Row]) -> list[float]:
    levels = [0.0] * BINS
    for row in rows:
        levels[row["bin"]] = row["amount"]
    return levels


def _left(run: ReportRun) -> list[float]:
    rows = run.rows(
        """SELECT greatest(0, least($n - 1, ceil((coalesce(ended_s, $b) - $a) / $w)::BIGINT - 1))
                    AS bin, count(*) AS ended
           FROM tasks WHERE job = $job AND (ended_s IS NOT NULL OR state != 'PLANNED')
           GROUP BY ALL""",
        n=BINS,
        w=run.span_s / BINS,
    )
    ended = {row["bin"]: row["ended"] for row in rows}
    left = run.one("SELECT count(*) AS tasks FROM tasks WHERE job = $job")["tasks"]
    levels: list[float] = []
    for k in range(BINS):
        left -= ended.get(k, 0)
        levels.append(float(left))
    return levels


def _seen(run: ReportRun, table: str, columns: Sequence[str]) -> Iterator[Levels]:
    """Yield the values of each column of a table of recorded values, summed over all pools, for each interval.

    The value of an interval is the last value that was recorded before the end of the interval. `table` and `columns`
    are constants of this module.
    """
    sums = ", ".join(f"sum({name}) AS {name}" for name in columns)
    rows = run.rows(
        f"""WITH looks AS (SELECT * FROM {table} WHERE job = $job),
                 edges AS (SELECT range AS bin, $a + (range + 1) * $w AS t FROM range($n)),
                 places AS (SELECT * FROM edges, (SELECT DISTINCT pool FROM looks))
            SELECT bin, {sums}
            FROM places ASOF JOIN looks ON places.pool = looks.pool AND looks.at_s <= places.t
            GROUP BY bin ORDER BY bin""",
        n=BINS,
        w=run.span_s / BINS,
    )
    by_bin = {row["bin"]: row for row in rows}
    for name in columns:
        yield [float(by_bin[k][name]) if k in by_bin and by_bin[k][name] is not None else None for k in range(BINS)]


# --- Charts --------------------------------------------------------------------------------------


def draw(run: ReportRun, series: Series, decisions: Sequence[Decision]) -> tuple[Chart, ...]:
    """Return the charts of the work and the fleet over one time axis. The third chart exists only if instances were
    recorded.
    """
    charts = [_running(run, series), _backlog(run, series)]
    if any(desired is not None for desired in series.desired):
        charts.append(_instances(run, series, decisions))
    return tuple(charts)


def _step_chart(
    run: ReportRun,
    chart: Chart,
    columns: Sequence[str],
    *,
    tooltip: Callable[[int], str],
    row: Callable[[int], tuple[str, ...]],
) -> Chart:
    """Add the time axis, a tooltip for each interval, and a table of `ROWS` intervals to a chart."""
    hover = (
        Shape(charts.box(k / BINS, (k + 1) / BINS, 0, HEIGHT), "hover", f"{at(run, k, BINS)}: {tooltip(k)}")
        for k in range(BINS)
    )
    rows = tuple((at(run, k, BINS), *row(k)) for k in range(BINS // ROWS - 1, BINS, BINS // ROWS))
    return replace(chart, x=time_ticks(run.span_s), shapes=(*chart.shapes, *hover), data=Data(("time", *columns), rows))


def _running(run: ReportRun, series: Series) -> Chart:
    in_flight, slots = series.in_flight, series.slots
    top, y = count_ticks(max(*in_flight, *slots, 1.0))
    looks = {stage: run.looks.get(stage, "s0") for stage in series.running}
    paths = charts.stack(list(series.running.values()), top, HEIGHT)
    shapes = [Shape(path, f"fill {look}") for look, path in zip(looks.values(), paths, strict=True) if path]
    peak = max(range(BINS), key=lambda k: in_flight[k])
    chart = Chart(
        "running",
        "Busy slots and slots in service",
        "Slots that ran tasks of the job, stacked by stage, and a line for all slots in service. The peak was at "
        f"{at(run, peak, BINS)}: {in_flight[peak]:,.1f} of {slots[peak]:,.1f} slots were busy.",
        HEIGHT,
        (),
        y,
        (*shapes, Shape(charts.line(list(slots), top, HEIGHT), "line strong")),
        keys=(
            *(Key(f"box {look}", visible(stage, 40)) for stage, look in looks.items()),
            Key("stroke strong", "slots in service"),
        ),
    )
    return _step_chart(
        run,
        chart,
        ("# slots busy", "# slots in service", "# share busy"),
        tooltip=lambda k: f"{in_flight[k]:,.1f} slots busy of {slots[k]:,.1f}",
        row=lambda k: (
            f"{in_flight[k]:,.1f}",
            f"{slots[k]:,.1f}",
            f"{min(1.0, in_flight[k] / slots[k]):.0%}" if slots[k] else "–",
        ),
    )


def _backlog(run: ReportRun, series: Series) -> Chart:
    left, waiting = series.left, series.waiting
    of_all = [tasks or 0.0 for tasks in series.left_of_all]
    # Without other jobs, the line of all jobs would repeat the line of this job.
    is_shared = max(of_all) > MIN_OTHERS_RATIO * left[0]
    top, y = count_ticks(max(*left, *waiting, *(of_all if is_shared else ()), 1.0))
    shapes = [
        Shape(charts.area(left, top, HEIGHT), "fill faint"),
        Shape(charts.area(waiting, top, HEIGHT), "fill wait"),
    ]
    keys = [Key("box faint", "not ended"), Key("box wait", "ready, waiting for a slot")]
    columns = ["# tasks left", "# of these waiting (mean)"]
    others = ""
    if is_shared:
        shapes.append(Shape(charts.line(series.left_of_all, top, HEIGHT), "line strong"))
        keys.append(Key("stroke strong", "not ended, of all jobs"))
        columns.append("# left of all jobs")
        others = f" Other jobs of the grid had up to {max(of_all) - left[0]:,.0f} further tasks."
    half = next((k for k in range(BINS) if left[k] <= left[0] / 2), BINS - 1)
    chart = Chart(
        "backlog",
        "Tasks left, and tasks that waited for a slot",
        "Tasks of the job that had not ended, and the part of them that was ready and waited for a slot. Half of the "
        f"tasks had ended at {at(run, half, BINS)}.{others}",
        HEIGHT,
        (),
        y,
        tuple(shapes),
        keys=tuple(keys),
    )
    return _step_chart(
        run,
        chart,
        columns,
        tooltip=lambda k: (
            f"{left[k]:,.0f} tasks left, {waiting[k]:,.0f} of them ready and waiting"
            + (f"; {of_all[k]:,.0f} tasks left of all jobs" if is_shared else "")
        ),
        row=lambda k: (
            f"{left[k]:,.0f}",
            f"{waiting[k]:,.1f}",
            *((_number(series.left_of_all[k]),) if is_shared else ()),
        ),
    )


def _instances(run: ReportRun, series: Series, decisions: Sequence[Decision]) -> Chart:
    in_service, pending = ([value or 0.0 for value in values] for values in (series.in_service, series.pending))
    running = [a + b for a, b in zip(in_service, pending, strict=True)]
    top, y = count_ticks(max(*running, *(value or 0.0 for value in series.desired), 1.0))
    service, boots = charts.stack([in_service, pending], top, HEIGHT)
    chart = Chart(
        "fleet",
        "Instances",
        "Instances in service and booting, and a line for the desired capacity. Triangles mark "
        f"{count(len(decisions), 'scaling decision')}. The table below has the reasons.",
        HEIGHT,
        (),
        y,
        (
            Shape(service, "fill service"),
            Shape(boots, "fill boot"),
            Shape(charts.line(series.desired, top, HEIGHT), "line strong"),
        ),
        keys=(Key("box service", "in service"), Key("box boot", "booting"), Key("stroke strong", "desired")),
        marks=tuple(
            Mark(decision.place, "up" if decision.grew else "down", f"{decision.at}: {decision.change}")
            for decision in decisions
        ),
    )

    def row(k: int) -> tuple[str, str, str]:
        return _number(series.desired[k]), _number(series.in_service[k]), _number(series.pending[k])

    return _step_chart(
        run,
        chart,
        ("# desired", "# in service", "# booting"),
        tooltip=lambda k: "{} desired, {} in service, {} booting".format(*row(k)),
        row=row,
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


# --- Decisions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decision:
    """Change of a pool's desired capacity. `place` is the position of the change on the time axis, from 0 to 1."""

    place: float
    at: str
    pool: str
    before: int
    after: int
    reason: str
    in_service: str
    backlog: str

    @property
    def grew(self) -> bool:
        return self.after > self.before

    @property
    def change(self) -> str:
        return f"{self.pool} {self.before} → {self.after}"


def decisions(run: ReportRun) -> tuple[list[Decision], int]:
    """Return at most `MAX_DECISIONS` scaling decisions in order of time, and the number of all decisions.

    The function prefers the decisions with the largest changes.
    """
    rows = run.rows(
        """SELECT * FROM (
             SELECT *, count(*) OVER () AS n FROM scaling WHERE job = $job
             ORDER BY abs("after" - coalesce("before", 0)) DESC, at_s LIMIT $most
           ) ORDER BY at_s, pool""",
        most=MAX_DECISIONS,
    )
    decisions = [
        Decision(
            min(1.0, max(0.0, (row["at_s"] - run.start_s) / run.span_s)),
            offset(row["at_s"] - run.start_s, run.span_s),
            visible(row["pool"] or "", 40),
            int(row["before"] or 0),
            int(row["after"] or 0),
            visible(row["reason"] or "", 500),
            _number(row["in_service"]),
            _number(row["backlog_tasks"]),
        )
        for row in rows
    ]
    return decisions, int(rows[0]["n"]) if rows else 0
