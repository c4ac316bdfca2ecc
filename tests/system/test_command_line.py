"""The command line as a user runs it, with real processes and a real grid, and without remaining processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batchlab.adapters.local.processes import living
from batchlab.runtime import manager_process
from batchlab.runtime.home import Home
from tests.support import forked_cli
from tests.support.grid.local_grid import processes_of

HANDLERS = """\
import time

def work(item, ctx):
    time.sleep(float(ctx.params["seconds"]))
    number = int(item.read_text())
    if number in ctx.params["bad"]:
        raise ValueError(f"number {number} is bad")
    print(f"worked on {number}")
    file = ctx.save(f"<{number}>".encode(), "made/number.txt")
    return {"number": number, "file": file}
"""
JOB = """\
name: numbers
input:
  files: data/*
params: {seconds: 0.01, bad: []}
stages:
  - name: work
    python: handlers:work
    timeout: 30s
    retry: 1
    bundle: 1
"""
WAIT_S = 60.0


class Cli:
    """A runner of command lines in a folder with a job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home(folder / "home")
        self.started: list[subprocess.Popen[str]] = []
        (folder / "data").mkdir()
        (folder / "job.yaml").write_text(JOB)
        (folder / "handlers.py").write_text(HANDLERS)

    def inputs(self, count: int) -> None:
        for number in range(count):
            (self.folder / f"data/{number:03d}").write_text(str(number))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "batchlab", *arguments],
            cwd=self.folder,
            env={**os.environ, "BATCHLAB_HOME": str(self.home.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=WAIT_S)
        return process.returncode, out, err

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command to its end. The process of the command is a fork."""
        environment = {**os.environ, "BATCHLAB_HOME": str(self.home.path)}
        told = forked_cli.run(arguments, environment, WAIT_S, folder=self.folder)
        return told.code, told.out, told.err

    def wait(self, until: Callable[[], object], what: str) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < deadline_s, f"no {what}: {self._log()}"
            time.sleep(0.02)

    def _log(self) -> str:
        log = self.home.manager_log
        return log.read_text()[-2000:] if log.exists() else "no manager has started"

    def outcomes(self) -> int:
        """Return the number of committed bundles so far."""
        return len(list(self.home.objects.glob("jobs/*/work/outcomes/*/*.json")))

    def none_left(self) -> None:
        self.wait(lambda: not processes_of(self.home.path), "end of all processes")

    def close(self) -> None:
        """Stop the manager and the started commands, and check that no process remains."""
        manager_process.stop_manager(self.home)
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.none_left()


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    made = Cli(tmp_path)
    yield made
    made.close()


def numbers(folder: Path) -> list[int]:
    lines = (folder / "work.jsonl").read_text().splitlines()
    return [json.loads(line)["value"]["number"] for line in lines]


def test_the_demo_runs_from_nothing_and_agrees_with_its_facts(cli: Cli) -> None:
    code, out, err = cli("demo", "--files", "20", "--out", "out")
    assert code == 0, err
    assert out.rstrip().endswith("totals agree with the generator: yes")
    assert "HARBOR MUTUAL HEALTH" in out
    assert err.replace("\n", "").isprintable(), "control codes where nobody has a terminal"
    lines = (cli.folder / "out/totals.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["value"]["claims"] for line in lines) == 20 * 40
    cli.none_left()


def test_interrupted_run_resumes(cli: Cli) -> None:
    """The interrupted run leaves no process running, and loses no result."""
    cli.inputs(40)
    first = cli.start("run", "job.yaml", "--out", "out", "--set", "seconds=0.1")
    cli.wait(lambda: cli.outcomes() >= 4, "outcome")
    first.send_signal(signal.SIGINT)
    code, _, err = cli.end(first)
    assert code == 130
    assert "batchlab run job.yaml --out out --set seconds=0.1 --resume" in err
    cli.none_left()
    done = cli.outcomes()
    assert done < 40, "it was not interrupted"

    arguments = ("run", "job.yaml", "--out", "out", "--set", "seconds=0.1")
    code, _, err = cli(*arguments)
    assert code == 2
    assert "--resume" in err

    code, out, err = cli(*arguments, "--resume", "--json", "--keep-up")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["job"]["stages"][0]["succeeded"] == 40
    assert numbers(cli.folder / "out") == list(range(40))
    assert (cli.folder / "out/files/work/7/made/number.txt").read_text() == "<7>"

    # The next run only fetches the results. Without --resume, the command starts a new run.
    again = json.loads(cli(*arguments, "--cache", "--json")[1])
    assert again["job"]["id"] == summary["job"]["id"]
    assert again["job"]["ended_s"] == summary["job"]["ended_s"]
    faster = json.loads(cli("run", "job.yaml", "--json")[1])
    _, out, err = cli("run", "job.yaml", "--json")
    anew = json.loads(out)
    assert len({one["job"]["id"] for one in (again, faster, anew)}) == 3
    # Only the last run follows a run with tiny tasks.
    assert (again["warnings"], faster["warnings"]) == ([], [])
    assert [(one["check"], one["stage"]) for one in anew["warnings"]] == [("task size", "work")]
    assert f"Warning: Tasks of work are tiny. Half of the 40 sampled tasks of {faster['job']['id']} took" in err


def test_sigterm_ends_a_run_like_ctrl_c(cli: Cli) -> None:
    cli.inputs(1)
    process = cli.start("run", "job.yaml", "--set", "seconds=20")
    cli.wait(lambda: bool(living(cli.home.fleet)), "worker")
    process.terminate()
    assert cli.end(process)[0] == 130
    cli.none_left()


def test_ctrl_c_twice_leaves_at_once_and_leaves_nothing(cli: Cli) -> None:
    """The first interrupt comes while the manager of an earlier run is on record and the next manager is starting."""
    cli.inputs(2)
    assert cli("run", "job.yaml")[0] == 0
    process = cli.start("run", "job.yaml", "--set", "seconds=20")
    cli.wait(lambda: len(processes_of(cli.home.path)) == 1, "manager")
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert cli.end(process)[0] == 130
    cli.none_left()


def test_a_run_survives_the_death_of_its_manager(cli: Cli) -> None:
    """The manager is killed in the middle, and no task is lost or done twice."""
    cli.inputs(30)
    process = cli.start("run", "job.yaml", "--out", "out", "--set", "seconds=0.1", "--json")
    cli.wait(lambda: cli.outcomes() >= 3, "outcome")
    record = cli.home.record()
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    code, out, err = cli.end(process)
    assert code == 0, err
    assert "another one takes over" in err
    assert numbers(cli.folder / "out") == list(range(30))
    assert json.loads(out)["job"]["stages"][0]["succeeded"] == 30
    cli.none_left()


def test_a_run_leaves_a_standing_grid_up_after_its_manager_died(cli: Cli) -> None:
    """The run starts another manager for the grid, with the same pools, and does not end this manager."""
    cli.inputs(30)
    assert cli("grid", "up", "--pool", "default:1-3x1")[0] == 0
    first = cli.home.record()
    assert first is not None
    process = cli.start("run", "job.yaml", "--out", "out", "--set", "seconds=0.1")
    cli.wait(lambda: cli.outcomes() >= 3, "outcome")
    os.kill(first.pid, signal.SIGKILL)
    code, _, err = cli.end(process)
    assert code == 0, err
    assert numbers(cli.folder / "out") == list(range(30))
    second = cli.home.record()
    assert second is not None, "the run ended a grid that it did not start"
    assert second.owner != first.owner
    (pool,) = json.loads(cli("grid", "status", "--json")[1])["pools"]
    assert (pool["min"], pool["max"], pool["slots"]) == (1, 3, 1)
    assert cli("grid", "down")[0] == 0
    cli.none_left()


def test_run_continues_when_its_standing_grid_is_stopped(cli: Cli) -> None:
    """The run starts its own grid for the remaining tasks, and ends this grid."""
    cli.inputs(30)
    assert cli("grid", "up")[0] == 0
    process = cli.start("run", "job.yaml", "--out", "out", "--set", "seconds=0.1")
    cli.wait(lambda: cli.outcomes() >= 3, "outcome")
    assert cli("grid", "down")[0] == 0
    code, _, err = cli.end(process)
    assert code == 0, err
    assert numbers(cli.folder / "out") == list(range(30))
    cli.none_left()


def test_failed_job_names_its_failures_and_keeps_its_results(cli: Cli) -> None:
    """The output names the failures with their reasons, and the other results are available."""
    cli.inputs(5)
    (cli.folder / "job.yaml").write_text(JOB.replace("bad: []", "bad: [2, 3]"))
    code, out, _ = cli("run", "job.yaml", "--out", "out", "--keep-up")
    assert code == 1
    assert "5 tasks, 2 failed" in out
    assert re.search(r"work/[23] exception: .*number [23] is bad", out)
    assert numbers(cli.folder / "out") == [0, 1, 4]

    code, out, _ = cli("job", "failures", "last")
    assert code == 0
    assert out.count("ValueError") >= 1
    code, _, err = cli("run", "job.yaml", "--resume")
    assert code == 2
    assert "job retry" in err
    assert cli("job", "retry", "last")[0] == 0
    assert cli("job", "watch", "last")[0] == 1
    assert cli("grid", "down")[0] == 0


def test_failed_run_is_examined_and_deleted_afterwards(cli: Cli) -> None:
    """The grid of the run is stopped, and its folder has the ledger and the bucket."""
    cli.inputs(5)
    (cli.folder / "job.yaml").write_text(JOB.replace("bad: []", "bad: [2, 3]"))
    assert cli("run", "job.yaml", "--out", "out")[0] == 1
    cli.none_left()
    code, out, err = cli("job", "list", "--json")
    assert code == 0, err
    (job,) = json.loads(out)
    assert job["state"] == "FAILED"
    assert "FAILED" in cli("job", "show", "last")[1]
    assert "number 2 is bad" in cli("job", "failures", "last", "--each")[1]
    assert "worked on 4" in cli("job", "logs", "last", "4")[1]
    assert "batchlab job replay-task" in cli("job", "why", "last")[1]
    code, out, err = cli("job", "replay-task", "last", "work/2", "--local", "--json")
    assert (code, json.loads(out)["verdict"]) == (1, "same"), err
    assert cli("job", "results", "last", "--out", "again")[0] == 0
    assert numbers(cli.folder / "again") == [0, 1, 4]
    code, _, err = cli("job", "retry", "last")
    assert code == 3
    assert "Start one with `batchlab grid up`" in err
    cli.none_left()

    assert cli("grid", "up")[0] == 0
    code, out, err = cli("job", "delete", "last", "--yes")
    assert code == 0, err
    assert re.fullmatch(rf"{job['id']} is deleted: \d+ objects\.\n", out)
    left = [path.relative_to(cli.home.objects).as_posix() for path in cli.home.objects.rglob("*") if path.is_file()]
    kept = {f"jobs/{job['id']}/spec.json", f"grid/deletions/{job['id']}.json"}  # notes against late objects
    assert {path for path in left if job["id"] in path} == kept
    assert cli("grid", "rebuild-ledger")[1] == "The ledger is rebuilt: 0 jobs.\n"
    # The next run of the same file is a new job.
    assert cli("run", "job.yaml", "--out", "out")[0] == 1
    (second,) = json.loads(cli("job", "list", "--json")[1])
    assert second["id"] != job["id"]
    assert cli("grid", "down")[0] == 0
    cli.none_left()


def test_a_grid_that_is_up_serves_every_command(cli: Cli) -> None:
    cli.inputs(6)
    code, out, err = cli("grid", "up", "--pool", "default:0-2x1")
    assert code == 0, err
    record = cli.home.record()
    assert record is not None
    assert re.search(r"^default +0 +2 ", out, re.MULTILINE)
    code, job, err = cli("job", "submit", "job.yaml")
    assert code == 0, err
    job = job.strip()
    assert cli("job", "watch", job)[0] == 0
    code, out, _ = cli("job", "list", "--json")
    assert [load["id"] for load in json.loads(out)] == [job]
    assert job in cli("job", "show", "last")[1]
    assert "SUCCEEDED" in cli("job", "why", "numbers")[1]
    assert "worked on 3" in cli("job", "logs", job, "3")[1]
    code, out, _ = cli("job", "results", job, "--out", "mine")
    assert code == 0
    assert numbers(cli.folder / "mine") == list(range(6))
    assert cli("grid", "rebuild-ledger")[1] == "The ledger is rebuilt: 1 job.\n"
    assert "Launching" in cli("grid", "activities")[1]
    doctor = json.loads(cli("doctor", "--json")[1])
    assert all(one["level"] != "fail" for one in doctor)
    # `run` uses the running grid, and keeps it running.
    assert cli("run", "job.yaml", "--out", "out")[0] == 0
    assert cli.home.record() == record
    assert cli("grid", "down")[0] == 0
    cli.none_left()


def test_a_stage_gets_the_pool_it_names(cli: Cli) -> None:
    """A stage without its pool would wait forever."""
    cli.inputs(2)
    (cli.folder / "job.yaml").write_text(f"{JOB}    pool: big\n    resources: {{slots: 2}}\n")
    code, out, err = cli("run", "job.yaml", "--workers", "1", "--json")
    assert code == 0, err
    assert json.loads(out)["stages"][0]["slots"] in (0, 2)
