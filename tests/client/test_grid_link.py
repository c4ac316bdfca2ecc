"""The end of a grid's link, also when its event loop has stopped, and the reports of direct calls."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from batchlab.client import grid_link
from batchlab.client.grid import Grid
from batchlab.client.grid_link import Link
from batchlab.core.errors import UsageError
from batchlab.runtime import factory
from batchlab.runtime.home import Home, ManagerRecord
from tests.support.cli import FakeClient, a_job


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Link:
    FakeClient.answers, FakeClient.asked = {"cancel": a_job("j-0123456789")}, []
    record = ManagerRecord("http://nowhere", 1, "manager-1", "local")
    monkeypatch.setattr(grid_link, "Client", FakeClient)
    monkeypatch.setattr(Home, "record", lambda self: record)
    monkeypatch.setattr(Home, "token", lambda self: "secret")
    return Link(factory.load("local"), Home(tmp_path / "h"), ())


def cancelled() -> list[str]:
    return sorted(job for name, (job,), _ in FakeClient.asked if name == "cancel")


def test_jobs_are_cancelled_at_the_end(link: Link) -> None:
    for job in ("waited-for", "left", "done"):
        link.follow(job)
    link.leave("left", cancel=True)
    link.leave("done", cancel=False)
    link.close()
    assert cancelled() == ["left", "waited-for"]
    assert not link._thread.is_alive()


def test_they_are_where_an_interrupt_hits_the_look_at_the_event_loop(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(link, "_is_stuck", interrupted)
    link.folder.mkdir(parents=True)
    link.follow("waited-for")
    try:
        with pytest.raises(KeyboardInterrupt):
            link.close()
        assert cancelled() == ["waited-for"]
        assert not link.folder.exists()
    finally:
        link._stop_loop()


def test_they_are_even_where_an_interrupt_has_left_a_lock_taken(
    link: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The interrupt arrives between the acquisition and the release of a lock, which Python cannot exclude."""
    monkeypatch.setattr(grid_link, "LOOP_TIMEOUT_S", 0.05)
    lock = threading.Lock()
    lock.acquire()
    link._loop.call_soon_threadsafe(lock.acquire)
    for job in ("waited-for", "left"):
        link.follow(job)
    link.leave("left", cancel=True)
    try:
        link.close()
        assert cancelled() == ["left", "waited-for"]
        assert "does not respond" in caplog.text
    finally:
        lock.release()
        link._stop_loop()


def test_calls_are_reported_before_the_wait_for_the_ends_of_jobs(link: Link) -> None:
    """Otherwise the manager would stop before it has recorded the ends of the reported calls."""
    FakeClient.answers |= {"report_calls": {"added": 1}, "jobs": []}
    link.ours = True
    link.follow("call")
    link.leave("call", cancel=False)
    link.report_later("call")
    link.close()
    assert [(name, arguments) for name, arguments, _ in FakeClient.asked] == [
        ("report_calls", (["call"],)),
        ("jobs", ()),
    ]


def test_a_forked_child_does_not_report_the_calls_of_its_parent(link: Link) -> None:
    """A report of the child would use a connection of the parent process at the same time as the parent."""
    grid = Grid.__new__(Grid)
    grid._link = link
    link.report_later("call")
    link._thread, thread = threading.Thread(), link._thread  # in a forked child, the thread does not run
    try:
        with pytest.raises(UsageError, match="closed in this process"):
            _ = grid.client
    finally:
        link._thread = thread
    assert not FakeClient.asked
    FakeClient.answers |= {"report_calls": {"added": 1}}
    link.close()
