"""Managers, as the process that started them sees them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from batchlab.runtime import manager_process
from batchlab.runtime.home import Home
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
