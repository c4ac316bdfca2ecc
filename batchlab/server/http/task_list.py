"""Endpoints that list a job's tasks page by page, and the job's bundles on a timeline.

Invariants: a request reads the outcomes of the listed tasks only, and at most MAX_SEARCHED outcomes in a search for an
input file. The indexes that the manager stores between requests are a cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated

from fastapi import Query

from batchlab.core import api_types
from batchlab.core.commit import committed
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import parse_task, task_name
from batchlab.core.model import JobId, Outcome, StageName, TaskMetrics
from batchlab.core.ports import JobRecord, JobRows
from batchlab.core.protocol.mended_inputs import mended_sha256
from batchlab.manager.manager import Manager
from batchlab.manager.retry_rounds import RetriedTasks
from batchlab.server.http.common import MAX_PARALLEL_READS, Leader, ServerState, StateDep, guarded_router
from batchlab.server.task_index import Figures, ListedTask, RunningBundle, TaskIndex, TaskList, TaskState
from batchlab.server.timeline import timeline as timeline_of

router = guarded_router()

MAX_LISTED_TASKS = 200
MAX_SEARCHED = 320
"""Number of outcomes that one request reads in a search for an input file."""
MAX_CACHED_JOBS = 4
"""Maximum number of jobs whose index is cached."""
PAGE_ROWS = 1_000
"""Number of bundles that are read from the ledger at a time."""
MAX_ROWS_AT_ONCE = 3_000
"""Maximum number of bundles that a page reads in one request, which takes about 40 ms of CPU time."""

NO_FIGURES: Figures = (None, TaskMetrics())
SearchText = Annotated[
    str, Query(max_length=200, description="Number of a task, such as 3 or parse/3, or a part of a worker or input")
]


@router.get("/jobs/{job}/tasks")
async def tasks(
    manager: Leader,
    served: StateDep,
    job: JobId,
    stage: StageName | None = None,
    state: TaskState | None = None,
    search: SearchText = "",
    after: Annotated[str | None, Query(description="Value of `next` in the response with the previous page")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED_TASKS)] = 50,
) -> api_types.TasksView:
    """Return a page of a job's tasks with their figures, in the order of the stages and tasks.

    `search` selects the task with this number, or else the tasks whose worker or whose first input file has a name
    with this text.
    """
    listed = await list_of(manager, served, job)
    stages = [one.name for one in listed.job.stages if stage in (None, one.name)]
    begin = None if after is None else _task_of(listed, after)
    text = search.strip()
    found: Iterator[ListedTask]
    if (numbered := _numbered(listed, stages, text)) is not None:
        found = (one for one in numbered if state in (None, one.state))
    elif not text:
        found = listed.tasks(stages, state, begin=begin)
    elif listed.index.workers_with(text) or any(text in run.worker for runs in listed.running.values() for run in runs):
        found = listed.tasks(stages, state, text, begin)
    else:
        return await _with_input(manager, listed, listed.tasks(stages, state, begin=begin), text, limit)
    page = list(islice(found, limit + 1))
    figures = await _figures(manager, listed, page[:limit])
    views = [_view(listed, one, figures) for one in page[:limit]]
    return {"tasks": views, "next": _name(page[limit]) if len(page) > limit else None}


@router.get("/jobs/{job}/timeline")
async def timeline(manager: Leader, served: StateDep, job: JobId) -> api_types.TimelineView:
    """Return the job's bundles by worker and time. Many bundles of a worker are merged into one bar."""
    listed = await list_of(manager, served, job)
    live = manager.lives.get(job)
    rows = JobRows(live.record, tuple(live.stages.values())) if live else await manager.ports.ledger.rows(job)
    submitted_s, now_s = listed.job.submitted_s, manager.ports.clock.now_s()
    starts = [row.counts.first_start_s for row in rows.stages if row.counts.first_start_s is not None]
    end_s = rows.job.ended_s or now_s
    # A worker reports the start of a task by its own clock.
    start_s = min(max(min(starts, default=submitted_s), submitted_s), end_s)
    running = [run for runs in listed.running.values() for run in runs]
    return timeline_of(listed.index, running, start_s, end_s, now_s)


def _task_of(listed: TaskList, name: str) -> tuple[StageName, int]:
    """Return the stage and the number of the task with the name, such as `parse/3`."""
    stage, task = parse_task(name)
    if stage is None or all(one.name != stage for one in listed.job.stages):
        raise UsageError(f"{name!r} is not a task of job {listed.job.id}.", remedy="Use `next` of the previous page.")
    return StageName(stage), task


