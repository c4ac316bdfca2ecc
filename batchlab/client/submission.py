"""Submission of jobs from Python. The module pickles a function and encodes its items, stores the function and the
items, and submits the job.

Invariant: an object is written to the bucket before any object that refers to it. If a job cannot be submitted, the
objects of the job are removed. The items of a map are read on the caller's thread, in parts. Modules that a worker can
import are pickled by name, and other modules are pickled by value. The settings of cloudpickle are restored after the
pickling.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import cloudpickle

from batchlab.client.grid_link import Link
from batchlab.client.local_imports import LocalImports, imported_names
from batchlab.core import shared_values
from batchlab.core.errors import AlreadyExists, UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, Json, Outcome, StageName, TaskSet
from batchlab.core.protocol import json_format, object_keys, values
from batchlab.core.shared_values import Shared, StoredFile
from batchlab.core.task_context import File, name_problem
from batchlab.manager.stage_plans import ITEM_BYTES, MAX_STORED_BYTES, MAX_STORED_ITEMS, PART_ITEMS, PartWriter
from batchlab.worker import code_cache
from batchlab.worker.executor_calls import Starred, WithShared

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import OutcomesView

_REGISTRY = threading.RLock()
"""Lock for changes of cloudpickle's registry of modules, which is global to the process."""

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
    """Reduce a code object for pickle as cloudpickle does, but keep the file name of the code for tracebacks."""
    constructor, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return constructor, tuple(code.co_filename if value == "<dynamic-code>" else value for value in arguments)


@dataclass(slots=True)
class Pickled:
    """A pickled object, the modules that its functions import, and the shared values that it refers to."""

    data: bytes = b""
    imports: set[str] = field(default_factory=set)
    shared: dict[str, Shared[Any]] = field(default_factory=dict)


def _reduce(self: Any, obj: Any) -> Any:
    """Collect the imports of functions that are pickled by value, and pickle a shared value without its file."""
    if type(obj) is Shared:
        obj.__reduce__()  # Raise LookupError if the reference is closed.
        self.found.shared[obj.digest] = obj
        return Shared, (obj.digest, obj.size)
    if isinstance(obj, File):
        raise UsageError(
            f"A function or a shared value refers to {obj!r}, but only items and arguments are sent with their files.",
            remedy="Pass the File as an item, or use its content, file.read_bytes().",
        )
    reduced = cloudpickle.Pickler.reducer_override(self, obj)
    if type(obj) is FunctionType and reduced is not NotImplemented:
        self.found.imports.update(imported_names(obj.__code__, obj.__globals__.get("__package__")))
    return reduced


# The class is created with `type`, because cloudpickle lacks type annotations, and the type checker rejects a class
# statement with the base class Any.
_Pickler = type(
    "_Pickler",
    (cloudpickle.Pickler,),
    {
        "dispatch_table": ChainMap({CodeType: _with_file}, cloudpickle.Pickler.dispatch_table),
        "reducer_override": _reduce,
    },
)


