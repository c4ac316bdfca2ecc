"""Gantt chart of a run, with a lane for each slot, instance, or group of instances.

Invariant: the chart has at most `MAX_LANES` lanes, whatever the size of the run. The chart of a small run shows each
bundle as a bar. The chart of a large run shows cells. The shade of a cell is the cell's busy share, and the color is
the stage with the most slots in the cell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.text import count, span
from batchlab.reports.html import charts
from batchlab.reports.html.charts import Chart, Data, Key, Shape, Tick, time_ticks
from batchlab.reports.html.source import PLACED, PLACES, ReportRun, Row, offset, share, visible

MAX_LANES = 40
MAX_BARS = 1000
"""Maximum number of bundles in a chart with one bar for each bundle."""
BINS = 150
LEVELS = 5
"""Number of shades of cells. The shade of a cell depends on the cell's busy share."""
MAX_TALL_LANES = 16
"""Maximum number of lanes in a chart with tall lanes."""
MAX_TABLE_ROWS = 100
"""Maximum number of rows in the table of bundles."""

Busy = dict[tuple[int, int], dict[str, float]]
"""Busy slots of each stage, by lane and bin."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Lane of the Gantt chart.

    `places` are the instances in the lane. `slot` is None if the lane shows all slots of the instances.
    """

    name: str
    title: str
    places: tuple[str, ...]
    slots: int
    slot: int | None = None


def draw(run: ReportRun) -> Chart | None:
    """Return the Gantt chart, or None if the job did not use an instance and did not run a bundle."""
    places = run.rows(f"SELECT * FROM {PLACES} ORDER BY pool, launched_s, begin_s, place")
    if not places:
        return None
    bundles = run.one(f"SELECT count(*) AS n FROM {PLACED}")["n"]
    few = bundles <= MAX_BARS and sum(row["slots"] for row in places) <= MAX_LANES
    if few:
        return _bars(run, places)
    return _shades(run, places, bundles)


# --- One bar per bundle --------------------------------------------------------------------------


def _bars(run: ReportRun, places: Sequence[Row]) -> Chart:
    lanes = [
        Lane(_lane_name(row["place"], slot, row["slots"]), "", (row["place"],), 1, slot)
        for row in places
        for slot in range(row["slots"])
    ]
    number = {(lane.places[0], lane.slot): n for n, lane in enumerate(lanes)}
    lane_height = _lane_height(len(lanes))
    tops = {row["place"]: (number[row["place"], 0] * lane_height + 1, row["slots"] * lane_height - 2) for row in places}
    shapes = _instance_shapes(run, places, tops)
    table_rows: list[tuple[str, ...]] = []
    failed_parts: list[str] = []
    for row, slots in _assign_slots(run, {row["place"]: row["slots"] for row in places}):
        look = f"bar {run.looks.get(row['stage'], 's0')}"
        between = _positions(run, row["started_s"], row["ended_s"])
        positions = [number[row["place"], slot] * lane_height + 1 for slot in slots]
        path = "".join(charts.box(*between, top, lane_height - 2) for top in positions)
        shapes.append(Shape(path, look, _tooltip(run, row)))
        if row["failed"] or row["retried"]:
            failed_parts += [charts.box(*between, top + lane_height - 6, 4) for top in positions]
        if len(table_rows) < MAX_TABLE_ROWS:
            table_rows.append(_table_row(run, row, slots))
    if failed_parts:
        shapes.append(Shape("".join(failed_parts), "fill foot"))
    note = f"The first {MAX_TABLE_ROWS} bundles." if len(table_rows) == MAX_TABLE_ROWS else ""
    return _chart(
        run,
        lanes,
        shapes,
        "Each bar is a bundle of tasks on the slot that ran it, in the color of its stage. A bar with a dark lower "
        "edge had failed tasks.",
        Data(("instance", "slot", "# start", "# took", "stage", "# tasks", "# failed"), tuple(table_rows), note),
    )


def _table_row(run: ReportRun, row: Row, slots: Sequence[int]) -> tuple[str, ...]:
    return (
        visible(row["place"], 60),
        ", ".join(str(slot + 1) for slot in slots),
        offset(row["started_s"] - run.start_s, run.span_s),
        span(row["ended_s"] - row["started_s"]),
        visible(row["stage"], 60),
        f"{row['tasks']:,}",
        f"{row['failed'] or 0:,}",
    )


