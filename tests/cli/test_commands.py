"""The command line with a fake manager: requests, output, and exit codes."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from batchlab.cli import app, option_values
from batchlab.core.errors import BackendError, NotFound, Refused, Unreachable, UsageError
from batchlab.core.job_definition import Condition, Dependency
from batchlab.core.protocol import mended_inputs
from batchlab.runtime import compose_deployment
from batchlab.runtime.compose_deployment import Deployment
from batchlab.runtime.home import Home, Place
from tests.support import job_files
from tests.support.cli import FakeClient, Run, a_grid, a_job

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


def test_an_unexpected_error_shows_its_traceback_only_with_debug(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"grid": ZeroDivisionError("oh")}
    code, _, err = run("grid", "status")
    assert code == app.UNEXPECTED
    assert "Traceback" not in err
    assert "ZeroDivisionError: oh" in err
    assert "--debug" in err
    for arguments in (["grid", "status", "--debug"], ["--debug", "grid", "status"]):
        code, _, err = run(*arguments)
        assert code == app.UNEXPECTED
        assert "Traceback" in err


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


def test_job_list_shows_jobs_of_some_states(
    manager: type[FakeClient], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command reads pages of jobs until it has enough."""
    monkeypatch.setattr(option_values, "JOBS_PER_REQUEST", 2)
    states = ("RUNNING", "FAILED", "SUCCEEDED", "FAILED", "CANCELLED", "FAILED", "FAILED")
    jobs = [a_job(f"sums-{n:010}", state) for n, state in enumerate(states)]

    def page(*, limit: int, before: str | None, active: bool) -> list[dict[str, Any]]:
        first = 1 + [job["id"] for job in jobs].index(before) if before else 0
        return [job for job in jobs if not active or job["state"] == "RUNNING"][first : first + limit]

    manager.answers = {"jobs": page}

    def listed(*options: object) -> list[int]:
        code, out, _ = run("job", "list", "--json", *options)
        assert code == 0
        return [int(job["id"].removeprefix("sums-")) for job in json.loads(out)]

    assert listed("--state", "failed", "--limit", 3) == [1, 3, 5]
    assert len(manager.asked) == 3
    assert listed("--state", "Failed") == [1, 3, 5, 6]
    assert listed("--state", "cancelled", "--state", "succeeded") == [2, 4]
    assert listed("--state", "ended", "--limit", 2) == [1, 2]
    assert listed("--state", "ended", "--state", "active") == [0, 1, 2, 3, 4, 5, 6]
    manager.asked.clear()
    assert listed("--state", "running") == [0]
    assert [asked["active"] for _, _, asked in manager.asked] == [True]
    code, out, err = run("job", "list", "--state", "paused", "--state", "PENDING")
    assert (code, out, err) == (0, "", "There are no paused or pending jobs.\n")


def test_active_jobs_are_listed_by_the_manager(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"jobs": []}
    assert run("job", "list", "--state", "active", "--limit", 7)[2] == "There are no active jobs.\n"
    assert manager.asked == [("jobs", (), {"limit": 7, "active": True})]


@pytest.mark.parametrize(("state", "remedy"), [("canceled", "Did you mean cancelled?"), ("xyz", "Write one of ")])
def test_unknown_state_is_refused(manager: type[FakeClient], run: Run, state: str, remedy: str) -> None:
    code, out, err = run("job", "list", "--state", state)
    assert (code, out, manager.asked) == (2, "", [])
    assert err.startswith(f"Error: The state '{state}' does not exist.\n  {remedy}")


def test_job_show_gives_the_wait_reason(manager: type[FakeClient], run: Run) -> None:
    """`job show` prints why a job waits."""
    eta = {"low_s": 60.0, "high_s": 120.0, "unmeasured": [], "text": "60 s to 2 min left"}
    manager.answers = {"job": a_job("sums-0123456789"), "why": "It waits for capacity.", "eta": eta}
    code, out, _ = run("job", "show", "sums-0123456789")
    assert code == 0
    assert re.search(r"^why +It waits for capacity\.$", out, re.MULTILINE)
    assert re.search(r"^to go +60 s to 2 min left$", out, re.MULTILINE)
    assert re.search(r"^parse +10 +4 +1 +0 +2 +1 +500 ms$", out, re.MULTILINE)
    code, out, _ = run("job", "show", "sums-0123456789", "--json")
    assert json.loads(out)["why"] == "It waits for capacity."
    assert json.loads(out)["eta"] == eta


