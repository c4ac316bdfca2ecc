"""A new ledger beside a bucket with jobs, as after a loss of the disk of the manager's instance."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from batchlab.manager import manager
from batchlab.manager.ledger_rebuild import LOST_JOBS, has_lost_jobs
from batchlab.runtime.home import Home
from tests.support.server.api import Rig, job


@pytest.fixture(autouse=True)
def any_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs of the tests are a few milliseconds old."""
    monkeypatch.setattr(manager, "RECENT_S", -60.0)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.make()
    return home


def lose(home: Home) -> None:
    files = list(home.path.glob("ledger.sqlite*"))
    assert files
    for file in files:
        file.unlink()


def finish(rig: Rig, token: str) -> str:
    name = rig.submit(job(token=token, tasks=1))
    rig.work(name, 1)
    assert rig.ended(name)["state"] == "SUCCEEDED"
    return name


def test_new_ledger_beside_a_bucket_with_jobs_is_reported_until_the_rebuild(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    with Rig(home=home) as rig:
        names = {finish(rig, token) for token in "ab"}
        assert rig.client.grid()["trouble"] == ""
    lose(home)
    with caplog.at_level(logging.WARNING), Rig(home=home) as rig:
        rig.until(lambda: rig.client.grid()["trouble"], "the search of the bucket")
        assert rig.client.grid()["trouble"] == LOST_JOBS
        assert caplog.text.count(LOST_JOBS) == 1
        assert not rig.client.jobs(), "the manager restores no job by itself"
        assert rig.client.rebuild() == 2
        assert rig.client.grid()["trouble"] == ""
        assert {view["id"] for view in rig.client.jobs()} == names
        assert not rig.run(has_lost_jobs(rig.manager.ports, math.inf))


def test_restart_with_its_ledger_is_no_loss(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rig(home=home) as rig:
        finish(rig, "a")
    monkeypatch.setattr(manager, "has_lost_jobs", lambda *_: pytest.fail("The ledger has jobs."))
    with Rig(home=home) as rig:
        assert rig.manager.is_leader.is_set()
        assert rig.client.grid()["trouble"] == ""


def test_deleted_and_recent_jobs_are_not_lost(home: Home) -> None:
    with Rig(home=home) as rig:
        name = finish(rig, "a")
        rig.client.delete(name)
        assert not rig.run(has_lost_jobs(rig.manager.ports, math.inf))
        second = finish(rig, "b")
        submitted_s = rig.client.job(second)["submitted_s"]
    lose(home)
    with Rig(home=home) as rig:
        # The messages of a recent job restore it.
        assert not rig.run(has_lost_jobs(rig.manager.ports, submitted_s))
        assert rig.run(has_lost_jobs(rig.manager.ports, submitted_s + 1))
