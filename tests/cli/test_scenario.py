"""The commands `scenario list` and `check`, and the schema of a scenario file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchlab.scenarios.model import loader
from tests.support.cli import Run
from tests.support.scenarios.files import FULL, changed


@pytest.mark.parametrize("command", ["list", "check"])
def test_every_command_has_help_with_one_example(run: Run, command: str) -> None:
    code, out, _ = run("scenario", command, "--help")
    assert code == 0
    assert out.count(f"Example: batchlab scenario {command}") == 1


def test_shipped_scenarios_are_listed_with_their_lessons(run: Run) -> None:
    code, out, _ = run("scenario", "list")
    assert code == 0
    for scenario in loader.shipped_scenarios():
        assert f"{scenario.name} " in out
        assert scenario.teaches in out
    code, out, _ = run("scenario", "list", "--json")
    assert [load["name"] for load in json.loads(out)] == loader.names()


def test_check_describes_the_scenario_and_draws_its_peak(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(FULL)
    code, out, err = run("scenario", "check", str(file))
    assert (code, err) == (0, "")
    assert f"{file} is fine: scenario evening, " in out
    assert "A peak. It teaches." in out
    assert "the largest fleet" in out
    assert "1  30 min: kill, instances die without a shutdown" in out


def test_a_seed_draws_other_arrivals(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(FULL)
    whole = [run("scenario", "check", str(file), "--json", "--seed", str(seed)) for seed in (1, 2)]
    first, second = (json.loads(out) for _, out, _ in whole)
    assert first["digest"] == second["digest"]
    assert first["columns"] != second["columns"]
    assert first["tasks"] == sum(column["tasks"] for column in first["columns"])
    assert first["faults"][0]["name"] == "kill"


def test_mistakes_have_file_and_line_only(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(changed("zones: 2", "zone: 2").replace("max: 4", "max: 0"))
    code, out, err = run("scenario", "check", str(file))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"{file}:3: There is no key 'zone' here.",
        "  Did you mean 'zones'?",
        f"{file}:16: 'max' must be at least 1, not 0.",
        "  Write for example `max: 40`.",
    ]


def test_odd_records_are_counted_by_kind(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("at\n0\nx\ny\n\n5\n")
    file = tmp_path / "s.yaml"
    file.write_text(changed("poisson: {per_hour: 60, until: 1h}", "trace: {file: t.csv, columns: {at: at}}"))
    code, _, err = run("scenario", "check", str(file))
    assert code == 0
    assert "3 odd records in traces:" in err
    assert f"{tmp_path / 't.csv'}:3: at is not a time: left out, and 1 more such" in err
    _, out, _ = run("scenario", "check", str(file), "--json")
    assert [odd["line"] for odd in json.loads(out)["odd"]] == [3, 4, 5]


def test_check_describes_the_used_part_of_a_trace(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("at\n2026-10-30 18:05:00\nsoon\n2026-10-30 18:30:00\n")
    file = tmp_path / "s.yaml"
    file.write_text(changed("poisson: {per_hour: 60, until: 1h}", "trace: {file: t.csv, columns: {at: at}}"))
    _, out, _ = run("scenario", "check", str(file))
    told = "2 of 3 records can be used; the scenario begins at 2026-10-30T18:05:00 of its clock"
    assert f"Trace t.csv: {told}\n" in out
    _, out, _ = run("scenario", "check", str(file), "--json")
    (trace,) = json.loads(out)["traces"]
    assert (trace["records"], trace["used"], trace["begins"]) == (3, 2, "2026-10-30T18:05:00")


def test_a_scenario_and_a_job_file_are_not_taken_for_each_other(run: Run, tmp_path: Path) -> None:
    peak, job = tmp_path / "peak.yaml", tmp_path / "job.yaml"
    peak.write_text(FULL)
    job.write_text("name: sums\ninput: {files: a.txt}\nstages: [{name: add, run: cat}]\n")
    code, _, err = run("cost", "estimate", peak, "--seconds", "2")
    assert code == 2
    what, remedy = err.splitlines()
    assert what == f"{peak}: There is no key 'jobs' here: this is a scenario, not a job file."
    assert remedy.startswith("  `batchlab scenario check`")
    code, _, err = run("scenario", "check", job)
    assert code == 2
    what, remedy = err.splitlines()
    assert what == f"{job}: There is no key 'input' here: this is a job file, not a scenario."
    assert remedy.startswith("  `batchlab run`")


def test_a_trace_without_a_usable_record_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("at\nx\n")
    file = tmp_path / "s.yaml"
    file.write_text(changed("poisson: {per_hour: 60, until: 1h}", "trace: {file: t.csv, columns: {at: at}}"))
    code, _, err = run("scenario", "check", str(file))
    assert code == 2
    assert "None of the 1 records" in err


@pytest.mark.parametrize(
    ("old", "new", "doubt"),
    [
        ("job: small, at", "job: claims, at", "No job 'small' arrives."),
        ("default: {max: 4,", "spare: {max: 1}\n  default: {max: 4,", "in the pool 'spare'"),
        ("at: 30m, fault: kill", "at: 30d, fault: kill", "The fault kill at 30 days comes when"),
        ("at: 10m, until: 20m", "at: 9d, until: 10d", "The prewarm of 'default' at 9 days comes"),
    ],
)
def test_questions_about_what_a_run_would_not_show(run: Run, tmp_path: Path, old: str, new: str, doubt: str) -> None:
    file = tmp_path / "s.yaml"
    text = changed(old, new).replace("expect: {late: 0, cost: 2 USD, ", "expect: {late: 0, ")
    file.write_text(text)
    code, out, err = run("scenario", "check", str(file))
    assert code == 0
    assert "is fine" not in out
    assert "Is this meant?" in err
    assert doubt in err
    _, out, _ = run("scenario", "check", str(file), "--json")
    [told] = json.loads(out)["doubts"]
    assert doubt in told


def test_a_scenario_in_which_nothing_arrives_is_refused(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    nothing = changed("poisson: {per_hour: 60, until: 1h}", "poisson: {per_hour: 0, until: 1h}")
    file.write_text(nothing.replace("at: [0s, {at: 5m, count: 3}]", "at: {at: 0s, count: 0}"))
    code, _, err = run("scenario", "check", str(file))
    assert code == 2
    assert f"Nothing arrives in the scenario {file}." in err


def test_an_unknown_name_is_met_with_the_nearest(run: Run) -> None:
    code, _, err = run("scenario", "check", "zone-lost")
    assert code == 2
    assert "Did you mean 'zone-loss'?" in err


def test_the_schema_is_that_of_the_scenario_file(run: Run) -> None:
    code, out, _ = run("schema", "scenario")
    assert code == 0
    assert json.loads(out)["title"] == "batchlab scenario"