@pytest.mark.parametrize(
    ("verb", "state"), [("cancel", "is being canceled"), ("pause", "PAUSED"), ("resume", "PAUSED"), ("retry", "PAUSED")]
)
def test_job_verbs_call_the_manager(manager: type[FakeClient], run: Run, verb: str, state: str) -> None:
    manager.answers = {"jobs": [a_job("sums-0123456789")], verb: a_job("sums-0123456789", "PAUSED")}
    code, out, _ = run("job", verb, "last")
    assert (code, out) == (0, f"sums-0123456789 {state}\n")
    assert manager.asked[-1] == (verb, ("sums-0123456789",), {})


def test_job_is_deleted_after_a_question(
    manager: type[FakeClient], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "sums-0123456789"
    copy = tmp_path / "reports" / "aws" / name
    copy.mkdir(parents=True)
    manager.answers = {
        "jobs": [a_job(name, "FAILED", ended_s=2.0)],
        "job": a_job(name, "FAILED", ended_s=2.0),
        "delete": {"id": name, "objects": 12},
    }
    code, _, err = run("job", "delete", "last", "--home", tmp_path)
    assert code == 2
    assert "Add --yes" in err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda: "n")
    code, _, err = run("job", "delete", "last", "--home", tmp_path)
    assert (code, err) == (1, f"Delete {name} (FAILED) with all its results? [y/N] Nothing is changed.\n")
    assert not any(call == "delete" for call, *_ in manager.asked)
    monkeypatch.setattr("builtins.input", lambda: "y")
    code, out, _ = run("job", "delete", "last", "--home", tmp_path)
    assert (code, out) == (0, f"{name} is deleted: 12 objects.\n")
    assert not copy.exists()
    code, out, _ = run("job", "delete", name, "--yes", "--json", "--home", tmp_path)
    assert (code, json.loads(out)) == (0, {"id": name, "objects": 12})
    manager.answers["job"] = a_job(name)
    code, _, err = run("job", "delete", name, "--yes", "--home", tmp_path)
    assert code == 2
    assert f"`batchlab job cancel {name}`" in err


def test_repeated_deletion_of_a_job_removes_late_objects(manager: type[FakeClient], run: Run, tmp_path: Path) -> None:
    name, gone = "sums-0123456789", NotFound("The ledger has no such job.")
    manager.answers = {"jobs": [], "job": gone, "delete": {"id": name, "objects": 1}}
    code, out, err = run("job", "delete", name, "--home", tmp_path)
    assert (code, out, err) == (0, f"{name} was deleted before: 1 object.\n", "")
    code, out, _ = run("job", "delete", name, "--json", "--home", tmp_path)
    assert (code, json.loads(out)) == (0, {"id": name, "objects": 1})
    manager.answers["delete"] = gone
    code, out, err = run("job", "delete", name, "--home", tmp_path)
    assert code != 0
    assert name in err
    assert not out