def _name(task: ListedTask) -> str:
    return task_name(task.stage, task.task)


def _numbered(listed: TaskList, stages: Sequence[StageName], text: str) -> list[ListedTask] | None:
    """Return the tasks with the number in `text`, or None if `text` is not the number of a task."""
    name, _, number = text.rpartition("/")
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        return None
    found = [listed.state(stage, int(number)) for stage in stages if name in ("", stage)]
    return [one for one in found if one] or None


# --- Index ----------------------------------------------------------------------------------------


async def list_of(manager: Manager, served: ServerState, job: JobId) -> TaskList:
    """Return the tasks of a job, after a read of the bundles that were folded since the last request."""
    listed, is_current = await _list_of(manager, served, job)
    if not is_current:
        # The job was retried during the read, or its rows were rebuilt and have new seqs.
        served.indexes.pop(job, None)
        listed, _ = await _list_of(manager, served, job)
    return listed


async def read_some(manager: Manager, served: ServerState, job: JobId) -> int | None:
    """Read at most MAX_ROWS_AT_ONCE bundles that are not in the job's index.

    Return None if the index is current, or else the number of bundles in the index. A page that first reads the bundles
    part by part never takes long, even if the manager has just started and the job has many bundles.
    """
    _, index = await _index_of(manager, served, job)
    is_current = await _read_rows(manager, job, index, MAX_ROWS_AT_ONCE)
    return None if is_current else len(index)


async def _list_of(manager: Manager, served: ServerState, job: JobId) -> tuple[TaskList, bool]:
    """Return the tasks of a job, and whether the index agrees with the ledger's counters."""
    record, index = await _index_of(manager, served, job)
    while not await _read_rows(manager, job, index, MAX_ROWS_AT_ONCE):
        pass
    rows = await manager.ports.ledger.rows(job)
    planned = {row.counts.stage: row.counts.planned for row in rows.stages}
    listed = TaskList(record.job, index, planned, rows.job.state.ended, _running(manager, job))
    succeeded = sum(row.counts.succeeded for row in rows.stages)
    return listed, rows.job.round == record.round and succeeded >= index.succeeded


async def _index_of(manager: Manager, served: ServerState, job: JobId) -> tuple[JobRecord, TaskIndex]:
    cache = served.indexes
    record = await manager.ports.ledger.job(job)
    known = cache.pop(job, None)
    index = known[1] if known and known[0] == record.round else None
    if index is None:
        index = TaskIndex(record.job, await RetriedTasks.read(manager.ports, record))
    cache[job] = record.round, index  # the most recently used job is the last key
    while len(cache) > MAX_CACHED_JOBS:
        del cache[next(iter(cache))]
    return record, index


async def _read_rows(manager: Manager, job: JobId, index: TaskIndex, most: int) -> bool:
    """Read at most `most` new bundles, and return whether the index has all bundles."""
    ledger, clock = manager.ports.ledger, manager.ports.clock
    async with index.lock:
        for _ in range(0, most, PAGE_ROWS):
            found = await ledger.results(job, after_seq=index.seq, limit=PAGE_ROWS)
            index.add(found, clock.now_s())
            if len(found) < PAGE_ROWS:
                return True
    return False


def _running(manager: Manager, job: JobId) -> dict[StageName, list[RunningBundle]]:
    """Return the bundles of the job that workers run, by stage. A bundle that several workers run is listed once."""
    live = manager.lives.get(job)
    if live is None:
        return {}
    now_s, monotonic_s = manager.ports.clock.now_s(), manager.ports.clock.monotonic_s()
    found: dict[tuple[str, str], RunningBundle] = {}
    for status in manager.registry.workers.values():
        for held in status.beat.held:
            outstanding = live.outstanding.get(held.stage, {}).get(held.bundle)
            if held.job == job and held.running and outstanding:
                since_s = now_s - (monotonic_s - status.since_s.get(held, monotonic_s))
                run = RunningBundle(outstanding.bundle, status.beat.worker, since_s)
                found.setdefault((held.stage, held.bundle), run)
    by_stage: dict[StageName, list[RunningBundle]] = {}
    for run in found.values():
        by_stage.setdefault(run.bundle.stage, []).append(run)
    return by_stage


