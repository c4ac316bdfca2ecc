"""The start of a grid's manager by a Grid object."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchlab import Grid
from batchlab.client import grid_link
from batchlab.client.submission import ObjectPickler
from batchlab.runtime import compose_deployment, container_grid, manager_process
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, ManagerRecord
from tests.support.cli import FakeClient
from tests.support.waiting import until

RECORD = ManagerRecord("http://nowhere", 1, "manager-1", "localstack")


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[Home]:
    """Replace the containers of `localstack` by a record, and return the list of the stopped homes."""
    running: dict[Home, ManagerRecord] = {}
    stopped: list[Home] = []

    def up(home: Home, *_: object) -> ManagerRecord:
        running[home] = RECORD
        monkeypatch.setattr(compose_deployment, "_CREATED_HERE", {home.path})
        return RECORD

    monkeypatch.setattr(container_grid, "up", up)
    monkeypatch.setattr(grid_link, "Client", FakeClient)
    monkeypatch.setattr(manager_process, "stop_manager", stopped.append)
    monkeypatch.setattr(Home, "record", lambda home: running.get(home))
    monkeypatch.setattr(Home, "token", lambda _: "secret")
    for name in ("check_installed", "check_python", "open_objects", "open_local_files"):
        monkeypatch.setattr(Backend, name, lambda *_: None)
    return stopped


def test_grid_with_pools_starts_in_containers_and_stops_at_the_end(tmp_path: Path, stopped: list[Home]) -> None:
    with Grid("localstack", home=tmp_path, workers=2):
        assert not stopped
    assert [home.path for home in stopped] == [tmp_path]


def test_manager_ends_if_the_grid_cannot_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]

    class Started(subprocess.Popen[bytes]):
        def __init__(self, argv: list[str], **options: Any) -> None:
            super().__init__(sleeper, **options)
            started.append(self)

    def fail(self: ObjectPickler) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr("batchlab.runtime.manager_process.subprocess.Popen", Started)
    monkeypatch.setattr(ObjectPickler, "check_modules", fail)
    try:
        with pytest.raises(OSError, match="no more processes"):
            Grid("local", home=tmp_path)
        (process,) = started
        until(lambda: process.poll() is not None)
    finally:
        for process in started:
            process.kill()
            process.wait()
