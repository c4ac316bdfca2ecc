"""The shipped scenarios, each of which meets its expectations in the simulator."""

from __future__ import annotations

import pytest

from batchlab.cli import charts
from batchlab.scenarios import verdicts
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model import loader

NAMES = loader.names()


def test_scenarios_are_shipped() -> None:
    assert len(NAMES) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_scenario_passes_its_own_expectations(name: str) -> None:
    scenario = loader.load(loader.find(name))
    record = simulate(scenario)
    rows = verdicts.judge(record, scenario.expect)
    assert rows, "a scenario that expects nothing teaches nothing"
    assert not verdicts.is_red(rows), charts.verdict_text(rows)
    assert (record.lost, record.duplicates) == (0, 0)
    assert len(record.faults) == len(scenario.faults)
    for fault in record.faults:
        assert fault.evidence, f"{fault.name} was not injected: {fault.impossible}"