def test_dependencies_are_submitted_and_shown(manager: type[FakeClient], run: Run, tmp_path: Path) -> None:
    first = a_job("sums-0123456789")
    waiting = a_job("next-0123456789", "PENDING", after=[{"job": first["id"], "condition": "ended"}])
    manager.answers = {"job": first, "submit": waiting, "why": "W.", "eta": {"text": "E"}}
    manager.answers["jobs"] = lambda **how: [] if how.get("before") else [waiting, first]
    job_files.write(tmp_path, {**job_files.FOLDER, "job.yaml": job_files.MINIMAL})
    submit = ("job", "submit", tmp_path / "job.yaml", "--home", tmp_path / "h")
    assert run(*submit, "--after", "sums:ended", "--after", "last")[0] == 0
    (job,) = next(args for name, args, _ in manager.asked if name == "submit")
    assert job.after == (Dependency(first["id"], Condition.ENDED), Dependency(waiting["id"]))
    assert run(*submit)[0] == 0
    alone = next(args[0] for name, args, _ in reversed(manager.asked) if name == "submit")
    assert (alone.after, alone.id != job.id) == ((), True)
    assert "after sums-0123456789:ended" in run("job", "list")[1]
    manager.answers["job"] = waiting
    assert re.search(r"^after +sums-0123456789:ended$", run("job", "show", waiting["id"])[1], re.MULTILINE)
    assert json.loads(run("job", "show", waiting["id"], "--json")[1])["after"] == waiting["after"]


def test_task_sizes_of_the_last_run_are_a_warning(manager: type[FakeClient], run: Run, tmp_path: Path) -> None:
    job_files.write(tmp_path, {**job_files.FOLDER, "job.yaml": job_files.MINIMAL})
    new = a_job("sums-0000000002", "RUNNABLE")
    (stage,) = new["stages"]
    earlier = a_job("sums-0000000001", "SUCCEEDED", stages=[{**stage, "planned": 30, "succeeded": 30}])
    manager.answers = {"submit": new, "jobs": [new, earlier]}
    manager.answers["tasks"] = {"tasks": [{"task": n, "run_s": 0.02} for n in range(20)]}
    submit = ("job", "submit", tmp_path / "job.yaml", "--home", tmp_path / "h")
    code, out, err = run(*submit)
    assert (code, out) == (0, "sums-0000000002\n")
    assert "Warning: Tasks of parse are tiny. Half of the 20 sampled tasks of sums-0000000001 took at most 20 ms" in err
    code, out, err = run(*submit, "--json")
    doc = json.loads(out)
    assert (code, doc["id"], [one["check"] for one in doc["warnings"]]) == (0, new["id"], ["task size"])
    manager.answers["tasks"] = {"tasks": [{"task": n, "run_s": 2.0} for n in range(20)]}
    assert "Warning" not in run(*submit)[2]
    manager.answers["jobs"] = Unreachable("It is gone.", remedy="Start it.")
    code, out, err = run(*submit)
    assert (code, out, "Warning" in err) == (0, "sums-0000000002\n", False)


@pytest.mark.parametrize("is_up", [True, False])
def test_job_check_warns_about_the_task_sizes_of_the_last_run(
    manager: type[FakeClient], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_up: bool
) -> None:
    job_files.write(tmp_path, {**job_files.FOLDER, "job.yaml": job_files.MINIMAL})
    (stage,) = a_job("j-0000000001")["stages"]
    stages = [{**stage, "name": "one", "planned": 30, "succeeded": 30}]
    manager.answers = {"jobs": [a_job("j-0000000001", "SUCCEEDED", stages=stages)]}
    manager.answers["tasks"] = {"tasks": [{"task": n, "run_s": 45_000.0} for n in range(20)]}
    manager.answers["job_use"] = {"account": None}
    if not is_up:
        monkeypatch.setattr(Home, "record", lambda self: None)
    code, out, err = run("job", "check", tmp_path / "job.yaml", "--json", "--home", tmp_path / "h")
    assert code == 0, err
    assert {one["check"] for one in json.loads(out)["warnings"]} == ({"task length"} if is_up else set())
    assert ("Warning: " in err) is is_up


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ("sums:finished", "'sums:finished' is not a dependency. Write a name, and :ended"),
        (":ended", "':ended' is not a dependency."),
        ("nobody", "The job 'nobody' does not exist."),
    ],
)
def test_a_wrong_dependency_is_one_sentence(
    manager: type[FakeClient], run: Run, tmp_path: Path, after: str, told: str
) -> None:
    manager.answers = {"jobs": lambda **how: [] if how.get("before") else [a_job("sums-0123456789")]}
    job_files.write(tmp_path, {**job_files.FOLDER, "job.yaml": job_files.MINIMAL})
    code, _, err = run("job", "submit", tmp_path / "job.yaml", "--home", tmp_path / "h", "--after", after)
    assert (code, told in " ".join(err.split()), "Traceback" in err) == (2, True, False)