def _assign_slots(run: ReportRun, slots: Mapping[str, int]) -> Iterator[tuple[Row, tuple[int, ...]]]:
    """Yield each bundle with the slots of its instance that the bundle used.

    A bundle gets slots that were free when the bundle started. If too few slots were free, because clocks differ, the
    bundle gets the slots that became free first.
    """
    free = {place: [0.0] * number for place, number in slots.items()}
    rows = run.rows(f"SELECT * FROM {PLACED} ORDER BY started_s, ended_s, bundle")
    for row in rows:
        ends_s = free[row["place"]]
        # A bundle gets the lowest free slots, so that the chart of a half-idle worker has an empty lane.
        ready = sorted(range(len(ends_s)), key=lambda n: (max(ends_s[n], row["started_s"]), n))
        used_slots = tuple(sorted(ready[: row["slots"]]))
        for slot in used_slots:
            ends_s[slot] = row["ended_s"]
        yield row, used_slots


def _tooltip(run: ReportRun, row: Row) -> str:
    took = span(row["ended_s"] - row["started_s"])
    failed = f", {row['failed']} failed" if row["failed"] else ""
    retried = f", {row['retried']} retried" if row["retried"] else ""
    start = offset(row["started_s"] - run.start_s, run.span_s)
    what = f"{visible(row['stage'], 40)}: {count(row['tasks'], 'task')}"
    return f"{what}, {took}, started at {start}{failed}{retried}"


# --- Cells ---------------------------------------------------------------------------------------


