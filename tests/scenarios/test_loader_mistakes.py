"""Mistakes in a scenario, all of which are reported at once, with the line and the correction of each mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchlab.core.errors import JobFileError
from batchlab.scenarios.model import loader
from tests.support.scenarios.files import changed, load, refused

POISSON = "poisson: {per_hour: 60, until: 1h}"
AT = "at: [0s, {at: 5m, count: 3}]"
KILL = "{at: 30m, fault: kill, count: 1}"
SMALL = "small: {task: 2s}"
TASKS = "{lognormal: {median: 20, sigma: 0.5}}"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        # The whole
        ("name: evening", "nmae: evening", 1, "There is no key 'nmae' here. Did you mean 'name'?"),
        ("name: evening\n", "", 1, "'name' is missing. Write for example `name: claims-month-end`"),
        ("name: evening", "name: Evening Peak", 1, "Write evening-peak."),
        ("about: A peak. It teaches.", "about:", 2, "'about' has no value."),
        ("about: A peak. It teaches.", 'about: ""', 2, "'about' is empty."),
        ("zones: 2", "zones: two", 3, "'zones' must be a whole number, not text."),
        ("zones: 2", "zones: 9", 3, "'zones' must be at most 6, not 9."),
        ("zones: 2", "compress: 0.5", 3, "'compress' must be at least 1, not 0.5."),
        ("zones: 2", "seed: -1", 3, "'seed' must be at least 0, not -1."),
        ("zones: 2", "zones: 2\nzones: 3", 4, "'zones' is already on line 3."),
        ("zones: 2", "zones: on", 3, "on is text in YAML 1.2 but true in YAML 1.1."),
        ("zones: 2", "fautls: []", 3, "Did you mean 'faults'?"),
        # Jobs
        ("  small: {task", "  Small: {task", 11, "A name in 'jobs' cannot be 'Small'"),
        ("deadline: 1h", "deadline: 06:00", 7, "'06:00' is not a duration, but a time of day"),
        ("deadline: 1h", "deadline: 31.10.2026", 7, "is not a duration, but a time of day or a date"),
        ("deadline: 1h", "deadline: soon", 7, "'soon' is not a duration. Write 30s, 5m"),
        ("deadline: 1h", "deadline: 0s", 7, "leaves no time to run"),
        ("deadline: 1h", "tenat: a", 7, "Did you mean 'tenant'?"),
        ("deadline: 1h", "max_failures: 5%", 7, "'max_failures' must be a whole number"),
        ("small: {task: 2s}", "small: {tenant: a}", 11, "'small' does not say what its work is"),
        (
            "small: {task: 2s}",
            "small: {task: 2s, stages: [{name: a, task: 1s}]}",
            11,
            "Job 'small' has both stages and task.",
        ),
        ("small: {task: 2s}", "small: {task: 2 x}", 11, "'2 x' is not a duration"),
        ("small: {task: 2s}", "small: {task: [2]}", 11, "'task' must be a mapping of keys"),
        ("small: {task: 2s}", "small: {task: {}}", 11, "There must be one distribution, but there is no distribution."),
        (
            "small: {task: 2s}",
            "small: {task: {constant: 1, exponential: {mean: 2s}}}",
            11,
            "There must be one distribution, but there is more than one: constant, exponential.",
        ),
        ("small: {task: 2s}", "small: {task: {lognormla: 1}}", 11, "Did you mean 'lognormal'?"),
        ("small: {task: 2s}", "small: {task: {lognormal: {median: 2s}}}", 11, "'sigma' is missing."),
        (
            "small: {task: 2s}",
            "small: {task: {lognormal: {median: 0s, sigma: 1}}}",
            11,
            "median must be a number above 0",
        ),
        (
            "small: {task: 2s}",
            "small: {task: {pareto: {least: 1s, alpha: 0.9}}}",
            11,
            "alpha must be above 1 without most",
        ),
        (
            "small: {task: 2s}",
            "small: {task: {uniform: {least: 2s, most: 1s}}}",
            11,
            "most (1.0) must not be below least (2.0)",
        ),
        ("small: {task: 2s}", "small: {task: {empirical: []}}", 11, "'empirical' is empty."),
        (
            "small: {task: 2s}",
            "small: {task: {mixture: [{weight: 1}]}}",
            11,
            "There must be one distribution, but there is no distribution.",
        ),
        ("small: {task: 2s}", "small: {task: {mixture: [{constant: 4s}]}}", 11, "'weight' is missing."),
        (TASKS, "many", 6, "'many' is not a number."),
        (TASKS, "-1", 6, "must be at least 0, not -1"),
        (TASKS, "{lognormal: {median: 20, sigma: 1000000}}", 6, "This cannot be: "),
        (TASKS, "{weibull: {scale: 20, shape: 0.001}}", 6, "This cannot be: "),
        (TASKS, "{lognormal: {median: 20, sigma: 9}}", 6, "mean is too large"),
        (TASKS, "{lognormal: {median: 20s, sigma: 1}}", 6, "'20s' is not a number."),
        ("{name: sum, gather", "{name: parse, gather", 10, "Stage 1 is named 'parse' already."),
        ("gather: all", "gather: some", 10, "Write 'all', or {by: key, groups: 12}."),
        ("gather: all", "gather: {groups: 3}", 10, "'by' is missing."),
        ("gather: all", "after: prase", 10, "Did you mean 'parse'?"),
        ("gather: all", "after: sum", 10, "The stages form a cycle: sum → sum."),
        ("gather: all", "kind: gpu", 10, "'kind' cannot be 'gpu'."),
        ("gather: all", "fails: 2", 10, "'fails' must be at most 1, not 2."),
        ("gather: all", "retry: 0", 10, "'attempts' must be at least 1, not 0."),
        ("gather: all", "memory: 1 MiB", 10, "less than the 16 MiB"),
        ("gather: all", "bundle: big", 10, "Write auto, or a number of tasks."),
        ("gather: all", "pool: defualt", 10, "Did you mean 'default'?"),
        ("gather: all", "slots: 3", 10, "it would never run"),
        ("{name: parse, task", "{name: parse, gather: all, task", 9, "nothing to gather"),
        (
            "{name: parse, task: 4s}\n      - {name: sum, gather: all, task: 5s}",
            "{name: parse, after: sum, task: 4s}\n      - {name: sum, after: [], task: 5s}",
            9,
            "'sum' is listed after this",
        ),
        (
            "gather: all, task: 5s}",
            "gather: all, task: 5s}\n      - {name: both, after: [parse, sum], task: 1s}",
            11,
            "'parse' and 'sum' item by item, but these have unequal numbers of tasks",
        ),
        (
            "gather: all, task: 5s}",
            "gather: {by: a, groups: 3}, task: 5s}\n"
            "      - {name: few, after: parse, gather: {by: b, groups: 2}, task: 1s}\n"
            "      - {name: both, after: [sum, few], task: 1s}",
            12,
            "unequal numbers of tasks",
        ),
        ("small: {task: 2s}", "small: {task: 2s, groups: {a: 2}}", 11, "without a job file"),
        # Dependencies
        (SMALL, "small: {task: 2s, after: clams}", 11, "There is no job 'clams' to wait for. Did you mean 'claims'?"),
        (SMALL, "small: {task: 2s, after: claims:failed}", 11, "'claims:failed' is not a dependency."),
        (SMALL, "small: {task: 2s, after: [claims, claims:ended]}", 11, "'claims' is named twice."),
        (SMALL, "small: {task: 2s, after: small}", 11, "would wait for each other: small after small."),
        (
            SMALL,
            "small: {task: 2s, after: large}\n  large: {task: 9s, after: small}",
            11,
            "These jobs would wait for each other: small after large after small.",
        ),
        (SMALL, "small: {task: 2s, after: 5}", 11, "There is no job '5' to wait for."),
        (SMALL, "small: {task: 2s, after: {job: claims}}", 11, "'after' must be"),
        # Arrivals
        ("job: claims, poisson", "jbo: claims, poisson", 13, "Did you mean 'job'?"),
        ("job: claims, poisson", "job: clams, poisson", 13, "Did you mean 'claims'?"),
        ("job: claims, poisson", "poisson", 13, "does not say which job arrives"),
        (f"job: claims, {POISSON}", "job: claims", 13, "This arrival does not say when."),
        (POISSON, f"{POISSON}, at: 0s", 13, "This arrival has both at and poisson."),
        (POISSON, "posson: {per_hour: 1, until: 1h}", 13, "Did you mean 'poisson'?"),
        (POISSON, "poisson: {until: 1h}", 13, "'per_hour' is missing."),
        (POISSON, "poisson: {per_hour: 60}", 13, "'until' is missing."),
        (POISSON, "poisson: {per_hour: 60, from: 2h, until: 1h}", 13, "must be after from"),
        (POISSON, "poisson: {per_hour: -1, until: 1h}", 13, "'per_hour' must be at least 0"),
        (POISSON, "poisson: {per_hour: 1e300, until: 1h}", 13, "too large"),
        (POISSON, f"poisson: {{per_hour: {10**400}, until: 1h}}", 13, "too large"),
        (POISSON, "on_off: {per_hour: 1, on: 10ms, off: 10ms, until: 30d}", 13, "1,000,000 bursts"),
        (POISSON, "on_off: {per_hour: 1, on: 0s, off: 1m, until: 1h}", 13, "durations above 0"),
        (POISSON, "profile: {daily: [1, 2], until: 1h}", 13, "'daily' has 2 entries"),
        (POISSON, f"profile: {{daily: {[0] * 24}, begins: noon, until: 1h}}", 13, "of the week"),
        (POISSON, "month_end: {per_hour: 1, begins: soon, until: 1h}", 13, "is not a date"),
        (POISSON, "month_end: {per_hour: 1, begins: 9999-12-31, until: 1h}", 13, "too far away"),
        (POISSON, "month_end: {per_hour: 1, begins: 0001-01-01, until: 1h}", 13, "too far away"),
        (POISSON, "poisson: {per_hour: 1010000, until: 1h}", 13, "more than the 1,000,000"),
        (POISSON, "ramp: {per_hour: 0, to_per_hour: 1e8, until: 1h}", 13, "more than the 1,000,000"),
        (
            POISSON,
            "on_off: {per_hour: 2e9, idle_per_hour: 1e9, on: 1s, off: 1s, until: 1h}",
            13,
            "more than the 1,000,000",
        ),
        (
            POISSON,
            "step: {per_hour: 1, steps: [{at: 2h, per_hour: 1}, {at: 1h, per_hour: 2}], until: 3h}",
            13,
            "steps must be in order of time",
        ),
        (
            POISSON,
            "step: {per_hour: 1, steps: [{at: 1h, per_hour: 1}, {at: 1h, per_hour: 2}], until: 3h}",
            13,
            "Two steps are at 3600 s.",
        ),
        (POISSON, "step: {per_hour: 1, steps: [{at: 3h, per_hour: 1}], until: 3h}", 13, "this step never comes"),
        (POISSON, "ramp: {per_hour: 1, until: 3h}", 13, "'to_per_hour' is missing."),
        (POISSON, "trace: {file: nowhere.swf}", 13, "nowhere.swf' is not there."),
        (POISSON, "trace: {file: /etc/passwd}", 13, "is not a path relative to the scenario"),
        (POISSON, "trace: {file: 's3://b/t.csv'}", 13, "is not a path relative to the scenario"),
        (POISSON, "trace: {file: .}", 13, "is a folder"),
        (POISSON, "trace: {file: pipe.swf}", 13, "pipe.swf' is not there"),
        (POISSON, "trace: {file: t.csv}", 13, "a table needs a map of its columns"),
        (POISSON, "trace: {file: t.csv, columns: {att: a}}", 13, "Did you mean 'at'?"),
        (POISSON, "trace: {file: t.csv, columns: {at: a, unit: h}}", 13, "The unit must be one of"),
        (POISSON, "trace: {file: t.csv, columns: {at: a, unit: '%Q'}}", 13, "bad directive"),
        (POISSON, "trace: {file: t.csv, columns: {at: a, unit: '%d %d'}}", 13, "repeats a directive"),
        (POISSON, "trace: {file: t.csv, columns: {at: a, unit: '%Y %'}}", 13, "stray %"),
        (POISSON, "trace: {file: t.csv, delimiter: '::', columns: {at: a}}", 13, "one character"),
        (POISSON, """trace: {file: t.csv, delimiter: '"', columns: {at: a}}""", 13, "between field"),
        (POISSON, "trace: {file: t.csv, delimiter: '', columns: {at: a}}", 13, "between fields"),
        (POISSON, "trace: {file: t.csv, format: swf, names: [a]}", 13, "'names' means nothing in"),
        (POISSON, "trace: {file: t.csv, columns: {at: a, every: 5m}}", 13, "without count"),
        (
            POISSON,
            "trace: {file: t.csv, columns: {at: a, job: b}}",
            13,
            "'job' means nothing because the arrival names the job.",
        ),
        (POISSON, "trace: {file: t.csv, columns: {at: a, count: b, scale: 0}}", 13, "'scale' must be above 0, not 0."),
        (POISSON, "trace: {file: t.csv, format: csv}", 13, "Write one of the values: swf"),
        (POISSON, "trace: {file: t.csv, columns: {at: a, tasks: {columns: b, per: 0}}}", 13, "It must be above 0."),
        (AT, "at: [0s, {at: 5m, count: 1000000}]", 14, "more than the 1,000,000 of a whole"),
        (AT, "at: [0s, soon]", 14, "'soon' is not a duration"),
        (AT, "at: [{at: 0s, count: many}]", 14, "'count' must be a whole number"),
        (AT, "at: {at: 0s, when: 0s}", 14, "There is no key 'when' here."),
        # The fleet
        ("max: 4", "max: 0", 16, "'max' must be at least 1, not 0."),
        ("max: 4", "min: 5, max: 4", 16, "min (5) is more than max (4)."),
        ("max: 4, ", "", 16, "'max' is missing."),
        ("m7i.large", "m7i.lrage", 16, "Did you mean m7i.large"),
        ("spot: 0.5", "spot: 50", 16, "'spot' must be at most 1, not 50."),
        ("spot: 0.5", "spot: 50%", 16, "'50%' is not a number. Write 0.5."),
        ("spot: 0.5", "spot: half", 16, "'half' is not a number."),
        ("spot: 0.5", "sopt: 0.5", 16, "Did you mean 'spot'?"),
        ("drain_target: 5m", "drain_traget: 5m", 17, "Did you mean 'drain_target'?"),
        ("drain_target: 5m", "drain_target: 0s", 17, "leaves no time to run"),
        ("{min: 2, at", "{min: 9, at", 18, "The pool 'default' has 4 instances at the most."),
        ("{min: 2, at", "{pool: defualt, min: 2, at", 18, "Did you mean 'default'?"),
        ("{min: 2, at", "{min: 0, at", 18, "always has 0 instances or more. Write 1 or more"),
        ("until: 20m", "until: 5m", 18, "It ends before it begins."),
        # Faults
        (KILL, "{at: 30m, fault: kil}", 19, "Did you mean 'kill'?"),
        (KILL, "{fault: kill}", 19, "'at' is missing."),
        (KILL, "{at: 30m, fault: kill, pool: other}", 19, "There is no pool 'other' to break."),
        (KILL, "{at: 30m, fault: kill, rate: 0.5}", 19, "'rate' means nothing for kill."),
        (KILL, "{at: 30m, fault: kill, for: 1m}", 19, "'for' means nothing for kill."),
        (KILL, "{at: 30m, fault: kill, share: 0}", 19, "A share of 0 hits no instance."),
        (KILL, "{at: 30m, fault: s3-errors, rate: 0}", 19, "A rate of 0 hits nothing."),
        (KILL, "{at: 30m, fault: pause, for: 0s}", 19, "It is over as soon as it has begun."),
        (KILL, "{at: 30m, fault: kill, share: 0.5, count: 1}", 19, "both a share and a count"),
        (KILL, "{at: 30m, fault: s3-errors, pool: default}", 19, "'pool' means nothing for s3-er"),
        (KILL, "{at: 30m, fault: zone-loss, zone: c}", 19, "There is no zone 'c'"),
        (KILL, "{at: 30m, fault: zone-loss, zone: ab}", 19, "Write a or b, or raise zones."),
        # Expectations
        ("late: 0", "makespam: 1h", 20, "Did you mean 'makespan'?"),
        ("late: 0", "makespan: fast", 20, "'fast' is not a duration"),
        ("late: 0", "p95_wait: {lest: 1m}", 20, "Did you mean 'least'?"),
        ("late: 0", "p95_wait: {}", 20, "It says neither least nor most."),
        ("late: 0", "lost: {least: 2, most: 1}", 20, "least is more than most."),
        ("late: 0", "idle_share: 30", 20, "must be at most 1, not 30"),
        ("cost: 2 USD", "cost: 2", 20, "2 is not an amount with its currency"),
        ("cost: 2 USD", "cost: {least: 2 USD, most: 1 USD}", 20, "least is more than most."),
        ("jobs: {claims: {p95", "jobs: {clams: {p95", 20, "Did you mean 'claims'?"),
        ("{p95_wait: 5m}", "{peak_fleet: 5}", 20, "There is no key 'peak_fleet' here."),
        ("{claims: {p95_wait: 5m}}", "{small: {late: 0}}", 20, "'small' has no deadline to miss"),
    ],
)
def test_mistake_has_its_line_and_a_remedy(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    os.mkfifo(tmp_path / "pipe.swf")
    errors = refused(tmp_path, changed(old, new))
    assert len(errors) == 1, [str(error) for error in errors]
    assert errors[0].line == line
    assert words in f"{errors[0].message} {errors[0].remedy}"


def test_all_mistakes_are_reported_in_line_order(tmp_path: Path) -> None:
    errors = refused(
        tmp_path,
        """\