def test_a_job_that_no_listing_has_can_be_cancelled(manager: type[FakeClient], run: Run) -> None:
    """Only the bucket contains the job, and the manager looks for it in the bucket."""
    name, gone = "sums-0123456789", NotFound("The ledger has no such job.")
    manager.answers = {"jobs": [], "job": gone, "cancel": a_job(name, "CANCELLED")}
    assert run("job", "cancel", name)[:2] == (0, f"{name} CANCELLED\n")
    manager.answers["cancel"] = gone
    code, out, err = run("job", "cancel", name)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: The job '{name}' does not exist.")


def test_logs_name_the_task_of_each_line(manager: type[FakeClient], run: Run) -> None:
    log = {"stage": "parse", "task": 3, "attempt": 2, "text": "one\n\x1b]0;evil\x07two\n"}
    manager.answers = {"job": a_job("sums-0123456789"), "logs": [log]}
    code, out, _ = run("job", "logs", "sums-0123456789", "parse/3")
    assert code == 0
    which = {"stage": "parse", "task": 3, "failed": False, "since_s": None}
    assert manager.asked[-1][2] == {**which, "limit": 100}
    assert out == "--- parse/3#2\none\n\\x1b]0;evil\\x07two\n"


def test_logs_are_of_one_task_or_of_a_whole_stage(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"job": a_job("sums-0123456789"), "logs": []}
    run("job", "logs", "sums-0123456789", "--stage", "parse")
    assert (manager.asked[-1][2]["stage"], manager.asked[-1][2]["task"]) == ("parse", None)
    run("job", "logs", "sums-0123456789", "3")
    assert (manager.asked[-1][2]["stage"], manager.asked[-1][2]["task"]) == (None, 3)
    code, _, err = run("job", "logs", "sums-0123456789", "parse/3", "--stage", "parse")
    assert code == 2
    assert "exclude each other" in err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("prase/3", "does not have a stage 'prase'. It has parse."),
        ("parse/10", "does not have a task parse/10."),
        ("10", "does not have a task 10."),
    ],
)
def test_logs_of_a_task_that_does_not_exist_are_an_error(
    manager: type[FakeClient], run: Run, task: str, message: str
) -> None:
    manager.answers = {"job": a_job("sums-0123456789"), "logs": []}
    code, _, err = run("job", "logs", "sums-0123456789", task)
    assert code == 2
    assert message in " ".join(err.split())


A_FAILURE = {
    "seq": 7,
    "stage": "parse",
    "task": 0,
    "attempt": 3,
    "kind": "exception",
    "reason": "no such column",
    "error": "KeyError",
    "traceback": "Traceback (most recent call last):\n  KeyError: 'x'\n",
    "exit_code": None,
    "fingerprint": "0123456789",
}


def test_failures_are_grouped_by_cause(manager: type[FakeClient], run: Run) -> None:
    groups = [{"fingerprint": "0123456789", "stage": "parse", "count": 12, "first": A_FAILURE}]
    manager.answers = {"job": a_job("sums-0123456789"), "failure_groups": groups}
    code, out, err = run("job", "failures", "sums-0123456789")
    assert code == 0
    assert re.search(r"^ *0123456789 +12 +parse +exception +- +no such column$", out, re.MULTILINE)
    assert out.count("Traceback") == 1
    assert "`batchlab job retry sums-0123456789 --fingerprint 0123456789`" in err
    code, out, _ = run("job", "failures", "sums-0123456789", "--json")
    assert json.loads(out) == groups
    manager.answers["failure_groups"] = []
    assert "No task has failed" in run("job", "failures", "sums-0123456789")[2]


