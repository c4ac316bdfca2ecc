"""The commands `scenario replay` and `record` on real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchlab.cli import output, progress
from batchlab.core.errors import UsageError
from batchlab.runtime.home import Home
from batchlab.scenarios import record
from batchlab.scenarios.replay.run_state import ReplayProgress
from examples.example_data import write_claims
from tests.support import ROOT
from tests.support.grid.backends import command
from tests.support.grid.local_grid import processes_of
from tests.support.waiting import until

EXAMPLES = ROOT / "examples"

SMALL: dict[str, Any] = {
    "name": "small",
    "about": "A few jobs, one of them while the other runs.",
    "seed": 3,
    "compress": 10,
    "jobs": {
        "claims": {
            "tasks": {"uniform": {"least": 6, "most": 12}},
            "deadline": "10m",
            "stages": [
                {"name": "parse", "task": {"lognormal": {"median": "3s", "sigma": 0.5}}},
                {"name": "price", "task": "2s"},
                {"name": "sum", "gather": {"by": "key", "groups": 2}, "task": "4s"},
            ],
        }
    },
    "arrivals": [{"job": "claims", "at": ["0s", "20s"]}],
    "pools": {"default": {"min": 0, "max": 2, "slots": 2}},
    "policy": {"drain_target": "30s", "cooldown_in": "10s", "idle": "10s"},
    "expect": {"makespan": "5m", "lost": 0, "duplicates": 0, "peak_fleet": {"least": 1, "most": 2}},
}


def write(folder: Path, **changes: Any) -> Path:
    """Write a scenario file."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def test_a_replay_is_judged_compared_and_recorded_as_a_scenario(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "record.json"
    told, said = command("scenario", "replay", write(tmp_path), "--home", home, "--out", out, "--json")
    answer = json.loads(told)
    assert (answer["record"], answer["red"], answer["cut"]) == (str(out), False, "")
    assert [row["verdict"] for row in answer["verdict"]] == ["green"] * 4
    compared = {one["measure"]: one for one in answer["comparison"]["differences"]}
    assert compared["makespan"]["forecast"] > 0
    assert compared["makespan"]["fact"] > 0
    assert "All times of small are divided by 10" in said
    assert processes_of(home) == {}
    assert not Home(home).settings_file.exists()

    run = record.read(out)
    assert (run.compressed, run.seed, run.backend) == (10.0, 3, "local")
    told, _ = command("scenario", "record", "--from", out, "--out", tmp_path / "again.yaml", "--json")
    again = json.loads(told)
    assert (again["jobs"], again["tasks"]) == (2, sum(job.planned for job in run.jobs))
    measured_s = 10 * sum(stage.run_s for stage in run.stages)
    assert again["task_s"] == pytest.approx(measured_s, rel=0.01)

    # The jobs of the home are recorded one by one, without the home's grid.
    ids = [job.id for job in run.jobs]
    told, _ = command("scenario", "record", *ids, "--home", home, "--out", tmp_path / "jobs.yaml", "--json")
    of_jobs = json.loads(told)
    assert (of_jobs["jobs"], of_jobs["tasks"]) == (2, again["tasks"])
    assert of_jobs["task_s"] == pytest.approx(measured_s / 10, rel=0.01)
    pools = yaml.safe_load((tmp_path / "jobs.yaml").read_text())["pools"]
    assert pools == {"default": {"min": 0, "max": 2, "slots": 2}}


def test_red_ends_with_1_and_a_person_reads_why(tmp_path: Path) -> None:
    path = write(tmp_path, expect={"makespan": "1s", "lost": 0})
    told, said = command("scenario", "replay", path, "--home", tmp_path / "home", "--no-forecast", code=1)
    assert "more than expected" in told
    assert "Red: 1 green, 1 red." in told
    kept = tmp_path / "home" / "records" / "small-1.json"
    assert f"The record is {kept}." in said
    assert record.read(kept).cut == ""


