"""Endpoint that returns the results of a job as one archive.

Invariant: no result can exhaust the manager's memory or disk. The size of an object is known before
it is read, and an archive has a total limit. The manager makes one archive at a time and removes it
afterwards.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from fastapi import Query
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from batchlab.core import api_types
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.model import JobId
from batchlab.core.text import size
from batchlab.jobs import results
from batchlab.jobs.result_files import Within
from batchlab.jobs.results import Listed
from batchlab.manager.manager import Manager
from batchlab.server.http.common import Given, Leader, guarded
from batchlab.server.http.jobs import shown
from batchlab.server.http.upload import has_room, roomy
from batchlab.server.views import jobs

router = guarded()

MOST_BYTES = 2 * 1024**3
"""Limit of the contents of an archive. `batchlab job results` fetches larger results."""
MOST_OUTCOMES = 50_000
MOST_VALUE_BYTES = 16 * 1024**2
"""Limit of the inline values of one result, because all of them are in memory at once."""
WAITS_S = 3.0
"""Time in seconds that a request waits for the archive before it."""

_BY_HAND = "`batchlab job results` fetches them from the bucket itself, however many there are."


@router.get(
    "/jobs/{job}/results",
    response_class=FileResponse,
    responses={200: {"content": {"application/zip": {}}, "description": "A ZIP archive"}},
)
async def archive(
    manager: Leader, served: Given, job: JobId, stage: Annotated[list[str] | None, Query()] = None
) -> FileResponse:
    """Return the job's results as a ZIP archive of the files that `batchlab job results` writes.
    For a job that still runs, the archive contains the results so far. An archive has up to 2 GiB.
    While one archive is made or sent, another request gets status 503."""
    try:
        async with asyncio.timeout(WAITS_S):
            await served.archiving.acquire()
    except TimeoutError:
        raise BackendError(
            "Another archive of results is being made or sent, and a manager makes one at a time.",
            remedy="Try again in a while, or run `batchlab job results`, which waits for none.",
        ) from None
    try:
        return await _archive(manager, job, stage or (), served.archiving.release)
    except BaseException:
        served.archiving.release()
        raise


async def _archive(
    manager: Manager, job: JobId, stages: Sequence[str], over: Callable[[], None]
) -> FileResponse:
    record = await manager.ports.ledger.job(job)
    view = await shown(manager, record)
    key = await manager.ports.keys.of(record.job)
    rows = await manager.ports.ledger.bundles(job, done=True, limit=MOST_OUTCOMES + 1)
    if len(rows) > MOST_OUTCOMES:
        raise _too_much(f"has more than {MOST_OUTCOMES:,} outcomes")
    listing = [Listed.of(jobs.outcome_view(row, key)) for row in rows if row.completion]
    folder = Path(
        await asyncio.to_thread(tempfile.mkdtemp, prefix="batchlab-results-", dir=roomy())
    )
    try:
        # In an event loop on another thread, because it decodes and writes thousands of results.
        path = await asyncio.to_thread(_pack, manager, view, listing, stages, folder)
    except BaseException:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        raise
    return _Archive(path, folder, over, filename=f"{view['id']}.zip")


class _Archive(FileResponse):
    """Response that sends the archive and removes it afterwards, even after an error."""

    def __init__(
        self, path: Path, folder: Path, over: Callable[[], None], *, filename: str
    ) -> None:
        super().__init__(path, media_type="application/zip", filename=filename)
        self._folder = folder
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


def _too_much(why: str) -> UsageError:
    return UsageError(f"The job {why}, too much for an archive.", remedy=_BY_HAND)


def _pack(
    manager: Manager,
    view: api_types.JobView,
    listing: Sequence[Listed],
    stages: Sequence[str],
    folder: Path,
) -> Path:
    taken_bytes = 0

    def claim(size_bytes: int) -> None:
        nonlocal taken_bytes
        taken_bytes += size_bytes
        if taken_bytes > MOST_BYTES:
            raise _too_much(f"has more than {size(MOST_BYTES)} of results")
        if not has_room(folder, size_bytes):
            raise UsageError(
                "The manager's disk has no room for an archive of these results.",
                remedy=_BY_HAND,
            )

    claim(0)
    objects, patience = manager.ports.objects, manager.ports.patience
    out = folder / "results"
    within = Within(claim, MOST_VALUE_BYTES, remedy=_BY_HAND)
    asyncio.run(
        results.fetch(objects, view, listing, out, patience=patience, stages=stages, within=within)
    )
    path = folder / "results.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped:
        for file in sorted(out.rglob("*")):
            if file.is_file() and not file.name.startswith(".batchlab"):
                claim(0)
                zipped.write(file, f"{view['id']}/{file.relative_to(out).as_posix()}")
                file.unlink()  # saves disk space, because the archive contains the file now
    return path
