"""The command line in the process of a test: views, a client with fixed answers, and a runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from batchlab.cli import app, folder_client, session, submission
from batchlab.core.api_types import JobView
from batchlab.runtime.home import Home, ManagerRecord

# Modules that copy the name Client are imported before `at_home` replaces it, because they would keep a FakeClient.
assert folder_client
assert submission

Run = Callable[..., tuple[int, str, str]]
"""A function that runs a command line, and returns its exit code, stdout, and stderr."""


def a_job(job: str, state: str = "RUNNING", **more: Any) -> dict[str, Any]:
    stage = {
        "name": "parse",
        "pool": "default",
        "after": [],
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
        "after": [],
        "submitted_s": 1_700_000_000.0,
        "started_s": None,
        "ended_s": None,
        "version": 3,
        "stages": [stage],
        "report": "",
        **more,
    }


def view(**more: Any) -> JobView:
    """Return a job's view with changes, typed as the client returns it."""
    return cast("JobView", a_job("sums-0123456789", **more))


class FakeClient:
    """A client that returns the `answers` of a test, and records its calls."""

    answers: dict[str, Any]
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]]

    def __init__(self, url: str, token: str) -> None:
        self.url = url

    @classmethod
    def of(cls, home: Home, record: ManagerRecord) -> FakeClient:
        return cls(record.url, home.token())

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


def at_home(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> type[FakeClient]:
    """Let commands find a manager that returns these answers."""
    FakeClient.answers, FakeClient.asked = answers, []
    record = ManagerRecord("http://nowhere", 1, "manager-1", "local")
    monkeypatch.setattr(session, "Client", FakeClient)
    monkeypatch.setattr("batchlab.client.http.Client", FakeClient)
    monkeypatch.setattr(Home, "record", lambda self: record)
    monkeypatch.setattr(Home, "token", lambda self: "secret")
    return FakeClient


def a_grid() -> dict[str, Any]:
    instance = {
        "id": "i-1",
        "state": "InService",
        "healthy": True,
        "protected": True,
        "launched_s": 1_700_000_000.0,
        "note": "",
        "type": "",
        "zone": "",
        "market": "on-demand",
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
        "trouble": "",
        "instances": [instance],
    }
    queue = {"name": "tasks-default", "visible": 3, "in_flight": 1, "delayed": 0}
    return {
        "backend": "local",
        "leader": True,
        "owner": "manager-1",
        "settings": {},
        "pools": [pool],
        "queues": [queue],
    }


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs command lines in this process."""
    monkeypatch.setattr("batchlab.cli.output.install_signal_handlers", lambda: None)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app.start([str(argument) for argument in arguments])
        told = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), told.out, told.err

    return run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command and returns its exit code and output."""
    return runner(monkeypatch, capsys)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    """Let commands find a manager whose answers the test sets."""
    return at_home(monkeypatch)