name: e
abuot: x
jobs:
  one: {task: soon}
  two: {task: 1s, tasks: many}
  three:
    stages:
      - {name: a, task: 1s, pool: nowhere}
arrivals:
  - {job: on, at: 0s}
  - {job: two}
pools:
  default: {max: 1, instance_type: x1.gigantic}
prewarm: [{pool: none, min: 1, at: 0s, until: 1m}]
faults: [{at: 1m, fault: spot-wave}]
expect: {lsot: 0}
""",
    )
    assert [error.line for error in errors] == [2, 4, 5, 8, 10, 11, 13, 14, 15, 16]


def test_consequences_of_a_mistake_are_not_reported(tmp_path: Path) -> None:
    [error] = refused(tmp_path, changed("pools:", "polls:"))
    assert error.message == "There is no key 'polls' here."
    [error] = refused(tmp_path, changed("instance_type: m7i", "instance_tpye: m7i"))
    assert "instance_tpye" in error.message
    [error] = refused(tmp_path, changed("deadline: 1h", "dedline: 1h"))
    assert "dedline" in error.message


def test_a_cost_is_expected_only_of_instances_that_have_a_price(tmp_path: Path) -> None:
    [error] = refused(tmp_path, changed(", instance_type: m7i.large", ""))
    assert error.line == 20
    assert "the pool 'default' has no instance type" in error.message


def test_a_spot_wave_needs_something_to_take(tmp_path: Path) -> None:
    text = changed(KILL, "{at: 30m, fault: spot-wave}")
    assert load(tmp_path, text)
    [error] = refused(tmp_path, text.replace("spot: 0.5", "spot: 0"))
    assert "the scenario has none" in error.message


@pytest.mark.parametrize(
    ("first", "second", "at_once"),
    [
        ("at: 10m, fault: pause, for: 5m", "at: 12m, fault: pause, for: 5m", True),
        ("at: 10m, fault: pause, for: 5m, pool: default", "at: 5m, fault: pause, for: 6m", True),
        ("at: 10m, fault: partition", "at: 10m, fault: partition, count: 1", True),
        ("at: 10m, fault: zone-loss, zone: a", "at: 10m, fault: zone-loss, zone: b", True),
        ("at: 10m, fault: manager-crash, for: 0s", "at: 10m, fault: manager-crash, for: 0s", True),
        ("at: 10m, fault: s3-errors, for: 5m", "at: 15m, fault: s3-errors, for: 5m", False),
        ("at: 10m, fault: s3-errors, for: 5m", "at: 11m, fault: sqs-delays, for: 5m", False),
        ("at: 10m, fault: kill", "at: 10m, fault: kill, count: 1", False),
        ("at: 1m, fault: pause, pool: default", "at: 1m, fault: pause, pool: other", False),
    ],
)
def test_faults_of_one_kind_do_not_overlap(tmp_path: Path, first: str, second: str, at_once: bool) -> None:
    text = changed(f"faults: [{KILL}]", f"faults:\n  - {{{first}}}\n  - {{{second}}}")
    text = text.replace("pools:\n", "pools:\n  other: {max: 1, instance_type: m7i.large}\n")
    if not at_once:
        assert len(load(tmp_path, text).faults) == 2
        return
    [error] = refused(tmp_path, text)
    assert second in text.splitlines()[(error.line or 0) - 1]
    assert "It overlaps with another" in error.message


def test_the_times_of_a_job_files_stages_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("def one(item): ...\n")
    (tmp_path / "job.yaml").write_text("name: j\ninput: {files: later/*}\nstages: [{name: one, python: 'work:one'}]\n")
    small = "small: {task: 2s}"
    for new, words in (
        ("small: {file: job.yaml, task: {oen: 4s}}", "Did you mean 'one'?"),
        ("small: {file: job.yaml}", "how long the tasks of one take"),
        ("small: {file: job.yaml, task: {one: 4s}, groups: {tow: 2}}", "does not have a stage 'tow'"),
        ("small: {file: jbo.yaml, task: 1s}", "is not there"),
        ("small: {file: work.py, task: 1s}", "The job file has a mistake"),
        ("small: {file: job.yaml, task: 1s, groups: {one: 2}}", "does not gather by a field"),
    ):
        messages = [f"{e.message} {e.remedy}" for e in refused(tmp_path, changed(small, new))]
        assert any(words in message for message in messages), messages
        assert all(message for message in messages)
    wide = tmp_path / "wide.yaml"
    wide.write_text((tmp_path / "job.yaml").read_text()[:-3] + ", resources: {slots: 3}}]\n")
    wanted = "small:\n    task: 1s\n    file: wide.yaml"
    [error] = refused(tmp_path, changed(small, wanted))
    assert "it would never run" in error.message
    assert error.line == 13
    good = load(tmp_path, changed(small, "small: {file: job.yaml, task: {one: 4s}}"))
    assert good.jobs["small"].stages[0].task_s.mean == 4.0
    assert good.jobs["small"].file == tmp_path / "job.yaml"
    for_all = load(tmp_path, changed(small, "small: {file: job.yaml, task: 3s}"))
    assert for_all.jobs["small"].stages[0].task_s.mean == 3.0


@pytest.mark.parametrize("text", ["", "[]", "5", "# only a comment", "&a [*a]"])
def test_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    [error] = refused(tmp_path, text)
    assert "A scenario is a mapping" in error.message or "nested" in error.message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"no such scenario.*scenario list"):
        loader.load(tmp_path / "nowhere.yaml")
    with pytest.raises(JobFileError, match="it is not a file"):
        loader.load(tmp_path)
    (tmp_path / "s.yaml").write_bytes(b"name: \xff")
    with pytest.raises(JobFileError, match="not UTF-8"):
        loader.load(tmp_path / "s.yaml")
