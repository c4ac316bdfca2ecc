"""The replay of a grid's task on the user's machine: the same failure, also under pdb, without effects on the grid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from batchlab import Grid
from batchlab.core.errors import TaskFailed
from batchlab.core.operating_system.processes import table
from batchlab.worker.shared_memory import ChildState
from tests.support.grid.failing_tasks import (
    Quick,
    Ran,
    Verdict,
    anywhere,
    at_a_terminal,
    contents,
    grids,
    here,
    quick,
    verdict,
)
from tests.support.processes import command_line
from tests.support.waiting import until

__all__ = ["anywhere", "grids", "here", "quick", "verdict"]


# --- The same failure, from any backend ----------------------------------------------------------


def test_failure_is_reproduced_under_pdb(anywhere: Ran) -> None:
    done = anywhere.cli("replay-task", "parse/1", "--debug", typed="p text\nu\np line\nq\n")
    assert done.returncode == 1, done.stderr
    # The debugger shows the unexpected item in the failing frame.
    assert "'four'" in done.stdout
    assert "'d,four'" in done.stdout
    (said,) = [line for line in done.stdout.splitlines() if "same way" in line]
    (failure,) = [f for f in anywhere.grid.client.failures(anywhere.job) if f["stage"] == "parse"]
    assert failure["reason"] in said
    assert f"({failure['fingerprint']})" in said
    assert "attempt 2" in done.stderr


@pytest.mark.parametrize(("task", "kind"), [("check/0", "a command"), ("gathered/0", "results of other tasks")])
def test_every_kind_of_input_is_downloaded(anywhere: Ran, verdict: Verdict, task: str, kind: str) -> None:
    found = verdict(anywhere, task)
    assert found["verdict"] == "same", (kind, found)
    assert found["fingerprint"] == found["fingerprint_on_grid"]
    assert found["differences"] == []


def test_a_chained_task_that_succeeded_succeeds_with_the_same_result(here: Ran, verdict: Verdict) -> None:
    found = verdict(here, "double/0")
    assert found["verdict"] == "succeeded"
    assert found["sentence"].endswith("as on the grid, with the same result.")


def test_each_attempt_can_be_had(here: Ran, verdict: Verdict, quick: Quick) -> None:
    assert verdict(here, "parse/1", "--attempt", "1")["attempt"] == 1
    assert verdict(here, "parse/1")["attempt"] == 2
    code, _, err = quick(here, "replay-task", "parse/1", "--attempt", "3")
    assert code == 2
    assert "It has 1 (round 0), 2 (round 0)." in err


def test_a_task_is_shown_with_its_attempts_and_where_it_ran(here: Ran, quick: Quick) -> None:
    code, out, _ = quick(here, "show", "parse/1", "--json")
    doc = json.loads(out)
    assert (code, [one["state"] for one in doc["attempts"]]) == (0, ["RETRIED", "FAILED"])
    assert "bytes of amounts.csv" in doc["input"]
    last = doc["attempts"][-1]
    assert last["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert last["log_bytes"] == len("parsing 2 lines of amounts.csv\n")
    assert doc["replay"].endswith(f"replay-task {here.job} parse/1 --home {here.home}")
    code, out, _ = quick(here, "show", "double/1")
    assert "No attempt of the task has ended yet." in out
    assert "parse/1 has not succeeded" in out


# --- Limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["hang/0", "die/0", "eat/0"])
def test_time_memory_and_crashes_are_judged_as_on_a_worker(here: Ran, verdict: Verdict, task: str) -> None:
    found = verdict(here, task)
    assert found["verdict"] == "same", found
    # The traceback shows where the task was when it was ended.
    assert f"in {task.partition('/')[0]}" in found["stderr"]


def test_missing_limits_are_reported_and_the_task_runs(here: Ran, verdict: Verdict) -> None:
    found = verdict(here, "eat/0", "--no-limits")
    assert found["verdict"] == "not at all"
    assert "The memory limit of 128 MiB did not apply." in found["differences"]


# --- Debuggers -----------------------------------------------------------------------------------


def test_pdb_starts_at_a_terminal(here: Ran) -> None:
    shown = at_a_terminal(here.argv("replay-task", "parse/1"), ["p text\n", "q\n"])
    assert "Post-mortem of ValueError" in shown
    assert "'four'" in shown
    assert "failed the same way as on the grid" in shown


def test_debugger_stops_at_the_first_line_of_the_handler(here: Ran) -> None:
    typed = "p part.name\nn\np lines\nc\nq\n"
    done = here.cli("replay-task", "parse/1", "--break", typed=typed)
    assert "handlers.py(6)parse()" in done.stdout, done
    assert "'amounts.csv'" in done.stdout
    assert "['name,amount', 'c,3', 'd,four']" in done.stdout
    assert "failed the same way" in done.stdout
    assert "The time limit of 30 s did not apply." in done.stdout


def test_leaving_the_debugger_is_not_a_failure(here: Ran) -> None:
    done = here.cli("replay-task", "parse/0", "--break", typed="q\n")
    assert done.returncode == 1
    assert "did not run to its end" in done.stdout


def test_ctrl_c_is_for_the_task_and_leaves_nothing_behind(here: Ran) -> None:
    process = subprocess.Popen(
        here.argv("replay-task", "hang/0", "--no-limits"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    (folder,) = until(lambda: _folders_of(process.pid))
    until(lambda: (folder / "run" / "cwd").is_dir() and _hangs(folder))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert "did not run to its end" in out
    assert not folder.exists()


def _folders_of(group: int) -> list[Path]:
    """Return the task folders in the command lines of a process group."""
    found = []
    for one in table():
        if one.group == group and one.pid != group:
            found += [Path(word) for word in command_line(one.pid) if "batchlab-task-" in word]
    return found


def _hangs(folder: Path) -> bool:
    with closing(ChildState(folder / "board")) as board:
        return board.task == 0


def test_ide_is_awaited_and_missing_debugpy_is_reported(
    here: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: Quick
) -> None:
    """The test uses a fake debugpy, which need not be installed, and checks its calls."""
    (tmp_path / "debugpy.py").write_text(
        "def listen(at): print('listens at', at)\n"
        "def wait_for_client(): print('attached')\n"
        "def breakpoint(): print('stopped')\n"
    )
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{before}")
    done = here.cli("replay-task", "parse/1", "--debugpy", "5678", "--break")
    assert done.stdout.startswith("listens at ('127.0.0.1', 5678)\nattached\nstopped\n"), done
    assert "same way" in done.stdout
    monkeypatch.setattr("batchlab.cli.job_replay.find_spec", lambda _: None)
    code, _, err = quick(here, "replay-task", "parse/1", "--debugpy", "5678")
    assert code == 2
    assert "-m pip install debugpy" in err


def test_a_command_gets_a_shell_where_it_would_run(here: Ran, monkeypatch: pytest.MonkeyPatch, quick: Quick) -> None:
    monkeypatch.setenv("SHELL", "/bin/sh")
    done = here.cli("replay-task", "check/0", "--shell", typed="pwd\ncommand -v show.sh\n")
    assert done.returncode == 0, done.stderr
    command, where, program = done.stdout.splitlines()
    assert "moon" in command
    assert where.endswith("/run/0/scratch")
    assert program.endswith("/code/show.sh")
    assert not Path(where).exists()
    code, _, err = quick(here, "replay-task", "parse/1", "--shell")
    assert code == 2
    assert "is a Python function" in err


# --- Kept ----------------------------------------------------------------------------------------


def test_folder_can_be_kept_moved_and_run_by_an_ide(here: Ran, tmp_path: Path, quick: Quick) -> None:
    folder = tmp_path / "a" / "task"
    code, out, err = quick(here, "replay-task", "parse/1", "--keep", str(folder))
    assert (code, out.split()[-1]) == (0, str(folder / "run.py")), err
    assert (folder / "code" / "handlers.py").is_file()
    text = (folder / "README.md").read_text()
    assert "`handlers:parse`" in text
    assert "invalid literal for int()" in text
    assert (folder / "run" / "1" / "in" / "0" / "amounts.csv").read_text() == ("name,amount\nc,3\nd,four\n")
    moved = tmp_path / "moved"
    folder.rename(moved)
    for _ in range(2):
        done = subprocess.run([sys.executable, str(moved / "run.py")], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "failed the same way" in done.stderr, done
    # The task is fixed locally before the fix is submitted.
    handlers = moved / "code" / "handlers.py"
    handlers.write_text(handlers.read_text().replace("int(text)", "len(text)"))
    done = subprocess.run([sys.executable, str(moved / "run.py")], capture_output=True, text=True, check=False)
    assert (done.returncode, "did not fail here" in done.stderr) == (0, True)


def test_a_folder_with_something_else_in_it_is_left_alone(here: Ran, tmp_path: Path, quick: Quick) -> None:
    (tmp_path / "precious").write_text("x")
    code, _, err = quick(here, "replay-task", "parse/1", "--keep", str(tmp_path))
    assert code == 2
    assert "is not empty" in err
    assert (tmp_path / "precious").read_text() == "x"


# --- Its environment -----------------------------------------------------------------------------

SECRETS = {
    "AWS_PROFILE": "the-profile",
    "BATCHLAB_TOKEN": "the-token",
    "STRIPE_API_KEY": "the-key",
    "DATABASE_URL": "postgresql://u:the-password@db/x",
    "SSH_AUTH_SOCK": "/the-agent",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, "PLAIN": "the-plain"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHELL", "/bin/sh")


@pytest.mark.usefixtures("secrets")
def test_a_task_is_given_no_secret_that_is_not_named(here: Ran) -> None:
    typed = "import os\np dict(os.environ)\nq\n"
    done = here.cli("replay-task", "parse/1", "--debug", "--env", "STRIPE_API_KEY", typed=typed)
    assert "/bin/sh" in done.stdout
    assert "the-key" in done.stdout
    for hidden in ("the-profile", "the-token", "the-password", "the-agent", "the-plain"):
        assert hidden not in done.stdout + done.stderr
    assert "It is the job's code, and runs with your rights." in done.stderr
    assert "AWS_PROFILE, " in done.stderr
    assert "which are set here. --env NAME" in done.stderr
    assert "--env NAME" in done.stderr


@pytest.mark.usefixtures("secrets")
def test_secrets_are_withheld_from_programs_and_kept_folders(here: Ran, tmp_path: Path, quick: Quick) -> None:
    done = here.cli("replay-task", "check/0", "--shell", "--env", "AWS_PROFILE", typed="env\n")
    assert "the-profile" in done.stdout
    assert "the-plain" not in done.stdout
    assert "the-token" not in done.stdout
    assert quick(here, "replay-task", "parse/1", "--keep", str(tmp_path / "task"))[0] == 0
    handlers = tmp_path / "task" / "code" / "handlers.py"
    handlers.write_text("import os\n\ndef parse(part, ctx):\n    print(dict(os.environ))\n")
    run = [sys.executable, str(tmp_path / "task" / "run.py"), "--env", "AWS_PROFILE"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert "the-profile" in done.stdout
    assert "the-plain" not in done.stdout
    assert "the-token" not in done.stdout
    assert "The task does not get" in done.stderr


def test_unset_variable_is_reported(here: Ran, quick: Quick) -> None:
    code, _, err = quick(here, "replay-task", "parse/1", "--env", "NOT_SET_HERE")
    assert code == 2
    assert "The environment variable 'NOT_SET_HERE' is not set." in err


# --- Functions from Python -----------------------------------------------------------------------


def test_function_of_the_python_api_is_replayed(tmp_path: Path) -> None:
    def inverse(number: int) -> float:
        return 1 / number

    with Grid("local", home=tmp_path / "home", workers=1) as grid:
        with pytest.raises(TaskFailed):
            list(grid.map(inverse, [4, 0], retry=1))
        job = grid.client.jobs(limit=1)[0]["id"]
        words = ("job", "replay-task", job, "1", "--json", "--home", str(tmp_path / "home"))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "batchlab", *words], capture_output=True, text=True, check=False
        )
    found = json.loads(done.stdout)
    assert found["verdict"] == "same", found
    assert "division by zero" in found["sentence"]


# --- The grid ------------------------------------------------------------------------------------


def test_nothing_of_the_grid_is_changed_and_none_need_be_up(here: Ran, tmp_path: Path, quick: Quick) -> None:
    # No manager runs in the copy of the grid's folder.
    shutil.copytree(here.home / "objects", tmp_path / "objects")
    down = here.moved(tmp_path)
    assert quick(down, "replay-task", "double/0")[0] == 0
    before = contents(tmp_path)
    assert len(before) > 20
    for task in ("parse/1", "check/0", "gathered/0", "double/0"):
        code, _, err = quick(down, "replay-task", task)
        assert code == (task != "double/0"), err
    code, out, _ = quick(down, "show", "parse/1")
    assert code == 0
    assert "RETRIED" in out
    assert contents(tmp_path) == before
    code, _, err = quick(down.named("last"), "replay-task", "parse/1")
    assert (code, "whole id" in err) == (2, True)


@pytest.mark.parametrize(
    ("prefix", "task", "what", "remedy"),
    [
        ("files", "gathered/0", "The input of gathered/0 cannot be fetched", "AttemptDays"),
        ("raw", "parse/1", "The input of parse/1 cannot be fetched", "uploads its input again"),
        ("code", "parse/1", "The code of parse/1 cannot be fetched", "uploads its code again"),
        ("jobs", "parse/1", "The bucket does not contain the job", "job list"),
    ],
)
def test_missing_objects_are_named(
    here: Ran, tmp_path: Path, quick: Quick, prefix: str, task: str, what: str, remedy: str
) -> None:
    shutil.copytree(here.home / "objects", tmp_path / "objects")
    shutil.rmtree(tmp_path / "objects" / prefix)
    code, _, err = quick(here.moved(tmp_path), "replay-task", task)
    assert code == 2
    assert what in err
    assert remedy in err
    assert "Traceback" not in err


def test_task_without_logs_is_replayed_and_unknown_facts_are_named(here: Ran, tmp_path: Path, verdict: Verdict) -> None:
    shutil.copytree(here.home / "objects", tmp_path / "objects")
    shutil.rmtree(tmp_path / "objects" / "logs")
    found = verdict(here.moved(tmp_path), "parse/1")
    assert found["verdict"] == "same"
    assert found["differences"][0].startswith("The environment of the worker")
