"""`batchlab scenario simulate`: its output, its files, and its exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.cli import scenario_replay
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.forecast.calibration import write
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.expansion import expand, task_times
from batchlab.scenarios.record import read
from tests.support.cli import Run

PEAK = """\
name: peak
about: A small one. It shows what the command says.
seed: 4
jobs:
  work: {tasks: 4, task: 3s, deadline: 10m}
arrivals:
  - {job: work, at: [0s, 30s]}
pools:
  default: {min: 1, max: 2, slots: 2, boot: 20s, instance_type: m7i.large}
faults:
  - {at: 31s, fault: sqs-duplicates, rate: 1, for: 10s}
expect: {makespan: MAKESPAN, late: 0, lost: 0, cost: 1 USD}
"""


def peak(folder: Path, makespan: str = "2m") -> Path:
    path = folder / "peak.yaml"
    path.write_text(PEAK.replace("MAKESPAN", makespan))
    return path


def test_a_scenario_that_holds_is_green_and_leaves_its_record_and_log(run: Run, tmp_path: Path) -> None:
    out, log = tmp_path / "peak.json", tmp_path / "peak.log"
    code, said, told = run("scenario", "simulate", peak(tmp_path), "--out", out, "--log", log)
    assert code == 0, told
    assert "peak, seed 4, as on aws: 2 jobs, 8 tasks, simulated in" in said
    assert "Green: 4 green." in said
    assert "messages were delivered twice" in said
    record = read(out)
    assert (record.scenario, len(record.jobs), record.simulated) == ("peak", 2, True)
    assert len(log.read_text().splitlines()) > 100


def test_missed_expectation_is_red_and_exits_with_1(run: Run, tmp_path: Path) -> None:
    code, said, told = run("scenario", "simulate", peak(tmp_path, "20s"))
    assert code == 1
    next_ = f"`batchlab scenario plan {tmp_path / 'peak.yaml'} --deadline 20s` looks for a fleet"
    assert next_ in told
    assert "more than expected" in said
    assert "Red: 3 green, 1 red." in said


def test_json_has_the_same_verdict(run: Run, tmp_path: Path) -> None:
    made = Calibration("localstack", bundle_s=1.0)
    write(made, tmp_path / "numbers.json")
    code, said, told = run(
        "scenario",
        "simulate",
        peak(tmp_path),
        "--json",
        "--seed",
        9,
        "--like",
        "localstack",
        "--compress",
        2,
        "--calibration",
        tmp_path / "numbers.json",
    )
    doc = json.loads(said)
    assert (code, doc["red"], doc["seed"], doc["like"]) == (0, False, 9, "localstack")
    assert doc["compressed"] == 2
    assert "the calibration is of runs that were compressed by 1, and the forecast by 2" in told
    assert doc["jobs"] == 2
    verdicts = {row["measure"]: row["verdict"] for row in doc["verdict"]}
    assert verdicts["cost"] == "not judged", "money is not judged in a compressed run"
    assert doc["measures"]["makespan"] < 60
    (fault,) = doc["faults"]
    assert fault["at_s"] == pytest.approx(15.5, abs=0.1)
    assert fault["evidence"]


def sizes(tasks: int, task: str, spot: str) -> str:
    return f"""\
name: sizes
about: Tasks of several sizes.
jobs:
  tiny: {{tasks: {tasks}, task: {task}}}
  few: {{tasks: 3, task: 10ms}}
arrivals:
  - {{job: tiny, at: [0s]}}
  - {{job: few, at: [0s]}}
pools:
  default: {{min: 1, max: 2, slots: 2, boot: 20s, instance_type: m7i.large, spot: {spot}}}
