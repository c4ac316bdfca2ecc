"""The figures of a report, compared with figures that Python computes from the same rows. The parts add up."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from batchlab.reports.html import costs, distributions, failures, gantt, load
from batchlab.reports.html.metrics import RunFigures, run_figures
from batchlab.reports.html.page import particulars
from batchlab.reports.html.source import ReportRun, share
from batchlab.reports.queries.store import open_store
from tests.support.reports.altered import altered
from tests.support.reports.figures import Row, means, percentile, rows_of
from tests.support.reports.made import Made, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run with permanent failures and with instances of two slots, two of which are sometimes idle."""
    return write_run(tmp_path_factory.mktemp("run"), Made(tasks=300, workers=5, failing=0.2))


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[ReportRun]:
    with open_store([folder]) as connection:
        yield ReportRun(connection, Made().job)


@pytest.fixture(scope="module")
def seen(run: ReportRun) -> RunFigures:
    return run_figures(run, load.series(run), costs.cost(run))


@pytest.fixture(scope="module")
def bundles(folder: Path) -> list[Row]:
    return rows_of(folder, "bundles")


@pytest.fixture(scope="module")
def tasks(folder: Path) -> list[Row]:
    return rows_of(folder, "tasks")


def _places(folder: Path, bundles: list[Row]) -> dict[str, tuple[float, float, int]]:
    """Return the time in service and the slots of each instance."""
    of = {row["worker"]: row["instance"] for row in rows_of(folder, "workers")}
    found = {}
    for row in rows_of(folder, "instances"):
        mine = [b for b in bundles if of[b["worker"]] == row["instance"]]
        begin_s = min([row["in_service_s"], *(b["started_s"] for b in mine)])
        end_s = max([row["ended_s"], *(b["ended_s"] for b in mine)])
        found[row["instance"]] = (begin_s, end_s, row["slots"])
    return found


# --- Load ----------------------------------------------------------------------------------------


def test_the_time_axis_is_the_jobs(run: ReportRun, folder: Path) -> None:
    (job,) = rows_of(folder, "jobs")
    assert run.start_s == pytest.approx(job["ended_s"] - job["took_s"])
    assert run.end_s == job["ended_s"]


def test_slots_busy_and_in_service_and_tasks_waiting(run: ReportRun, folder: Path, bundles: list[Row]) -> None:
    found = load.series(run)
    edges = (run.start_s, run.end_s, load.BINS)
    for stage, levels in found.running.items():
        mine = [(b["started_s"], b["ended_s"], b["slots"]) for b in bundles if b["stage"] == stage]
        assert levels == pytest.approx(means(mine, *edges), rel=1e-9, abs=1e-6)
    places = [(a, b, slots) for a, b, slots in _places(folder, bundles).values()]
    assert found.slots == pytest.approx(means(places, *edges), rel=1e-9, abs=1e-6)
    ready = [(b["ready_s"], b["started_s"], b["tasks"]) for b in bundles]
    assert found.waiting == pytest.approx(means(ready, *edges), rel=1e-9, abs=1e-6)


def test_the_time_under_the_running_tasks_is_that_of_the_bundles(run: ReportRun, bundles: list[Row]) -> None:
    part_s = run.span_s / load.BINS
    whole_s = sum(b["took_s"] * b["slots"] for b in bundles)
    assert sum(load.series(run).in_flight) * part_s == pytest.approx(whole_s)


def test_tasks_left(run: ReportRun, tasks: list[Row]) -> None:
    left = load.series(run).left
    for k in range(load.BINS):
        at_s = run.start_s + (k + 1) * run.span_s / load.BINS
        assert left[k] == sum(task["ended_s"] > at_s + 1e-9 for task in tasks)
    assert left[-1] == 0


def test_the_fleet_is_as_it_was_last_seen(run: ReportRun, folder: Path) -> None:
    looks = sorted(rows_of(folder, "fleet"), key=lambda row: row["at_s"])
    found = load.series(run)
    for k in range(load.BINS):
        at_s = run.start_s + (k + 1) * run.span_s / load.BINS
        last = [row for row in looks if row["at_s"] <= at_s][-1]
        assert found.desired[k] == last["desired"]
        assert found.in_service[k] == last["in_service"]
        assert found.pending[k] == last["pending"]


