"""Download of a job's results into a folder, with the files and large values of the results.

Invariants: a fetch of results writes only inside its folder, even for a file name that a malicious task chose. A file
is written to the folder of its own task. A results file is written completely or not at all, with its lines in task
order. The memory use of a fetch does not grow with the size of the job. A fetch does not read more bytes than its
limits allow (`FetchLimits`).
"""

from __future__ import annotations

import asyncio
import heapq
import json
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from batchlab.core.api_types import JobView, OutcomesView, OutcomeView
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, Json, Outcome, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys, values
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.core.protocol.values import OUTCOME_WEIGHT
from batchlab.core.task_context import FreeNames, name_problem
from batchlab.core.text import size
from batchlab.jobs.attempts import definition

VALUES_AT_ONCE = 16
"""Maximum number of results whose files and large values are fetched concurrently."""
_DEEPEST = 8
_PIECE_BYTES = 8 * 1024 * 1024
_BY_PIECES = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_WRITTEN = 4
"""Maximum size of a written result, as a multiple of `FetchLimits.value_bytes`."""


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Limits of a fetch of results that other users' tasks may have written.

    `claim` is called with a number of bytes before the bytes are written to the disk, and raises an error if the number
    is too large. `value_bytes` is the maximum size of one result without its files. `remedy` is the remedy in the error
    for a larger result.
    """

    claim: Callable[[int], None]
    value_bytes: int
    remedy: str

    async def read(self, objects: Objects, key: str, most_bytes: int, patience: Patience) -> bytes:
        """Return the content of an object. Raise UsageError if the object has more than `most_bytes`."""
        data = await patience(partial(objects.get_range, key, 0, most_bytes + 1))
        if len(data) > most_bytes:
            raise self.too_large(most_bytes)
        return data

    def too_large(self, most_bytes: int | None = None) -> UsageError:
        """Return the UsageError for a result that is too large."""
        most = size(self.value_bytes if most_bytes is None else most_bytes)
        return UsageError(f"One of the results is larger than {most}, without being a file.", remedy=self.remedy)


def plain(encoded: Json, replacements: Mapping[str, Json]) -> Json:
    """Return a result as the task returned it, with each reference replaced by its value in `replacements`.

    A pickled object stays encoded, because unpickling would run code, and JSON cannot represent the object.
    """
    if type(encoded) is list:
        return [plain(part, replacements) for part in encoded]
    if type(encoded) is not dict:
        return encoded
    kind = values.kind(encoded)
    if kind is None:
        return {key[1:] if key.startswith("$") else key: plain(part, replacements) for key, part in encoded.items()}
    return encoded if kind == "$pickle" else replacements[_id(encoded)]


def _id(reference: Json) -> str:
    return json.dumps(reference, sort_keys=True)


@dataclass(slots=True)
class Files:
    """Fetcher of the objects to which results refer.

    A file's path consists of its stage, its task, and its own name.
    """

    objects: Objects
    out: Path
    patience: Patience
    own: JobObjects
    within: FetchLimits | None = None
    count: int = 0
    size_bytes: int = 0
    value_bytes: int = 0
    """Number of bytes of the large values. Large values are written into the results file of their stage."""
    limit: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(VALUES_AT_ONCE))

    async def local(self, stage: str, task: int, value: Json) -> Json:
        """Return a result with its large values instead of references to large values, and with paths relative to `out`
        instead of references to files.
        """
        left = _Left(self.within.value_bytes if self.within else 0)
        return await self._value(value, Names(f"files/{stage}/{task}"), left, _DEEPEST)

    def line(self, doc: Json) -> str:
        """Return a result as a line of JSON with its large values instead of references to large values.

        A large value is read once but may occur in several places of a result, so the written size is known only during
        the write. Raise UsageError if the written line is too large.
        """
        if self.within is None:
            return json_format.dumps(doc) + "\n"
        pieces: list[str] = []
        left_bytes = _WRITTEN * self.within.value_bytes
        for piece in _BY_PIECES.iterencode(doc):
            left_bytes -= len(piece)
            if left_bytes < 0:
                raise self.within.too_large()
            pieces.append(piece)
        return "".join((*pieces, "\n"))

    def claim(self, size_bytes: int) -> None:
        """Announce the write of `size_bytes` bytes. Raise an error if the number of bytes exceeds the limits of the
        fetch.
        """
        if self.within:
            self.within.claim(size_bytes)

    async def _read(self, key: str, left: _Left) -> bytes:
        async with self.limit:
            if self.within is None:
                return await self.patience(partial(self.objects.get, key))
            data = await self.within.read(self.objects, key, left.value_bytes, self.patience)
            left.value_bytes -= len(data)
            return data

    async def _value(self, value: Json, names: Names, left: _Left, depth: int) -> Json:
        references = {_id(one): one for one in values.references(value)}
        replacements: dict[str, Json] = {}
        for key, reference in references.items():
            if values.kind(reference) != "$value":
                replacements[key] = await self._file(reference, names)
            elif depth:
                data = await self._read(self.own.key(reference), left)
                self.value_bytes += len(data)
                inner = self.own.value(reference, data)
                replacements[key] = await self._value(inner, names, left, depth - 1)
            else:
                raise UsageError(
                    f"A result refers to objects more than {_DEEPEST} deep.",
                    remedy="Tasks do not write such results. Check who may write to the bucket.",
                )
        return plain(value, replacements)

    async def _file(self, reference: Json, names: Names) -> str:
        name, is_new = names.path_of(reference)
        self.own.key(reference)
        if is_new:
            path = self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.within:
                self.within.claim(await self._size_of(reference))
            async with self.limit:
                if values.kind(reference) == "$part":
                    size_bytes = await self._part(reference, path)
                else:
                    get = partial(self.objects.download, reference["$file"], path)
                    size_bytes = await self.patience(get)
            # Await the size before `+=`, because `+=` with an `await` on its right side would add to the sum from
            # before the wait.
            self.size_bytes += size_bytes
            self.count += 1
        return name

    async def _size_of(self, reference: Json) -> int:
        """Return the size of a file. Return 0 for a missing file, whose download fails later.

        The size in the reference is not trusted, because any worker may have written the reference.
        """
        info = await self.patience(partial(self.objects.head, reference.get("$file") or reference["$part"]))
        if info is None:
            return 0
        if values.kind(reference) == "$file":
            return info.size
        parts = [reference["header"] or (0, 0), (reference["start"], reference["stop"])]
        return sum(max(0, min(stop, info.size) - start) for start, stop in parts)

    async def _part(self, reference: Json, path: Path) -> int:
        spans = [reference["header"]] if reference["header"] else []
        size_bytes = 0
        with path.open("wb") as file:
            for start, stop in [*spans, (reference["start"], reference["stop"])]:
                for at in range(start, stop, _PIECE_BYTES):
                    end = min(at + _PIECE_BYTES, stop)
                    get = partial(self.objects.get_range, reference["$part"], at, end)
                    piece = await self.patience(get)
                    size_bytes += file.write(piece)
                    if not piece:
                        break  # The range in the reference extends beyond the end of the object.
        return size_bytes


@dataclass(slots=True)
class _Left:
    """Number of bytes that the remaining large values of a result may have, if the fetch has limits."""

    value_bytes: int


class Names:
    """Safe file names in one task's folder.

    Each file name is unique, and a file's path never contains the path of another file.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._known: dict[str, str] = {}
        self._free = FreeNames()

    def path_of(self, reference: Json) -> tuple[str, bool]:
        """Return the path for a referenced file, and whether the function was not called before with the reference."""
        key = _id(reference)
        if key in self._known:
            return self._known[key], False
        name = str(reference["name"])
        if name_problem(name):
            # Do not trust the name in the reference, because any worker may have written the reference.
            last = name.replace("\\", "/").rpartition("/")[2]
            name = "file" if name_problem(last) else last
        self._known[key] = f"{self._folder}/{self._free.take(name)}"
        return self._known[key], True


