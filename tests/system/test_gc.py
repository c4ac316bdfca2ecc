"""The command `batchlab gc` on this machine: processes of deleted grids. `test_containers.py` tests containers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from batchlab.adapters.local.processes import GRID_VARIABLE, living
from batchlab.runtime.home import Home
from batchlab.runtime.manager_process import grid_processes
from tests.support.grid.backends import command as batchlab
from tests.support.waiting import until


def test_gc_ends_the_processes_of_a_grid_without_a_folder_and_no_others(tmp_path: Path) -> None:
    """A task's program that has left its process group also belongs to its grid."""
    gone, kept = tmp_path / "gone", tmp_path / "kept"
    kept.mkdir()
    argv = [sys.executable, "-c", "import time; time.sleep(100)"]
    environment = {name: {**os.environ, GRID_VARIABLE: str(path)} for name, path in (("gone", gone), ("kept", kept))}
    with (
        subprocess.Popen(argv, env=environment["gone"], start_new_session=True) as left,
        subprocess.Popen(argv, env=environment["kept"]) as used,
    ):
        try:
            printed, _ = batchlab("gc", "--dry-run")
            assert f"{gone}: 1 process, would be removed." in printed
            assert f"{kept}: 1 process, whose grid has a folder: kept." in printed
            assert left.poll() is None
            found = {one["folder"]: one["removed"] for one in json.loads(batchlab("gc", "--json")[0])}
            assert (found[str(gone)], found[str(kept)]) == (True, False)
            assert left.wait(10.0) == -signal.SIGKILL
            assert used.poll() is None
        finally:
            used.kill()
            left.kill()


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
