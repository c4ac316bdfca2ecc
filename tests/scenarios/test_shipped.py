"""The shipped scenarios, each of which meets its expectations in the simulator."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from batchlab.cli import charts
from batchlab.scenarios import verdicts
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.values import Scenario
from batchlab.scenarios.record import Record
from tests.support import ROOT
from tests.support.scenarios.records import measured

NAMES = loader.names()
TENANTS = "two-tenants"
PAGE = ROOT / "docs" / "scenarios.md"
TABLE_ROW = re.compile(r"\| (.*?) \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) min \|")


def test_scenarios_are_shipped() -> None:
    assert len(NAMES) >= 10
    assert TENANTS in NAMES


def check(scenario: Scenario, record: Record) -> None:
    rows = verdicts.judge(record, scenario.expect)
    assert rows, "a scenario that expects nothing teaches nothing"
    assert not verdicts.is_red(rows), charts.verdict_text(rows)
    assert (record.lost, record.duplicates) == (0, 0)
    assert len(record.faults) == len(scenario.faults)
    for fault in record.faults:
        assert fault.evidence, f"{fault.name} was not injected: {fault.impossible}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != TENANTS])
def test_a_shipped_scenario_passes_its_own_expectations(name: str) -> None:
    scenario = loader.load(loader.find(name))
    check(scenario, simulate(scenario))


@pytest.mark.slow
def test_two_tenants_passes_its_expectations_and_its_table_is_measured() -> None:
    """Only the scenario's own policy meets the expectations, or a priority. The rows of the page differ from the
    forecasts by less than a quarter."""
    whole = loader.load(loader.find(TENANTS))
    small = replace(whole.jobs["small"], priority=10)
    scenarios = {
        "the policy of the scenario": whole,
        "no policy (`--no-shares`)": replace(whole, shares=None),
        "no policy, and `priority: 10` for the small jobs": replace(
            whole, shares=None, jobs={**whole.jobs, "small": small}
        ),
    }
    rows = TABLE_ROW.findall(PAGE.read_text())
    assert [row[0] for row in rows] == list(scenarios)
    for (_, *shown), scenario in zip(rows, scenarios.values(), strict=True):
        record = simulate(scenario)
        if scenario is whole:
            check(scenario, record)
        turnaround_s = measured(record, "p95_turnaround", "small")
        forecast = [measured(record, "p95_wait", "small"), turnaround_s, measured(record, "makespan", "noisy")]
        assert [float(shown[0]), float(shown[1]), 60 * float(shown[2])] == pytest.approx(forecast, rel=0.25)
        is_red = scenario.shares is None and scenario.jobs["small"].priority == 0
        assert verdicts.is_red(verdicts.judge(record, scenario.expect)) == is_red
