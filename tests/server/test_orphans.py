"""Orphans: on a laptop, a worker outlives its manager only for a limited time."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from batchlab.runtime.home import Home, ManagerRecord
from batchlab.server import worker_service


def test_worker_without_a_manager_drains_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_service, "ORPHAN_S", 0.1)
    asyncio.run(_watch(Home(tmp_path)))


async def _watch(home: Home) -> None:
    drained = asyncio.Event()
    with home.lock():
        home.write_record(ManagerRecord("http://127.0.0.1:1", os.getpid(), "manager-1", "local"))
        watching = asyncio.create_task(worker_service._drain_orphan(home, drained.set))
        await asyncio.sleep(0.3)
        assert not drained.is_set(), "its manager is there"
    async with asyncio.timeout(5):
        await watching
    assert drained.is_set()
