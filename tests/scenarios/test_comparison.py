"""Forecasts compared with facts, on records with a simple difference."""

from __future__ import annotations

import json

import pytest

from batchlab.cli import scenario_records
from batchlab.cli.charts import Chart
from batchlab.core.errors import UsageError
from batchlab.scenarios.forecast.comparison import compare, sample_curve
from batchlab.scenarios.record import InjectedFault
from tests.support.scenarios.records import a_job, a_record, a_sample

FACT = a_record(
    a_job(0, started_s=10.0, ended_s=100.0),
    a_job(1, started_s=30.0, ended_s=80.0, template="other"),
    samples=(a_sample(0.0, 4, waiting=10), a_sample(50.0, 2, waiting=0), a_sample(100.0, 0)),
    usd=2.0,
)
FORECAST = a_record(
    a_job(0, started_s=12.0, ended_s=90.0),
    a_job(1, started_s=33.0, ended_s=80.0, template="other"),
    samples=(a_sample(0.0, 3, waiting=10), a_sample(50.0, 2, waiting=0), a_sample(90.0, 0)),
    usd=2.5,
    backend="sim",
    simulated=True,
)


def test_an_error_is_forecast_minus_fact_absolute_and_relative() -> None:
    found = compare(FORECAST, FACT)
    makespan = found.of("makespan")
    assert makespan.absolute == -10.0
    assert makespan.relative == pytest.approx(-0.1)
    assert found.of("peak_fleet").absolute == -1
    assert (found.of("cost").absolute, found.of("cost").relative) == (0.5, 0.25)
    assert found.of("max_wait").absolute == 3.0
    assert found.of("p50_wait").absolute == 2.0
    assert found.of("p95_turnaround", "other").absolute == 0.0
    # Neither run has failures, so the error is zero and not unknown.
    assert (found.of("failed_tasks").absolute, found.of("failed_tasks").relative) == (0.0, 0.0)
    with pytest.raises(KeyError):
        found.of("makespan", "nobody")


def test_missing_measure_has_no_error() -> None:
    endless = a_record(a_job(0, ended_s=None), usd=None)
    found = compare(FORECAST, endless)
    assert found.of("makespan").fact is None
    assert found.of("makespan").absolute is None
    assert found.of("cost").relative is None
    # An error relative to a fact of 0 is undefined.
    failed = compare(a_record(a_job(0, failed=3)), a_record(a_job(0)))
    assert (failed.of("failed_tasks").absolute, failed.of("failed_tasks").relative) == (3.0, None)


def test_curves_are_compared_over_time() -> None:
    queue, backlog, fleet = compare(FORECAST, FACT).curves
    assert queue.mean_error == 0
    assert backlog.relative == 0
    # One instance is missing for half of the time, and two for the last tenth.
    assert fleet.mean_error == pytest.approx(0.5 * 1 + 0.1 * 2)
    assert fleet.mean_fact == pytest.approx(0.5 * 4 + 0.5 * 2)
    assert sample_curve([(1.0, 5.0), (3.0, 1.0)], 4.0, 4) == [0, 5, 5, 1]


def test_differences_that_reduce_comparability_are_reported() -> None:
    found = compare(
        a_record(seed=1, digest="a", cut="it was interrupted", pools={"default": (0, 9, 2)}),
        a_record(
            a_job(0),
            a_job(1),
            seed=2,
            digest="b",
            settings={"cooldown_in_s": 99.0},
            faults=(InjectedFault("kill", 1.0, impossible="no"),),
        ),
    )
    told = " ".join(found.notes)
    for word in ("file was changed", "seeds", "not a simulated one", "cut", "1 jobs", "pools", "kill"):
        assert word in told
    assert "cooldown_in_s" in told
    assert compare(FORECAST, FACT).notes == ()


def test_incomparable_records_are_refused() -> None:
    with pytest.raises(UsageError, match="of scenario b"):
        compare(a_record(), a_record(scenario="b"))
    with pytest.raises(UsageError, match="divided by 1, and the fact's times by 60"):
        compare(a_record(), a_record(compressed=60.0))


def test_a_person_sees_two_curves_and_a_program_json() -> None:
    told = scenario_records.comparison_text(compare(FORECAST, FACT))
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "makespan all 90.0 s 1 min 40 s -10.0 s -10.0%" in lines
    assert "cost all 2.50 USD 2.00 USD +0.5 USD +25.0%" in lines
    assert told.count("┊") == 0
    drawn = [line for line in told.splitlines() if "│" in line]
    assert len(drawn) == 3 * 10
    assert all("●" in told and "░" in told for told in ("".join(drawn[:10]), "".join(drawn[20:])))
    assert json.dumps(compare(FORECAST, FACT).to_json(), allow_nan=False)
    assert "none at any time" in scenario_records.comparison_text(compare(a_record(), a_record()))


def test_two_forecasts_are_named_a_and_b() -> None:
    told = scenario_records.comparison_text(compare(FORECAST, FORECAST))
    assert "Difference is A minus B" in told
    assert "fact" not in told.lower()
    assert "Error is forecast minus fact" in scenario_records.comparison_text(compare(FORECAST, FACT))


def test_a_chart_is_what_it_shows() -> None:
    chart = Chart(3.0, 2.0, width=4, height=3)
    chart.area([0.0, 1.0, 2.0, 0.0], "#")
    chart.line([2.0, 2.0, 1.0, 0.0], "o")
    chart.wall(3.0, "|")
    assert chart.text(str, str).splitlines() == ["2.0 │oo#|", "    │ #o|", "0.0 │ ##o", "    └────", "     0.0 3.0"]
