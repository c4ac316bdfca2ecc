"""Items on their way to the grid: the function and the plan in the bucket, then the job.

Invariant: payload before pointer, and nothing of a job that could not be submitted stays behind.
The items of a map are drawn on its caller's thread, some at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
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
from batchlab.manager.plans import ITEM_BYTES, PART_ITEMS, PartWriter
from batchlab.model import JobId, Json, StageName, TaskSet
from batchlab.protocol import naming, values, wire
from batchlab.task import File, name_problem

MAP = StageName("map")

UPLOADS_AT_ONCE = 16

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(slots=True)
class Chunk:
    """Encoded items from index `first` on, and the files (path, key) that they refer to."""

    first: int
    items: list[Json]
    files: list[tuple[Path, str]]

    def file(self, job: JobId) -> Callable[[File], Json]:
        """What encodes a file that one of the items refers to."""
        return partial(_reference, f"{naming.raw(job)}{self.first:08d}", self.files)


class Outgoing:
    """Submits jobs of one grid that bring their own items."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.shipping = Shipping()
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
        self._link.check_open()
        pickled = self.shipping.function(function)
        draft = self.draft(name, stage)
        return self.send(draft, pickled, self._chunks(draft.id, items), tolerant=tolerant)

    def draft(self, name: str, stage: StageDef) -> JobDef:
        """A job that has an id, and nothing else of its own yet."""
        link = self._link
        token = link.ids.fresh("map")
        job = naming.job_id(name, token)
        return JobDef(job, name, (stage,), link.clock.now_s(), token=token)

    def send(
        self, draft: JobDef, pickled: bytes, chunks: Iterable[Chunk], *, tolerant: bool
    ) -> JobDef | None:
        """Submit the job with its encoded items and its pickled handler; as `submit` otherwise."""
        link, job = self._link, draft.id
        (stage,) = draft.stages
        key = f"code/{hashlib.sha256(pickled).hexdigest()}.pkl"
        try:
            count = self._plan(job, key, pickled, chunks)
        except BaseException:
            link.run(self._remove(job))
            raise
        if not count:
            return None
        made = replace(
            draft,
            stages=(replace(stage, handler=f"pickle:{key}"),),
            items=count,
            max_failures=count if tolerant else 0,
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

    def _plan(self, job: JobId, key: str, pickled: bytes, chunks: Iterable[Chunk]) -> int:
        """Bring handler and items into the bucket; how many items there are."""
        run = self._link.run
        writer = PartWriter(self._link.objects, self._link.patience, job, MAP, 0)
        last: Chunk | None = None
        for chunk in chunks:
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
            chunk = Chunk(first, [], [])
            chunk.items += self.shipping.items(some, first, chunk.file(job))
            yield chunk
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
                # As the writer would, but several at once.
                put(naming.item(job, MAP, 0, chunk.first + n), n)
                for n, item in enumerate(chunk.items)
                if _size(item) > ITEM_BYTES
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


def _size(item: Json) -> int:
    """Its length where it is encoded, roughly: of what may be large in it."""
    if type(item) is list:
        return sum(map(_size, item))
    if type(item) is dict:
        return len(item.get("$pickle", ""))
    return len(item) if type(item) is str else 0


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


def job_name(function: Callable[..., Any], name: str | None) -> str:
    """The job's name: the given one if it may be one, else made from the function's."""
    if name is None:
        text = str(getattr(function, "__name__", "")).lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:40] or "map"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a job.",
            remedy="Use up to 40 lower case letters, digits, - and _, no - or _ first.",
        )
    return name
