"""Submission of jobs that bring their own items: the function and the plan go into the bucket, and
then the job is submitted.

Invariant: objects are written before the objects that refer to them. A job that could not be
submitted leaves no objects. The items of a map are read on the caller's thread, in parts.

Pickling of functions and items, so that a worker can load them.

Invariant: modules that a worker can import are pickled by name, and all others by value.
cloudpickle's settings are restored afterwards.
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
"""Held while this module changes cloudpickle's registry, which is global to the process."""

_ASK = """
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
    """Reduce a code object as cloudpickle does, but keep the file name, so that tracebacks show
    it."""
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    named = (code.co_filename if argument == "<dynamic-code>" else argument for argument in arguments)
    return make, tuple(named)


# Not a class statement, because cloudpickle lacks type annotations. The type checker would reject a
# subclass of Any.
_Pickler = type(
    "_Pickler",
    (cloudpickle.Pickler,),
    {"dispatch_table": ChainMap({CodeType: _with_file}, cloudpickle.Pickler.dispatch_table)},
)


def pickled(function: Callable[..., Any]) -> bytes:
    """Pickle a function within `ObjectPickler.by_value`. Raise the error of the pickling."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(function)
    return buffer.getvalue()


class ObjectPickler:
    """Pickling of objects with the knowledge of which modules of this process the workers lack."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._local: list[ModuleType] = []
        """Top-level modules that the workers lack. Their submodules are pickled with them."""

    def function(self, function: Callable[..., Any]) -> bytes:
        """Return the pickled function. Raise UsageError if it cannot be pickled."""
        name = getattr(function, "__qualname__", None) or repr(function)
        if not callable(function):
            raise UsageError(f"{name} is no function.", remedy="Give map something to call.")
        with self.by_value():
            try:
                return pickled(function)
            except Exception as error:
                raise UsageError(
                    f"The function {name} cannot be sent to the workers: {type(error).__name__}: {error}.",
                    remedy="Let it make what it cannot carry (connections, locks, open files), "
                    "instead of using the ones that are here.",
                ) from error

    def items(self, items: Sequence[Any], first: int, file: Callable[[File], Json], *, starred: bool) -> list[Json]:
        """Return encoded items, or for `starred` lists of encoded arguments. If an item cannot be
        encoded, raise UsageError with its number, counted from `first`."""
        done: list[Json] = []
        encode = _arguments if starred else values.encode_object
        with self.by_value():
            try:
                for item in items:
                    done.append(encode(item, file))  # noqa: PERF401 - see below
            except values.NotAValue as error:
                # The number of encoded items is the index of the failed one.
                raise UsageError(
                    f"Item {first + len(done)} cannot be sent to the workers: {error.message.rstrip('.')}.",
                    remedy="Nothing was submitted. Send plain data, or what makes the object.",
                ) from error
        return done

    @contextmanager
    def by_value(self) -> Iterator[None]:
        """Make cloudpickle pickle the modules by value that the workers cannot import, during the
        block."""
        with _REGISTRY:
            self._look_around()
            known = cloudpickle.list_registry_pickle_by_value()
            ours = [one for one in self._local if one.__name__ not in known]
            for our in ours:
                cloudpickle.register_pickle_by_value(our)
            try:
                yield
            finally:
                for one in ours:
                    cloudpickle.unregister_pickle_by_value(one)

    def _look_around(self) -> None:
        """Check the modules that were imported since the last call."""
        fresh = sys.modules.keys() - self._seen
        places = {
            name: place for name in fresh if "." not in name and (place := _place(name)) and not _is_installed(place)
        }
        if places:
            theirs = _workers_places(list(places))
            self._local += [sys.modules[name] for name in places if theirs[name] != places[name]]
        self._seen |= fresh


def _arguments(item: Any, file: Callable[[File], Json]) -> Json:
    try:
        arguments = list(item)
    except TypeError:
        raise values.NotAValue(f"It is {item!r:.60}, and not a sequence of arguments.") from None
    return [values.encode_object(argument, file) for argument in arguments]


def _place(name: str) -> str | None:
    """Return the file or folder that a module was loaded from. Return None for the standard
    library, for `__main__`, and for modules without a file."""
    module = sys.modules.get(name)
    if name in sys.stdlib_module_names or name == "__main__":
        return None
    folders = getattr(module, "__path__", None) or ()
    return getattr(module, "__file__", None) or next(iter(folders), None)


def _is_installed(place: str) -> bool:
    paths = sysconfig.get_paths()
    return place.startswith((f"{paths['purelib']}/", f"{paths['platlib']}/"))


def _workers_places(names: Sequence[str]) -> dict[str, str | None]:
    """Return the paths from which a worker would load these modules. As in a task's process, -P
    excludes the current folder and the script's folder from the path."""
    answer = subprocess.run([sys.executable, "-P", "-c", _ASK, *names], capture_output=True, text=True, check=True)
    found: dict[str, str | None] = json.loads(answer.stdout.splitlines()[-1])
    return found