OUTCOMES_AT_ONCE = 8
LIMITED_AT_ONCE = 2
"""Maximum number of outcomes, and of results, that are in memory at the same time if the fetch has limits."""

Progress = Callable[[int, int], None]
"""Callback with the number of outcomes that were read and the total number of outcomes."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Outcome in the manager's list of outcomes. `tasks` has those tasks of the outcome that succeeded."""

    stage: str
    key: str
    tasks: TaskSet

    @classmethod
    def from_view(cls, view: OutcomeView) -> Listed:
        return cls(view["stage"], view["key"], json_format.tasks_from_json(view["tasks"]))


def list_results(page: Callable[[int | None], OutcomesView]) -> list[Listed]:
    """Return all current outcomes of a job.

    `page` returns a page of outcomes after a given seq, or the first page for None.
    """
    listings: list[Listed] = []
    after: int | None = None
    while outcomes := page(after)["outcomes"]:
        listings += map(Listed.from_view, outcomes)
        after = outcomes[-1]["seq"]
    return listings


@dataclass(frozen=True, slots=True)
class Fetched:
    """Summary of a fetch: the number of results by stage, and the number of files that the results refer to.

    `read_bytes` is the number of bytes read from the bucket.
    """

    folder: Path
    results: Mapping[str, int]
    files: int
    size_bytes: int
    read_bytes: int = 0