def _shades(run: ReportRun, places: Sequence[Row], bundles: int) -> Chart:
    group_size = -(-len(places) // MAX_LANES)
    groups = [places[k : k + group_size] for k in range(0, len(places), group_size)]
    lanes = [_lane(group) for group in groups]
    lane_height = _lane_height(len(lanes))
    if group_size == 1:
        tops = {lane.places[0]: (n * lane_height + 1, lane_height - 2) for n, lane in enumerate(lanes)}
        shapes = _instance_shapes(run, places, tops)
    else:
        shapes = _group_shapes(run, lanes, lane_height)
    busy = _busy(run, lanes)
    cells_by_look: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    for n, lane in enumerate(lanes):
        looks = [_cell_look(run, busy.get((n, k), {}), lane.slots) for k in range(BINS)]
        for first, after in _equal_ranges(looks):
            if looks[first]:
                cells_by_look[looks[first]].append((first, after, n * lane_height + 1))
    shapes += [Shape(charts.cells(at, BINS, lane_height - 2), look) for look, at in sorted(cells_by_look.items())]
    busy_s = [_busy_s(run, busy, n) for n in range(len(lanes))]
    rows = []
    for n, lane in enumerate(lanes):
        used = share(busy_s[n], lane.slots * run.span_s)
        title = f"{lane.title}: slots busy for {used} of the run's time"
        shapes.append(Shape(charts.box(0, 1, n * lane_height, lane_height), "hover", title))
        rows.append((lane.title, f"{len(lane.places):,}", f"{lane.slots:,}", span(busy_s[n]), used))
    lane_text = "an instance" if group_size == 1 else f"an instance and up to {group_size - 1} launched after it"
    columns = ("lane", "# instances", "# slots", "# slot time busy", "# of the run's time")
    return _chart(
        run,
        lanes,
        shapes,
        f"Each lane is {lane_text}, and each cell is {span(run.span_s / BINS)}. A cell has the color of the stage with "
        f"the most busy slots. A darker cell has more busy slots. The run had {count(bundles, 'bundle')}.",
        Data(columns, tuple(rows)),
    )


def _busy(run: ReportRun, lanes: Sequence[Lane]) -> Busy:
    busy: Busy = defaultdict(dict)
    table = _with_lanes(PLACED)
    values = _lane_parameters(lanes)
    for row in run.over(table, "started_s", "ended_s", "slots", "lane, stage", BINS, **values):
        busy[row["lane"], row["bin"]][row["stage"]] = row["amount"]
    return busy


def _lane(group: Sequence[Row]) -> Lane:
    names = tuple(row["place"] for row in group)
    slots = sum(row["slots"] for row in group)
    if len(group) == 1:
        return Lane(_lane_name(names[0], None, slots), visible(names[0], 60), names, slots)
    title = f"{len(group)} instances, {visible(names[0], 40)} to {visible(names[-1], 40)}"
    return Lane(f"{_tail(names[0])} +{len(group) - 1}", title, names, slots)


def _cell_look(run: ReportRun, cell: dict[str, float], slots: int) -> str:
    total = sum(cell.values())
    if total <= 0.005 * slots:
        return ""
    stage = max(sorted(cell), key=lambda stage_name: cell[stage_name])
    level = min(LEVELS, 1 + int(total / slots * LEVELS * 0.999))
    return f"fill {run.looks.get(stage, 's0')} l{level}"


def _busy_s(run: ReportRun, busy: Busy, lane: int) -> float:
    cells = (busy[lane, k] for k in range(BINS) if (lane, k) in busy)
    return sum(sum(cell.values()) for cell in cells) * run.span_s / BINS


# --- Both forms ----------------------------------------------------------------------------------


def _instance_shapes(run: ReportRun, places: Sequence[Row], tops: Mapping[str, tuple[float, float]]) -> list[Shape]:
    """Return shapes for the time in service and the boot time of each instance.

    `tops` maps each instance to the top and the height of the instance's lanes.
    """
    in_service, boots = [], []
    for row in places:
        top, height = tops[row["place"]]
        launched_s, begin_s, end_s = row["launched_s"], row["begin_s"], row["end_s"]
        if begin_s is not None and begin_s < end_s:
            in_service.append(charts.box(*_positions(run, begin_s, end_s), top, height))
        # An instance that was never in service spent all of its time booting.
        ready_s = end_s if begin_s is None else begin_s
        if launched_s is not None and launched_s < ready_s and ready_s > run.start_s:
            boots.append(charts.box(*_positions(run, launched_s, ready_s), top, height))
    return [Shape("".join(paths), look) for paths, look in ((in_service, "fill there"), (boots, "fill boot")) if paths]


def _group_shapes(run: ReportRun, lanes: Sequence[Lane], tall: float) -> list[Shape]:
    """Return shapes for the lanes of groups of instances. The shade of a shape is the share of instances in service."""
    members = [len(lane.places) for lane in lanes]
    shares = [[0.0] * BINS for _ in lanes]
    rows = run.over(_with_lanes(PLACES), "begin_s", "end_s", "1", "lane", BINS, **_lane_parameters(lanes))
    for row in rows:
        shares[row["lane"]][row["bin"]] = row["amount"] / members[row["lane"]]
    cells_by_shade: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for n, levels in enumerate(shares):
        shades = [min(3, int(level * 3 + 0.5)) for level in levels]
        for first, after in _equal_ranges(shades):
            if shades[first]:
                cells_by_shade[shades[first]].append((first, after, n * tall + 1))
    return [
        Shape(charts.cells(cells, BINS, tall - 2), f"fill there t{shade}")
        for shade, cells in sorted(cells_by_shade.items())
    ]


def _equal_ranges(levels: Sequence[object]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of equal neighboring levels as (first index, index after the last)."""
    first = 0
    for k in range(1, len(levels) + 1):
        if k == len(levels) or levels[k] != levels[first]:
            yield first, k
            first = k


def _with_lanes(table: str) -> str:
    return f"""(SELECT t.*, l.lane FROM {table} t JOIN (
      SELECT unnest($names::VARCHAR[]) AS place, unnest($lanes::INTEGER[]) AS lane
    ) l USING (place))"""


def _lane_parameters(lanes: Sequence[Lane]) -> dict[str, object]:
    pairs = [(place, n) for n, lane in enumerate(lanes) for place in lane.places]
    return {"names": [place for place, _ in pairs], "lanes": [n for _, n in pairs]}


def _positions(run: ReportRun, begin_s: float, end_s: float) -> tuple[float, float]:
    """Return the two times as positions from 0 to 1 on the time axis of the run."""
    first, last = ((at_s - run.start_s) / run.span_s for at_s in (begin_s, end_s))
    return min(1.0, max(0.0, first)), min(1.0, max(0.0, last))


def _lane_height(lanes: int) -> float:
    return 18.0 if lanes <= MAX_TALL_LANES else 12.0


def _lane_name(place: str, slot: int | None, slots: int) -> str:
    """Return a lane's name. A long name of an instance is reduced to its end, because names differ at the end."""
    name = _tail(place)
    return name if slot is None or slots == 1 else f"{name} · {slot + 1}"


def _tail(place: str) -> str:
    name = visible(place, 60)
    return name if len(name) <= 9 else f"…{name[-8:]}"


def _chart(run: ReportRun, lanes: Sequence[Lane], shapes: Iterable[Shape], text: str, data: Data) -> Chart:
    tall = _lane_height(len(lanes))
    shapes = tuple(shapes)
    stages = [row["stage"] for row in run.stages]
    # The legend has an entry for booting only if the chart shows boots. A chart with groups of instances does not show
    # boots.
    boots = [Key("box boot", "booting")] if any(shape.look == "fill boot" for shape in shapes) else []
    return Chart(
        "gantt",
        "Workers over time",
        text,
        tall * len(lanes),
        time_ticks(run.span_s),
        tuple(Tick((n + 0.5) / len(lanes), lane.name) for n, lane in enumerate(lanes)),
        shapes,
        keys=(
            *(Key(f"box {run.looks[stage]}", visible(stage, 40)) for stage in stages),
            Key("box there", "in service, not busy with this job"),
            *boots,
        ),
        data=data,
        lanes=True,
    )
