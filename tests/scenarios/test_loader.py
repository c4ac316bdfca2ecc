"""The keys of a scenario file, and the values that the forecast and the replay read from them."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from batchlab.core.errors import UsageError
from batchlab.jobs.validation import keys
from batchlab.scenarios.model import arrivals, distributions, loader, schema, schema_distributions
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Expectation, FaultName, Policy, Prewarm, WorkKind
from batchlab.scenarios.traces.source import Trace
from batchlab.scenarios.verdicts import MEASURES
from docs.reference import scenario_file
from tests.support import ROOT
from tests.support.scenarios.files import FULL, changed, load

POISSON = "poisson: {per_hour: 60, until: 1h}"


def test_a_whole_file_becomes_values(tmp_path: Path) -> None:
    scenario = load(tmp_path)
    claims = scenario.jobs["claims"]
    assert (scenario.name, scenario.about, scenario.zones) == ("evening", "A peak. It teaches.", 2)
    assert claims.tasks == distributions.Lognormal(20, 0.5)
    assert claims.deadline_s == 3600
    assert [(stage.name, stage.after, stage.gather) for stage in claims.stages] == [
        ("parse", (), None),
        ("sum", ("parse",), "*"),
    ]
    assert scenario.jobs["small"].stages[0].name == "work"
    assert scenario.jobs["small"].stages[0].task_s == distributions.Constant(2)
    assert scenario.arrivals == (
        arrivals.Poisson(template="claims", per_hour=60, until_s=3600),
        arrivals.FixedTimes(template="small", moments=((0, 1), (300, 3))),
    )
    [plan] = scenario.pools
    assert (plan.pool.max_size, plan.pool.slots, plan.spot) == (4, 2, 0.5)
    assert scenario.policy == Policy(drain_target_s=300)
    assert scenario.prewarm == (Prewarm("default", 2, 600, 1200),)
    [fault] = scenario.faults
    assert (fault.name, fault.at_s, fault.count) == (FaultName.KILL, 1800, 1)
    assert scenario.expect == (
        Expectation("late", None, 0),
        Expectation("cost", None, 2),
        Expectation("p95_wait", None, 300, "claims"),
    )
    assert scenario.path == tmp_path / "s.yaml"


def test_the_digest_is_that_of_the_text(tmp_path: Path) -> None:
    assert load(tmp_path).digest == load(tmp_path).digest
    assert load(tmp_path, FULL + "# a comment\n").digest != load(tmp_path).digest


@pytest.mark.parametrize(
    ("text", "draw"),
    [
        ("3", distributions.Constant(3)),
        ("2m", distributions.Constant(120)),
        ("{constant: 1h}", distributions.Constant(3600)),
        ("{uniform: {least: 1s, most: 1m}}", distributions.Uniform(1, 60)),
        ("{exponential: {mean: 30s}}", distributions.Exponential(30)),
        ("{weibull: {scale: 1m, shape: 0.7}}", distributions.Weibull(60, 0.7)),
        ("{pareto: {least: 6s, alpha: 1.3, most: 1h}}", distributions.Pareto(6, 1.3, 3600)),
        ("{empirical: [4s, 1m, 4s]}", distributions.Empirical((4, 4, 60))),
        (
            "{mixture: [{weight: 9, constant: 4s}, {weight: 1, exponential: {mean: 1m}}]}",
            distributions.Mixture(((9, distributions.Constant(4)), (1, distributions.Exponential(60)))),
        ),
    ],
)
def test_every_distribution_can_be_written(tmp_path: Path, text: str, draw: Any) -> None:
    scenario = load(tmp_path, changed("small: {task: 2s}", f"small: {{task: {text}}}"))
    assert scenario.jobs["small"].stages[0].task_s == draw


DAILY = tuple(float(hour) for hour in range(24))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("at: 5m", arrivals.FixedTimes(template="claims", moments=((300, 1),))),
        (
            "on_off: {per_hour: 9, on: 5m, off: 1h, idle_per_hour: 1, regular: true, until: 2h}",
            arrivals.OnOff(
                template="claims", per_hour=9, on_s=300, off_s=3600, idle_per_hour=1, regular=True, until_s=7200
            ),
        ),
        (
            f"profile: {{daily: {list(range(24))}, begins: tue 06:30, from: 1h, until: 1d}}",
            arrivals.Profile(template="claims", daily=DAILY, begins_s=30.5 * 3600, from_s=3600, until_s=86_400),
        ),
        (
            "month_end: {per_hour: 2, begins: 2026-01-26, last: [5, 2], holidays: [2026-01-28], until: 7d}",
            arrivals.MonthEnd(
                template="claims",
                per_hour=2,
                begins=date(2026, 1, 26),
                last=(5, 2),
                holidays=frozenset({date(2026, 1, 28)}),
                until_s=7 * 86_400,
            ),
        ),
        (
            "step: {per_hour: 1, steps: [{at: 1h, per_hour: 60}], until: 2h}",
            arrivals.Step(template="claims", per_hour=1, steps=((3600, 60),), until_s=7200),
        ),
        (
            "ramp: {per_hour: 0, to_per_hour: 60, until: 2h}",
            arrivals.Ramp(template="claims", per_hour=0, to_per_hour=60, until_s=7200),
        ),
    ],
)
def test_every_source_can_be_written(tmp_path: Path, text: str, source: Any) -> None:
    assert load(tmp_path, changed(POISSON, text)).arrivals[0] == source


def test_a_trace_is_read_with_the_map_of_its_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("when,in,out,who\n100,10,5,a\n160,1,0,b\nx,1,1,c\n")
    columns = "{at: when, tasks: {columns: [in, out], per: 5}, tenant: who}"
    text = changed(POISSON, f"trace: {{file: t.csv, columns: {columns}, starts: 1m}}")
    schedule = expand(load(tmp_path, text))
    claims = [job for job in schedule.jobs if job.template.name == "claims"]
    assert [(job.due_s, job.tasks, job.tenant) for job in claims] == [(60, 3, "a"), (120, 1, "b")]
    [odd] = schedule.odd
    assert (odd.line, odd.what) == (4, "when is not a time")


def test_a_tab_may_be_written_with_two_characters(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a b\ta\n1\t2\n")
    for delimiter in (r"'\t'", r'"\t"'):
        text = changed(POISSON, f"trace: {{file: t.csv, columns: {{at: a}}, delimiter: {delimiter}}}")
        assert len(expand(load(tmp_path, text)).jobs) == 5


def test_a_format_follows_from_the_name_and_brings_its_columns(tmp_path: Path) -> None:
    (tmp_path / "log.swf").write_text("; a comment\n" + "1 0 5 60 4 -1 -1 4 -1 -1 1 3 1 1 1 -1 -1 -1\n")
    text = changed(POISSON, "trace: {file: log.swf, columns: {tasks: processors, tenant: user}}")
    [job] = [one for one in expand(load(tmp_path, text)).jobs if one.template.name == "claims"]
    assert (job.tasks, job.task_s, job.tenant, job.label) == (4, 60, "3", "1")


def test_only_a_trace_may_leave_the_job_to_its_records(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"due_s": 1, "tasks": 2, "label": "", "tenant": "", "template": "small"}\n')
    text = changed(f"job: claims, {POISSON}", "trace: {file: runs.jsonl}")
    scenario = load(tmp_path, text)
    assert isinstance(scenario.arrivals[0], Trace)
    assert scenario.arrivals[0].template == ""
    assert expand(scenario).jobs[0].template.name == "small"


def test_stages_with_equally_many_tasks_can_be_joined(tmp_path: Path) -> None:
    last = "gather: all, task: 5s}"
    beside = "{name: few, after: parse, gather: {by: b, groups: 3}, task: 1s}"
    for more in (
        "- {name: both, after: [], task: 1s}\n      - {name: all, after: [parse, both], task: 1s}",
        f"- {beside}\n      - {{name: all, after: [sum, few], task: 1s}}",
    ):
        ours = "gather: {by: a, groups: 3}, task: 5s}"
        load(tmp_path, changed(last, f"{ours}\n      {more}"))
    one = FULL.replace("{lognormal: {median: 20, sigma: 0.5}}", "1")
    load(tmp_path, one.replace(last, f"{last}\n      - {{name: c, after: [parse, sum], task: 1s}}"))


def test_whether_jobs_of_a_trace_can_be_joined_follows_from_its_records(tmp_path: Path) -> None:
    stages = "gather: all, task: 5s}\n      - {name: both, after: [parse, sum], task: 1s}"
    text = changed("gather: all, task: 5s}", stages).replace(POISSON, "trace: {file: t.jsonl}")
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"due_s": 1, "tasks": 1}\n')
    assert len(expand(load(tmp_path, text)).jobs) == 5
    trace.write_text('{"due_s": 1, "tasks": 1}\n{"due_s": 2, "tasks": 30}\n')
    with pytest.raises(UsageError, match=r"A job 'claims' of 30 tasks cannot run.*'both'"):
        expand(load(tmp_path, text))


def test_details_of_stages_and_faults_are_loaded(tmp_path: Path) -> None:
    stage = "{name: sum, gather: {by: region, groups: 3}, task: 5s, kind: cpu, retry: 2, poison: 1}"
    text = changed("{name: sum, gather: all, task: 5s}", stage)
    text = text.replace("fault: kill, count: 1", "fault: zone-loss, zone: b, for: 5m")
    scenario = load(tmp_path, text)
    last = scenario.jobs["claims"].stages[1]
    assert (last.gather, last.groups, last.kind) == ("key", 3, WorkKind.CPU)
    assert (last.retry.attempts, last.poison) == (2, 1)
    assert (scenario.faults[0].zone, scenario.faults[0].for_s) == ("b", 300)


def test_a_scenario_is_found_by_its_file_or_by_the_name_of_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loader.find("claims-month-end").name == "claims-month-end.yaml"
    with pytest.raises(UsageError, match="Did you mean 'claims-month-end'"):
        loader.find("claims-monthend")
    (tmp_path / "claims-month-end").write_text(FULL)
    monkeypatch.chdir(tmp_path)
    assert loader.load(loader.find("claims-month-end")).name == "evening"
    assert loader.find("nowhere.yaml") == Path("nowhere.yaml")


def test_twelve_scenarios_are_shipped_and_each_stands_alone() -> None:
    shipped = loader.shipped_scenarios()
    assert len(shipped) >= 12
    for one in shipped:
        scenario = loader.load(one.path)
        assert scenario.name == one.name == one.path.stem
        assert f"It teaches {one.teaches}" in " ".join(scenario.about.split())
        assert len(scenario.about.split("\n\n")) >= 2
        assert not any(isinstance(source, Trace) for source in scenario.arrivals)
        assert all(job.file is None for job in scenario.jobs.values())
        assert {row.measure for row in scenario.expect} >= {"lost", "duplicates"}
        assert len(scenario.expect) >= 4
        assert all(plan.pool.instance_type for plan in scenario.pools)


# --- Schema and page -----------------------------------------------------------------------------


def _models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return all models of a scenario file by name."""
    found: dict[str, type[BaseModel]] = {}

    def walk(annotation: Any) -> None:
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if is_model and annotation.__name__ not in found:
            found[annotation.__name__] = annotation
            for field in annotation.model_fields.values():
                walk(field.annotation)
        for inner in getattr(annotation, "__args__", ()):
            walk(inner)

    walk(model)
    return found