def test_each_failure_is_listed_with_one_traceback_for_each_cause(manager: type[FakeClient], run: Run) -> None:
    found = [{**A_FAILURE, "task": task} for task in range(3)]
    manager.answers = {"job": a_job("sums-0123456789"), "failures": found}
    code, out, _ = run("job", "failures", "sums-0123456789", "--each")
    assert code == 0
    assert out.count("no such column") == 3
    assert out.count("Traceback") == 1
    run("job", "failures", "sums-0123456789", "--fingerprint", "0123456789", "--limit", 3)
    assert manager.asked[-1][2] == {"limit": 3, "fingerprint": "0123456789"}


def test_a_retry_may_be_of_some_failures(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"job": a_job("sums-0123456789"), "retry": a_job("sums-0123456789", "PENDING")}
    code, _, _ = run(
        "job", "retry", "sums-0123456789", "--fingerprint", "0123456789", "--tasks", "parse/3,7-9", "--tasks", "price/0"
    )
    assert code == 0
    assert manager.asked[-1][2] == {
        "fingerprints": ["0123456789"],
        "tasks": {"parse": [(3, 4), (7, 10)], "price": [(0, 1)]},
        "inputs": {},
    }
    for wrong in ("parse", "parse/", "/3", "parse/9-7", "parse/x", "parse/1,,2", "parse/-1", "parse:3"):
        code, _, err = run("job", "retry", "sums-0123456789", "--tasks", wrong)
        assert code == 2, wrong
        assert "parse/3,7-9" in err


