"""Download of the objects that a task's item refers to, and upload of its outputs.

Invariant: an input that is missing or does not fit on the disk fails only the task of the input. An unavailable service
does not fail any task, and the BackendError of the service propagates.
"""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from batchlab.core.errors import AlreadyExists, BackendError, NotFound
from batchlab.core.model import Failure, FailureKind, Json, TaskMetrics
from batchlab.core.ports import LocalFiles, Objects
from batchlab.core.protocol import object_keys, values
from batchlab.core.protocol.bundle_inputs import ForeignReference, JobObjects
from batchlab.core.protocol.field_checks import MAX_INPUT_NAME
from batchlab.core.task_context import name_problem
from batchlab.worker.handlers import Fault
from batchlab.worker.inflight_message import Work
from batchlab.worker.task_executor import ExecutionRequest, local_ref

OffLoop = Callable[..., Awaitable[Any]]
"""Function that calls a blocking function in a thread, or directly in an event loop without threads."""

_PIECE_BYTES = 8 * 1024 * 1024
_MAX_DOWNLOADS = 16
_MAX_CHUNK_TASKS = 16
_MAX_CHUNK_BYTES = 256 * 1024 * 1024
_MAX_DEPTH = 8


def request(work: Work, folder: Path, *, function: Path | None, code: Path | None) -> ExecutionRequest:
    """Return the execution request that all tasks of `work` share. A child process runs in `folder`/cwd."""
    stage = work.stage
    return ExecutionRequest(
        handler=stage.handler,
        function=str(function) if function else None,
        command=list(stage.command),
        stdout=stage.stdout,
        code=str(code) if code else "",
        params_json=json.dumps(dict(work.job.params)),
        job=work.job.id,
        stage=stage.name,
        attempt=work.bundle.attempt,
        folder=str(folder),
        cwd=str(folder / "cwd"),
        prefix=object_keys.files(work.bundle, work.execution, work.key),
        objects=function_key(work) is not None,
    )


def function_key(work: Work) -> str | None:
    """Return the object key of the stage's pickled function, or None for a stage without a pickled function."""
    handler = work.stage.handler or ""
    return handler.removeprefix("pickle:") if handler.startswith("pickle:") else None


def chunks(tasks: Sequence[int], items: Sequence[Json]) -> Iterator[list[tuple[int, Json]]]:
    """Split the tasks into chunks, so that a chunk's inputs are fetched while the previous chunk runs.

    The first chunk has one task, so that the task starts soon. The size of further chunks doubles up to 16 tasks or 256
    MiB. Items without inputs to fetch do not count toward the size of a chunk.
    """
    chunk: list[tuple[int, Json]] = []
    limit, count, size = 1, 0, 0
    for task, item in zip(tasks, items, strict=True):
        needs = [_bytes(reference) for reference in values.references(item)] if not values.is_flat(item) else []
        if needs and chunk and (count >= limit or size + sum(needs) > _MAX_CHUNK_BYTES):
            yield chunk
            chunk, count, size = [], 0, 0
            limit = min(2 * limit, _MAX_CHUNK_TASKS)
        chunk.append((task, item))
        count += bool(needs)
        size += sum(needs)
    if chunk:
        yield chunk


def refers(chunk: Iterable[tuple[int, Json]]) -> bool:
    """Return whether any item in the chunk refers to an object."""
    return any(_refers(item) for _, item in chunk)


def _bytes(reference: Json) -> int:
    if values.kind(reference) == "$part":
        return int(reference["stop"]) - int(reference["start"])
    # A shared value is fetched once for all tasks of an instance.
    return 0 if object_keys.is_shared_value(reference.get("$file", "")) else int(reference.get("size", 0))


class ValueCache(Protocol):
    """Files of shared values that an instance caches; see `code_cache.CodeCache`."""

    async def link_value(self, key: str, target: Path) -> None: ...

    def evict_unused(self) -> None: ...


