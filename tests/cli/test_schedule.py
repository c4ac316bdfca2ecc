"""`batchlab schedule` with a fake manager: requests, output, and errors."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from batchlab.cli import schedule as schedule_upload
from batchlab.core.errors import NotFound, Refused
from batchlab.core.job_definition import JobDef
from batchlab.runtime import factory
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from tests.support import job_files as jobfiles
from tests.support.cli import FakeClient, Run

DUE_S = 1_774_746_000.0
"""2026-03-29 03:00 in Berlin, the first minute after the hour that the clock change skips."""


def a_run(**more: Any) -> dict[str, Any]:
    return {
        "due_s": DUE_S,
        "due": "2026-03-29T03:00:00+02:00",
        "by_hand": False,
        "state": "ended",
        "result": "SUCCEEDED",
        "reason": "",
        "job": "j-0123456789",
        "started_s": DUE_S,
        "ended_s": DUE_S + 5,
        "peak": {},
        "tasks": 3,
        **more,
    }


def a_schedule(**more: Any) -> dict[str, Any]:
    return {
        "name": "nightly",
        "job": "j",
        "state": "active",
        "cron": "30 2 * * *",
        "timezone": "Europe/Berlin",
        "at_s": None,
        "next_s": DUE_S,
        "next": "2026-03-29T03:00:00+02:00",
        "missed": "run-once",
        "missed_within_s": 3600.0,
        "overlap": "skip",
        "prewarm_s": 600.0,
        "capacity": None,
        "due_param": "",
        "after": [],
        "source": "",
        "source_digest": "",
        "input": [],
        "added_s": DUE_S - 9_000,
        "runs": [a_run()],
        **more,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jobfiles.write(tmp_path, {**jobfiles.FOLDER, "job.yaml": jobfiles.MINIMAL})
    return tmp_path


def added(manager: type[FakeClient], run: Run, folder: Path, *options: str) -> tuple[Any, JobDef]:
    """Return the schedule and the job of the request that the manager receives."""
    manager.answers = {"add_schedule": a_schedule()}
    code, out, err = run("schedule", "add", folder / "job.yaml", "--home", folder / "h", *options)
    assert (code, err) == (0, ""), err
    assert out == "nightly is due next at 2026-03-29 03:00:00 CEST\n"
    name, (schedule, job), _ = manager.asked[-1]
    assert name == "add_schedule"
    return schedule, job


def refused(run: Run, folder: Path, *options: str) -> str:
    code, out, err = run("schedule", "add", folder / "job.yaml", "--home", folder / "h", *options)
    assert (code, out) == (2, "")
    sentence, remedy = err.rstrip("\n").split("\n")
    assert remedy.strip()
    return str(sentence)


# --- Adding --------------------------------------------------------------------------------------


def test_a_job_file_is_uploaded_and_described(manager: type[FakeClient], run: Run, folder: Path) -> None:
    schedule, job = added(
        manager,
        run,
        folder,
        "--cron",
        "30 2 * * *",
        "--timezone",
        "Europe/Berlin",
        "--missed",
        "run-all",
        "--missed-within",
        "6h",
        "--overlap",
        "queue",
        "--after",
        "loads",
        "--after",
        "clean-up:ended",
        "--prewarm",
        "10m",
        "--capacity",
        "4",
        "--name",
        "nightly",
        "--max-cost",
        "5USD",
    )
    source_digest = schedule.pop("source_digest")
    assert len(source_digest) == 64
    assert schedule == {
        "name": "nightly",
        "cron": "30 2 * * *",
        "timezone": "Europe/Berlin",
        "at_s": None,
        "missed": "run-all",
        "missed_within_s": 21_600.0,
        "overlap": "queue",
        "prewarm_s": 600.0,
        "capacity": 4,
        "due_param": "",
        "after": ["loads", "clean-up:ended"],
        "source": str(folder / "job.yaml"),
    }
    assert job.max_cost_usd == 5
    assert job.input
    objects = factory.load("local").open_objects(Home(folder / "h"))
    for key in (job.code or "", *job.input.keys):
        assert asyncio.run(objects.head(key))
    # The second request is equal to the first, so the manager recognizes it.
    assert added(manager, run, folder, "--cron", "30 2 * * *", "--name", "nightly")[1].id == job.id


def test_a_span_may_be_a_number_of_seconds(manager: type[FakeClient], run: Run, folder: Path) -> None:
    """The error message for an invalid span says the same."""
    when = ("--cron", "30 2 * * *", "--prewarm", "600", "--missed-within", "90.5")
    schedule, _ = added(manager, run, folder, *when)
    assert (schedule["prewarm_s"], schedule["missed_within_s"]) == (600.0, 90.5)


def test_times_of_the_file_apply_unless_an_option_overrides_them(
    manager: type[FakeClient], run: Run, folder: Path
) -> None:
    text = jobfiles.MINIMAL + 'cron: "5 4 * * *"\ntimezone: Europe/Berlin\n'
    (folder / "job.yaml").write_text(text)
    schedule, job = added(manager, run, folder)
    assert (schedule["cron"], schedule["timezone"]) == ("5 4 * * *", "Europe/Berlin")
    schedule, _ = added(manager, run, folder, "--at", "2126-03-29T02:30")
    assert schedule["cron"] == ""
    assert schedule["at_s"] == datetime(2126, 3, 29, 1, 30, tzinfo=UTC).timestamp()
    (folder / "job.yaml").write_text(jobfiles.MINIMAL + 'at: "2126-03-29T02:30:00Z"\n')
    schedule, other = added(manager, run, folder)
    assert schedule["at_s"] == datetime(2126, 3, 29, 2, 30, tzinfo=UTC).timestamp()
    assert job.name == other.name == "j"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "The schedule does not have a due time."),
        (("--cron", "* * * * *", "--at", "+10m"), "--cron and --at exclude each other."),
        (("--at", "tomorrow"), "'tomorrow' is not a time."),
        (("--at", "+1x"), "'+1x' is not a time."),
        (("--at", "2026-03-29T02:30", "--timezone", "Berlin"), "time zone 'Berlin' does not exist"),
        (("--cron", "* * * * *", "--prewarm", "soon"), "--prewarm: 'soon' is not a duration."),
        (("--cron", "* * * * *", "--capacity", "3"), "--capacity needs --prewarm."),
        (("--cron", "* * * * *", "--input", "incoming/"), "'incoming/' is not below raw/"),
        (("--cron", "* * * * *", "--input", "raw/../jobs/"), "is not below raw/"),
        (("--cron", "* * * * *", "--input", "raw/incoming"), "does not end in a slash"),
        (("--cron", "* * * * *", "--set", "year=1"), "there is no parameter 'year'"),
    ],
)
def test_mistake_is_reported_before_any_request(
    manager: type[FakeClient], run: Run, folder: Path, options: tuple[str, ...], told: str
) -> None:
    assert told in refused(run, folder, *options)
    assert manager.asked == []


def test_each_runs_input_may_be_a_prefix_of_the_bucket(
    manager: type[FakeClient], run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (folder / "data").iterdir():
        file.unlink()  # the file's own input need not exist
    _, job = added(manager, run, folder, "--cron", "* * * * *", "--input", "raw/incoming/")
    assert job.input
    assert job.input.keys == ("raw/incoming/",)
    monkeypatch.setattr(Backend, "bucket", lambda *_: "mine")
    own = jobfiles.MINIMAL.replace("data/*", "[s3://mine/raw/a/, s3://mine/raw/b]")
    (folder / "job.yaml").write_text(own)
    _, job = added(manager, run, folder, "--cron", "* * * * *")
    assert job.input
    assert job.input.keys == ("raw/a/", "raw/b")
    (folder / "job.yaml").write_text(own.replace("s3://mine/raw/b", "s3://other/raw/b"))
    assert "partly" in refused(run, folder, "--cron", "* * * * *")
    (folder / "job.yaml").write_text(own.replace("s3://mine", "s3://other"))
    assert "cannot read" in refused(run, folder, "--cron", "* * * * *")


@pytest.mark.parametrize("command", [("job", "submit"), ("run",)])
def test_job_file_with_a_cron_is_not_run_once(
    manager: type[FakeClient], run: Run, folder: Path, command: tuple[str, ...]
) -> None:
    (folder / "job.yaml").write_text(jobfiles.MINIMAL + 'cron: "5 4 * * *"\n')
    code, _, err = run(*command, folder / "job.yaml", "--home", folder / "h")
    assert code == 2
    assert "contains cron, so its job runs repeatedly" in err
    assert "batchlab schedule add job.yaml" in err
    assert manager.asked == []


# --- Looking -------------------------------------------------------------------------------------


def test_list_shows_the_next_and_the_last_run(manager: type[FakeClient], run: Run) -> None:
    schedules = [a_schedule(), a_schedule(name="once", cron="", at_s=DUE_S, runs=[], next_s=None)]
    notes = ["schedule nightly: the run of 2026 is skipped: 3 due times were missed"]
    manager.answers = {"schedules": {"schedules": schedules, "notes": notes}}
    code, out, err = run("schedule", "list")
    assert code == 0
    head, first, second = out.rstrip("\n").split("\n")
    assert head.split()[:3] == ["NAME", "STATE", "WHEN"]
    assert "30 2 * * * Europe/Berlin  2026-03-29 03:00:00 CEST" in first
    assert first.endswith("SUCCEEDED  j-0123456789")
    assert second.split() == ["once", "active", "once", "-", "-", "-", "-"]
    assert err == f"Note: {notes[0]}\n"
    assert json.loads(run("schedule", "list", "--json")[1]) == schedules
    manager.answers = {"schedules": {"schedules": [], "notes": []}}
    assert "batchlab schedule add FILE" in run("schedule", "list")[2]


def test_a_schedule_shows_its_runs_and_why_one_was_skipped(manager: type[FakeClient], run: Run) -> None:
    why = "the run of \x1b[31mtoday had not ended"
    runs = [a_run(state="skipped", result="", reason=why, job=None, started_s=None), a_run()]
    due = {"at_s": DUE_S, "local": "2026-03-29T03:00:00+02:00", "utc": "2026-03-29T01:00:00Z"}
    manager.answers = {"schedule": a_schedule(runs=runs), "coming": [due]}
    code, out, _ = run("schedule", "show", "nightly", "--count", 1)
    assert code == 0
    assert "warm      10 min 00 s before, what the last runs used" in out
    assert "missed    run-once within 60 min 00 s" in out
    skipped, ended = out.rstrip("\n").split("\n")[-2:]
    assert skipped.split("  ")[1] == "skipped"
    assert "had not ended" in skipped
    assert "\x1b" not in out
    assert "5.0 s" in ended
    assert f"{due['local']}  {due['utc']}\n" in out
    assert manager.asked[-1] == ("coming", ("nightly",), {"count": 1})
    shown = json.loads(run("schedule", "show", "nightly", "--json")[1])
    assert (shown["changed"], shown["coming"]) == ("", [due])


def test_changed_job_file_is_reported(manager: type[FakeClient], run: Run, folder: Path) -> None:
    said, _ = added(manager, run, folder, "--cron", "30 2 * * *")
    view: Any = a_schedule(source=said["source"], source_digest=said["source_digest"])
    assert schedule_upload.change_note(view) == ""
    (folder / "data" / "a.csv").write_text("another")
    assert "has changed since the schedule was added. Runs use the uploaded files" in schedule_upload.change_note(view)
    manager.answers = {"schedule": view, "coming": []}
    assert "--replace uploads the changed ones" in run("schedule", "show", "nightly")[2]
    (folder / "job.yaml").write_text("name: [")
    assert "is not a valid job file now" in schedule_upload.change_note(view)
    (folder / "job.yaml").unlink()
    assert schedule_upload.change_note(view) == ""


# --- Steering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["pause", "resume", "delete"])
def test_schedule_verbs_call_the_manager(manager: type[FakeClient], run: Run, verb: str) -> None:
    runs = [a_run(state="running", result="")]
    method = f"{'remove' if verb == 'delete' else verb}_schedule"
    manager.answers = {method: a_schedule(state="paused", runs=runs)}
    code, out, err = run("schedule", verb, "nightly")
    assert code == 0
    assert out == f"nightly {'is deleted' if verb == 'delete' else 'paused'}\n"
    assert err == "The job j-0123456789 of this schedule is running.\n"
    assert manager.asked[-1] == (method, ("nightly",), {})


def test_run_prints_the_job_and_uses_a_new_token(manager: type[FakeClient], run: Run) -> None:
    manager.answers = {"run_schedule": a_run(by_hand=True)}
    assert run("schedule", "run", "nightly")[:2] == (0, "j-0123456789\n")
    assert run("schedule", "run", "nightly")[0] == 0
    tokens = [asked[1][1] for asked in manager.asked]
    assert len(set(tokens)) == 2
    manager.answers = {"run_schedule": a_run(job=None)}
    assert run("schedule", "run", "nightly")[1] == "nightly waits for the run before it\n"
    none = a_run(job=None, state="skipped", reason="asked for; there was no object in raw/x/")
    manager.answers = {"run_schedule": none}
    code, out, err = run("schedule", "run", "nightly")
    assert (code, out) == (2, "")
    assert "has not run: asked for; there was no object in raw/x/." in err


@pytest.mark.parametrize(
    "error",
    [
        NotFound("There is no schedule 'x'.", remedy="`batchlab schedule list` shows them."),
        Refused("There is a schedule 'x' already.", remedy="Say --replace to change it."),
    ],
)
def test_refusal_of_the_manager_is_a_clear_sentence(manager: type[FakeClient], run: Run, error: Exception) -> None:
    manager.answers = {"pause_schedule": error}
    code, out, err = run("schedule", "pause", "x")
    assert (code, out) == (2, "")
    assert err.startswith("Error: There is")
