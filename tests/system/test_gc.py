"""The command `batchlab gc` on this machine: processes of deleted grids. `test_containers.py` tests containers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from batchlab.adapters.local.processes import GRID_VARIABLE, living
from batchlab.runtime.home import Home
from batchlab.runtime.manager_process import grid_processes, kill_manager
from tests.support.grid.backends import command as batchlab
from tests.support.waiting import until


def removed(home: Path) -> dict[str, bool]:
    """Remove the leftovers of one grid, and return whether `gc` has removed the processes, by folder."""
    return {one["folder"]: one["removed"] for one in json.loads(batchlab("gc", "--home", home, "--json")[0])}


def delete(folder: Path) -> None:
    """Delete a grid's folder, whose processes may create files at the same time."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def daemons(home: Path) -> list[int]:
    return [pid for one in grid_processes() if one.folder == str(home) for pid in one.pids]


def test_gc_ends_the_processes_of_a_grid_without_a_folder_and_no_others(tmp_path: Path) -> None:
    """A task's program that has left its process group also belongs to its grid."""
    gone, kept = tmp_path / "gone", tmp_path / "kept"
    Home(kept).make()
    argv = [sys.executable, "-c", "import time; time.sleep(100)"]
    values = {"gone": str(gone), "kept": str(kept), "user": "production"}
    environment = {name: {**os.environ, GRID_VARIABLE: value} for name, value in values.items()}
    with (
        subprocess.Popen(argv, env=environment["gone"], start_new_session=True) as left,
        subprocess.Popen(argv, env=environment["kept"]) as used,
        subprocess.Popen(argv, env=environment["user"]) as foreign,
    ):
        try:
            printed, _ = batchlab("gc", "--dry-run")
            assert f"{gone}: 1 process, would be removed." in printed
            assert f"{kept}: 1 process, whose grid has a folder: kept." in printed
            assert left.poll() is None
            assert "production" not in printed, "a user's own variable with this name does not name a grid"
            # The tests never remove leftovers of other grids on this machine.
            assert removed(kept) == {str(kept): False}
            assert removed(gone) == {str(gone): True}
            assert left.wait(10.0) == -signal.SIGKILL
            assert used.poll() is None
            assert removed(gone) == {}
        finally:
            for process in (used, left, foreign):
                process.kill()


def test_all_processes_of_a_grid_name_its_folder(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    batchlab("grid", "up", "--home", home.path, "--pool", "default:1-1x1")
    try:
        until(lambda: len(living(home.fleet)) == 1, 60.0)
        record = home.record()
        assert record is not None
        (found,) = (one for one in grid_processes() if one.folder == str(home.path))
        # The manager, the worker, and, on Linux, the fork server.
        assert {record.pid, *living(home.fleet).values()} <= set(found.pids)
        assert not found.is_orphan
    finally:
        batchlab("grid", "down", "--home", home.path)
    until(lambda: str(home.path) not in [one.folder for one in grid_processes()], 10.0)


DAEMON = """\
name: daemon
input: {files: numbers.txt, split: lines, size: 1}
stages:
  - {name: start, command: [sh, -c, "setsid -f sleep 100 > /dev/null 2>&1 < /dev/null"]}
"""


def job_with_a_daemon(folder: Path) -> Path:
    """Return a job whose task leaves a program in a session of its own."""
    (folder / "numbers.txt").write_text("1\n")
    (folder / "daemon.yaml").write_text(DAEMON)
    return folder / "daemon.yaml"


def test_the_processes_of_a_grid_end_after_its_folder_was_deleted(tmp_path: Path) -> None:
    """The folder does not come back, and `gc` has nothing to end."""
    home = Home(tmp_path / "home")
    batchlab("grid", "up", "--home", home.path, "--pool", "default:1-1x1")
    batchlab("job", "submit", job_with_a_daemon(tmp_path), "--home", home.path)
    batchlab("job", "watch", "last", "--home", home.path)
    # The manager, the fork server, the worker, and the daemon. The worker may also have a child process.
    assert len(daemons(home.path)) >= (4 if sys.platform == "linux" else 3)
    delete(home.path)
    until(lambda: not daemons(home.path), 30.0)
    assert not home.path.exists()


def test_the_manager_of_a_moved_folder_does_not_disturb_the_next_manager(tmp_path: Path) -> None:
    home, moved = Home(tmp_path / "home"), Home(tmp_path / "moved")
    batchlab("grid", "up", "--home", home.path, "--pool", "default:0-1x1")
    first = home.record()
    assert first is not None
    home.path.rename(moved.path)
    batchlab("grid", "up", "--home", home.path, "--pool", "default:0-1x1")
    try:
        until(lambda: first.pid not in daemons(home.path), 30.0)
        second = home.record()
        assert second is not None
        assert second.pid != first.pid
        assert home.socket(second) is not None, "only the second manager has the socket"
        batchlab("run", job_with_a_daemon(tmp_path), "--home", home.path)
        # The moved folder is a grid that ended without an error, or whose manager was killed.
        batchlab("grid", "up", "--home", moved.path, "--pool", "default:0-1x1")
        batchlab("grid", "down", "--home", moved.path)
    finally:
        batchlab("grid", "down", "--home", home.path)
    assert not daemons(home.path)


def test_a_grid_ends_the_programs_that_tasks_left(tmp_path: Path) -> None:
    home = tmp_path / "home"
    batchlab("run", job_with_a_daemon(tmp_path), "--home", home)
    assert not daemons(home)


def test_grid_down_ends_the_processes_of_a_killed_manager(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    batchlab("grid", "up", "--home", home.path, "--pool", "default:1-1x1")
    batchlab("run", job_with_a_daemon(tmp_path), "--home", home.path)
    kill_manager(home)
    assert daemons(home.path)
    assert removed(home.path) == {str(home.path): False}, "the next manager continues with the workers"
    _, said = batchlab("grid", "down", "--home", home.path)
    assert "The grid's other processes are ended now." in said
    until(lambda: not daemons(home.path), 10.0)
    assert f"No grid is up in {home.path}." in batchlab("grid", "down", "--home", home.path)[1]


def test_gc_ends_a_suspended_manager_whose_folder_is_not_a_grid_any_more(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    batchlab("grid", "up", "--home", home.path, "--pool", "default:0-1x1")
    record = home.record()
    assert record is not None
    os.kill(record.pid, signal.SIGSTOP)
    delete(home.path)
    home.path.mkdir()  # For example, an older release creates it again.
    assert removed(home.path) == {str(home.path): True}
    until(lambda: not daemons(home.path), 10.0)
