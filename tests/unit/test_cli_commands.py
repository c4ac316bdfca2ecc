"""The command line against a manager that only pretends: what is asked, printed and exited with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchlab.cli import app as cli
from batchlab.cli import output, session
from batchlab.errors import BackendError, NotFound, Refused, Unreachable, UsageError
from batchlab.home import Home, ManagerRecord
from batchlab.spec.problems import JobFileErrors


def a_job(job: str, state: str = "RUNNING", **more: Any) -> dict[str, Any]:
    stage = {
        "name": "parse",
        "pool": "default",
        "planned": 10,
        "succeeded": 4,
        "failed": 1,
        "cancelled": 0,
        "running": 2,
        "retried": 1,
        "run_s": 2.0,
        "mean_s": 0.5,
        "first_start_s": 1.0,
        "last_end_s": 3.0,
    }
    return {
        "id": job,
        "name": job.rpartition("-")[0],
        "state": state,
        "reason": "",
        "round": 0,
        "priority": 0,
        "tags": {"team": "a"},
        "submitted_s": 1_700_000_000.0,
        "started_s": None,
        "ended_s": None,
        "version": 3,
        "stages": [stage],
        **more,
    }


class FakeClient:
    """Answers with what a test has put into `answers`, and remembers what it was asked."""

    answers: dict[str, Any]
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]]

    def __init__(self, url: str, token: str) -> None:
        self.url = url

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def close(self) -> None:
        return

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked.append((name, args, kwargs))
            answer = self.answers[name]
            answer = answer(*args, **kwargs) if callable(answer) else answer
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    FakeClient.answers, FakeClient.asked = {}, []
    record = ManagerRecord("http://nowhere", 1, "manager-1", "local")
    monkeypatch.setattr(session, "Client", FakeClient)
    monkeypatch.setattr(Home, "record", lambda self: record)
    monkeypatch.setattr(Home, "token", lambda self: "secret")
    return FakeClient


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line here; its exit code, stdout and stderr."""
    monkeypatch.setattr("batchlab.cli.signals.install", lambda: None)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.start([str(one) for one in arguments])
        told = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), told.out, told.err

    return run


# --- Help ----------------------------------------------------------------------------------------

