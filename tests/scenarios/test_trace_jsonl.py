"""Traces in JSON Lines, in which every odd line is reported and the other lines are read."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.model import Pool
from batchlab.scenarios import record
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model.arrivals import Poisson
from batchlab.scenarios.model.distributions import Constant, Uniform
from batchlab.scenarios.model.expansion import compress_scenario, expand
from batchlab.scenarios.model.values import Arrival, JobTemplate, PoolPlan, Scenario, StageTemplate
from batchlab.scenarios.traces.rows import RECORD_COLUMNS, Columns, ColumnSum
from tests.support.scenarios.records import a_job, a_record
from tests.support.scenarios.trace_files import arrivals, jsonl, odd, written


def test_jobs_of_a_record_as_lines(tmp_path: Path) -> None:
    runs = [
        a_job(0, template="claims", due_s=10.0, tasks=5, planned=6, tenant="a", label="first"),
        a_job(1, template="media", due_s=25.0, tasks=None, planned=6),
    ]
    text = "\n".join(json.dumps(job) for job in record_jobs(a_record(*runs)))
    trace = jsonl(written(tmp_path, text), template="")
    assert arrivals(trace) == [Arrival(0.0, "claims", 5, None, "first", "a"), Arrival(15.0, "media", 6)]
    assert odd(trace) == [(2, "no count of its first stage's tasks", "that of all stages was taken", "")]
    assert {arrival.template for arrival in arrivals(jsonl(trace.path))} == {"j"}


def record_jobs(run: record.Record) -> list[dict[str, object]]:
    jobs: list[dict[str, object]] = json.loads(record.to_json(run))["jobs"]
    return jobs


def test_a_whole_record_is_stretched_to_its_own_time(tmp_path: Path) -> None:
    run = replace(a_record(a_job(0, due_s=1.0, tasks=5), a_job(1, due_s=3.0, tasks=4)), compressed=60.0)
    path = tmp_path / "run.json"
    record.write(run, path)
    assert [(arrival.at_s, arrival.tasks) for arrival in arrivals(jsonl(path))] == [(0.0, 5), (120.0, 4)]
    flat = json.dumps(json.loads(path.read_text())).encode()
    for number, data in enumerate((flat, gzip.compress(flat), gzip.compress(path.read_bytes()))):
        again = jsonl(written(tmp_path, data, f"again-{number}"))
        assert arrivals(again) == arrivals(jsonl(path))


def test_recorded_forecast_can_be_replayed(tmp_path: Path) -> None:
    template = JobTemplate(
        "claims",
        (StageTemplate("parse", Constant(4.0)), StageTemplate("sum", Constant(2.0), after=("parse",), gather="*")),
        Uniform(3.0, 30.0),
        tenant="a",
    )
    first = Scenario(
        "first",
        "",
        {"claims": template},
        (Poisson(template="claims", per_hour=30, until_s=1800.0),),
        (PoolPlan(Pool("default", 0, 4, 2)),),
    )
    path = tmp_path / "run.json"
    record.write(simulate(compress_scenario(first, 60)), path)
    trace = jsonl(path, template="")
    again = expand(replace(first, arrivals=(trace,)))
    jobs = expand(first).jobs
    assert len(jobs) > 5
    assert not again.odd
    assert [(job.tasks, job.template, job.tenant) for job in again.jobs] == [
        (job.tasks, job.template, job.tenant) for job in jobs
    ]
    assert [job.due_s + jobs[0].due_s for job in again.jobs] == pytest.approx([job.due_s for job in jobs])


def test_custom_fields_are_mapped(tmp_path: Path) -> None:
    lines = [
        {"when": {"start": "2026-01-01T00:00:00Z"}, "n": "12", "sec": 2},
        {"when": {"start": "2026-01-01T00:01:00Z"}, "n": 3, "sec": 0.5, "who": 7},
    ]
    columns = Columns("when.start", tasks=ColumnSum(("n",), per=4), task_s=ColumnSum(("sec",)), tenant="who")
    trace = jsonl(written(tmp_path, "\n".join(map(json.dumps, lines))), columns)
    assert arrivals(trace) == [Arrival(0.0, "j", 3, 2.0), Arrival(60.0, "j", 1, 0.5, "", "7")]
    with pytest.raises(UsageError, match=r"No record of the trace .* has 'size'") as caught:
        arrivals(jsonl(trace.path, Columns("when.start", tasks=ColumnSum(("size",)))))
    assert "when, n, sec" in caught.value.remedy


def test_task_count_may_come_from_the_template(tmp_path: Path) -> None:
    lines = [{"when": 5}, {"when": 6, "tasks": 4}, {"when": 7, "planned": 3}, {"when": 8, "n": 2}]
    path = written(tmp_path, "\n".join(map(json.dumps, lines)))
    trace = jsonl(path, replace(RECORD_COLUMNS, at="when"))
    assert [arrival.tasks for arrival in arrivals(trace)] == [None, 4, 3, None]
    assert [one[0] for one in odd(trace)] == [3]
    asked = jsonl(path, replace(RECORD_COLUMNS, at="when", tasks=ColumnSum(("n",))))
    assert [arrival.tasks for arrival in arrivals(asked)] == [2]
    assert [one[:2] for one in odd(asked)] == [(line, "n is missing") for line in (1, 2, 3)]


def test_odd_lines_of_json(tmp_path: Path) -> None:
    good = {"due_s": 1, "tasks": 2, "template": "a"}
    lines = [
        json.dumps(good),
        "{broken",
        "[1]",
        "null",
        json.dumps(good | {"due_s": True}),
        json.dumps(good | {"tasks": [1]}),
        json.dumps(good | {"tasks": -1}),
        json.dumps(good | {"template": ""}),
        json.dumps(good | {"due_s": None}),
        '{"due_s": 1e999, "tasks": 1, "template": "a"}',
        "[" * 100_000,
        json.dumps(good | {"tasks": 10**400}),
    ]
    trace = jsonl(written(tmp_path, "\n".join(lines)), template="")
    assert len(arrivals(trace)) == 1
    assert [(line, what) for line, what, _, _ in odd(trace)] == [
        (2, "not a JSON object"),
        (3, "not a JSON object"),
        (4, "not a JSON object"),
        (5, "due_s is not a time"),
        (6, "tasks is not a number"),
        (7, "tasks is below 0"),
        (8, "template is missing"),
        (9, "due_s is missing"),
        (10, "due_s is not a time"),
        (11, "not a JSON object"),
        (12, "tasks is not a number"),
    ]
    assert {done for _, _, done, _ in odd(trace)} == {"left out"}
    assert all(len(detail) <= 60 for *_, detail in odd(trace))