def final_stages(job: JobDef) -> list[StageName]:
    """Return the stages that are not the upstream stage of another stage."""
    followed = {name for stage in job.stages for name in stage.after}
    return [stage.name for stage in job.stages if stage.name not in followed]


async def fetch(
    objects: Objects,
    view: JobView,
    listing: Sequence[Listed],
    out: Path,
    *,
    patience: Patience,
    stages: Sequence[str] = (),
    progress: Progress | None = None,
    within: FetchLimits | None = None,
) -> Fetched:
    """Write `out/<stage>.jsonl`, `out/files/<stage>/<task>/…`, and `out/summary.json`.

    `view` is the manager's view of the job, and `listing` contains all outcomes of the job. Without `stages`, the final
    stages are fetched. The files of an earlier fetch of the same stages are replaced. Raise UsageError for an unknown
    stage, for a folder that cannot be written, and for results that exceed the limits `within`.
    """
    job = await definition(objects, JobId(view["id"]), patience)
    chosen = {name: of_stage(name, listing) for name in _check_stages(job, stages) or final_stages(job)}
    steps = _Steps(sum(len(outcomes) for outcomes in chosen.values()), progress)
    try:
        make_room(out, chosen)
        files = Files(objects, out, patience, JobObjects.of_job(job), within)
        counts: dict[str, int] = {}
        for name, outcomes in chosen.items():
            coming = in_task_order(objects, outcomes, patience, steps.step, within)
            counts[name] = await _write(name, coming, files)
        read_bytes = steps.read_bytes + files.value_bytes + files.size_bytes
        fetched = Fetched(out, counts, files.count, files.size_bytes, read_bytes)
        _write_summary(view, fetched)
    except OSError as error:
        raise UsageError(
            f"The results cannot be written to {out}: {error.strerror or error}.",
            remedy="Free some space, or name another folder with --out. The grid has the results: "
            f"`batchlab job results {view['id']}` fetches them while it is up.",
        ) from error
    return fetched


def _check_stages(job: JobDef, stages: Iterable[str]) -> list[StageName]:
    names = [stage.name for stage in job.stages]
    for name in stages:
        if name not in names:
            raise UsageError(f"Job {job.id} does not have a stage {name!r}.", remedy=f"It has {', '.join(names)}.")
    return [StageName(name) for name in stages]


def _write_summary(view: JobView, fetched: Fetched) -> None:
    summary = {
        "job": view,
        "results": {stage: {"file": f"{stage}.jsonl", "results": count} for stage, count in fetched.results.items()},
        "files": fetched.files,
        "size_bytes": fetched.size_bytes,
    }
    staged = fetched.folder / ".summary.json.part"
    staged.write_text(json.dumps(summary, indent=2) + "\n")
    staged.replace(fetched.folder / "summary.json")