def test_remaining_work_of_all_jobs_is_shown_if_there_are_several(run: ReportRun, folder: Path, tmp_path: Path) -> None:
    found = load.series(run)
    looks = sorted(rows_of(folder, "queues"), key=lambda row: row["at_s"])
    last = [row for row in looks if row["at_s"] <= run.start_s + run.span_s / 2][-1]
    assert found.left_of_all[load.BINS // 2 - 1] == last["backlog_tasks"]
    busy = altered(folder, tmp_path / "busy", {"queues": "backlog_tasks + 5000 AS backlog_tasks"})
    with open_store([busy]) as connection:
        crowded = ReportRun(connection, Made().job)
        made = load.draw(crowded, load.series(crowded), [])[1]
    assert "Other jobs of the grid" in made.text
    assert made.data
    assert made.data.columns[-1] == "# left of all jobs"
    assert "Other jobs" not in load.draw(run, found, [])[1].text


def test_scaling_decisions_with_their_reasons(run: ReportRun, folder: Path) -> None:
    rows = sorted(rows_of(folder, "scaling"), key=lambda row: row["at_s"])
    found, in_all = load.decisions(run)
    assert in_all == len(rows)
    assert [(d.before, d.after, d.reason) for d in found] == [
        (row["before"], row["after"], row["reason"]) for row in rows
    ]


# --- Times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measure",
    [distributions.RUN, distributions.WAIT, distributions.CPU, distributions.MEMORY],
    ids=lambda one: one.name,
)
def test_percentiles_and_histograms(run: ReportRun, tasks: list[Row], measure: distributions.Measure) -> None:
    found = distributions.spreads(run, measure)
    assert [one.stage for one in found] == ["read", "score", "merge"]
    for one in found:
        values = [task[measure.column] for task in tasks if task["stage"] == one.stage]
        assert one.tasks == len(values)
        assert one.mean == pytest.approx(sum(values) / len(values))
        assert one.most == max(values)
        for percent, value in one.percentiles.items():
            assert value == pytest.approx(percentile(values, percent / 100))
        per_decade = measure.scale.per_decade
        bins = Counter(math.floor(math.log10(max(value, measure.least)) * per_decade) for value in values)
        assert one.bins == bins
        assert sum(one.bins.values()) == one.tasks


@pytest.mark.parametrize("measure", [distributions.RUN, distributions.MEMORY], ids=lambda one: one.name)
def test_a_histograms_table_has_every_task(run: ReportRun, measure: distributions.Measure) -> None:
    spreads = distributions.spreads(run, measure)
    found = distributions.distribution(run, measure, spreads)
    assert len(found.table.rows) == len(spreads)
    assert found.charts
    for histogram in found.charts:
        (spread,) = [spread for spread in spreads if spread.stage == histogram.title]
        assert histogram.data
        assert sum(int(row[1].replace(",", "")) for row in histogram.data.rows) == spread.tasks


def test_tasks_are_sorted_by_each_column(run: ReportRun, tasks: list[Row]) -> None:
    orders = {order.id: order.table.rows for order in distributions.task_orders(run)}
    assert list(orders) == ["run-s", "cpu-s", "memory-bytes", "input-bytes", "output-bytes", "wait-s", "attempts"]
    for column, rows in zip(distributions.SORT_COLUMNS, orders.values(), strict=True):
        order = sorted(
            (task for task in tasks if task[column]), key=lambda task: (-task[column], task["stage"], task["task"])
        )
        assert [row[0] for row in rows] == [
            f"{task['stage']}/{task['task']}" for task in order[: distributions.MAX_SORTED_TASKS]
        ]
    first = orders["memory-bytes"][0]
    assert first[7] == "48.0 MiB"
    assert first[10].startswith("day-") or first[10] == "–"


# --- Workers -------------------------------------------------------------------------------------


def test_each_bundle_is_a_bar_and_no_two_share_a_slot(run: ReportRun, bundles: list[Row]) -> None:
    chart = gantt.draw(run)
    assert chart
    bars = [shape for shape in chart.shapes if shape.look.startswith("bar ")]
    assert len(bars) == len(bundles)
    lanes = defaultdict(list)
    for bar in bars:
        x, top, width = (float(n) for n in re.findall(r"[\d.]+", bar.path)[:3])
        lanes[top].append((x, x + width))
    for spans in lanes.values():
        for before, after in pairwise(sorted(spans)):
            assert before[1] <= after[0] + 0.75  # rounded to a tenth, plus the minimum width of a bar


