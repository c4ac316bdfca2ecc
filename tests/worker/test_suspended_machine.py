"""Leases on a machine that was suspended, which include the time of the suspension."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from batchlab.adapters.clock import WallClock
from batchlab.worker.shared_memory import ChildState


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="the system has no such clock")
def test_a_lease_runs_out_while_the_machine_is_suspended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLOCK_MONOTONIC does not advance during a suspension. Before, a worker that woke up used an old lease, although a
    cancellation had been acknowledged meanwhile."""
    suspended_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(time, "clock_gettime", lambda _clock: 100.0 + suspended_s)
    board = ChildState(tmp_path / "board", create=True)
    clock = WallClock()
    board.allow(stop=False, until_s=clock.monotonic_s() + 5.0)
    assert board.may_start()
    suspended_s = 60.0
    assert clock.monotonic_s() == 160.0
    assert not board.may_start()
    board.close()
