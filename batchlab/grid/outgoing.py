"""A map on its way to the grid: the function and the plan in the bucket, then the job.

Invariant: payload before pointer, and nothing of a map that could not be submitted stays behind.
The caller's items are drawn on the caller's thread, some at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from batchlab.errors import AlreadyExists, UsageError
from batchlab.grid.link import Link
from batchlab.grid.shipping import Shipping
from batchlab.manager.plans import PART_ITEMS, PartWriter
from batchlab.model import JobDef, JobId, Json, StageDef, TaskSet
from batchlab.protocol import naming, values
from batchlab.task import File

UPLOADS_AT_ONCE = 16


@dataclass(slots=True)
class Chunk:
    """Encoded items, and the files (path, key) that they refer to."""

    items: list[Json]
    files: list[tuple[Path, str]]


class Outgoing:
    """Submits maps of one grid."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._shipping = Shipping()
        self._stored: set[str] = set()
        """Keys of functions that are in the bucket."""

    def submit(
        self,
        name: str,
        function: Callable[..., Any],
        items: Iterable[Any],
        stage: Callable[[str], StageDef],
        *,
        tolerant: bool,
    ) -> JobDef | None:
        """Submit a job of one task per item, None where there is no item.

        `stage` is told the handler. A `tolerant` job succeeds whatever fails. UsageError for what
        cannot be pickled, and whatever drawing the items raises, with nothing submitted.
        """
        pickled = self._shipping.function(function)
        key = f"code/{hashlib.sha256(pickled).hexdigest()}.pkl"
        link = self._link
        token = link.ids.fresh("map")
        job = naming.job_id(name, token)
        one = stage(f"pickle:{key}")
        writer = PartWriter(link.objects, link.patience, job, one.name, 0)
        count, last = 0, Chunk([], [])
        try:
            for chunk in self._chunks(job, items):
                link.run(self._write(writer, last))
                count, last = count + len(chunk.items), chunk
            if not count:
                return None
            # The last chunk along with the rest: most maps have one chunk, and pay for one trip.
            link.run(self._commit(writer, last, key, pickled))
        except BaseException:
            link.run(self._remove(job))
            raise
        made = JobDef(
            job,
            name,
            (one,),
            link.clock.now_s(),
            items=count,
            max_failures=count if tolerant else 0,
            token=token,
        )
        link.follow(job)
        try:
            link.call(lambda client: client.submit(made))
        except UsageError:
            link.leave(job, cancel=False)
            link.run(self._remove(job))
            raise
        except BaseException:
            # It may have arrived all the same.
            link.leave(job, cancel=True)
            raise
        return made

    def _chunks(self, job: JobId, items: Iterable[Any]) -> Iterator[Chunk]:
        drawn, first = iter(items), 0
        while some := list(islice(drawn, PART_ITEMS)):
            files: list[tuple[Path, str]] = []
            file = partial(_reference, f"{naming.raw(job)}{first:08d}", files)
            yield Chunk(self._shipping.items(some, first, file), files)
            first += len(some)

    async def _write(self, writer: PartWriter, chunk: Chunk) -> None:
        limit = asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def upload(path: Path, key: str) -> None:
            async with limit:
                await self._link.objects.upload(key, path)

        await asyncio.gather(*(upload(path, key) for path, key in chunk.files))
        for item in chunk.items:
            await writer.add(item)

    async def _commit(self, writer: PartWriter, last: Chunk, key: str, pickled: bytes) -> None:
        await self._write(writer, last)
        if key not in self._stored:
            put = partial(self._link.objects.put, key, pickled, if_absent=True)
            try:
                await self._link.patience(put)
            except AlreadyExists:
                self._stored.add(key)  # named by its content, so what is there is the same
            self._stored.add(key)
        await writer.commit(TaskSet())

    async def _remove(self, job: JobId) -> None:
        for prefix in (f"jobs/{job}/", naming.raw(job)):
            async for page in self._link.objects.list(prefix):
                await self._link.objects.delete([one.key for one in page])


def _reference(prefix: str, files: list[tuple[Path, str]], file: File) -> Json:
    """What stands for a file among the items; one that this process has made is to be uploaded."""
    origin = file.origin()
    if origin is not None:
        return origin
    key = f"{prefix}/{len(files):06d}/{file.name}"
    files.append((file.path, key))
    return values.file_ref(key, file.name, file.size)
