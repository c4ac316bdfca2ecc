"""Measures and verdicts, on records with a simple answer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from batchlab.cli import charts
from batchlab.core.errors import UsageError
from batchlab.scenarios.model.values import Expectation
from batchlab.scenarios.record import InjectedFault, Record, StageRun
from batchlab.scenarios.verdicts import MEASURES, Color, Unknown, is_red, judge, quantile
from tests.support.scenarios.records import a_job, a_record, a_sample, an_instance


def measured(name: str, record: Record, template: str = "") -> Any:
    return MEASURES[name].of(record, template)


TWENTY = a_record(*(a_job(i, due_s=10.0 * i, started_s=11.0 * i, ended_s=10.0 * i + 100) for i in range(1, 21)))


def test_a_quantile_is_a_number_that_was_seen() -> None:
    numbers = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [quantile(numbers, q) for q in (0.0, 0.2, 0.5, 0.8, 0.81, 1.0)] == [1, 1, 3, 4, 5, 5]
    assert quantile(range(1, 101), 0.95) == 95
    with pytest.raises(ValueError, match="nothing"):
        quantile([], 0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("makespan", 290.0), ("p50_wait", 10.0), ("p95_wait", 19.0), ("max_wait", 20.0), ("p95_turnaround", 100.0)],
)
def test_times_are_from_when_a_job_was_due(name: str, expected: float) -> None:
    assert measured(name, TWENTY) == expected


def test_a_job_that_never_ended_is_infinitely_late() -> None:
    ended = a_job(0, deadline_s=60.0)
    late = a_job(1, deadline_s=59.0)
    endless = a_job(2, started_s=None, ended_s=None, state="RUNNABLE", deadline_s=1e9)
    assert measured("late", a_record(ended)) == 0
    assert measured("late", a_record(ended, late, endless)) == 2
    assert measured("makespan", a_record(ended, endless)) == math.inf
    assert measured("max_wait", a_record(ended, endless)) == math.inf
    assert measured("p50_wait", a_record(ended, endless)) == 5.0
    # A job that was canceled before its start did not wait.
    gone = a_job(3, started_s=None, state="CANCELLED")
    assert measured("max_wait", a_record(ended, gone)) == 5.0
    assert isinstance(measured("late", a_record(a_job())), Unknown)


def test_a_template_is_measured_alone() -> None:
    record = a_record(a_job(0), a_job(1, template="other", ended_s=90.0, failed=3, state="FAILED"))
    assert measured("makespan", record, "claims") == 60.0
    assert measured("makespan", record, "other") == 90.0
    assert measured("failed_tasks", record, "claims") == 0
    assert measured("failed_tasks", record) == 3
    assert measured("failed_jobs", record, "other") == 1
    for name in ("makespan", "failed_tasks", "failed_jobs"):
        assert isinstance(measured(name, record, "nobody"), Unknown)


FLEET = a_record(
    a_job(ended_s=50.0),
    samples=(
        a_sample(0.0, 3, 0),
        a_sample(10.0, 3, 2),
        a_sample(20.0, 3),
        a_sample(30.0, 1),
        a_sample(45.0, 4, 2),
        a_sample(60.0, 0),
        a_sample(100.0, 2),
    ),
)


def test_the_fleet_is_what_was_in_service() -> None:
    assert measured("peak_fleet", FLEET) == 3
    # During boots and after the end of the last job, there may be fewer instances.
    assert measured("least_fleet", FLEET) == 1
    # A decrease after 30 s is calm. An increase and a decrease 15 s apart are not. A change after 40 s is calm again.
    assert measured("flapping", FLEET) == 2


def test_fleet_without_samples_is_derived_from_its_instances() -> None:
    pair = (an_instance(0), an_instance(1, ready_s=20.0, ended_s=60.0))
    follower = an_instance(2, launched_s=50.0, ready_s=60.0, ended_s=None)
    record = a_record(instances=(*pair, follower), pools={"default": (0, 4, 2)})
    assert measured("peak_fleet", record) == 2
    assert isinstance(measured("flapping", record), Unknown)


def test_idle_is_what_the_slots_did_not_work() -> None:
    work = StageRun("claims", "parse", "default", 2, 10, 10, 21.0, 21.0, 25.0)
    record = a_record(instances=(an_instance(),), stages=(work,), again_s=28.0)
    # One instance has two slots for 70 s, and 42 + 28 slot seconds had work.
    assert measured("idle_share", record) == pytest.approx(0.5)
    assert isinstance(measured("idle_share", a_record()), Unknown)


def test_every_measure_of_an_empty_run_is_a_number_or_gives_a_reason() -> None:
    empty = a_record(jobs=())
    for name in MEASURES:
        found = measured(name, empty)
        assert isinstance(found, float | Unknown), name


# --- The verdict ---------------------------------------------------------------------------------


def colours(record: Record, *expected: Expectation) -> list[str]:
    return [row.verdict.value for row in judge(record, expected)]


def test_bounds_hold_up_to_the_last_but_one_digit() -> None:
    record = a_record(a_job(ended_s=0.1 + 0.2))
    assert colours(record, Expectation("makespan", most=0.3)) == ["green"]
    assert colours(record, Expectation("makespan", least=0.3)) == ["green"]
    assert colours(record, Expectation("makespan", most=0.2999)) == ["red"]
    assert colours(record, Expectation("makespan", least=0.31, most=1)) == ["red"]
    assert colours(record, Expectation("makespan", least=0.3, most=0.3)) == ["green"]


def test_money_is_judged_in_real_time_only() -> None:
    dear = Expectation("cost", most=1.0)
    assert colours(a_record(usd=1.5), dear) == ["red"]
    assert colours(a_record(usd=0.5), dear) == ["green"]
    (row,) = judge(a_record(usd=1.5, compressed=60.0), [dear])
    assert (row.verdict, row.measured) == (Color.NOT_JUDGED, 1.5)
    assert "compressed" in row.why
    (row,) = judge(a_record(), [dear])
    assert (row.verdict, row.measured) == (Color.NOT_JUDGED, None)


def test_a_run_in_which_nothing_arrived_is_red() -> None:
    rows = judge(replace(a_record(), jobs=()), [Expectation("lost", most=0)])
    assert is_red(rows)
    assert rows[0].why == "nothing arrived, so nothing was tried"


def test_a_run_that_was_cut_is_red_and_never_green() -> None:
    record = a_record(a_job(0), cut="it took more than 1 h")
    rows = judge(record, [Expectation("makespan", most=100), Expectation("max_wait", most=1)])
    assert [row.verdict for row in rows] == [Color.RED, Color.NOT_JUDGED, Color.RED]
    assert rows[0].why == "it took more than 1 h"
    assert is_red(rows)
    assert is_red(judge(record, []))


def test_a_job_without_an_end_is_red() -> None:
    record = a_record(a_job(ended_s=None, state="RUNNING"))
    (row,) = judge(record, [Expectation("makespan", most=1e12)])
    assert row.verdict is Color.RED
    assert json.dumps(row.to_json(), allow_nan=False)


def test_fault_that_was_not_injected_is_reported() -> None:
    record = a_record(faults=(InjectedFault("kill", 1.0, impossible="nothing runs there"),))
    rows = judge(record, [Expectation("makespan", most=100)])
    assert [row.verdict for row in rows] == [Color.NOT_JUDGED, Color.GREEN]
    assert "nothing runs there" in rows[0].why
    assert not is_red(rows)


def test_unmeasurable_expectation_is_refused() -> None:
    with pytest.raises(UsageError, match="measure 'speed' does not exist"):
        judge(a_record(), [Expectation("speed", most=1)])
    with pytest.raises(UsageError, match="whole run"):
        judge(a_record(), [Expectation("cost", most=1, template="claims")])


def test_a_person_reads_a_table() -> None:
    record = a_record(a_job(0, failed=3), usd=2.0, compressed=60.0)
    expected = [
        Expectation("makespan", most=3600.0),
        Expectation("failed_tasks", least=2, most=2, template="claims"),
        Expectation("peak_fleet", least=0),
        Expectation("cost", most=1.0),
    ]
    told = charts.verdict_text(judge(record, expected)).splitlines()
    assert [" ".join(line.split()) for line in told] == [
        "MEASURE JOBS EXPECTED MEASURED VERDICT WHY",
        "makespan all at most 60 min 00 s 60.0 s green",
        "failed_tasks claims exactly 2 3 red more than expected",
        "peak_fleet all at least 0 0 green",
        "cost all at most 1.00 USD 2.00 USD not judged money is not judged in a compressed run",
        "",
        "Red: 2 green, 1 red, 1 not judged.",
    ]
    assert "expects nothing" in charts.verdict_text([])
    endless = judge(a_record(a_job(ended_s=None)), [Expectation("makespan", most=1)])
    assert "never" in charts.verdict_text(endless)