def test_real_work_follows_its_job_file(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "claims", tmp_path / "claims")
    facts = write_claims(tmp_path / "claims" / "data", seed=5, files=12, claims_per_file=5)
    times = {"parse": "50ms", "adjudicate": "50ms", "totals": "50ms"}
    job = {"file": "claims/job.yaml", "tasks": 12, "task": times, "groups": {"totals": len(facts.payers)}}
    path = write(
        tmp_path,
        compress=1,
        jobs={"claims": job},
        arrivals=[{"job": "claims", "at": ["0s", "2s"]}],
        policy={"drain_target": "3s", "cooldown_in": "2s", "idle": "1s"},
        expect={"failed_jobs": 0, "lost": 0, "duplicates": 0},
    )
    out = tmp_path / "record.json"
    command("scenario", "replay", path, "--home", tmp_path / "home", "--out", out)
    run = record.read(out)
    tasks = {stage.stage: stage.tasks for stage in run.stages}
    assert tasks == {"parse": 24, "adjudicate": 24, "totals": 2 * len(facts.payers)}
    assert [job.state for job in run.jobs] == ["SUCCEEDED"] * 2
    assert all(stage.run_s > 0 for stage in run.stages)


def test_a_picture_is_drawn_while_it_is_entered(capsys: pytest.CaptureFixture[str]) -> None:
    state = ReplayProgress(3.0, 12, 4, 2, 1, 0.0, 0.0, None, ("kill",))
    with progress.ReplayDisplay(is_live=True) as picture:
        picture.show(state)
    shown = capsys.readouterr().err
    assert "2/12 jobs ended, 1 of them badly" in shown
    assert "broken now: kill" in shown


def test_unwritable_record_is_reported_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    replay = ("scenario", "replay", write(tmp_path), "--home", tmp_path / "home", "--out")
    _, said = command(*replay, tmp_path / "file" / "out.json", code=2)
    assert "out.json cannot be written: " in said
    assert not (tmp_path / "home").exists()


def test_whether_a_file_can_be_written_leaves_none(tmp_path: Path) -> None:
    output.check_writable(tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="cannot be written"):
        output.check_writable(tmp_path / "new" / "out.json")
    output.check_writable(tmp_path / "new" / "out.json", folder=True)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "kept").write_text("as it was")
    output.check_writable(tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "as it was"
    link, loop = tmp_path / "link", tmp_path / "loop"
    link.symlink_to(tmp_path / "later")
    loop.symlink_to(loop)
    output.check_writable(link)
    assert link.is_symlink()
    assert not (tmp_path / "later").exists()
    with pytest.raises(UsageError, match="cannot be written"):
        output.check_writable(loop)


def test_ctrl_c_keeps_the_record_and_leaves_nothing(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "record.json"
    path = write(tmp_path, jobs={"claims": {"task": "10m", "tasks": 4}}, arrivals=SMALL["arrivals"])
    words = ("scenario", "replay", path, "--home", home, "--out", out)
    with subprocess.Popen(
        [sys.executable, "-m", "batchlab", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        while "1 submitted" not in said and "2 submitted" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        told, rest = process.communicate(timeout=60)
    assert process.returncode == 130, (told, said, rest)
    assert "It was interrupted." in told
    assert record.read(out).cut == "It was interrupted."
    assert record.read(out).samples
    until(lambda: processes_of(home) == {})
    assert not Home(home).settings_file.exists()


def test_a_grid_that_is_up_is_used_where_it_fits_and_refused_where_not(tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = write(tmp_path)
    replay = ("scenario", "replay", path, "--home", home, "--no-forecast")
    command(*replay, "--keep-up")
    try:
        assert Home(home).settings_file.exists(), "the next manager must be told the same"
        pid = Home(home).record()
        command(*replay)
        assert Home(home).record() == pid, "another grid was started"
        _, said = command(*replay, "--compress", "20", code=2)
        assert "drain_target_s of the running grid is 3, and the scenario needs 1.5" in said
        other = write(tmp_path, pools={"default": {"min": 0, "max": 3, "slots": 2}})
        _, said = command("scenario", "replay", other, "--home", home, code=2)
        assert "is 0-2x2, and the scenario needs 0-3x2" in said
    finally:
        command("grid", "down", "--home", home)