# --- Figures --------------------------------------------------------------------------------------


async def _figures(manager: Manager, listed: TaskList, page: Sequence[ListedTask]) -> dict[tuple[int, int], Figures]:
    """Return the figures of the tasks by row and task. Each outcome that is not cached is read once."""
    index = listed.index
    figures: dict[tuple[int, int], Figures] = {}
    missing: dict[int, list[int]] = {}
    for one in page:
        if one.row >= 0:
            known = index.figures.get((index.bundle(one.row).seq, one.task))
            if known is None:
                missing.setdefault(one.row, []).append(one.task)
            else:
                figures[one.row, one.task] = known
    for row, found in (await _read(manager, listed, list(missing))).items():
        for task in missing[row]:
            figures[row, task] = found.get(task, NO_FIGURES)
            index.keep_figures(index.bundle(row).seq, task, figures[row, task])
    return figures


async def _read(manager: Manager, listed: TaskList, rows: Sequence[int]) -> dict[int, dict[int, Figures]]:
    """Return the figures of all tasks of the bundles with the numbers `rows`. Each bundle takes one read."""
    if not rows:
        return {}
    ports, index = manager.ports, listed.index
    key = await ports.keys.key_of(listed.job)
    found: dict[int, dict[int, Figures]] = {}
    for first in range(0, len(rows), MAX_PARALLEL_READS):
        batch = rows[first : first + MAX_PARALLEL_READS]
        bundles = [index.bundle(row).bundle(listed.job.id) for row in batch]
        outcomes = await asyncio.gather(*(committed(ports.objects, one, ports.patience, key) for one in bundles))
        found |= {row: _figures_in(outcome) if outcome else {} for row, outcome in zip(batch, outcomes, strict=True)}
    return found


def _figures_in(outcome: Outcome) -> dict[int, Figures]:
    run_s: dict[int, float] = dict(zip(outcome.succeeded, outcome.run_s, strict=True))
    run_s |= {failure.task: failure.run_s for failure in outcome.failed}
    metrics = dict(outcome.metrics)
    return {task: (run_s.get(task), metrics.get(task, TaskMetrics())) for task in outcome.bundle.tasks}


async def _with_input(
    manager: Manager, listed: TaskList, found: Iterator[ListedTask], text: str, limit: int
) -> api_types.TasksView:
    """Return the tasks whose first input file has a name with this text, after reads of at most MAX_SEARCHED
    outcomes.
    """
    matching: list[ListedTask] = []
    figures: dict[tuple[int, int], Figures] = {}
    ended = (one for one in found if one.row >= 0)
    searched = 0
    following = next(ended, None)
    while following and searched < MAX_SEARCHED and len(matching) < limit:
        batch: dict[int, list[ListedTask]] = {}
        while following and (following.row in batch or len(batch) < MAX_PARALLEL_READS):
            batch.setdefault(following.row, []).append(following)
            following = next(ended, None)
        searched += len(batch)
        for row, of_row in (await _read(manager, listed, list(batch))).items():
            for one in batch[row]:
                figures[row, one.task] = of_row.get(one.task, NO_FIGURES)
                if text in figures[row, one.task][1].input:
                    matching.append(one)
    page = matching[:limit]
    following = matching[limit] if len(matching) > limit else following
    return {"tasks": [_view(listed, one, figures) for one in page], "next": _name(following) if following else None}


def _view(listed: TaskList, one: ListedTask, figures: dict[tuple[int, int], Figures]) -> api_types.TaskRowView:
    bundle = listed.index.bundle(one.row) if one.row >= 0 else None
    run_s, metrics = figures.get((one.row, one.task), NO_FIGURES)
    run = one.running
    return {
        "seq": bundle.seq if bundle else 0,
        "stage": one.stage,
        "task": one.task,
        "state": one.state.value,
        "attempt": bundle.attempt if bundle else run.bundle.attempt if run else 0,
        "worker": bundle.worker if bundle else run.worker if run else "",
        "since_s": run.since_s if run else None,
        "run_s": run_s,
        "cpu_s": metrics.cpu_s,
        "memory_bytes": metrics.memory_bytes,
        "input_bytes": metrics.input_bytes,
        "output_bytes": metrics.output_bytes,
        "input": metrics.input,
        "mended_sha256": mended_sha256(listed.index.mended.get((one.stage, one.task))),
    }