class Inputs:
    """Downloader of the objects that the items of one execution refer to.

    Objects in `files` are used without a copy, and shared values are used from `cache`. All other objects are
    downloaded into the folder of the task. If the disk is full, unused files of the cache are removed.
    """

    def __init__(
        self,
        objects: Objects,
        folder: Path,
        off_loop: OffLoop,
        own: JobObjects,
        files: LocalFiles | None = None,
        cache: ValueCache | None = None,
    ) -> None:
        self._objects = objects
        self._files = files
        self._cache = cache
        self._values: dict[str, Path] = {}
        """Links to shared values, which all tasks of the execution use, by key."""
        self._values_lock = asyncio.Lock()
        self._own = own
        self._folder = folder
        self._off_loop = off_loop
        self._at_once = asyncio.Semaphore(_MAX_DOWNLOADS)
        self.fetched: set[int] = set()
        """Tasks that have a folder for downloaded inputs."""
        self._headers: dict[tuple[str, int, int], bytes] = {}

    async def fetch(self, chunk: Iterable[tuple[int, Json]]) -> list[tuple[int, Json | Failure]]:
        """Return the chunk with local references, and with a Failure for each missing input."""
        items = dict(chunk)
        referring = [task for task, item in items.items() if _refers(item)]
        self.fetched.update(referring)
        items |= await _all(self._fetch_item(task, items[task]) for task in referring)
        return list(items.items())

    async def _fetch_item(self, task: int, item: Json) -> tuple[int, Json | Failure]:
        folder = self._folder / str(task) / "in"
        try:
            try:
                return task, await self._local(item, folder, _MAX_DEPTH)
            except (BackendError, OSError) as error:
                if self._cache is None or no_room(error) is None:
                    raise
                # The other downloads of the chunk may also have failed, and have removed their files.
                await self._remove(folder)
                self._cache.evict_unused()
                return task, await self._local(item, folder, _MAX_DEPTH)
        except NotFound as error:
            return task, _failure(task, f"Its input does not exist: {error}", error)
        except (BackendError, OSError) as error:
            reason = no_room(error)
            if reason is None:
                raise
            # The folder of a failed download is removed immediately, because the next bundle starts before the
            # execution's folder is cleaned.
            await self._remove(folder)
            return task, _failure(task, f"Its input does not fit on the worker: {reason}", error)
        except (ValueError, ForeignReference) as error:
            return task, _failure(task, f"Its input cannot be read: {error}", error)

    async def _remove(self, folder: Path) -> None:
        await self._off_loop(partial(shutil.rmtree, ignore_errors=True), folder)

    async def _local(self, item: Json, folder: Path, depth: int) -> Json:
        references: dict[str, Json] = {}
        for reference in values.references(item):
            references.setdefault(json.dumps(reference, sort_keys=True), reference)
        if references and not depth:
            raise ValueError(f"it refers to objects more than {_MAX_DEPTH} deep")
        fetched = await _all(
            self._reference(reference, folder / str(number), depth)
            for number, reference in enumerate(references.values())
        )
        by_reference = dict(zip(references, fetched, strict=True))
        return values.replace(item, lambda ref: by_reference[json.dumps(ref, sort_keys=True)])

    async def _reference(self, reference: Json, folder: Path, depth: int) -> Json:
        kind, key = values.kind(reference), self._own.key(reference)
        if kind == "$value":
            async with self._at_once:
                data = await self._objects.get(key)
            return await self._local(self._own.value(reference, data), folder, depth - 1)
        name = reference["name"]
        async with self._at_once:
            if kind == "$part":
                path = await self._part(reference, folder)
            else:
                path = await self._whole(key, name, folder)
        return local_ref(str(path), name, reference)

    async def _whole(self, key: str, name: str, folder: Path) -> Path:
        if self._files and (file := self._files.path(key)):
            return file
        if self._cache and object_keys.is_shared_value(key):
            return await self._value(key, self._cache)
        path = await self._place(name, folder)
        await self._objects.download(key, path)
        return path

    async def _value(self, key: str, cache: ValueCache) -> Path:
        async with self._values_lock:
            if key not in self._values:
                path = self._folder / "values" / str(len(self._values))
                await cache.link_value(key, path)
                self._values[key] = path
        return self._values[key]

    async def _part(self, reference: Json, folder: Path) -> Path:
        key, start, stop = reference["$part"], int(reference["start"]), int(reference["stop"])
        path = await self._place(reference["name"], folder)
        await self._off_loop(path.write_bytes, await self._header(key, reference["header"]))
        while start < stop:
            piece = await self._objects.get_range(key, start, min(stop, start + _PIECE_BYTES))
            if not piece:
                raise NotFound(f"{key} is shorter than when the job was planned.")
            await self._off_loop(_append, path, piece)
            start += len(piece)
        return path

    async def _header(self, key: str, header: Sequence[int] | None) -> bytes:
        if not header:
            return b""
        place = (key, header[0], header[1])
        # The header is fetched once per execution, because every part of a file needs the header.
        if place not in self._headers:
            self._headers[place] = await self._objects.get_range(*place)
        return self._headers[place]

    async def _place(self, name: str, folder: Path) -> Path:
        await self._off_loop(_make, folder)
        last = name.rpartition("/")[2]
        return folder / ("input" if name_problem(last) else last)


def _refers(item: Json) -> bool:
    return not values.is_flat(item) and next(values.references(item), None) is not None


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


async def _all(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Return the results of all calls, or raise an error after all calls have ended.

    An error of a service has priority over NotFound. `asyncio.gather` alone would leave other calls running after the
    first error.
    """
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise next((error for error in errors if not isinstance(error, NotFound)), errors[0])
    return list(results)


def _failure(task: int, reason: str, error: Exception) -> Failure:
    return Failure(task, FailureKind.INPUT, reason, error=type(error).__name__)


def metrics(item: Json, measured: Sequence[Any] | None) -> TaskMetrics | None:
    """Return the metrics of a task with the local item `item`, or None if there is nothing to report.

    `measured` has the CPU time in seconds, the peak memory in bytes, and the size in bytes of the result. `measured` is
    None if the task was too short to be measured, or if its process died.
    """
    origins = [reference["origin"] for reference in values.references(item)] if not values.is_flat(item) else []
    if origins:
        name = origins[0]["name"][:MAX_INPUT_NAME]
        input_bytes = sum(map(_bytes, origins))
    elif measured is None:
        return None
    else:
        name, input_bytes = "", len(json.dumps(item))
    cpu_s, memory_bytes, output_bytes = measured or (None, None, None)
    return TaskMetrics(cpu_s, memory_bytes, input_bytes, output_bytes, name)


def failure(task: int, fault: Fault, run_s: float) -> Failure:
    """Return the Failure of a task from the fields in `fault`."""
    return Failure(task, run_s=run_s, **{**fault, "kind": FailureKind(fault["kind"])})


def no_room(error: BaseException) -> str | None:
    """Return the system's message if a full disk or quota caused `error`, else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return cause.strerror
        cause = cause.__cause__
    return None


async def upload(objects: Objects, uploads: Iterable[tuple[str, str]]) -> None:
    """Store each (path, key) as an object. No other execution uses the keys."""
    for path, key in uploads:
        # An existing key means that an earlier try of the request wrote the object, and that the answer was lost.
        with suppress(AlreadyExists):
            await objects.upload(key, Path(path), if_absent=True)
