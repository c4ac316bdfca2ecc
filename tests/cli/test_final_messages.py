"""The final output of commands: the summary, the demo's verdict, and the doctor's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchlab.cli import demo, doctor, output
from batchlab.cli.doctor import Level
from batchlab.cli.run_job import Phases, Summary
from batchlab.core.api_types import FailureView
from batchlab.core.job_definition import with_task
from batchlab.core.protocol import json_format, object_keys
from batchlab.jobs.job_file import load
from batchlab.jobs.results import Fetched
from batchlab.runtime.home import Home, ManagerRecord
from batchlab.worker.handlers import explain
from tests.support.cli import view

# --- The summary ---------------------------------------------------------------------------------


def test_phases_add_up_to_the_wall_time() -> None:
    phases = Phases(begun_s=0.0)
    for name, seconds in (("check", 1.0), ("start", 2.0), ("run", 10.0)):
        phases.add(name, seconds)
    phases.split("run", "wait", 4.0)
    phases.split("run", "wait", -3.0)
    phases.end()
    assert phases.spent_s["wait"] == 4.0
    assert phases.spent_s["run"] == 6.0
    assert sum(phases.spent_s.values()) == pytest.approx(phases.wall_s)


def a_summary(tmp_path: Path, **more: Any) -> Summary:
    phases = Phases()
    phases.add("run", 2.0)
    fetched = Fetched(tmp_path, {"parse": 9}, 2, 2048)
    return Summary(view(**more), phases, {"default": 2}, {"parse": 1}, (), fetched)


def test_summary_shows_how_the_time_was_spent(tmp_path: Path) -> None:
    text = a_summary(tmp_path, state="FAILED", reason="1 of 10 failed").text()
    assert "sums-0123456789 FAILED in" in text
    assert "10 tasks, 1 failed, 1 retried" in text
    # The tasks took 2 s of task time in 2 s on 2 slots.
    assert "10 tasks, 2.0 s of task time, 50% of 2 slots" in text
    assert "files/: 2 files, 2.0 KiB" in text


def failure(task: int, cause: str) -> FailureView:
    return {
        "seq": task,
        "stage": "parse",
        "task": task,
        "attempt": 1,
        "kind": "exception",
        "reason": f"ValueError: {cause}",
        "error": "ValueError",
        "traceback": f'Traceback:\n  File "handlers.py", line 8\nValueError: {cause}\x1b[2J\n',
        "exit_code": None,
        "fingerprint": cause,
    }


def test_the_summary_of_a_failure_shows_where_each_cause_was_raised(tmp_path: Path) -> None:
    """The grid of the run has ended, so the summary cannot request more data."""
    summary = a_summary(tmp_path, state="FAILED")
    summary.job["stages"][0]["failed"] = 4
    summary.failures = [failure(3, "bad"), failure(1, "bad"), failure(2, "worse")]
    text = summary.text()
    assert text.count("ValueError: bad") == 2
    assert "  parse/3 exception: ValueError: bad\n    Traceback:\n" in text
    assert "  parse/2 exception: ValueError: worse\n    Traceback:\n" in text
    assert "parse/1" not in text
    assert "  2 more: `batchlab job failures sums-0123456789`" in text
    assert "`batchlab job replay-task sums-0123456789 parse/3`" in text
    assert "\x1b" not in text
    summary.job["stages"][0]["failed"] = 2
    assert "more:" not in summary.text()
    assert "`batchlab job logs sums-0123456789`" in summary.text()


@pytest.mark.parametrize("message", ["bad: 'x'", "bad\n  in two lines", "very bad " * 40])
def test_failure_reason_is_printed_once_and_in_full(tmp_path: Path, message: str) -> None:
    """The job, the task, and the traceback contain the same message."""

    try:
        raise ValueError(message)
    except ValueError as error:
        told = explain(error)
    one = failure(3, "a")
    one["reason"], one["traceback"] = told["reason"], told["traceback"]
    reason = with_task("2 tasks failed (2 of 4 in stage parse)", "parse", 3, told["reason"])
    summary = a_summary(tmp_path, state="FAILED", reason=reason)
    summary.job["stages"][0]["failed"] = 2
    summary.failures = [one]
    text = summary.text()
    assert "\n  2 tasks failed (2 of 4 in stage parse)\n  parse/3 exception: ValueError: " in text
    assert text.split().count("ValueError:") == 1
    assert " ".join(message.split()) in text
    assert text.partition("Traceback")[2].splitlines()[2].lstrip() == "raise ValueError(message)"
    assert summary.to_json()["job"]["reason"] == reason


def test_traceback_keeps_what_the_failure_reason_omits(tmp_path: Path) -> None:
    summary = a_summary(tmp_path, state="FAILED", reason="of another; task parse/9: bad")
    summary.failures = [{**failure(3, "a"), "reason": "SyntaxError: no"}]
    text = summary.text()
    assert "\n  of another; task parse/9: bad\n" in text
    assert "\n    ValueError: a" in text


def test_the_summary_for_programs_has_the_same(tmp_path: Path) -> None:
    doc = a_summary(tmp_path).to_json()
    assert doc["stages"][0]["utilisation"] == 0.5
    assert doc["results"]["results"] == {"parse": 9}
    assert doc["phases_s"]["run"] == 2.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0003, "0.3 ms"),
        (0.04, "40 ms"),
        (0.99951, "1.0 s"),
        (99.9, "99.9 s"),
        (99.96, "1 min 40 s"),
        (725, "12 min 05 s"),
        (12_000, "3 h 20 min"),
        (200_000, "2 days 7 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert output.span(seconds) == text


def test_columns_of_numbers_stand_to_the_right() -> None:
    told = output.table(("name", "count", "took"), [("a", 5, "3.2 s"), ("b", 10, "-")])
    assert told == "NAME  COUNT   TOOK\na         5  3.2 s\nb        10      -"


# --- The demo ------------------------------------------------------------------------------------


def test_the_demos_claims_are_made_once(tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        files = (tmp_path / "demo").rglob("*")
        return {str(path): path.stat().st_mtime_ns for path in files if path.is_file()}

    first = demo.prepare(Home(tmp_path), seed=1, files=3, claims_per_file=5)
    before = times()
    assert demo.prepare(Home(tmp_path), seed=1, files=3, claims_per_file=5) == first
    assert times() == before
    assert sum(fact["claims"] for fact in first.facts.values()) == 15
    other = demo.prepare(Home(tmp_path), seed=2, files=3, claims_per_file=5)
    assert other.facts != first.facts
    assert len(load(other.job_file).files) == 3


def totals_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"payer": payer, "payer_name": fact["name"], "paid_cents": 5, **demo.expected_totals(fact)}
        for payer, fact in facts.items()
    ]


@pytest.mark.parametrize("wrong", ["", "claims", "charge_cents", "denied", "payer"])
def test_the_demos_totals_are_compared_with_the_facts(tmp_path: Path, wrong: str) -> None:
    """The check must be able to fail."""
    prepared = demo.prepare(Home(tmp_path), seed=1, files=3, claims_per_file=5)
    totals = totals_of(dict(prepared.facts))
    if wrong == "payer":
        totals.pop()
    elif wrong:
        totals[0][wrong] += 1
    summary = a_summary(tmp_path)
    lines = [json_format.dumps({"task": i, "value": one}) for i, one in enumerate(totals)]
    (tmp_path / "totals.jsonl").write_text("\n".join(lines) + "\n")
    verdict = demo.check(prepared, summary)
    assert verdict.agrees is not bool(wrong)
    answer = "no" if wrong else "yes"
    assert f"totals agree with the generator: {answer}" in verdict.text()


# --- The doctor ----------------------------------------------------------------------------------


def levels(home: Home, backend: str = "local") -> dict[str, set[Level]]:
    found: dict[str, set[Level]] = {}
    for one in doctor.examine(home, backend):
        found.setdefault(one.about, set()).add(one.level)
        assert one.level is Level.OK or one.remedy or one.text
    return found


def test_the_doctor_finds_nothing_here_and_leaves_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    found = levels(home)
    assert Level.FAIL not in set.union(*found.values())
    assert {path.name for path in home.path.iterdir()} == {".gitignore", object_keys.MADE}


def test_the_doctor_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    found = levels(Home(tmp_path / "file" / "h"), "nonsense")
    assert found["backend"] == found["folder"] == found["sqlite"] == {Level.FAIL}
    assert found["port"] == found["python"] == {Level.OK}

    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    def no_ports(*_: object, **__: object) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr("os.link", no_links)
    monkeypatch.setattr("socket.create_server", no_ports)
    monkeypatch.setattr(doctor, "FAIL_BELOW_BYTES", 0)
    monkeypatch.setattr("time.time", lambda: 1.0)
    found = levels(Home(tmp_path / "h"))
    assert found["folder"] == found["port"] == found["clock"] == {Level.FAIL}


def test_doctor_reports_a_silent_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = ManagerRecord("http://127.0.0.1:9", 1, "m", "local")
    monkeypatch.setattr(Home, "record", lambda _: record)
    assert levels(Home(tmp_path))["manager"] == {Level.FAIL}
