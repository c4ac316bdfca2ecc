"""Submission of jobs with their own items: pickling of the function and the items, storage in the bucket, and the
request.

Invariant: an object is written before the objects that refer to it. A job that could not be submitted leaves no
objects. The items of a map are read on the caller's thread, in parts. Modules that a worker can import are pickled by
name, and other modules are pickled by value. The settings of cloudpickle are restored after the pickling.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import subprocess
import sys
import sysconfig
import threading
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import cloudpickle

from batchlab.client.grid_link import Link
from batchlab.core.errors import AlreadyExists, UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, Json, StageName, TaskSet
from batchlab.core.protocol import json_format, object_keys, values
from batchlab.core.task_context import File, name_problem
from batchlab.manager.stage_plans import ITEM_BYTES, MAX_STORED_BYTES, MAX_STORED_ITEMS, PART_ITEMS, PartWriter
from batchlab.worker.executor_calls import Starred

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import OutcomesView

_REGISTRY = threading.RLock()
"""Lock for changes of cloudpickle's registry, which is global to the process."""

_FIND_MODULES = """
import importlib.util, json, sys
def place(name):
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
json.dump({name: place(name) for name in sys.argv[1:]}, sys.stdout)
"""


def _with_file(code: CodeType) -> tuple[Any, ...]:
    """Reduce a code object as cloudpickle does, but keep the file name for tracebacks."""
    constructor, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return constructor, tuple(code.co_filename if value == "<dynamic-code>" else value for value in arguments)


# The class is created by `type`, because cloudpickle lacks type annotations and the type checker rejects a subclass of
# Any.
_Pickler = type(
    "_Pickler",
    (cloudpickle.Pickler,),
    {"dispatch_table": ChainMap({CodeType: _with_file}, cloudpickle.Pickler.dispatch_table)},
)


