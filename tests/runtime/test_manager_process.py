"""Managers, as the process that started them sees them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import chain, repeat
from pathlib import Path

import pytest

from batchlab.adapters.local.processes import GRID_VARIABLE
from batchlab.core.errors import Unreachable
from batchlab.runtime import factory, manager_process
from batchlab.runtime.home import Home, ManagerRecord
from tests.support.processes import is_running
from tests.support.waiting import until


def test_exited_manager_is_reaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as dead, subprocess.Popen(["sleep", "60"]) as living:
        try:
            started = {one.pid: one for one in (dead, living)}
            monkeypatch.setattr(manager_process, "_STARTED", started)
            until(lambda: not is_running(dead.pid))
            assert not manager_process.stop_manager(Home(tmp_path))
            assert dead.returncode == 0
            assert started == {living.pid: living}
        finally:
            living.kill()


def with_killed_manager(path: Path) -> Home:
    """Return the home of a grid whose manager was killed."""
    home = Home(path)
    home.make()
    with subprocess.Popen(["true"]) as dead:
        home.write_record(ManagerRecord("http://127.0.0.1:1", dead.pid, "manager-1", "local"))
        (home.path / "manager.lock").write_text(str(dead.pid))
    return home


def leftover(home: Home) -> subprocess.Popen[bytes]:
    """Start a process that belongs to the grid in the home."""
    argv = [sys.executable, "-c", "import time; time.sleep(100)"]
    return subprocess.Popen(argv, env={**os.environ, GRID_VARIABLE: str(home.path)})


def test_the_next_manager_starts_while_the_leftovers_of_a_killed_manager_are_ended(tmp_path: Path) -> None:
    home = with_killed_manager(tmp_path / "home")
    with leftover(home) as left:
        start = manager_process.begin_manager(home, factory.load("local"))
        assert isinstance(start, manager_process.ManagerStart)
        (starting,) = (pid for pid, one in manager_process._STARTED.items() if one.poll() is None)
        os.kill(starting, signal.SIGSTOP)  # The manager has not taken the lock of the home yet.
        try:
            assert manager_process.kill_leftovers(home) == 1
            assert left.wait(10.0) == -signal.SIGKILL
        finally:
            os.kill(starting, signal.SIGCONT)
        assert start.wait().pid == starting
        with leftover(home) as used:
            assert manager_process.kill_leftovers(home) == 0, "the next manager continues with the processes"
            assert used.poll() is None
            assert manager_process.stop_manager(home)
            assert used.wait(10.0) == -signal.SIGKILL


def test_the_stop_of_a_manager_does_not_wait_for_the_next_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["sleep", "60"]) as living:
        first, second = (ManagerRecord("", living.pid, f"manager-{n}", "local") for n in (1, 2))
        records = chain([first], repeat(second))
        monkeypatch.setattr(Home, "record", lambda _: next(records))
        assert manager_process.stop_manager(Home(tmp_path))
        assert living.wait(10.0) == -signal.SIGTERM


def test_a_manager_that_still_starts_is_awaited(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    start = manager_process.begin_manager(home, factory.load("local"))
    assert isinstance(start, manager_process.ManagerStart)
    until(lambda: home.is_locked)
    assert manager_process.settled_record(home)
    assert manager_process.stop_manager(home)
    assert home.record() is None
    assert home.is_taken_down


def test_a_manager_that_does_not_finish_its_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_process, "START_S", 0.05)
    home = Home(tmp_path / "home")
    with home.lock(), pytest.raises(Unreachable, match="has been starting for"):
        manager_process.settled_record(home)
