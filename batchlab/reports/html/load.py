"""Work and fleet over time: running tasks, slots, remaining tasks, and scaling decisions.

Invariant: the area under the running tasks equals the slot time of the run's bundles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from batchlab.core.text import count
from batchlab.reports.html import charts
from batchlab.reports.html.charts import Chart, Data, Key, Mark, Shape, Tick, count_ticks, time_ticks
from batchlab.reports.html.source import PLACED, PLACES, Row, Run, at, offset, visible

BINS = 120
ROWS = 24
"""Rows of a chart's table."""
HEIGHT = 150.0
OTHERS = 1.1
"""The chart shows the tasks of all jobs if they exceed this multiple of the job's own tasks."""
DECISIONS = 40
"""Maximum number of decisions on the page. If there are more, the largest changes are shown."""


_WAITS = """(SELECT ready_s, coalesce(started_s, $b) AS begun_s, tasks FROM bundles
             WHERE job = $job AND (started_s IS NOT NULL OR state = 'PLANNED'))"""

Levels = list[float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """Figures of the run in `BINS` equal intervals.

    `running` contains busy slots by stage, and `slots` the slots in service. `waiting` counts the tasks that are ready.
    `left` counts the tasks that had not ended at the interval's end, and `left_of_all` counts those of all jobs of the
    grid. `desired`, `in_service`, and `pending` count instances. A value is None if nothing was recorded.
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
        return [sum(of) for of in zip(*self.running.values(), strict=True)] or [0.0] * BINS


def series(run: Run) -> Series:
    """Return the figures of the charts."""
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


def _left(run: Run) -> list[float]:
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


def _seen(run: Run, table: str, columns: Sequence[str]) -> Iterator[Levels]:
    """Yield each column of a table of recorded values, summed over all pools.

    Each interval has the last value that was recorded before its end. `table` and `columns` are
    constants of this module.
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
    found = {row["bin"]: row for row in rows}
    for name in columns:
        yield [float(found[k][name]) if k in found and found[k][name] is not None else None for k in range(BINS)]


# --- Charts --------------------------------------------------------------------------------------


def drawn(run: Run, found: Series, decisions: Sequence[Decision]) -> tuple[Chart, ...]:
    """Return two or three charts over one time axis. The third needs recorded instances."""
    ticks = time_ticks(run.span_s)
    charts = [_running(run, found), _left_over(run, found)]
    if any(one is not None for one in found.desired):
        charts.append(_instances(run, found, decisions))
    return tuple(_on(ticks, one) for one in charts)


def _on(ticks: tuple[Tick, ...], one: Chart) -> Chart:
    return replace(one, x=ticks)


def _running(run: Run, found: Series) -> Chart:
    in_flight = found.in_flight
    most = max(*in_flight, *found.slots, 1.0)
    top, y = count_ticks(most)
    layers = list(found.running.items())
    paths = charts.stacked([levels for _, levels in layers], top, HEIGHT)
    shapes = [
        Shape(path, f"fill {run.looks.get(stage, 's0')}")
        for (stage, _), path in zip(layers, paths, strict=True)
        if path
    ]
    shapes.append(Shape(charts.line(list(found.slots), top, HEIGHT), "line strong"))
    names = [f"{visible(stage, 40)}" for stage, _ in layers]
    hover = [f"{at(run, k, BINS)}: {in_flight[k]:,.1f} slots busy of {found.slots[k]:,.1f}" for k in range(BINS)]
    rows = [
        (at(run, k, BINS), f"{in_flight[k]:,.1f}", f"{found.slots[k]:,.1f}", _share(in_flight, found.slots, k))
        for k in _some()
    ]
    peak = max(range(BINS), key=lambda k: in_flight[k])
    return Chart(
        "running",
        "Slots busy, and slots in service",
        f"Slots that ran tasks of the job, stacked by stage, under the line of all slots that "
        f"were in service. The most were busy at {at(run, peak, BINS)}: {in_flight[peak]:,.1f} of "
        f"{found.slots[peak]:,.1f}.",
        HEIGHT,
        (),
        y,
        (*shapes, *_hover(hover)),
        keys=(
            *(Key(f"box {run.looks.get(s, 's0')}", n) for (s, _), n in zip(layers, names, strict=True)),
            Key("stroke strong", "slots in service"),
        ),
        data=Data(("time", "# slots busy", "# slots in service", "# share busy"), tuple(rows)),
    )


def _share(part: Sequence[float], whole: Sequence[float], k: int) -> str:
    return f"{min(1.0, part[k] / whole[k]):.0%}" if whole[k] else "–"


def _left_over(run: Run, found: Series) -> Chart:
    of_all = [one or 0.0 for one in found.left_of_all]
    # Without other jobs, the line of all jobs would repeat the line of this job.
    crowded = max(of_all) > OTHERS * found.left[0]
    top, y = count_ticks(max(*found.left, *found.waiting, *(of_all if crowded else ()), 1.0))
    hover = [
        f"{at(run, k, BINS)}: {found.left[k]:,.0f} tasks left, {found.waiting[k]:,.0f} of them "
        f"ready and waiting{f'; of all jobs {of_all[k]:,.0f}' if crowded else ''}"
        for k in range(BINS)
    ]
    rows = [
        (at(run, k, BINS), f"{found.left[k]:,.0f}", f"{found.waiting[k]:,.1f}")
        + ((_n(found.left_of_all[k]),) if crowded else ())
        for k in _some()
    ]
    half = next((k for k in range(BINS) if found.left[k] <= found.left[0] / 2), BINS - 1)
    shapes = [
        Shape(charts.area(found.left, top, HEIGHT), "fill faint"),
        Shape(charts.area(found.waiting, top, HEIGHT), "fill wait"),
    ]
    keys = [Key("box faint", "not ended"), Key("box wait", "ready, waiting for a slot")]
    columns = ["time", "# tasks left", "# of these waiting (mean)"]
    others = ""
    if crowded:
        shapes.append(Shape(charts.line(found.left_of_all, top, HEIGHT), "line strong"))
        keys.append(Key("stroke strong", "not ended, of all jobs"))
        columns.append("# left of all jobs")
        others = " Other jobs of the grid had up to "
        others += f"{max(of_all) - found.left[0]:,.0f} more to do."
    return Chart(
        "backlog",
        "Tasks left, and tasks that waited for a slot",
        "Tasks of the job that had not ended, and of these the tasks that were ready and waited "
        f"for a slot. Half of them had ended at {at(run, half, BINS)}.{others}",
        HEIGHT,
        (),
        y,
        (*shapes, *_hover(hover)),
        keys=tuple(keys),
        data=Data(tuple(columns), tuple(rows)),
    )


def _instances(run: Run, found: Series, decisions: Sequence[Decision]) -> Chart:
    known = [v for levels in (found.desired, found.in_service) for v in levels if v is not None]
    both = [(a or 0.0) + (b or 0.0) for a, b in zip(found.in_service, found.pending, strict=True)]
    top, y = count_ticks(max(*known, *both, 1.0))
    shapes = charts.stacked([[v or 0.0 for v in found.in_service], [v or 0.0 for v in found.pending]], top, HEIGHT)
    hover = [
        f"{at(run, k, BINS)}: {_n(found.desired[k])} desired, {_n(found.in_service[k])} in "
        f"service, {_n(found.pending[k])} booting"
        for k in range(BINS)
    ]
    rows = [
        (at(run, k, BINS), *(_n(of[k]) for of in (found.desired, found.in_service, found.pending))) for k in _some()
    ]
    return Chart(
        "fleet",
        "Instances",
        "Instances in service and booting, under the line of desired capacity. Triangles mark "
        f"{count(len(decisions), 'scaling decision')}, listed below with the reasons.",
        HEIGHT,
        (),
        y,
        (
            Shape(shapes[0], "fill service"),
            Shape(shapes[1], "fill boot"),
            Shape(charts.line(found.desired, top, HEIGHT), "line strong"),
            *_hover(hover),
        ),
        keys=(Key("box service", "in service"), Key("box boot", "booting"), Key("stroke strong", "desired")),
        marks=tuple(
            Mark(decision.place, "up" if decision.grew else "down", f"{decision.at}: {decision.change}")
            for decision in decisions
        ),
        data=Data(("time", "# desired", "# in service", "# booting"), tuple(rows)),
    )


def _n(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _some() -> range:
    return range(BINS // ROWS - 1, BINS, BINS // ROWS)


def _hover(titles: Sequence[str]) -> list[Shape]:
    return [Shape(charts.box(k / BINS, (k + 1) / BINS, 0, HEIGHT), "hover", title) for k, title in enumerate(titles)]


# --- Decisions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decision:
    """Change of a pool's desired capacity. `place` is its position in [0, 1] on the time axis."""

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


def decisions(run: Run) -> tuple[list[Decision], int]:
    """Return at most `DECISIONS` scaling decisions in order of time, and the number of all decisions.

    If there are more, the function returns the largest changes.
    """
    rows = run.rows(
        """SELECT * FROM (
             SELECT *, count(*) OVER () AS n FROM scaling WHERE job = $job
             ORDER BY abs("after" - coalesce("before", 0)) DESC, at_s LIMIT $most
           ) ORDER BY at_s, pool""",
        most=DECISIONS,
    )
    decisions = [
        Decision(
            min(1.0, max(0.0, (row["at_s"] - run.start_s) / run.span_s)),
            offset(row["at_s"] - run.start_s, run.span_s),
            visible(row["pool"] or "", 40),
            int(row["before"] or 0),
            int(row["after"] or 0),
            visible(row["reason"] or "", 500),
            _n(row["in_service"]),
            _n(row["backlog_tasks"]),
        )
        for row in rows
    ]
    return decisions, int(rows[0]["n"]) if rows else 0
