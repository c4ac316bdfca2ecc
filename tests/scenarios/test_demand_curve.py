"""The demand curve: the arriving work over time, compared with the capacity of the fleet, and its drawing."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.cli import charts
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Fault, FaultName
from tests.support.scenarios.files import changed, load

BURST = """\
name: burst
about: One burst. It teaches.
jobs:
  one:
    tasks: 100
    stages:
      - {name: map, task: 10s, slots: 2}
      - {name: sum, gather: {by: k, groups: 5}, task: 20s, pool: small}
arrivals: [{job: one, at: {at: 10m, count: 6}}, {job: one, at: 1h}]
pools: {default: {max: 5, slots: 4}, small: {max: 1}}
faults: [{at: 30m, fault: pause, count: 1, for: 10m}, {at: 31m, fault: kill, count: 2}]
"""


def test_work_is_slot_seconds_by_pool_and_column(tmp_path: Path) -> None:
    scenario = load(tmp_path, BURST)
    seen = expansion.build_curve(scenario, expand(scenario).jobs, most=7)
    assert seen.width_s == 600
    assert [column.jobs for column in seen.columns] == [0, 6, 0, 0, 0, 0, 1]
    assert seen.columns[1].tasks == 6 * 105
    assert seen.columns[1].work_s == {"default": 6 * 100 * 10 * 2, "small": 6 * 5 * 20}
    assert seen.work_s == 7 * (2000 + 100)


def test_how_far_the_largest_fleet_falls_behind_is_that_of_a_fluid(tmp_path: Path) -> None:
    scenario = load(tmp_path, BURST)
    ask = expansion.build_curve(scenario, expand(scenario).jobs, most=7).asks[0]
    # 12,000 slot seconds of work need 20 slots for exactly ten minutes.
    assert (ask.slots, ask.peak, ask.behind_s) == (20, 20.0, 0.0)
    small = load(tmp_path, BURST.replace("max: 5", "max: 2"))
    ask = expansion.build_curve(small, expand(small).jobs, most=7).asks[0]
    assert ask.behind_s == pytest.approx((12_000 - 8 * 600) / 8)
    assert ask.behind_at_s == 1200
    assert ask.idle_from_s == pytest.approx(3600 + 2000 / 8)


@pytest.mark.parametrize(("span_s", "width_s"), [(1, 0.1), (71, 1), (3600, 60), (8 * 3600, 600), (7 * 86_400, 10_800)])
def test_columns_are_as_wide_as_a_person_counts(span_s: float, width_s: float) -> None:
    assert expansion.column_width_s(span_s, 72) == width_s


def test_durations_of_a_trace_are_used(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("at,s\n0,100\n1,300\n")
    source = "trace: {file: t.csv, columns: {at: at, task_s: s}}"
    text = changed("poisson: {per_hour: 60, until: 1h}", source)
    text = text.replace("tasks: {lognormal: {median: 20, sigma: 0.5}}", "tasks: 1")
    text = text.replace("at: [0s, {at: 5m, count: 3}]", "at: []")
    scenario = load(tmp_path, text)
    assert expansion.build_curve(scenario, expand(scenario).jobs).work_s == 100 + 300 + 2 * 5


def test_the_chart_is_as_high_as_the_peak_and_has_the_fleet_as_a_line() -> None:
    drawn = charts.chart([0, 5, 10, 2.5], 4, fancy=True, line=5, says="fleet").splitlines()
    assert drawn == ["     10   █", "          █", "      5 ┄██┄ fleet", "         ███", "      0 ────"]


def test_fleet_far_above_the_peak_is_described_instead_of_drawn() -> None:
    drawn = charts.chart([1, 2], 2, fancy=True, line=100, says="fleet").splitlines()
    assert drawn[0].strip() == "(fleet: 100 slots, above this chart)"
    assert all("┄" not in line for line in drawn)


def test_a_small_column_is_still_seen() -> None:
    assert charts.chart([0.01, 100], 4, fancy=True).splitlines()[-2].strip() == "▁█"


def test_the_charts_show_faults_where_they_are_and_name_them(tmp_path: Path) -> None:
    scenario = load(tmp_path, BURST)
    seen = expansion.build_curve(scenario, expand(scenario).jobs, most=61)
    text = charts.text(scenario, seen)
    [first, second] = [line for line in text.splitlines() if line.startswith(" faults")]
    assert first == second
    assert first == " faults " + " " * 30 + "1+11111111"
    assert "1  30 min: pause, instances freeze for a while (1), for 10 min" in text
    assert "2  31 min: kill, instances die without a shutdown (2)" in text
    assert "of the pool small" in text
    assert "The largest fleet has 1 slot, so work waits: at most " in text


def test_plain_text_is_ascii(tmp_path: Path) -> None:
    scenario = load(tmp_path, BURST)
    text = charts.text(scenario, expansion.build_curve(scenario, expand(scenario).jobs), fancy=False)
    assert text.isascii()
    assert "#" in text


def test_fault_is_described_with_its_parameters() -> None:
    said = charts.fault_text(Fault(FaultName.S3_ERRORS, 60, 300, rate=0.25))
    assert said == "60 s: s3-errors, S3 answers a share of all requests with status 503 (25%), for 5 min"
    said = charts.fault_text(Fault(FaultName.ZONE_LOSS, 60, 300))
    assert said.endswith("(zone a), for 5 min")
    said = charts.fault_text(Fault(FaultName.SPOT_WAVE, 60, 300, share=0.5, pool="big"))
    assert said.endswith("(50% of big)")