def test_every_key_is_described_with_an_example_that_is_accepted() -> None:
    models = _models(schema.ScenarioSpec)
    assert len(models) > 25
    for name, model in models.items():
        needed = {key: (field.examples or [None])[0] for key, field in keys(model).items() if field.is_required()}
        for key, field in keys(model).items():
            assert field.description, (name, key)
            assert field.description.endswith("."), (name, key)
            assert field.examples, (name, key)
            if model is schema_distributions.TaskTimes or name.endswith(("Money", "Shares")):
                continue  # the field is the same with another unit
            model.model_validate({**needed, key: field.examples[0]})


def test_the_schema_is_plain_json_that_forbids_unknown_keys() -> None:
    whole = schema.json_schema()
    text = json.dumps(whole)
    assert json.loads(text) == whole
    assert '"null"' not in text
    for own in (whole, *whole["$defs"].values()):
        assert own["additionalProperties"] is False
    for name in whole["$defs"]:
        assert name.isalnum(), name


def test_the_page_shows_every_part_of_the_schema() -> None:
    hidden = set(schema.json_schema()["$defs"]) - scenario_file.parts()
    same = {name for name in hidden if name.endswith(("Numbers", "Money", "Shares"))}
    assert hidden - same == {"RetrySpec"}
    text = scenario_file.reference()
    for measure in MEASURES:
        assert f"| `{measure}` |" in text
    for fault in FaultName:
        assert f"`{fault.value}`" in text


def test_the_guide_names_every_shipped_scenario_and_its_own_is_one(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "scenarios.md").read_text()
    for name in loader.names():
        assert f"| `{name}` |" in guide
    [block] = re.findall(r"```yaml\n(.*?)```", guide, re.S)
    assert load(tmp_path, block).name == "friday-evening"
    for source in schema.SOURCES:
        assert f"`{source}`" in guide
