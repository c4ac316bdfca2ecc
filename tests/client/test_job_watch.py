"""The watch of an executor's jobs, with a fake manager."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest

from batchlab.client import job_watch
from batchlab.client.grid_link import Link
from batchlab.client.job_watch import JobWatch
from batchlab.core.model import Bundle, JobId, Outcome, StageName, TaskSet
from batchlab.core.protocol import json_format
from tests.support.waiting import until

T = TypeVar("T")


class FakeManager:
    """A manager with one job, of which a worker runs one task."""

    def __init__(self) -> None:
        self.running = 1
        self.asked: list[str] = []
        self.outcomes_listed: list[Any] = []
        self.may_cancel = threading.Event()

    def view(self) -> Any:
        return {"state": "PAUSED", "version": len(self.asked), "stages": [{"running": self.running}]}

    def pause(self, job: str) -> Any:
        self.asked.append("pause")
        return self.view()

    def job(self, job: str) -> Any:
        return self.view()

    def outcomes(self, job: str, *, after: int | None) -> Any:
        if not self.outcomes_listed:
            time.sleep(0.01)
        return {"outcomes": [one for one in self.outcomes_listed if one["seq"] > (after or 0)], "ended": False}

    def cancel(self, job: str) -> None:
        self.asked.append("cancel")
        assert self.may_cancel.wait(20)
        self.asked.append("canceled")


class FakeLink:
    def __init__(self, manager: FakeManager) -> None:
        self.manager = manager
        self.clock = SimpleNamespace(monotonic_s=time.monotonic)
        self.backend = SimpleNamespace(manager=SimpleNamespace(control_lease_s=0.05))
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def check_open(self) -> None: ...

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, request: Callable[[FakeManager], T]) -> T:
        return request(self.manager)


class Events:
    """A listener that records its events."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def outcome(self, job: str, outcome: Outcome) -> None:
        self.seen.append(outcome.values)

    def on_end(self, job: str, view: Any) -> None:
        self.seen.append("end")

    def on_loss(self, job: str, error: Exception) -> None:
        self.seen.append(error)


@pytest.fixture
def link() -> Iterator[FakeLink]:
    link = FakeLink(FakeManager())
    yield link
    link.manager.may_cancel.set()
    until(lambda: not asyncio.all_tasks(link.loop))
    link.loop.call_soon_threadsafe(link.loop.stop)
    link.thread.join()
    link.loop.close()


def listed(value: int, seq: int) -> Any:
    tasks = TaskSet.span(0, 1)
    bundle = Bundle(JobId("job-1"), StageName("map"), tasks)
    outcome = Outcome(bundle, "e", "w", 0.0, 1.0, tasks, (value,), (0.1,))
    key = f"jobs/job-1/map/outcomes/00/{bundle.id}.json"
    doc = json_format.outcome_to_json(outcome)
    return {"seq": seq, "key": key, "tasks": [[0, 1]], "failed": 0, "outcome": doc}


def test_callers_wait_for_started_calls_and_not_for_the_cancellation(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager answers a cancellation after a control lease, which took as long as some calls."""

    async def ask(self: JobWatch, path: str, query: Any, request: Callable[[Any], T]) -> T:
        return await asyncio.to_thread(link.call, request)

    monkeypatch.setattr(JobWatch, "_ask", ask)
    monkeypatch.setattr(job_watch, "HEARTBEATS_S", 0.05)
    events = Events()
    watch = JobWatch(cast(Link, link), events)
    watch.add("job-1", None)
    watch.cancel_gracefully("job-1")
    until(lambda: link.manager.asked == ["pause"])
    time.sleep(0.2)
    assert events.seen == []
    assert link.manager.asked == ["pause"]
    link.manager.outcomes_listed.append(listed(7, 1))
    link.manager.running = 0
    until(lambda: "end" in events.seen)
    assert [*dict.fromkeys(map(str, events.seen))] == ["(7,)", "end"]
    assert "canceled" not in link.manager.asked
    watch.drop("job-1")
    link.manager.may_cancel.set()
    until(lambda: link.manager.asked == ["pause", "cancel", "canceled"])