def test_many_instances_share_lanes(tmp_path: Path) -> None:
    folder = write_run(tmp_path, Made(tasks=2000, per_bundle=2, workers=200))
    bundles = rows_of(folder, "bundles")
    with open_store([folder]) as connection:
        run = ReportRun(connection, Made().job)
        chart = gantt.draw(run)
        assert chart
        assert chart.data
        assert len(chart.y) <= gantt.MAX_LANES
        assert sum(int(row[1]) for row in chart.data.rows) == 100
        for row, group in zip(chart.data.rows, _groups(folder, 3), strict=True):
            busy_s = sum(b["took_s"] for b in bundles if b["worker"] in group)
            assert row[4] == share(busy_s, 2 * len(group) / 2 * run.span_s)


def _groups(folder: Path, each: int) -> list[set[str]]:
    """Return groups of workers that belong to `each` instances each, in the order of launch."""
    order = sorted(rows_of(folder, "instances"), key=lambda row: (row["launched_s"], row["in_service_s"]))
    workers = defaultdict(set)
    for row in rows_of(folder, "workers"):
        workers[row["instance"]].add(row["worker"])
    names = [row["instance"] for row in order]
    return [set().union(*(workers[name] for name in names[k : k + each])) for k in range(0, len(names), each)]


# --- RunFigures ---------------------------------------------------------------------------------------


def test_signs_of_the_fleet(run: ReportRun, seen: RunFigures, folder: Path, bundles: list[Row]) -> None:
    places = _places(folder, bundles)
    whole_s = sum(
        slots * (min(end_s, run.end_s) - max(begin_s, run.start_s)) for begin_s, end_s, slots in places.values()
    )
    assert seen.slot_s == pytest.approx(whole_s)
    assert (seen.instances, seen.noun) == (len(places), "instance")
    assert seen.unused == 0
    boots = [row["in_service_s"] - row["launched_s"] for row in rows_of(folder, "instances")]
    assert seen.boots == len(boots)
    assert seen.boot_s == pytest.approx(median(boots))
    assert seen.longest_boot_s == pytest.approx(max(boots))
    first_s = min(b["started_s"] for b in bundles) - min(b["ready_s"] for b in bundles)
    assert seen.first_wait_s == pytest.approx(first_s)


def test_signs_of_slots(seen: RunFigures, folder: Path, bundles: list[Row]) -> None:
    of = {row["worker"]: row["instance"] for row in rows_of(folder, "workers")}
    by_place = defaultdict(list)
    for row in bundles:
        by_place[of[row["worker"]]].append(row)
    used_s = room_s = 0.0
    for mine in by_place.values():
        moments = sorted({b[name] for b in mine for name in ("started_s", "ended_s")})
        for begin_s, end_s in pairwise(moments):
            level = sum(b["started_s"] <= begin_s < b["ended_s"] for b in mine)
            used_s += level * (end_s - begin_s)
            room_s += 2 * (end_s - begin_s) if level else 0.0
    assert seen.filled == pytest.approx(used_s / room_s)


def test_task_durations_beside_other_tasks(folder: Path, tmp_path: Path) -> None:
    """Two workers share an instance. One of the five workers has its own instance."""
    del folder
    folder = write_run(tmp_path, Made(tasks=800, per_bundle=2, workers=5))
    bundles = rows_of(folder, "bundles")
    with open_store([folder]) as connection:
        run = ReportRun(connection, Made().job)
        found = run_figures(run, load.series(run), None)
    of = {row["worker"]: row["instance"] for row in rows_of(folder, "workers")}
    for stage in found.stages:
        sides: dict[bool, list[Row]] = {True: [], False: []}
        for b in bundles:
            if b["stage"] != stage.name or not b["succeeded"]:
                continue
            beside_s = sum(
                max(0.0, min(b["ended_s"], c["ended_s"]) - max(b["started_s"], c["started_s"]))
                for c in bundles
                if of[c["worker"]] == of[b["worker"]] and c is not b
            )
            crowd = beside_s / (b["ended_s"] - b["started_s"])
            if crowd <= 0.25 or crowd >= 0.75:
                sides[crowd >= 0.75].append(b)
        if min(len(side) for side in sides.values()) < 10:
            assert stage.alone_s is None
            continue
        means_s = {
            side: sum(b["run_s"] for b in rows) / sum(b["succeeded"] for b in rows) for side, rows in sides.items()
        }
        assert stage.alone_s == pytest.approx(means_s[False])
        assert stage.crowded_s == pytest.approx(means_s[True])
    assert any(stage.alone_s is not None for stage in found.stages)


