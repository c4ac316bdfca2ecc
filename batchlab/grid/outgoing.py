"""A map on its way to the grid: the function and the plan in the bucket, then the job.

Invariant: payload before pointer, and nothing of a map that could not be submitted stays behind.
The caller's items are drawn on the caller's thread, some at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from batchlab.errors import AlreadyExists, UsageError
from batchlab.grid.link import Link
from batchlab.grid.shipping import Shipping
from batchlab.jobdef import JobDef, StageDef
from batchlab.manager.plans import PART_ITEMS, PartWriter
from batchlab.model import JobId, Json, StageName, TaskSet
from batchlab.protocol import naming, values, wire
from batchlab.task import File, name_problem

MAP = StageName("map")

UPLOADS_AT_ONCE = 16
LARGE_BYTES = 128 * 1024
"""An item that is longer when encoded becomes an object of its own: the manager reads plans, and
need not read this."""


@dataclass(slots=True)
class Chunk:
    """Encoded items from index `first` on, and the files (path, key) that they refer to."""

    first: int
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
        stage: StageDef,
        *,
        tolerant: bool,
    ) -> JobDef | None:
        """Submit a job of one task per item, None where there is no item.

        `stage` is what the tasks are to be, but for the handler. A `tolerant` job succeeds whatever
        fails. UsageError for what cannot be pickled, and whatever drawing the items raises, with
        nothing submitted.
        """
        link = self._link
        link.check_open()
        pickled = self._shipping.function(function)
        key = f"code/{hashlib.sha256(pickled).hexdigest()}.pkl"
        token = link.ids.fresh("map")
        job = naming.job_id(name, token)
        try:
            count = self._plan(job, key, pickled, items)
        except BaseException:
            link.run(self._remove(job))
            raise
        if not count:
            return None
        made = JobDef(
            job,
            name,
            (replace(stage, handler=f"pickle:{key}"),),
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

    def _plan(self, job: JobId, key: str, pickled: bytes, items: Iterable[Any]) -> int:
        """Bring function and items into the bucket; how many items there are."""
        run = self._link.run
        writer = PartWriter(self._link.objects, self._link.patience, job, MAP, 0)
        last: Chunk | None = None
        for chunk in self._chunks(job, items):
            if last:
                run(self._write(writer, job, last))
            last = chunk
        if last is None:
            return 0
        # The last chunk along with the rest: most maps have one chunk, and pay for one trip.
        run(self._commit(writer, job, last, key, pickled))
        return last.first + len(last.items)

    def _chunks(self, job: JobId, items: Iterable[Any]) -> Iterator[Chunk]:
        drawn, first = iter(items), 0
        while some := list(islice(drawn, PART_ITEMS)):
            files: list[tuple[Path, str]] = []
            file = partial(_reference, f"{naming.raw(job)}{first:08d}", files)
            yield Chunk(first, self._shipping.items(some, first, file), files)
            first += len(some)

    async def _write(self, writer: PartWriter, job: JobId, chunk: Chunk) -> None:
        limit = asyncio.Semaphore(UPLOADS_AT_ONCE)
        objects, patience = self._link.objects, self._link.patience

        async def upload(path: Path, key: str) -> None:
            async with limit:
                await objects.upload(key, path)

        async def put(key: str, number: int) -> None:
            async with limit:
                await patience(partial(objects.put, key, wire.to_bytes(chunk.items[number])))
            chunk.items[number] = values.value_ref(key)

        await asyncio.gather(
            *(upload(path, key) for path, key in chunk.files),
            *(
                put(naming.part(job, MAP, 0, chunk.first + n).replace("part-", "item-"), n)
                for n, item in enumerate(chunk.items)
                if _is_large(item)
            ),
        )
        for item in chunk.items:
            await writer.add(item)

    async def _commit(
        self, writer: PartWriter, job: JobId, last: Chunk, key: str, pickled: bytes
    ) -> None:
        await self._write(writer, job, last)
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


def _is_large(item: Json) -> bool:
    if type(item) is dict:
        return len(item.get("$pickle", "")) > LARGE_BYTES
    return type(item) is str and len(item) > LARGE_BYTES


def _reference(prefix: str, files: list[tuple[Path, str]], file: File) -> Json:
    """What stands for a file among the items; one that this process has made is to be uploaded."""
    origin = file.origin()
    if origin is not None:
        return origin
    if not file.path.is_file():
        raise values.NotAValue(f"It names the file {file.path}, which does not exist.")
    if problem := name_problem(file.name):
        raise values.NotAValue(f"It names the file {file.name!r}, but a name {problem}.")
    key = f"{prefix}/{len(files):06d}/{file.name}"
    files.append((file.path, key))
    return values.file_ref(key, file.name, file.size)