def pickle_object(obj: Any) -> Pickled:
    """Return the pickled object. The caller must call `pickle_object` inside `ObjectPickler.by_value`. An error of
    pickle is raised unchanged.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.found = found = Pickled()
    pickler.dump(obj)
    found.data = buffer.getvalue()
    return found


LARGE_BYTES = 1_000_000
"""Size of a pickled function in bytes above which a program gets a warning."""
MAX_SHARED_BYTES = 2 * 1024**3


class ObjectPickler:
    """Pickler of functions and items. The pickler remembers the modules of this process that workers cannot import."""

    def __init__(self) -> None:
        self._checked: set[str] = set()
        self._last: tuple[int, str] | None = None
        """Number of imported modules and the last imported module at the last check."""
        self._local: list[ModuleType] = []
        """Top-level modules that workers cannot import.

        The submodules of a module in the list are also pickled by value.
        """
        self._registered: list[ModuleType] = []
        """Modules that cloudpickle pickles by value inside `by_value`."""
        self.imports = LocalImports(self._workers_lack)
        """Modules that the pickled functions import while they run."""
        self._warned: set[str] = set()

    def call(self, function: Callable[..., Any]) -> Pickled:
        """Return the pickled function, and record the modules that it imports. Warn about a large function.

        An error of pickle is raised unchanged. The caller must call `call` inside `by_value`.
        """
        pickled = pickle_object(function)
        self.imports.add(pickled.imports)
        if self._unregister(self.imports.names):
            imports = pickled.imports
            pickled = pickle_object(function)
            pickled.imports |= imports
        name = getattr(function, "__qualname__", None) or type(function).__name__
        if len(pickled.data) > LARGE_BYTES and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"The function {name} takes {len(pickled.data) / 1e6:.1f} MB when pickled. Each worker loads the "
                "function for each job. Store its large objects once with Grid.put, or pass them as a File.",
                stacklevel=2,
            )
        return pickled

    def function(self, function: Callable[..., Any]) -> Pickled:
        """Return the pickled function. Raise UsageError if the function cannot be pickled."""
        name = getattr(function, "__qualname__", None) or repr(function)
        if not callable(function):
            raise UsageError(f"{name} is not a function.", remedy="Pass a callable to map.")
        with self.by_value():
            try:
                return self.call(function)
            except (UsageError, Warning):
                raise
            except Exception as error:
                raise UsageError(
                    f"The function {name} cannot be sent to the workers: {type(error).__name__}: {error}.",
                    remedy="Create connections, locks, and open files inside the function. Objects of this process "
                    "cannot be sent.",
                ) from error

    def items(
        self,
        items: Sequence[Any],
        first: int,
        file: Callable[[File], Json],
        *,
        starred: bool,
        shared: Sequence[Shared[Any]] = (),
    ) -> list[Json]:
        """Return the encoded items. If `starred` is True, each item is encoded as a list of arguments. If the function
        uses `shared` values, each item is encoded together with these values (see `WithShared`). If an item cannot be
        encoded, raise UsageError with the item's number. The numbers begin with `first`.
        """
        encoded: list[Json] = []
        encode = _arguments if starred else values.encode_object
        if shared:
            encode = partial(_with_shared, shared, starred=starred)
        with self.by_value():
            try:
                for item in items:
                    encoded.append(encode(item, file))  # noqa: PERF401 - an error message needs the length
            except values.NotAValue as error:
                raise UsageError(
                    f"Item {first + len(encoded)} cannot be sent to the workers: {error.message.rstrip('.')}.",
                    remedy="Nothing was submitted. Use plain data, and create other objects inside the function.",
                ) from error
        return encoded

    @contextmanager
    def by_value(self) -> Iterator[None]:
        """Inside the `with` block, let cloudpickle pickle by value the modules that workers cannot import.

        Modules that are packed for the workers are pickled by name.
        """
        with _REGISTRY:
            self.check_modules()
            others = {*cloudpickle.list_registry_pickle_by_value(), *self.imports.names}
            outer, self._registered = self._registered, []
            try:
                for module in self._local:
                    if module.__name__ not in others:
                        cloudpickle.register_pickle_by_value(module)
                        self._registered.append(module)
                yield
            finally:
                self._unregister({module.__name__ for module in self._registered})
                self._registered = outer

    def _unregister(self, names: set[str]) -> bool:
        """Let cloudpickle pickle the modules by name. Return whether it has pickled any of them by value before."""
        modules = [module for module in self._registered if module.__name__ in names]
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
            self._registered.remove(module)
        return bool(modules)

    def check_modules(self) -> None:
        """Among the modules that were imported since the last call, find the modules that workers cannot import.

        The check of the first call may start a Python process, which takes some hundredths of a second.
        """
        last = len(sys.modules), next(reversed(sys.modules))
        if last == self._last:
            return  # A single call takes little more time than the comparison of all names.
        new = sys.modules.keys() - self._checked
        if not new:
            return  # `sysconfig.get_paths` takes 0.1 ms, which counts for single calls
        places = {name: place for name in new if "." not in name and (place := _place(name))}
        lacking = self._workers_lack(places)
        self._local += [sys.modules[name] for name in places if name in lacking]
        self._checked |= new
        self._last = last  # If Ctrl-C interrupts the check, the next call checks again.

    def _workers_lack(self, places: dict[str, str]) -> set[str]:
        """Return the modules that workers cannot import, or that workers would import from another place.

        `places` has the file or the folder of each module by the module's name.
        """
        paths = sysconfig.get_paths()
        installed = (f"{paths['purelib']}/", f"{paths['platlib']}/")
        # Workers can import all modules of batchlab and of the standard library.
        standard = f"{paths['stdlib']}/"
        places = {
            name: place
            for name, place in places.items()
            if name != "batchlab"
            and not place.startswith(installed)
            and ("-packages/" in place or not place.startswith(standard))
        }
        if not places:
            return set()
        # The option -P excludes the current folder and the script's folder from the module search path, as in a
        # task's process.
        command = [sys.executable, "-P", "-c", _FIND_MODULES, *places]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        workers_places: dict[str, str | None] = json.loads(answer.stdout.splitlines()[-1])
        return {name for name in places if workers_places[name] != places[name]}


def _arguments(item: Any, file: Callable[[File], Json]) -> Json:
    return [values.encode_object(argument, file) for argument in _sequence(item)]


def _sequence(item: Any) -> list[Any]:
    try:
        return list(item)
    except TypeError:
        raise values.NotAValue(f"{item!r:.60} is not a sequence of arguments.") from None


def _with_shared(shared: Sequence[Shared[Any]], item: Any, file: Callable[[File], Json], *, starred: bool) -> Json:
    return values.encode_object((_sequence(item) if starred else item, *shared), file)


def _place(name: str) -> str | None:
    """Return the file or folder from which a module was loaded. Return None for a module of the standard library, for
    `__main__`, and for a module without a file.
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
    """Consecutive encoded items of a job. `first` is the number of the first item, and `files` lists the path and the
    key of each file in the items.
    """

    first: int
    items: list[Json]
    files: list[tuple[Path, str]]

    def file(self, job: JobId) -> Callable[[File], Json]:
        """Return the function that encodes a File object in an item of the chunk."""
        return partial(_reference, f"{object_keys.raw(job)}{self.first:08d}", self.files)