def pickled(function: Callable[..., Any]) -> bytes:
    """Pickle a function within `ObjectPickler.by_value`. An error of the pickling is raised unchanged."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(function)
    return buffer.getvalue()


class ObjectPickler:
    """Pickler of functions and items. The pickler stores the modules of this process that workers cannot import."""

    def __init__(self) -> None:
        self._checked: set[str] = set()
        self._local: list[ModuleType] = []
        """Top-level modules that workers cannot import.

        The submodules of a module that workers cannot import are also pickled by value.
        """

    def function(self, function: Callable[..., Any]) -> bytes:
        """Return the pickled function. Raise UsageError if the function cannot be pickled."""
        name = getattr(function, "__qualname__", None) or repr(function)
        if not callable(function):
            raise UsageError(f"{name} is not a function.", remedy="Pass a callable to map.")
        with self.by_value():
            try:
                return pickled(function)
            except Exception as error:
                raise UsageError(
                    f"The function {name} cannot be sent to the workers: {type(error).__name__}: {error}.",
                    remedy="Create connections, locks, and open files inside the function. Objects of this process "
                    "cannot be sent.",
                ) from error

    def items(self, items: Sequence[Any], first: int, file: Callable[[File], Json], *, starred: bool) -> list[Json]:
        """Return encoded items, or for `starred` lists of encoded arguments. Raise UsageError with the number of the
        item, counted from `first`, if an item cannot be encoded.
        """
        encoded: list[Json] = []
        encode = _arguments if starred else values.encode_object
        with self.by_value():
            try:
                for item in items:
                    encoded.append(encode(item, file))  # noqa: PERF401 - the length is needed after an error
            except values.NotAValue as error:
                raise UsageError(
                    f"Item {first + len(encoded)} cannot be sent to the workers: {error.message.rstrip('.')}.",
                    remedy="Nothing was submitted. Use plain data, and create other objects inside the function.",
                ) from error
        return encoded

    @contextmanager
    def by_value(self) -> Iterator[None]:
        """During the block, cloudpickle pickles the modules by value that the workers cannot import."""
        with _REGISTRY:
            self._check_modules()
            registered = cloudpickle.list_registry_pickle_by_value()
            modules = [module for module in self._local if module.__name__ not in registered]
            for module in modules:
                cloudpickle.register_pickle_by_value(module)
            try:
                yield
            finally:
                for module in modules:
                    cloudpickle.unregister_pickle_by_value(module)

    def _check_modules(self) -> None:
        """Find modules that workers cannot import among the modules that were imported since the last call."""
        new = sys.modules.keys() - self._checked
        paths = sysconfig.get_paths()
        installed = (f"{paths['purelib']}/", f"{paths['platlib']}/")
        places = {
            name: place
            for name in new
            if "." not in name and (place := _place(name)) and not place.startswith(installed)
        }
        if places:
            # As in a task's process, the option -P excludes the current folder and the script's folder from the module
            # search path.
            command = [sys.executable, "-P", "-c", _FIND_MODULES, *places]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            workers_places: dict[str, str | None] = json.loads(answer.stdout.splitlines()[-1])
            self._local += [sys.modules[name] for name in places if workers_places[name] != places[name]]
        self._checked |= new


def _arguments(item: Any, file: Callable[[File], Json]) -> Json:
    try:
        arguments = list(item)
    except TypeError:
        raise values.NotAValue(f"{item!r:.60} is not a sequence of arguments.") from None
    return [values.encode_object(argument, file) for argument in arguments]


def _place(name: str) -> str | None:
    """Return the file or folder that a module was loaded from. Return None for the standard library, for `__main__`,
    and for modules without a file.
    """
    module = sys.modules.get(name)
    if name in sys.stdlib_module_names or name == "__main__":
        return None
    folders = getattr(module, "__path__", None) or ()
    return getattr(module, "__file__", None) or next(iter(folders), None)


T = TypeVar("T")

MAP = StageName("map")

MAX_PARALLEL_UPLOADS = 16

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(slots=True)
class Chunk:
    """Encoded items from index `first`, and the files (path, key) in these items."""

    first: int
    items: list[Json]
    files: list[tuple[Path, str]]

    def file(self, job: JobId) -> Callable[[File], Json]:
        """Return the function that encodes a file in one of the items."""
        return partial(_reference, f"{object_keys.raw(job)}{self.first:08d}", self.files)


@dataclass(frozen=True, slots=True)
class _PreparedJob:
    """A job that is ready for submission.

    `items` are the items of a small job, or None if the bucket contains the items.
    """

    job: JobDef
    items: list[Json] | None


class JobSubmitter:
    """Submitter of jobs with their own items to one grid."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.shipping = ObjectPickler()
        self._stored: set[str] = set()
        """Keys of the functions that are in the bucket."""

    def submit(
        self,
        name: str,
        function: Callable[..., Any],
        items: Iterable[Any],
        stage: StageDef,
        *,
        tolerant: bool,
        starred: bool = False,
    ) -> JobDef | None:
        """Submit a job with one task per item. Return None if `items` is empty.

        The items of a `starred` function are sequences of arguments. `stage` describes the tasks, without the handler.
        A `tolerant` job succeeds even if tasks fail. Submit no job and raise UsageError if an object cannot be pickled.
        Submit no job if the iteration over the items raises an error.
        """
        self._link.check_open()
        pickled = self.shipping.function(Starred(function) if starred else function)
        draft = self.draft(name, stage)
        chunks = self._chunks(draft.id, items, starred=starred)
        prepared = self._prepare(draft, pickled, chunks, tolerant=tolerant)
        if prepared is None:
            return None
        self._request(prepared.job, lambda client: client.submit(prepared.job, prepared.items))
        return prepared.job

    def draft(self, name: str, stage: StageDef) -> JobDef:
        """Return a new job that has an id and no items."""
        link = self._link
        job = object_keys.job_id(name, link.ids.fresh("map"))
        # The job has no client token, because no other process can use its id. A job without a client token is accepted
        # faster.
        return JobDef(job, name, (stage,), link.clock.now_s())

    def send(
        self, draft: JobDef, pickled: bytes, chunks: Iterable[Chunk], accepted: Callable[[], None], *, wait_s: float
    ) -> OutcomesView | None:
        """Submit a tolerant job with its encoded items and its pickled handler.

        Wait up to `wait_s` seconds for the job's first outcomes. The function `accepted` may be called twice.
        """
        prepared = self._prepare(draft, pickled, chunks, tolerant=True)
        if prepared is None:
            return None
        return self._request(
            prepared.job, lambda client: client.submit_and_hear(prepared.job, prepared.items, accepted, wait_s=wait_s)
        )

    def _prepare(
        self, draft: JobDef, pickled: bytes, chunks: Iterable[Chunk], *, tolerant: bool
    ) -> _PreparedJob | None:
        """Store the job's objects in the bucket and return the job, or None for a job without items."""
        link, job = self._link, draft.id
        (stage,) = draft.stages
        key = f"code/{hashlib.sha256(pickled).hexdigest()}.pkl"
        try:
            count, items = self._store_objects(job, key, pickled, chunks)
        except BaseException:
            link.run(self._remove(job))
            raise
        if not count:
            return None
        job_def = replace(
            draft, stages=(replace(stage, handler=f"pickle:{key}"),), items=count, max_failures=count if tolerant else 0
        )
        return _PreparedJob(job_def, items)

    def _request(self, job: JobDef, request: Callable[[Client], T]) -> T:
        link = self._link
        link.follow(job.id)
        try:
            return link.call(request)
        except UsageError:
            link.leave(job.id, cancel=False)
            link.run(self._remove(job.id))
            raise
        except BaseException:
            # The manager may have accepted the job in spite of the error.
            link.leave(job.id, cancel=True)
            raise

    def _store_objects(
        self, job: JobId, key: str, pickled: bytes, chunks: Iterable[Chunk]
    ) -> tuple[int, list[Json] | None]:
        """Store the handler in the bucket, and also the items of a large job. Return the number of items, and the items
        of a small job, which the submission contains.
        """
        run = self._link.run
        writer = PartWriter(self._link.objects, self._link.patience, job, MAP, 0)
        pending: list[Chunk] = []
        count = size_bytes = 0
        are_few = True
        for chunk in chunks:
            if not are_few:
                run(self._write(writer, job, pending))
                pending.clear()
            pending.append(chunk)
            count += len(chunk.items)
            if are_few and count <= MAX_STORED_ITEMS and not chunk.files:
                size_bytes += sum(map(values.roughly, chunk.items))
                are_few = size_bytes <= MAX_STORED_BYTES
            else:
                are_few = False
        if are_few:
            if pending and key not in self._stored:
                run(self._store(key, pickled))
            return count, [item for chunk in pending for item in chunk.items]

        async def commit() -> None:
            await self._write(writer, job, pending)
            if key not in self._stored:
                await self._store(key, pickled)
            await writer.commit(TaskSet())

        # One call of the event loop stores the last chunks and the handler. Most maps have a single chunk.
        run(commit())
        return count, None

    def _chunks(self, job: JobId, items: Iterable[Any], *, starred: bool) -> Iterator[Chunk]:
        iterator, first = iter(items), 0
        while part := list(islice(iterator, PART_ITEMS)):
            chunk = Chunk(first, [], [])
            chunk.items += self.shipping.items(part, first, chunk.file(job), starred=starred)
            yield chunk
            first += len(part)

    async def _write(self, writer: PartWriter, job: JobId, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            await self._write_one(writer, job, chunk)

    async def _write_one(self, writer: PartWriter, job: JobId, chunk: Chunk) -> None:
        limit = asyncio.Semaphore(MAX_PARALLEL_UPLOADS)
        objects, patience = self._link.objects, self._link.patience

        async def upload(path: Path, key: str) -> None:
            async with limit:
                await objects.upload(key, path)

        async def put(number: int) -> None:
            data = json_format.to_bytes(chunk.items[number])
            if len(data) <= ITEM_BYTES:
                return
            key = object_keys.item(job, MAP, 0, object_keys.name_digest(data))
            async with limit:
                await patience(partial(objects.put, key, data))
            chunk.items[number] = values.value_ref(key)

        # Large items are stored in parallel here, because the writer would store large items one after the other.
        large = [number for number, item in enumerate(chunk.items) if values.roughly(item) > ITEM_BYTES]
        await asyncio.gather(*(upload(path, key) for path, key in chunk.files), *map(put, large))
        await writer.add(*chunk.items)

    async def _store(self, key: str, pickled: bytes) -> None:
        put = partial(self._link.objects.put, key, pickled, if_absent=True)
        with suppress(AlreadyExists):  # the key is a hash of the content, so the stored content is equal
            await self._link.patience(put)
        self._stored.add(key)

    async def _remove(self, job: JobId) -> None:
        for prefix in object_keys.everything_of(job):
            async for page in self._link.objects.list(prefix):
                await self._link.objects.delete([object_info.key for object_info in page])


def _reference(prefix: str, files: list[tuple[Path, str]], file: File) -> Json:
    """Return the reference to a file in an item. A local file is added to `files` and uploaded later."""
    origin = file.origin()
    if origin is not None:
        return origin
    if not file.path.is_file():
        raise values.NotAValue(f"The file {file.path} does not exist.")
    if problem := name_problem(file.name):
        raise values.NotAValue(f"The file name {file.name!r} {problem}.")
    key = f"{prefix}/{len(files):06d}/{file.name}"
    files.append((file.path, key))
    return values.file_ref(key, file.name, file.size)


def job_name(function: Callable[..., Any], name: str | None) -> str:
    """Return `name`, or a name that is derived from the function's name. Raise UsageError if `name` is invalid."""
    if name is None:
        text = str(getattr(function, "__name__", "")).lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:40] or "map"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid job name.",
            remedy="Use up to 40 lower case letters, digits, - and _, and begin with a letter or a digit.",
        )
    return name