GROUPS = {
    "job": "submit list show watch cancel pause resume retry results logs why failures check",
    "grid": "up down status workers activities scale drain",
    "ledger": "rebuild",
}
COMMANDS = [
    *("demo", "init", "run", "schema", "doctor"),
    *(f"{group} {name}" for group, names in GROUPS.items() for name in names.split()),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_one_example(run: Run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    examples = re.findall(r"Example: (batchlab \S.*)", out)
    assert len(examples) == 1
    assert examples[0].startswith(f"batchlab {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_listing_speaks_json(run: Run, command: str) -> None:
    silent = {"init", "schema", "job watch", "grid down"}
    _, out, _ = run(*command.split(), "--help")
    assert ("--json" in out) is (command not in silent)


def test_help_names_every_group_and_what_exit_codes_mean(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for word in ("demo", "init", "run", "job", "grid", "ledger", "schema", "doctor"):
        assert re.search(rf"^  {word} ", out, re.MULTILINE)
    assert "130 interrupted" in " ".join(out.split())
    assert "..." not in out.partition("Commands:")[2], "a summary is cut off"


def test_version(run: Run) -> None:
    import batchlab

    assert run("--version") == (0, f"batchlab {batchlab.__version__}\n", "")


def test_help_and_services_import_nothing_heavy() -> None:
    """What a command pays for at its start; milliseconds would depend on the machine."""
    heavy = "rich|httpx|pydantic|fastapi|sqlalchemy|obstore|uvicorn|yaml|asyncio"
    for arguments in (["--help"], ["worker", "--help"], ["manager", "--help"]):
        code = (
            "import sys, batchlab.cli as c\n"
            f"sys.argv = ['batchlab', *{arguments!r}]\n"
            "try: c.main()\n"
            f"except SystemExit: print(sorted(sys.modules.keys() & set('{heavy}'.split('|'))))\n"
            "if sys.argv[1] != '--help': print(sorted(sys.modules.keys() & {'typer', 'click'}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        printed = done.stdout.splitlines()
        assert done.returncode == 0
        assert set(printed[-(1 if arguments == ["--help"] else 2) :]) == {"[]"}


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refused("It runs.", remedy="Wait."), 2),
        (NotFound("There is no pool 'x'.", remedy="Its pools are y."), 2),
        (Unreachable("It is gone.", remedy="Start it."), 3),
        (BackendError("The bucket is full.", remedy="Empty it."), 3),
    ],
)
def test_an_error_is_a_sentence_a_remedy_and_its_own_exit_code(
    manager: type[FakeClient], run: Run, error: Exception, code: int
) -> None:
    manager.answers = {"grid": error}
    sentence, remedy = error.args[0], getattr(error, "remedy", "")
    assert run("grid", "status") == (code, "", f"Error: {sentence}\n  {remedy}\n")


def test_an_unexpected_error_shows_its_traceback_only_with_debug(
    manager: type[FakeClient], run: Run
) -> None:
    manager.answers = {"grid": ZeroDivisionError("oh")}
    code, _, err = run("grid", "status")
    assert code == cli.UNEXPECTED
    assert "Traceback" not in err
    assert "ZeroDivisionError: oh" in err
    assert "--debug" in err
    for arguments in (["grid", "status", "--debug"], ["--debug", "grid", "status"]):
        code, _, err = run(*arguments)
        assert code == cli.UNEXPECTED
        assert "Traceback" in err


def test_without_a_grid_the_remedy_is_to_start_one(run: Run, tmp_path: Path) -> None:
    code, out, err = run("job", "list", "--home", tmp_path / "h")
    assert (code, out) == (3, "")
    assert "batchlab grid up" in err
    assert not (tmp_path / "h").exists(), "asking must not make a folder"


def test_wrong_usage_exits_with_two(run: Run) -> None:
    assert run("nonsense")[0] == run("run")[0] == run("job", "show")[0] == 2


def test_every_mistake_of_a_job_file_is_told_with_its_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "name: x\ninput: {files: nothing-*.csv}\nstages:\n  - name: a\n    pythn: b:c\n"
    )
    code, out, err = run("job", "check", file)
    assert (code, out) == (2, "")
    told = [line for line in err.splitlines() if line.startswith(f"{file}:")]
    assert len(told) >= 2
    assert any(line.startswith(f"{file}:5: ") for line in told)


def test_complaints_keep_a_jobs_own_control_characters_off_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.complain(Refused("bad \x1b[31mred\x07\nline", remedy="\x9b2J"))
    err = capsys.readouterr().err
    assert not set(err) & {"\x1b", "\x07", "\x9b"}
    assert err.count("\n") == 2


def test_several_errors_are_told_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    from batchlab.errors import JobFileError

    first = JobFileError("No name.", file="job.yaml", line=1, remedy="Write one.")
    output.complain(JobFileErrors([first, JobFileError("No stages.", file="job.yaml")]))
    assert capsys.readouterr().err == ("job.yaml:1: No name.\n  Write one.\njob.yaml: No stages.\n")


# --- Jobs ----------------------------------------------------------------------------------------


def test_job_list_is_a_table_and_json(manager: type[FakeClient], run: Run) -> None:
    jobs = [a_job("sums-0123456789"), a_job("tots-9876543210", "FAILED", reason="1 of 10 failed")]
    manager.answers = {"jobs": jobs}
    code, out, err = run("job", "list", "--active", "--limit", 7)
    assert (code, err) == (0, "")
    assert manager.asked == [("jobs", (), {"limit": 7, "active": True})]
    rows = out.splitlines()
    assert [row.split()[0] for row in rows] == ["ID", "sums-0123456789", "tots-9876543210"]
    assert rows[2].endswith("1 of 10 failed")
    code, out, _ = run("job", "list", "--json")
    assert json.loads(out) == jobs


def test_job_show_says_why(manager: type[FakeClient], run: Run) -> None:
    """Pain 1: stuck, and no reason given."""
    manager.answers = {"job": a_job("sums-0123456789"), "why": "It waits for capacity."}
    code, out, _ = run("job", "show", "sums-0123456789")
    assert code == 0
    assert re.search(r"^why +It waits for capacity\.$", out, re.MULTILINE)
    assert re.search(r"^parse +10 +4 +1 +0 +2 +1 +500 ms$", out, re.MULTILINE)
    code, out, _ = run("job", "show", "sums-0123456789", "--json")
    assert json.loads(out)["why"] == "It waits for capacity."


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry"])
def test_verbs_go_to_the_manager(manager: type[FakeClient], run: Run, verb: str) -> None:
    manager.answers = {"jobs": [a_job("sums-0123456789")], verb: a_job("sums-0123456789", "PAUSED")}
    code, out, _ = run("job", verb, "last")
    assert (code, out) == (0, "sums-0123456789 PAUSED\n")
    assert manager.asked[-1] == (verb, ("sums-0123456789",), {})


def test_logs_show_who_printed_what(manager: type[FakeClient], run: Run) -> None:
    log = {"stage": "parse", "task": 3, "attempt": 2, "text": "one\n\x1b]0;evil\x07two\n"}
    manager.answers = {"job": a_job("sums-0123456789"), "logs": [log]}
    code, out, _ = run("job", "logs", "sums-0123456789", "--stage", "parse", "--task", 3)
    assert code == 0
    assert manager.asked[-1][2] == {"stage": "parse", "task": 3, "limit": 100}
    assert out == "--- parse[3] attempt 2\none\n\\x1b]0;evil\\x07two\n"


def test_failures_show_each_kind_of_traceback_once(manager: type[FakeClient], run: Run) -> None:
    failure = {
        "stage": "parse",
        "task": 0,
        "attempt": 3,
        "kind": "exception",
        "reason": "no such column",
        "error": "KeyError",
        "traceback": "Traceback (most recent call last):\n  KeyError: 'x'\n",
        "exit_code": None,
    }
    found = [{**failure, "task": task} for task in range(3)]
    manager.answers = {"job": a_job("sums-0123456789"), "failures": found}
    code, out, _ = run("job", "failures", "sums-0123456789")
    assert code == 0
    assert out.count("no such column") == 3
    assert out.count("Traceback") == 1


def test_watch_ends_with_the_jobs_own_verdict(manager: type[FakeClient], run: Run) -> None:
    grid: dict[str, Any] = {"pools": [], "queues": []}
    states = iter(["RUNNING", "FAILED"])

    def job(*_: object, **__: object) -> dict[str, Any]:
        return a_job("sums-0123456789", next(states), reason="all of it failed")

    manager.answers = {"job": job, "grid": grid}
    code, out, err = run("job", "watch", "sums-0123456789")
    assert (code, out) == (1, "sums-0123456789 FAILED: all of it failed\n")
    assert "RUNNING: parse 5/10 (1 failed)" in err


# --- Which job is meant --------------------------------------------------------------------------


def test_a_job_may_be_named_by_the_beginning_of_its_id(manager: type[FakeClient]) -> None:
    jobs = [a_job(f"{name}-{i:010x}") for i, name in enumerate(["sums", "sums", "tots", "top"])]

    def page(*, limit: int, before: str | None = None) -> list[dict[str, Any]]:
        ids = [one["id"] for one in jobs]
        first = ids.index(before) + 1 if before else 0
        return jobs[first : first + min(limit, 2)]

    def one(job: str) -> Any:
        found = [view for view in jobs if view["id"] == job]
        return found[0] if found else NotFound("no")

    manager.answers = {"jobs": page, "job": one}
    client: Any = manager("", "")

    def named(text: str) -> str:
        return str(session.resolve(client, text)["id"])

    assert named("last") == jobs[0]["id"]
    assert named("tot") == jobs[2]["id"]
    assert named("sums-0000000001") == jobs[1]["id"]
    with pytest.raises(UsageError, match="could be any of 2 jobs"):
        named("sums")
    with pytest.raises(UsageError, match="There is no job 'x/y'"):
        named("x/y")


def test_last_of_no_jobs(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"jobs": []}
    code, _, err = run("job", "why", "last")
    assert code == 2
    assert err.startswith("Error: There are no jobs.")


# --- The grid ------------------------------------------------------------------------------------


def a_grid() -> dict[str, Any]:
    instance = {
        "id": "i-1",
        "state": "InService",
        "healthy": True,
        "protected": True,
        "launched_s": 1_700_000_000.0,
        "note": "",
        "worker": "w-1",
        "busy": 1,
        "held": 2,
    }
    pool = {
        "name": "default",
        "min": 0,
        "max": 4,
        "desired": 1,
        "slots": 2,
        "backlog_tasks": 8,
        "backlog_s": 4.0,
        "held_by_hand": True,
        "instances": [instance],
    }
    queue = {"name": "tasks-default", "visible": 3, "in_flight": 1, "delayed": 0}
    return {
        "backend": "local",
        "leader": True,
        "owner": "manager-1",
        "pools": [pool],
        "queues": [queue],
    }


def test_grid_status_shows_pools_and_queues(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"grid": a_grid()}
    code, out, _ = run("grid", "status")
    assert code == 0
    assert re.search(r"^default +0 +4 +1 +1 +0 +2 +8 tasks, 4\.0 s +hand$", out, re.MULTILINE)
    assert re.search(r"^tasks-default +3 +1 +0$", out, re.MULTILINE)
    code, out, _ = run("grid", "status", "--json")
    assert json.loads(out) == a_grid()


def test_grid_workers_lists_instances(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"grid": a_grid()}
    code, out, _ = run("grid", "workers")
    assert code == 0
    assert re.search(r"^i-1 +default +InService +Healthy +yes +w-1 +1 +2 ", out, re.MULTILINE)


def test_grid_scale_asks_only_for_what_was_said(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"scale": a_grid()["pools"][0]}
    assert run("grid", "scale", "default", "--max", 4, "--desired", 2)[0] == 0
    asked = {"min": None, "max": 4, "desired": 2, "auto": None}
    assert manager.asked == [("scale", ("default",), asked)]
    assert run("grid", "scale", "default", "--auto")[0] == 0
    assert manager.asked[-1][2]["auto"] is True


@pytest.mark.parametrize("arguments", [[], ["--desired", "1", "--auto"]])
def test_grid_scale_refuses_what_means_nothing(
    manager: type[FakeClient], run: Run, arguments: list[str]
) -> None:
    assert run("grid", "scale", "default", *arguments)[0] == 2
    assert not manager.asked


def test_grid_up_with_other_pools_is_refused_while_one_is_up(
    manager: type[FakeClient], run: Run
) -> None:
    code, _, err = run("grid", "up", "--pool", "big:0-2x4")
    assert code == 2
    assert "grid scale" in err


def test_ledger_rebuild_says_how_many(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"rebuild": 3}
    assert run("ledger", "rebuild") == (0, "The ledger is made anew: 3 jobs.\n", "")


# --- Without a grid ------------------------------------------------------------------------------


def test_schema_is_a_json_schema(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert "stages" in json.loads(out)["properties"]


def test_init_writes_a_job_that_passes_its_checks(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "first job"
    code, _, err = run("init", folder)
    assert code == 0
    assert f"batchlab run '{folder}/job.yaml'" in err
    code, out, _ = run("job", "check", folder / "job.yaml", "--json")
    assert code == 0
    assert json.loads(out)["stages"] == ["summarise", "total"]


def test_init_never_replaces_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("mine")
    code, _, err = run("init", tmp_path)
    assert code == 2
    assert "handlers.py is there already" in err
    assert [path.name for path in tmp_path.iterdir()] == ["handlers.py"]
    assert (tmp_path / "handlers.py").read_text() == "mine"


def test_init_of_an_example_comes_without_its_data(run: Run, tmp_path: Path) -> None:
    assert run("init", tmp_path / "c", "--example", "claims")[0] == 0
    assert {"job.yaml", "parse.py"} <= {path.name for path in (tmp_path / "c").iterdir()}
    assert not (tmp_path / "c/data").exists()
    code, _, err = run("init", tmp_path / "d", "--example", "clams")
    assert code == 2
    assert "There are claims, " in err


def test_set_wants_key_and_value(run: Run, tmp_path: Path) -> None:
    run("init", tmp_path)
    code, _, err = run("job", "check", tmp_path / "job.yaml", "--set", "min_cents")
    assert code == 2
    assert "is not KEY=VALUE" in err
    code, out, _ = run("job", "check", tmp_path / "job.yaml", "--set", "min_cents=5", "--json")
    assert json.loads(out)["params"] == {"min_cents": 5}