@dataclass(frozen=True, slots=True)
class _PreparedJob:
    """A job whose objects are in the bucket, and which can be submitted.

    `items` are the encoded items of a small job, or None if the bucket contains the items.
    """

    job: JobDef
    items: list[Json] | None


class JobSubmitter:
    """Submitter of jobs of the Python API to one grid."""

    def __init__(self, link: Link, pickler: ObjectPickler) -> None:
        self._link = link
        self.pickler = pickler
        self._stored: set[str] = set()
        """Keys of the pickled functions that this process has stored in the bucket."""
        self._owner = link.ids.fresh("values")
        self._values: Counter[str] = Counter()
        """Number of open references to each shared value, by the key of the value."""
        self._values_lock = threading.Lock()

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
        """Submit a job that calls `function` for each item in a task of its own. Return None if `items` is empty.

        If `starred` is True, each item is a sequence of arguments. `stage` describes the tasks, without the handler. If
        `tolerant` is True, the job succeeds even if tasks fail. If an object cannot be pickled, raise UsageError. The
        job is submitted only after the iteration over the items has ended without an error.
        """
        self._link.check_open()
        pickled = self.pickler.function(Starred(function) if starred else function)
        handler, shared = pickled.data, list(pickled.shared.values())
        if shared:
            handler = pickle.dumps(WithShared(handler))
        draft = self.draft(name, stage)
        chunks = self._chunks(draft.id, items, starred=starred, shared=shared)
        prepared = self._prepare(draft, handler, chunks, tolerant=tolerant)
        if prepared is None:
            return None
        self._request(prepared.job, lambda client: client.submit(prepared.job, prepared.items))
        return prepared.job

    def put(self, value: T) -> Shared[T]:
        """Store a value for all tasks. A value that is already in the bucket is not stored again."""
        self._link.check_open()
        what = values.type_name(type(value))
        try:
            with self.pickler.by_value():
                pickled = pickle_object(value)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"A value of type {what} cannot be pickled: {type(error).__name__}: {error}.",
                remedy="Store plain data, and create other objects in the tasks.",
            ) from error
        if pickled.shared:
            raise UsageError("A shared value refers to another shared value.", remedy="Pass both values to the tasks.")
        if len(pickled.data) > MAX_SHARED_BYTES:
            raise UsageError(
                f"A value of type {what} has {len(pickled.data) / 1e9:.1f} GB when pickled, and the limit is "
                f"{MAX_SHARED_BYTES / 1e9:.1f} GB.",
                remedy="Write the data to a file, and pass a File.",
            )
        digest = hashlib.sha256(pickled.data).hexdigest()
        key = object_keys.shared_value(self._owner, digest)
        with self._values_lock:
            if not self._values[key]:
                self._link.delete_at_close(key)
                self._link.run(self._store(key, pickled.data))
            self._values[key] += 1
        shared: Shared[T] = Shared(digest, len(pickled.data))
        stored = StoredFile(values.file_ref(key, f"{digest}.pkl", shared.size))
        shared_values.attach_value(shared, value, stored, partial(self._release, key))
        return shared

    def _release(self, key: str) -> None:
        """Delete a shared value when its last reference is closed. After `close` of the grid, do nothing."""
        with self._values_lock:
            self._values[key] -= 1
            if not self._values[key] and not self._link.closed:
                self._link.run(self._link.delete(key))
                self._stored.discard(key)

    def draft(self, name: str, stage: StageDef) -> JobDef:
        """Return the definition of a new job with a fresh id, without items."""
        link = self._link
        job = object_keys.job_id(name, link.ids.fresh("map"))
        # The job does not need a client token, because its id is random. The manager accepts a job without a client
        # token faster.
        return JobDef(job, name, (stage,), link.clock.now_s())

    def send(
        self, draft: JobDef, pickled: bytes, chunks: Iterable[Chunk], accepted: Callable[[], None], *, wait_s: float
    ) -> OutcomesView | Outcome | None:
        """Submit a job with encoded items and a pickled handler. The job succeeds even if tasks fail.

        Wait up to `wait_s` seconds for the job's first outcomes, and return the outcomes. A single call is a direct
        call if possible, whose only outcome is returned. `accepted` is called when the job is accepted, and may be
        called twice. Return None for a job without items.
        """
        prepared = self._prepare(draft, pickled, chunks, tolerant=True)
        if prepared is None:
            return None
        job, items = prepared.job, prepared.items
        is_sent = False
        # A direct call does not check whether an instance has enough slots and GPUs.
        is_small = job.stages[0].slots == 1 and not job.stages[0].gpus
        if job.is_single_call and items is not None and is_small:
            self._link.follow(job.id)
            is_sent, outcome = self._link.direct_calls.call(job, items, accepted)
            if outcome:
                self._link.report_later(job.id)
                return outcome
        return self._request(
            job, lambda client: client.submit_and_hear(job, items, accepted, wait_s=wait_s, is_sent=is_sent)
        )

    def _prepare(
        self, draft: JobDef, pickled: bytes, chunks: Iterable[Chunk], *, tolerant: bool
    ) -> _PreparedJob | None:
        """Store the job's handler and items in the bucket, and return the job. Return None for a job without items."""
        link, job = self._link, draft.id
        (stage,) = draft.stages
        key = object_keys.pickled(pickled)
        try:
            count, items = self._store_objects(job, key, pickled, chunks)
            code = self._store_code() if count else None
        except BaseException:
            link.run(self._remove(job))
            raise
        if not count:
            return None
        job_def = replace(
            draft,
            stages=(replace(stage, handler=f"pickle:{key}"),),
            items=count,
            code=code,
            max_failures=count if tolerant else 0,
        )
        return _PreparedJob(job_def, items)

    def _store_code(self) -> str | None:
        """Store the local modules that functions import on the workers. Return the key, or None without modules."""
        data = self.pickler.imports.pack()
        if not data:
            return None
        key = code_cache.key(data)
        if key not in self._stored:
            self._link.run(self._store(key, data))
        return key

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
            # The manager may have accepted the job before the error, so the job is canceled.
            link.leave(job.id, cancel=True)
            raise

    def _store_objects(
        self, job: JobId, key: str, pickled: bytes, chunks: Iterable[Chunk]
    ) -> tuple[int, list[Json] | None]:
        """Store the handler and the items of a large job in the bucket. Return the number of items, and the items of a
        small job. The request for the submission contains the items of a small job.
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

        # One call of the event loop stores both the last chunks of items and the handler, because most maps have a
        # single chunk.
        run(commit())
        return count, None

    def _chunks(
        self, job: JobId, items: Iterable[Any], *, starred: bool, shared: Sequence[Shared[Any]]
    ) -> Iterator[Chunk]:
        iterator, first = iter(items), 0
        while part := list(islice(iterator, PART_ITEMS)):
            chunk = Chunk(first, [], [])
            chunk.items += self.pickler.items(part, first, chunk.file(job), starred=starred, shared=shared)
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

        # Large items are stored in parallel before the other items, because the writer would store large items one
        # after another.
        large = [number for number, item in enumerate(chunk.items) if values.roughly(item) > ITEM_BYTES]
        await asyncio.gather(*(upload(path, key) for path, key in chunk.files), *map(put, large))
        await writer.add(*chunk.items)

    async def _store(self, key: str, pickled: bytes) -> None:
        put = partial(self._link.objects.put, key, pickled, if_absent=True)
        # The key is a hash of the content, so an existing object with the key has equal content.
        with suppress(AlreadyExists):
            await self._link.patience(put)
        self._stored.add(key)

    async def _remove(self, job: JobId) -> None:
        for prefix in object_keys.everything_of(job):
            async for page in self._link.objects.list(prefix):
                await self._link.objects.delete([object_info.key for object_info in page])


def _reference(prefix: str, files: list[tuple[Path, str]], file: File) -> Json:
    """Return the reference that encodes a File object in an item. A local file is added to `files`, and is uploaded
    later.
    """
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
    """Return `name`, or a job name that is derived from the function's name if `name` is None. Raise UsageError if
    `name` is invalid.
    """
    if name is None:
        text = str(getattr(function, "__name__", "")).lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:40] or "map"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid job name.",
            remedy="Use up to 40 lower case letters, digits, - and _, and begin with a letter or a digit.",
        )
    return name