def test_a_new_input_belongs_to_the_task_at_its_position(
    manager: type[FakeClient], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.answers = {"job": a_job("sums-0123456789"), "retry": a_job("sums-0123456789", "PENDING")}
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    retry = ("job", "retry", "sums-0123456789")
    assert run(*retry, "--task", "parse/3", "--input", first, "--task", "price/0", "--input", second)[0] == 0
    assert manager.asked[-1][2]["inputs"] == {("parse", 3): b"1", ("price", 0): b"2"}
    assert run(*retry, "--task", "3", "--input", first)[0] == 0
    assert manager.asked[-1][2]["inputs"] == {("parse", 3): b"1"}
    stages = [{**a_job("x-0123456789")["stages"][0], "name": name} for name in ("parse", "price")]
    manager.answers["job"] = a_job("sums-0123456789", stages=stages)
    wrong = {
        ("--task", "parse/3"): "Each --task needs one --input",
        ("--input", first): "each --input one --task",
        ("--task", "3", "--input", first): "has the stages parse, price. Write for example parse/3.",
        ("--task", "parse/3", "--input", first) * 2: "names parse/3 twice",
        ("--task", "parse/x", "--input", first): "is not the name of a task",
        ("--task", "parse/3", "--input", tmp_path / "none"): "cannot be read: No such file",
        ("--task", "parse/3", "--input", tmp_path): "cannot be read: Is a directory",
        ("--task", "a/1", "--input", "-", "--task", "a/2", "--input", "-"): "of one task only",
    }
    for arguments, text in wrong.items():
        code, _, err = run(*retry, *arguments)
        assert code == 2
        assert text in err
    monkeypatch.setattr(mended_inputs, "MAX_INPUT_BYTES", 0)
    code, _, err = run(*retry, "--task", "parse/3", "--input", first)
    assert (code, "The new input of parse/3 is larger than 0 B" in err) == (2, True)


# --- Text from tasks and names --------------------------------------------------------------------

EVIL = "a\x1b[2J\x9b31m\rb\u202ec\x07"
ETA: dict[str, Any] = {"low_s": None, "high_s": None, "text": EVIL, "parts": []}


@pytest.mark.parametrize("words", [("show", "last"), ("list",), ("logs", "last")])
@pytest.mark.parametrize("json_", [False, True])
def test_no_command_lets_a_job_write_to_the_terminal(
    manager: type[FakeClient], run: Run, words: tuple[str, ...], json_: bool
) -> None:
    """A manager from before such names were refused may still know a job with such a name."""
    job = a_job("sums-0123456789", name=EVIL, reason=EVIL, tags={EVIL: EVIL})
    log = {"stage": EVIL, "task": 1, "attempt": 1, "text": EVIL, "worker": "w", "execution": "x"}
    manager.answers = {"jobs": [job], "job": job, "logs": [log], "why": EVIL, "eta": ETA, "grid": {}}
    code, out, err = run("job", *words, *(["--json"] if json_ else []))
    assert all(c.isprintable() or c in "\n\t" for c in out + err), out + err
    assert code == 0, err
    assert "2J" in out


# --- The page ------------------------------------------------------------------------------------


def test_grid_open_shows_an_address_that_works_once(
    manager: type[FakeClient], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = {"code": "abc", "name": "n", "path": "/ui/login#abc", "valid_s": 60.0}
    manager.answers = {"open_session": session, "code_waits": False}
    code, out, err = run("grid", "open", "--no-browser")
    assert code == 0
    assert out.endswith("/ui/login#abc\n")
    assert "once" in err
    assert json.loads(run("grid", "open", "--json")[1])["url"] == out.strip()
    opened: list[str] = []
    home = tmp_path / "h\u00f6me 1"
    home.mkdir()
    monkeypatch.setenv("BATCHLAB_HOME", str(home))
    (home / "open-killed.html").touch()
    os.utime(home / "open-killed.html", (1.0, 1.0))

    def open_browser(address: str) -> bool:
        assert "abc" not in address, "everybody can see the command lines of others"
        (file,) = home.glob("open-*.html")
        assert address == file.as_uri()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        opened.append(re.findall(r'url=([^"]*)"', file.read_text())[0])
        return True

    monkeypatch.setattr("webbrowser.open", open_browser)
    monkeypatch.setenv("DISPLAY", ":0")
    code, shown, err = run("grid", "open")
    assert (code, shown, opened) == (0, "", [out.strip()]), err
    assert list(home.iterdir()) == []
    # The answer to this request never arrives.
    manager.answers = {"open_session": {**session, "valid_s": 0.0}, "code_waits": True}
    code, shown, err = run("grid", "open")
    assert (code, shown) == (2, "")
    assert "has not requested it" in err
    assert "--no-browser" in err
    assert list(home.iterdir()) == []
    manager.answers = {"open_session": session}
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert run("grid", "open")[1] == out  # without a screen, a person opens the link on another machine
    assert len(opened) == 2


def test_why_lists_each_reason_once_with_a_remedy(manager: type[FakeClient], run: Run) -> None:
    def failure(task: int, fingerprint: str) -> dict[str, Any]:
        where = {"stage": "parse", "task": task, "attempt": 2, "kind": "exception"}
        return {**where, "reason": f"bad {fingerprint}", "fingerprint": fingerprint}

    manager.answers = {
        "job": a_job("sums-0123456789"),
        "why": "It ended FAILED.",
        "failure_groups": [
            {"fingerprint": "bbb", "stage": "parse", "count": 2, "first": failure(1, "bbb")},
            {"fingerprint": "aaa", "stage": "parse", "count": 1, "first": failure(0, "aaa")},
        ],
        "logs": lambda *_, task, **__: [{"text": f"first\n{task} \x1b[0m\n\nlast\n"}],
    }
    code, out, _ = run("job", "why", "sums-0123456789", "--home", "/a b")
    assert code == 0
    command = "batchlab job replay-task sums-0123456789 parse/{} --home '/a b'"
    assert out.splitlines() == [
        "It ended FAILED.",
        "",
        "parse/1 failed (bbb): bad bbb, and so did 1 other task",
        "  | first",
        "  | 1  [0m",
        "  | last",
        f"  {command.format(1)}",
        "",
        "parse/0 failed (aaa): bad aaa",
        "  | first",
        "  | 0  [0m",
        "  | last",
        f"  {command.format(0)}",
    ]
    code, out, _ = run("job", "why", "sums-0123456789", "--json")
    assert [load["tasks"] for load in json.loads(out)["failed"]] == [2, 1]


def test_watch_ends_with_the_jobs_own_verdict(manager: type[FakeClient], run: Run) -> None:
    grid: dict[str, Any] = {"pools": [], "queues": []}
    states = iter(["RUNNING", "FAILED"])

    def job(*_: object, **__: object) -> dict[str, Any]:
        return a_job("sums-0123456789", next(states), reason="all of it failed")

    manager.answers = {"job": job, "grid": grid}
    code, out, err = run("job", "watch", "sums-0123456789")
    assert (code, out) == (1, "sums-0123456789 FAILED: all of it failed\n")
    assert "RUNNING: parse 5/10 (1 failed)" in err


# --- Selection of a job --------------------------------------------------------------------------


def test_a_job_may_be_named_by_the_beginning_of_its_id(manager: type[FakeClient]) -> None:
    jobs = [a_job(f"{name}-{i:010x}") for i, name in enumerate(["sums", "sums", "tots", "top"])]

    def page(*, limit: int, before: str | None = None) -> list[dict[str, Any]]:
        ids = [job["id"] for job in jobs]
        first = ids.index(before) + 1 if before else 0
        return jobs[first : first + min(limit, 2)]

    def one(job: str) -> Any:
        found = [view for view in jobs if view["id"] == job]
        return found[0] if found else NotFound("no")

    manager.answers = {"jobs": page, "job": one}
    client: Any = manager("", "")

    def named(text: str) -> str:
        return str(option_values.resolve(client, text)["id"])

    assert named("last") == jobs[0]["id"]
    assert named("tot") == jobs[2]["id"]
    assert named("sums-0000000001") == jobs[1]["id"]
    with pytest.raises(UsageError, match="could be any of 2 jobs"):
        named("sums")
    with pytest.raises(UsageError, match="The job 'x/y' does not exist"):
        named("x/y")


def test_last_of_no_jobs(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"jobs": []}
    code, _, err = run("job", "why", "last")
    assert code == 2
    assert err.startswith("Error: The grid does not have jobs yet.")


# --- The grid ------------------------------------------------------------------------------------


def test_grid_status_shows_pools_and_queues(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"grid": a_grid()}
    code, out, _ = run("grid", "status")
    assert code == 0
    assert re.search(r"^default +0 +4 +1 +1 +0 +2 +8 tasks, 4\.0 s +hand$", out, re.MULTILINE)
    assert re.search(r"^tasks-default +3 +1 +0$", out, re.MULTILINE)
    code, out, _ = run("grid", "status", "--json")
    assert json.loads(out) == a_grid()


def test_grid_status_names_containers_that_do_not_work(
    manager: type[FakeClient], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"asg": "exited", "localstack": "healthy", "manager": "healthy"}
    monkeypatch.setattr(
        "batchlab.runtime.compose_deployment.read", lambda _: Deployment("p", "10.213.70", "i", "1:1", "")
    )
    monkeypatch.setattr("batchlab.runtime.compose_project.Project.states", lambda _: states)
    manager.answers = {"grid": a_grid()}
    text = "The container of asg is exited."
    assert f"{text} `batchlab grid up` starts a container that has ended." in run("grid", "status")[1]
    assert json.loads(run("grid", "status", "--json")[1]) == {**a_grid(), "services": states}
    manager.answers = {"grid": Unreachable("Pool 'default': no answer.")}
    code, _, err = run("grid", "status")
    assert (code, f"Error: Pool 'default': no answer. {text}" in err) == (3, True)
    states["asg"] = "healthy"
    assert "container" not in run("grid", "status")[2]


def test_grid_workers_lists_instances(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"grid": a_grid()}
    code, out, _ = run("grid", "workers")
    assert code == 0
    assert re.search(r"^i-1 +default +InService +Healthy +yes +w-1 +1 +2 ", out, re.MULTILINE)


def test_usage_shows_required_and_optional_arguments(run: Run) -> None:
    usages = {
        ("job", "show"): "JOB [TASK]",
        ("job", "submit"): "FILE",
        ("report", "pull"): "JOB...",
        ("report", "query"): "[NAME|SQL] [RUN]...",
        ("schema",): "[job|scenario]",
    }
    for command, usage in usages.items():
        code, out, _ = run(*command, "--help")
        assert code == 0
        assert out.startswith(f"Usage: batchlab {' '.join(command)} [OPTIONS] {usage}\n")
    code, out, err = run("run")
    assert (code, out) == (2, "")
    assert "Usage: batchlab run [OPTIONS] FILE\n" in err


@pytest.mark.parametrize(
    ("arguments", "missing", "example"),
    [
        (("scenario", "plan", "mine.yaml"), "option '--deadline'", "batchlab scenario plan long-tail --deadline 2h"),
        (("cost", "refresh-prices"), "option '--from'", "batchlab cost refresh-prices --from AmazonEC2.csv"),
        (("job", "cap", "last"), "argument 'AMOUNT'", "batchlab job cap last 10USD"),
    ],
)
def test_message_about_a_missing_option_has_an_example(
    run: Run, arguments: tuple[str, ...], missing: str, example: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert f"Error: Missing {missing}. Example: {example}" in err


def test_help_hides_old_options(manager: type[FakeClient], run: Run) -> None:
    """Commands of release 0.1.0 still work."""
    assert "--local" not in run("job", "replay-task", "--help")[1]
    assert run("job", "replay-task", "last", "parse/3", "--local", "--env", "NOTHING")[2].startswith("Error: The env")
    assert "--active" not in run("job", "list", "--help")[1]
    manager.answers = {"jobs": []}
    assert run("job", "list", "--active")[2] == "There are no active jobs.\n"


def test_grid_scale_sends_only_the_given_limits(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"scale": a_grid()["pools"][0]}
    assert run("grid", "scale", "default", "--max", 4, "--desired", 2)[0] == 0
    asked = {"min": None, "max": 4, "desired": 2, "auto": None}
    assert manager.asked == [("scale", ("default",), asked)]
    assert run("grid", "scale", "default", "--auto")[0] == 0
    assert manager.asked[-1][2]["auto"] is True


@pytest.mark.parametrize("arguments", [[], ["--desired", "1", "--auto"]])
def test_grid_scale_refuses_what_means_nothing(manager: type[FakeClient], run: Run, arguments: list[str]) -> None:
    assert run("grid", "scale", "default", *arguments)[0] == 2
    assert not manager.asked


def test_grid_up_with_other_pools_is_refused_while_one_is_up(manager: type[FakeClient], run: Run) -> None:
    code, _, err = run("grid", "up", "--pool", "big:0-2x4")
    assert code == 2
    assert "grid scale" in err


def test_ledger_rebuild_prints_the_number_of_jobs(manager: type[FakeClient], run: Run) -> None:
    bad = {"key": "jobs/j/s/outcomes/aa/x.json", "reason": "a field is missing"}
    manager.answers = {"rebuild_ledger": {"jobs": 3, "unreadable": [bad]}}
    said = f"The ledger is rebuilt: 3 jobs.\nNot read: {bad['key']}: {bad['reason']}\n"
    assert run("grid", "rebuild-ledger") == (0, said, "")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (True, ["1 unfinished job: `batchlab grid up` continues", "not run until a grid is up here again"]),
        (False, ["1 unfinished job, and deleted with the grid", "2 schedules deleted with the grid"]),
    ],
)
def test_grid_down_names_what_it_deletes(
    manager: type[FakeClient], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, said: list[str]
) -> None:
    """The command names the bucket of the grid's own LocalStack, with all objects in it."""
    home = Home(tmp_path)
    compose_deployment.write(home, Deployment("batchlab-1", "10.213.70", "image:1", "1:1", "3.13"))
    home.write_place(compose_deployment.NAME, Place("http://10.213.70.10:4566", "bucket-1", named))
    monkeypatch.setattr("batchlab.runtime.manager_process.stop_manager", lambda _: True)
    timed = [{"state": state} for state in ("active", "active", "paused")]
    manager.answers = {"jobs": [a_job("sums-0123456789")], "schedules": {"schedules": timed}}
    code, _, err = run("grid", "down", "--home", tmp_path)
    assert code == 0
    assert all(one in err for one in said), err
