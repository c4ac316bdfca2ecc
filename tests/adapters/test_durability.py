"""The writes of a `local` grid that wait for the disk, and their order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.local.objects import open_local
from batchlab.adapters.sql.engines import WalFlush
from batchlab.adapters.sql.ledger import open_sqlite
from batchlab.core.atomic_write import Sync, of_single_call, read_sync
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Control, JobId, JobState, StageName
from batchlab.core.ports import JobHistory

SPEC = "jobs/j-1/spec.json"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the system calls that create names and the calls that wait for the disk, in order."""
    found: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            found.append(name)
            return result

        return note

    for name in ("fdatasync", "fsync", "link", "rename"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    return found


def test_the_default_is_safe_for_jobs_and_fast_for_single_calls() -> None:
    assert read_sync({}) is Sync.JOBS
    assert read_sync({"BATCHLAB_SYNC": "all"}) is Sync.ALL
    with pytest.raises(UsageError, match="BATCHLAB_SYNC"):
        read_sync({"BATCHLAB_SYNC": "sometimes"})
    with of_single_call(True):
        assert [one.waits for one in (Sync.ALL, Sync.JOBS, Sync.NONE)] == [True, False, False]
    with of_single_call(False):
        assert [one.waits for one in (Sync.ALL, Sync.JOBS, Sync.NONE)] == [True, True, False]


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_answer(tmp_path: Path, calls: list[str]) -> None:
    objects = open_local(tmp_path)
    asyncio.run(objects.put(SPEC, b"{}", if_absent=True))
    # The content and the names of the two new folders are synced first, then the name of the object.
    assert sorted(calls[:3]) == ["fdatasync", "fsync", "fsync"]
    assert calls[3:] == ["link", "fsync"]
    calls.clear()
    asyncio.run(objects.put(SPEC, b"{ }"))
    assert calls == ["fdatasync", "rename", "fsync"]


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_single_call_and_a_marker_do_not_wait(tmp_path: Path, calls: list[str], size: int) -> None:
    async def act() -> None:
        objects = open_local(tmp_path)
        await objects.put("jobs/j-1/map/running/0.json", b"x" * size)
        await objects.put("logs/j-1/.tails/w-1.json", b"x" * size)
        with of_single_call(True):
            await objects.put(SPEC, b"x" * size, if_absent=True)

    asyncio.run(act())
    assert calls == ["rename", "rename", "link"]


def test_callers_that_wait_at_once_share_a_flush(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "a-wal").touch()

    async def act() -> None:
        flush = WalFlush(tmp_path / "a")
        await asyncio.gather(*(flush() for _ in range(20)))
        flush.close()

    asyncio.run(act())
    assert calls.count("fdatasync") == 1


def test_a_job_that_is_restored_or_forgotten_is_so_after_a_power_cut(tmp_path: Path, calls: list[str]) -> None:
    """The rebuild of a ledger is acknowledged at its end."""
    job = JobDef(JobId("sums"), "sums", (StageDef(StageName("s"), handler="a:b"),), 0.0, items=1)

    async def act() -> list[int]:
        ledger = open_sqlite(tmp_path / "ledger.db", Sync.JOBS)
        flushes = []
        await ledger.jobs()
        calls.clear()
        await ledger.restore(JobHistory(job, JobState.SUBMITTED, [], Control.RUN), over=None)
        flushes.append(calls.count("fdatasync"))
        await ledger.forget([job.id])
        flushes.append(calls.count("fdatasync"))
        await ledger.close()
        return flushes

    assert asyncio.run(act()) == [1, 2]
