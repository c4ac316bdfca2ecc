"""The output of a followed job, which contains each line once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from batchlab.cli import job_logs
from batchlab.cli.job_logs import Follower, Line, LogFilter, to_json


class Manager:
    """A fake manager that returns a list of answers for each request, and repeats the last answer."""

    def __init__(self, *news: dict[str, Any]) -> None:
        self.news = iter(news)
        self.tail_answers: Iterator[list[dict[str, Any]]] = iter(())
        self.stored: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def logs_after(self, job: str, seq: int | None, **which: Any) -> dict[str, Any]:
        self.asked.append(("news", {"seq": seq, **which}))
        return {"logs": [], "seq": seq, "ended": False, **next(self.news)}

    def tails(self, job: str) -> dict[str, Any]:
        self.asked.append(("tails", {}))
        return {"tails": next(self.tail_answers, []), "every_s": 0.0}

    def logs(self, job: str, **which: Any) -> list[dict[str, Any]]:
        self.asked.append(("logs", which))
        return self.stored


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "MIN_REQUEST_INTERVAL_S", 0.0)


def tail(text: str, start: int = 0, task: int = 0) -> dict[str, Any]:
    where = {"stage": "s", "task": task, "attempt": 1, "round": 0, "execution": "e"}
    return {**where, "start": start, "stop": start + len(text.encode()), "text": text}


def log(text: str, task: int = 0, **more: Any) -> dict[str, Any]:
    where = {"stage": "s", "task": task, "attempt": 1, "round": 0, "execution": "e"}
    return {**where, "state": "SUCCEEDED", "ended_s": 1.0, "stored": True, "text": text, **more}


ALL = LogFilter()


def followed(manager: Manager, which: LogFilter = ALL) -> list[str]:
    lines: list[Line] = []
    Follower("j", which, lambda ask: ask(manager), lines.append).run()  # type: ignore[arg-type]
    return [f"{line.name}{'!' if line.is_note else ':'}{line.text}" for line in lines]


def test_repeated_lines_are_printed_once() -> None:
    manager = Manager({}, {}, {"logs": [log("one\ntwo ü\nthree\nfour")], "seq": 5}, {"ended": True})
    manager.tail_answers = iter([[tail("one\ntwo")], [tail("one\ntwo ü\nth")]])
    assert followed(manager) == ["s/0:one", "s/0:two ü", "s/0:three", "s/0:four"]
    assert [how["seq"] for what, how in manager.asked if what == "news"] == [None, None, None, 5]


def test_skipped_output_is_named_and_the_end_is_complete() -> None:
    manager = Manager({}, {}, {"logs": [log("a\n" + "x" * 50 + "\nz\n")]}, {"ended": True})
    manager.tail_answers = iter([[tail("a\nx")], [tail("x\n", 51)]])
    missing = "s/0!48 bytes came too fast to be followed"
    assert followed(manager) == ["s/0:a", missing, "s/0:x", "s/0:z"]


def test_a_log_that_was_cut_is_not_taken_for_what_was_seen() -> None:
    text = "head\n[... batchlab left out 99 bytes ...]\ntail\n"
    manager = Manager({}, {"logs": [log(text)]}, {"ended": True})
    manager.tail_answers = iter([[tail("head\n")]])
    shown = followed(manager)
    assert shown[0] == "s/0:head"
    assert "more than is kept" in shown[1]
    # Nothing was shown before, so all stored lines are shown.
    assert len(followed(Manager({"logs": [log(text)]}, {"ended": True}))) == 3


def test_late_live_log_of_an_ended_task_is_ignored() -> None:
    manager = Manager({"logs": [log("a\n")]}, {}, {"ended": True})
    manager.tail_answers = iter([[tail("a\n")], [tail("a\n")]])
    assert followed(manager) == ["s/0:a"]


def test_log_that_is_not_stored_yet_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "LOG_RETRY_INTERVAL_S", 0.0)
    missing = log("(not stored)", stored=False)
    manager = Manager({"logs": [missing]}, {}, {"ended": True})
    manager.stored = [log("here it is\n"), log("another\n", task=1)]
    assert followed(manager) == ["s/0:here it is"]
    gone = Manager({"logs": [missing]}, {"ended": True})
    assert followed(gone) == ["s/0!what it printed was never stored: its worker is gone"]


def test_logs_of_one_task_or_of_failed_tasks() -> None:
    manager = Manager({}, {"ended": True})
    manager.tail_answers = iter([[tail("a\n"), tail("b\n", task=1)]])
    assert followed(manager, LogFilter(stage="s", task=1)) == ["s/1:b"]
    manager = Manager({}, {"logs": [log("a\n", state="FAILED")]}, {"ended": True})
    assert followed(manager, LogFilter(failed=True, since_s=60.0)) == ["s/0:a"]
    # The client does not request the output of tasks, so live logs cost nothing.
    assert [what for what, _ in manager.asked] == ["news"] * 3
    assert manager.asked[0][1]["failed"] is True
    assert manager.asked[0][1]["since_s"] == 60.0


def test_follow_stops_if_the_manager_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "MIN_REQUEST_INTERVAL_S", 0.05)
    began_s = time.monotonic()
    followed(Manager({}, {}, {}, {"ended": True}))
    assert time.monotonic() - began_s >= 0.15


def test_a_program_gets_every_id() -> None:
    line = Line("s", 3, 2, 0, "w-1-7", "text")
    assert line.name == "s/3#2"
    ids = {"job": "j", "stage": "s", "task": 3, "attempt": 2, "round": 0, "execution": "w-1-7"}
    assert to_json("j", line) == {**ids, "line": "text"}
    note = Line("s", 3, 2, 0, "w-1-7", "text", is_note=True)
    assert to_json("j", note) == {**ids, "note": "text"}