def make_room(out: Path, stages: Iterable[StageName]) -> None:
    """Create the folder `out`, and remove the files of an earlier fetch, because the earlier fetch may have had more
    tasks.

    The folder belongs to the user. Files are removed only if a summary in the folder proves that a fetch wrote the
    files.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
        # Mark only an empty folder, because a marked folder is never part of a job's code. The user's own files must
        # stay part of the code.
        (out / object_keys.MADE).touch()
    try:
        known = json.loads((out / "summary.json").read_text())["results"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    for stage in stages:
        if stage in known and (out / "files" / stage).is_dir():
            shutil.rmtree(out / "files" / stage)


@dataclass(slots=True)
class _Steps:
    """Progress of a fetch: the number of outcomes that were read, and the number of their bytes."""

    of: int
    tell: Progress | None
    done: int = 0
    read_bytes: int = 0

    def step(self, read_bytes: int) -> None:
        self.done += 1
        self.read_bytes += read_bytes
        if self.tell:
            self.tell(self.done, self.of)


# --- Outcomes ------------------------------------------------------------------------------------


def of_stage(stage: StageName, listing: Iterable[Listed]) -> list[Listed]:
    """Return the outcomes of a stage that contain results, sorted by task.

    The manager's list does not contain outcomes that a `job retry` has invalidated.
    """
    listeds = [one for one in listing if one.stage == stage and one.tasks]
    return sorted(listeds, key=lambda one: one.tasks.first)


async def in_task_order(
    objects: Objects,
    outcomes: Sequence[Listed],
    patience: Patience,
    read: Callable[[int], None] = lambda _: None,
    within: FetchLimits | None = None,
) -> AsyncIterator[tuple[int, Json]]:
    """Yield the task and the encoded result of each task in the outcomes of a stage, in task order.

    `outcomes` is a result of `of_stage`. `read` is called with the size in bytes of each outcome that was read.
    """
    ready: list[tuple[int, Json]] = []
    fetching: deque[asyncio.Task[tuple[Outcome, int]]] = deque()
    coming = iter(outcomes)
    try:
        for number in range(len(outcomes)):
            most = LIMITED_AT_ONCE if within else OUTCOMES_AT_ONCE
            while len(fetching) < most and (listed := next(coming, None)):
                reading = _outcome(objects, listed.key, patience, within)
                fetching.append(asyncio.ensure_future(reading))
            outcome, read_bytes = await fetching[0]
            fetching.popleft()
            read(read_bytes)
            for pair in zip(outcome.succeeded, outcome.values, strict=True):
                heapq.heappush(ready, pair)
            # The tasks of a retry are within the range of an earlier bundle. All results before the first task of the
            # next outcome are complete, because later outcomes do not begin earlier.
            rest = outcomes[number + 1 : number + 2]
            while ready and (not rest or ready[0][0] < rest[0].tasks.first):
                yield heapq.heappop(ready)
    finally:
        await _drop(fetching)


async def _outcome(objects: Objects, key: str, patience: Patience, within: FetchLimits | None) -> tuple[Outcome, int]:
    if within:
        data = await within.read(objects, key, OUTCOME_WEIGHT, patience)
    else:
        data = await patience(lambda: objects.get(key, limit=OUTCOME_WEIGHT))
    return json_format.outcome_from_bytes(data, key), len(data)


async def _drop(tasks: Iterable[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- Writing -------------------------------------------------------------------------------------


async def _write(stage: StageName, results: AsyncIterator[tuple[int, Json]], files: Files) -> int:
    """Write the results of one stage and return their number."""
    staged = files.out / f".{stage}.jsonl.part"
    waiting: deque[tuple[int, Json | asyncio.Task[Json]]] = deque()
    most = LIMITED_AT_ONCE if files.within else VALUES_AT_ONCE
    count = 0

    async def first() -> str:
        task, value = waiting[0]
        if isinstance(value, asyncio.Task):
            line = files.line({"task": task, "value": await value})
        else:
            line = json_format.dumps({"task": task, "value": value}) + "\n"
        waiting.popleft()
        files.claim(len(line))
        return line

    try:
        with staged.open("w", encoding="utf-8") as file:
            async for task, value in results:
                count += 1
                # Do not call a coroutine for a plain value, because a stage may have millions of plain values.
                is_plain = next(values.references(value), None) is None
                waiting.append(
                    (task, plain(value, {}))
                    if is_plain
                    else (task, asyncio.ensure_future(files.local(stage, task, value)))
                )
                while len(waiting) >= most:
                    file.write(await first())
            while waiting:
                file.write(await first())
        staged.replace(files.out / f"{stage}.jsonl")
    finally:
        await _drop([value for _, value in waiting if isinstance(value, asyncio.Task)])
        staged.unlink(missing_ok=True)
    return count