"""


@pytest.mark.parametrize(
    ("tasks", "task", "spot", "compress", "checks"),
    [
        (30, "20ms", "0", 1, ["task size"]),
        (30, "200ms", "0", 1, []),
        (30, "200ms", "0", 4, []),  # Compression changes the times of the run, and not those of the real tasks.
        (30, "{mixture: [{weight: 9, constant: 50ms}, {weight: 1, constant: 1m}]}", "0", 1, ["task size"]),
        (30, "{mixture: [{weight: 9, constant: 10s}, {weight: 1, constant: 1h}]}", "1.0", 1, []),
        (4, "11m", "1.0", 1, ["long tasks on Spot"]),
        (4, "11m", "0", 1, []),
        (1, "12h", "0", 1, ["task length"]),
    ],
)
def test_task_sizes_of_a_scenario_are_warnings(
    run: Run, tmp_path: Path, tasks: int, task: str, spot: str, compress: int, checks: list[str]
) -> None:
    (tmp_path / "sizes.yaml").write_text(sizes(tasks, task, spot))
    code, said, told = run("scenario", "simulate", tmp_path / "sizes.yaml", "--compress", compress, "--json")
    assert code == 0, told
    doc = json.loads(said)
    assert [(one["check"], one["stage"]) for one in doc["warnings"]] == [(check, "tiny (work)") for check in checks]
    assert told.count("Warning: Tasks of tiny (work)") == len(checks)


def test_times_in_a_trace_are_judged_instead_of_the_times_of_the_template(tmp_path: Path) -> None:
    (tmp_path / "sizes.yaml").write_text(sizes(30, "20ms", "0"))
    scenario = loader.load(tmp_path / "sizes.yaml")
    jobs = [job for job in expand(scenario).jobs if job.template.name == "tiny"]
    assert [one.median_s for one in task_times(scenario, jobs)] == [0.02]
    slow, fast = replace(jobs[0], task_s=9.0, tasks=40), replace(jobs[0], task_s=0.01, tasks=10)
    (times,) = task_times(scenario, [slow, fast, fast])
    assert (times.median_s, times.tasks) == (9.0, 60)


def test_a_plan_warns_about_the_spot_instances_that_it_chooses(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sizes.yaml").write_text(sizes(4, "11m", "1.0"))
    arguments = ("--deadline", "12h", "--seeds", 1, "--runs", 3, "--jobs", 1)
    code, said, told = run("scenario", "plan", tmp_path / "sizes.yaml", *arguments, "--json")
    assert code in (0, 1), told
    doc = json.loads(said)
    has_spot = "spot:" in doc["yaml"]
    assert [one["check"] for one in doc["warnings"]] == (["long tasks on Spot"] if has_spot else [])
    (tmp_path / "sizes.yaml").write_text(sizes(30, "20ms", "1.0"))
    code, said, told = run("scenario", "plan", tmp_path / "sizes.yaml", *arguments)
    assert "Warning: Tasks of tiny (work) are tiny. Half of the 30 tasks in the scenario take at most 20 ms" in told


def test_record_of_another_backend_is_refused(run: Run, tmp_path: Path) -> None:
    write(Calibration("local", bundle_s=1.0), tmp_path / "numbers.json")
    for what in (("simulate",), ("plan", "--deadline", "1h")):
        code, _, told = run("scenario", what[0], peak(tmp_path), *what[1:], "--calibration", tmp_path / "numbers.json")
        assert code == 2
        assert "was measured on local, and the forecast is for aws" in told
        assert "--like local" in told


def test_unwritable_path_is_reported_before_the_run(run: Run, tmp_path: Path) -> None:
    code, _, told = run("scenario", "simulate", peak(tmp_path), "--out", tmp_path / "no" / "x")
    assert code != 0
    assert "cannot be written" in told


def test_unknown_scenario_is_reported(run: Run) -> None:
    code, _, told = run("scenario", "simulate", "no-such")
    assert code != 0
    assert "no-such" in told
    assert "Traceback" not in told


def test_an_interrupted_forecast_ends_at_once_in_a_sentence(tmp_path: Path) -> None:
    text = PEAK.replace("MAKESPAN", "2m").replace("tasks: 4,", "tasks: 200000,")
    (tmp_path / "peak.yaml").write_text(text)
    path = str(tmp_path / "peak.yaml")
    # The program is the same, but it reports progress after half a second instead of ten.
    program = "from batchlab.cli import main, scenario as s; s.LINE_EVERY_S = 0.5; main()"
    command = [sys.executable, "-c", program, "scenario", "simulate", path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "400,000 tasks take up to about" in process.stderr.readline()
        told = process.stderr.readline()  # the simulation is running
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 130
    assert "jobs ended" in told
    assert rest.strip().endswith("nothing is kept.")
    assert "Traceback" not in rest


def test_long_runs_are_announced(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, told = run("scenario", "simulate", peak(tmp_path))
    assert "to simulate" not in told
    monkeypatch.setattr("batchlab.cli.scenario.NOTE_FROM_TASKS", 8)
    _, _, told = run("scenario", "simulate", peak(tmp_path))
    assert "8 tasks take up to about 16 ms to simulate; Ctrl-C ends it." in told


def test_real_time_replay_of_a_night_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = peak(tmp_path)
    scenario_replay._note_duration(loader.load(path), None)
    assert capsys.readouterr().err == ""
    path.write_text(path.read_text().replace("[0s, 30s]", "[0s, 9h]"))
    scenario_replay._note_duration(loader.load(path), None)
    assert "peak runs in real time, for at least 9 h 00 min; --compress 100" in (capsys.readouterr().err)


def test_fleet_too_large_for_one_machine_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = peak(tmp_path)
    scenario_replay._note_fleet(loader.load(path), factory.load("local"))
    path.write_text(path.read_text().replace("max: 2", "max: 800"))
    scenario_replay._note_fleet(loader.load(path), factory.load("aws"))
    assert capsys.readouterr().err == ""
    scenario_replay._note_fleet(loader.load(path), factory.load("local"))
    told = capsys.readouterr().err
    assert "Its fleet may come to 800 instances, each a process of this machine" in told
