"""The stored deadlines at which draining containers must end."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from batchlab.adapters.clock import WallClock
from batchlab.adapters.docker.launcher import StopDeadlines


def test_recorded_deadline_applies_to_one_container(tmp_path: Path) -> None:
    endings = StopDeadlines(tmp_path / "ending", WallClock())
    endings.note("i-1", "container", 100.0)
    left_s = endings.left_s("i-1", "container")
    assert left_s is not None
    assert 90.0 < left_s <= 100.0
    assert endings.left_s("i-1", "another") is None
    endings.forget("i-1")
    assert endings.left_s("i-1", "container") is None


def test_full_disk_does_not_prevent_the_end_of_an_instance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ending").touch()
    with caplog.at_level(logging.WARNING):
        StopDeadlines(tmp_path / "ending", WallClock()).note("i-1", "container", 100.0)
    (told,) = caplog.records
    assert "the deadline of the instance cannot be stored" in told.getMessage()
    assert vars(told)["instance"] == "i-1"
