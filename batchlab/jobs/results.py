"""Download of a job's results into a folder.

Invariants: nothing is written outside this folder, whatever the names of results are. A results
file is written completely or not at all, with its lines in task order. Memory use does not grow
with the job.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchlab.core.api_types import JobView, OutcomesView, OutcomeView
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, Json, Outcome, StageName, TaskSet
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys, values
from batchlab.core.protocol.references import Own
from batchlab.core.protocol.values import OUTCOME_WEIGHT
from batchlab.core.retry import Patience
from batchlab.jobs.attempts import definition
from batchlab.jobs.result_files import VALUES_AT_ONCE, Files, Within, plain

OUTCOMES_AT_ONCE = 8
LIMITED_AT_ONCE = 2
"""Outcomes and results that are in memory at the same time if the fetch is limited."""

Progress = Callable[[int, int], None]
"""Callback with the number of outcomes read and the total number."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Outcome as the manager lists it. `tasks` contains the tasks that succeeded."""

    stage: str
    key: str
    tasks: TaskSet

    @classmethod
    def of(cls, view: OutcomeView) -> Listed:
        return cls(view["stage"], view["key"], json_format.tasks_from_json(view["tasks"]))


def listed(page: Callable[[int | None], OutcomesView]) -> list[Listed]:
    """Return all outcomes that the job has now.

    `page` returns those after a seq, or the first ones.
    """
    found: list[Listed] = []
    after: int | None = None
    while some := page(after)["outcomes"]:
        found += map(Listed.of, some)
        after = some[-1]["seq"]
    return found


@dataclass(frozen=True, slots=True)
class Fetched:
    """Summary of a fetch: results by stage, and the files to which they refer.

    `read_bytes` is the number of bytes read from the bucket.
    """

    folder: Path
    results: Mapping[str, int]
    files: int
    size_bytes: int
    read_bytes: int = 0


def final_stages(job: JobDef) -> list[StageName]:
    """Return the stages that no other stage follows."""
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
    within: Within | None = None,
) -> Fetched:
    """Write `out/<stage>.jsonl`, `out/files/<stage>/<task>/…`, and `out/summary.json`.

    `view` is the job as the manager shows it, and `listing` contains all of its outcomes. Without
    `stages`, the final stages are fetched. The files of an earlier fetch of these stages are
    replaced. Raise UsageError for an unknown stage, for a folder that cannot be written, and for
    results that exceed `within`.
    """
    job = await definition(objects, JobId(view["id"]), patience)
    chosen = {name: of_stage(name, listing) for name in _known(job, stages) or final_stages(job)}
    steps = _Steps(sum(len(found) for found in chosen.values()), progress)
    try:
        _make_room(out, chosen)
        files = Files(objects, out, patience, Own.of(job), within)
        counts: dict[str, int] = {}
        for name, found in chosen.items():
            coming = in_task_order(objects, found, patience, steps.step, within)
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


def _known(job: JobDef, stages: Iterable[str]) -> list[StageName]:
    names = [stage.name for stage in job.stages]
    for name in stages:
        if name not in names:
            raise UsageError(
                f"Job {job.id} has no stage {name!r}.", remedy=f"It has {', '.join(names)}."
            )
    return [StageName(name) for name in stages]


def _write_summary(view: JobView, fetched: Fetched) -> None:
    summary = {
        "job": view,
        "results": {
            stage: {"file": f"{stage}.jsonl", "results": count}
            for stage, count in fetched.results.items()
        },
        "files": fetched.files,
        "size_bytes": fetched.size_bytes,
    }
    staged = fetched.folder / ".summary.json.part"
    staged.write_text(json.dumps(summary, indent=2) + "\n")
    staged.replace(fetched.folder / "summary.json")


def _make_room(out: Path, stages: Iterable[StageName]) -> None:
    """Create the folder and remove the files of an earlier fetch, which may have had more tasks.

    Files are removed only if a summary proves that a fetch wrote them, because the folder is the
    user's.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
        # Mark only an empty folder. A job's code may include the folder, and the user's files in it
        # must not be skipped.
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
    """Progress of a fetch: the outcomes that were read, and their bytes."""

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

    The manager does not list outcomes that a retry made void.
    """
    found = [one for one in listing if one.stage == stage and one.tasks]
    return sorted(found, key=lambda one: one.tasks.first)


async def in_task_order(
    objects: Objects,
    outcomes: Sequence[Listed],
    patience: Patience,
    read: Callable[[int], None] = lambda _: None,
    within: Within | None = None,
) -> AsyncIterator[tuple[int, Json]]:
    """Yield (task, encoded result) for the outcomes of `of_stage`, in task order.

    `read` is called with the size of each outcome in bytes.
    """
    held: list[tuple[int, Json]] = []
    fetching: deque[asyncio.Task[tuple[Outcome, int]]] = deque()
    coming = iter(outcomes)
    try:
        for number in range(len(outcomes)):
            most = LIMITED_AT_ONCE if within else OUTCOMES_AT_ONCE
            while len(fetching) < most and (one := next(coming, None)):
                reading = _outcome(objects, one.key, patience, within)
                fetching.append(asyncio.ensure_future(reading))
            outcome, read_bytes = await fetching[0]
            fetching.popleft()
            read(read_bytes)
            for pair in zip(outcome.succeeded, outcome.values, strict=True):
                heapq.heappush(held, pair)
            # Retried tasks are within the range of an earlier bundle. All later results start at
            # the first task of the next outcome, so the results before it are complete.
            rest = outcomes[number + 1 : number + 2]
            while held and (not rest or held[0][0] < rest[0].tasks.first):
                yield heapq.heappop(held)
    finally:
        await _drop(fetching)


async def _outcome(
    objects: Objects, key: str, patience: Patience, within: Within | None
) -> tuple[Outcome, int]:
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
                # Avoid a coroutine for plain values, because there may be millions of them.
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