def test_signs_of_stages(seen: RunFigures, tasks: list[Row], bundles: list[Row]) -> None:
    for stage in seen.stages:
        runs = [task["run_s"] for task in tasks if task["stage"] == stage.name]
        mine = [b for b in bundles if b["stage"] == stage.name]
        assert (stage.tasks, stage.tiny) == (len(runs), sum(run < 0.1 for run in runs))
        assert stage.median_s == pytest.approx(median(runs))
        assert stage.longest_s == max(runs)
        assert stage.bundles == len(mine)
        assert stage.took_s == pytest.approx(sum(b["took_s"] for b in mine))
        spent_s = sum(b["took_s"] - b["run_s"] - b["failed_run_s"] for b in mine)
        assert stage.overhead_s == pytest.approx(spent_s)


def test_signs_of_waste(seen: RunFigures, folder: Path) -> None:
    attempts = rows_of(folder, "attempts")
    duplicates = rows_of(folder, "duplicates")
    (job,) = rows_of(folder, "jobs")
    failed_s = sum(attempt["run_s"] for attempt in attempts if attempt["state"] == "FAILED")
    assert seen.failed_s == pytest.approx(failed_s)
    assert seen.lost_s == job["lost_slot_s"]
    assert seen.repeated_s == sum(duplicate["wasted_slot_s"] for duplicate in duplicates)
    assert seen.harmful == sum(duplicate["harmful"] for duplicate in duplicates)


def test_a_named_share_is_a_fact_of_the_run(run: ReportRun, seen: RunFigures, tmp_path: Path) -> None:
    assert (run.share, seen.share) == ("", "")
    assert "share" not in dict(particulars(run))
    with open_store([write_run(tmp_path, Made(tasks=8, share="research"))]) as connection:
        named = ReportRun(connection, Made().job)
        assert dict(particulars(named))["share"] == "research"
        assert run_figures(named, load.series(named), None).share == "research"


# --- Money ---------------------------------------------------------------------------------------


def test_the_bill_is_split_in_three_ways_that_add_up(run: ReportRun, folder: Path) -> None:
    found = costs.cost(run)
    rows = rows_of(folder, "cost")
    (job,) = rows_of(folder, "jobs")
    assert found
    assert found.total == job["cost_usd"] == sum(row["cost_usd"] for row in rows)
    shown = Decimal(found.shown.removesuffix(" USD").replace(",", ""))
    for parts, column in ((found.kinds, "kind"), (found.stages, "stage"), (found.lines, "line")):
        assert sum(part.usd for part in parts) == found.total
        assert sum(Decimal(part.shown.replace(",", "")) for part in parts) == shown
        sums: dict[str | None, Decimal] = defaultdict(Decimal)
        for row in rows:
            sums[row[column]] += row["cost_usd"]
        assert sorted(part.usd for part in parts) == sorted(sums.values())
    assert found.of("idle") == sum(row["cost_usd"] for row in rows if row["kind"] == "idle")


# --- Failures ------------------------------------------------------------------------------------


def test_failures_by_cause(run: ReportRun, folder: Path, tasks: list[Row]) -> None:
    found = failures.failures(run)
    attempts = [row for row in rows_of(folder, "attempts") if row["state"] == "FAILED"]
    (job,) = rows_of(folder, "jobs")
    assert found.tasks == job["failed"] > 0
    assert found.attempts == len(attempts)
    assert found.causes == len(found.groups) == 2
    for group in found.groups:
        mine = [attempt for attempt in attempts if attempt["fingerprint"] == group.fingerprint]
        assert group.attempts == len(mine)
        assert group.retried == sum(not one["is_final"] for one in mine)
        assert group.tasks == sum(task["fingerprint"] == group.fingerprint for task in tasks)
    assert sum(group.tasks for group in found.groups) == found.tasks


def test_causes_beyond_the_first_are_summed_up(run: ReportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MAX_GROUPS", 1)
    found = failures.failures(run)
    (group,) = found.groups
    tasks, attempts = found.tasks - group.tasks, found.attempts - group.attempts
    assert found.more.startswith("1 more cause, ")
    assert [int(n) for n in re.findall(r"\d+", found.more)] == [1, tasks, attempts]


def test_duplicates(run: ReportRun, folder: Path) -> None:
    rows = rows_of(folder, "duplicates")
    table = failures.twice(run)
    assert table
    assert [row[1:4] for row in table.rows] == [
        tuple(str(sum(one[name] for one in rows if one["kind"] == kind)) for name in ("seen", "harmless", "harmful"))
        for kind in sorted({one["kind"] for one in rows})
    ]