T = TypeVar("T")

MAP = StageName("map")

MAX_PARALLEL_UPLOADS = 16

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(slots=True)
class Chunk:
    """Encoded items from index `first`, and the files (path, key) that they refer to."""

    first: int
    items: list[Json]
    files: list[tuple[Path, str]]

    def file(self, job: JobId) -> Callable[[File], Json]:
        """Return the function that encodes a file in one of the items."""
        return partial(_reference, f"{object_keys.raw(job)}{self.first:08d}", self.files)


@dataclass(frozen=True, slots=True)
class _PreparedJob:
    """A job to submit, and its items if they are few."""

    job: JobDef
    few: list[Json] | None


class JobSubmitter:
    """Submits the jobs of one grid that bring their own items."""

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

        The items of a `starred` function are sequences of arguments. `stage` describes the tasks,
        without the handler. A `tolerant` job succeeds even if tasks fail. Raise UsageError for an
        object that cannot be pickled, or the error that the iteration over the items raises. Then
        nothing is submitted.
        """
        self._link.check_open()
        pickled = self.shipping.function(Starred(function) if starred else function)
        draft = self.draft(name, stage)
        chunks = self._chunks(draft.id, items, starred=starred)
        made = self._made(draft, pickled, chunks, tolerant=tolerant)
        if made is None:
            return None
        self._submitted(made.job, lambda client: client.submit(made.job, made.few))
        return made.job

    def draft(self, name: str, stage: StageDef) -> JobDef:
        """Return a job with an id and without items."""
        link = self._link
        job = object_keys.job_id(name, link.ids.fresh("map"))
        # Without a client token, because no other process can use this id, and the submission is
        # faster.
        return JobDef(job, name, (stage,), link.clock.now_s())

    def send(
        self, draft: JobDef, pickled: bytes, chunks: Iterable[Chunk], accepted: Callable[[], None], *, wait_s: float
    ) -> OutcomesView | None:
        """Submit the job with its encoded items and its pickled handler, as `submit` does. The job
        is tolerant. Wait up to `wait_s` for its first outcomes. `accepted` may be called twice."""
        made = self._made(draft, pickled, chunks, tolerant=True)
        if made is None:
            return None
        return self._submitted(
            made.job, lambda client: client.submit_and_hear(made.job, made.few, accepted, wait_s=wait_s)
        )

    def _made(self, draft: JobDef, pickled: bytes, chunks: Iterable[Chunk], *, tolerant: bool) -> _PreparedJob | None:
        """Store the job's objects in the bucket and return the job. Return None if it would be
        empty."""
        link, job = self._link, draft.id
        (stage,) = draft.stages
        key = f"code/{hashlib.sha256(pickled).hexdigest()}.pkl"
        try:
            count, few = self._bring(job, key, pickled, chunks)
        except BaseException:
            link.run(self._remove(job))
            raise
        if not count:
            return None
        job_def = replace(
            draft, stages=(replace(stage, handler=f"pickle:{key}"),), items=count, max_failures=count if tolerant else 0
        )
        return _PreparedJob(job_def, few)

    def _submitted(self, job: JobDef, submit: Callable[[Client], T]) -> T:
        link = self._link
        link.follow(job.id)
        try:
            return link.call(submit)
        except UsageError:
            link.leave(job.id, cancel=False)
            link.run(self._remove(job.id))
            raise
        except BaseException:
            # The submission may have arrived in spite of the error.
            link.leave(job.id, cancel=True)
            raise

    def _bring(self, job: JobId, key: str, pickled: bytes, chunks: Iterable[Chunk]) -> tuple[int, list[Json] | None]:
        """Store the handler in the bucket, and also the items if they are many. Return the number
        of items, and the items if they are few enough for the submission."""
        run = self._link.run
        writer = PartWriter(self._link.objects, self._link.patience, job, MAP, 0)
        kept: list[Chunk] = []
        count = size_bytes = 0
        are_few = True
        for chunk in chunks:
            if not are_few:
                run(self._write(writer, job, *kept))
                kept.clear()
            kept.append(chunk)
            count += len(chunk.items)
            if are_few and count <= MAX_STORED_ITEMS and not chunk.files:
                size_bytes += sum(map(values.roughly, chunk.items))
                are_few = size_bytes <= MAX_STORED_BYTES
            else:
                are_few = False
        if are_few:
            if kept and key not in self._stored:
                run(self._store(key, pickled))
            return count, [item for one in kept for item in one.items]
        # The last chunks are stored together with the rest. Most maps have a single chunk, so they
        # need one call of the loop.
        run(self._commit(writer, job, kept, key, pickled))
        return count, None

    def _chunks(self, job: JobId, items: Iterable[Any], *, starred: bool) -> Iterator[Chunk]:
        drawn, first = iter(items), 0
        while some := list(islice(drawn, PART_ITEMS)):
            chunk = Chunk(first, [], [])
            chunk.items += self.shipping.items(some, first, chunk.file(job), starred=starred)
            yield chunk
            first += len(some)

    async def _write(self, writer: PartWriter, job: JobId, *chunks: Chunk) -> None:
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

        await asyncio.gather(
            *(upload(path, key) for path, key in chunk.files),
            *(
                # The writer would store them one at a time.
                put(n)
                for n, item in enumerate(chunk.items)
                if values.roughly(item) > ITEM_BYTES
            ),
        )
        await writer.add(*chunk.items)

    async def _commit(self, writer: PartWriter, job: JobId, last: Sequence[Chunk], key: str, pickled: bytes) -> None:
        await self._write(writer, job, *last)
        if key not in self._stored:
            await self._store(key, pickled)
        await writer.commit(TaskSet())

    async def _store(self, key: str, pickled: bytes) -> None:
        put = partial(self._link.objects.put, key, pickled, if_absent=True)
        with suppress(AlreadyExists):  # the key is a hash, so the content is equal
            await self._link.patience(put)
        self._stored.add(key)

    async def _remove(self, job: JobId) -> None:
        for prefix in object_keys.everything_of(job):
            async for page in self._link.objects.list(prefix):
                await self._link.objects.delete([object_info.key for object_info in page])


def _reference(prefix: str, files: list[tuple[Path, str]], file: File) -> Json:
    """Return the reference to a file in the items. A file of this process is added to `files` for
    the upload."""
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
    """Return the job's name: the given one, or one made from the function's name. Raise UsageError
    if the given one is invalid."""
    if name is None:
        text = str(getattr(function, "__name__", "")).lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:40] or "map"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a job.", remedy="Use up to 40 lower case letters, digits, - and _, no - or _ first."
        )
    return name
