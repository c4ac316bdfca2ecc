"""Two endpoints: one task with its result, input, and log, and the results of a job as an archive.

Invariant: the endpoints never unpickle a value, because unpickling could run code. The answer about a task contains at
most MAX_SHOWN_BYTES of the input and at most MAX_SHOWN_BYTES of the log. A result cannot exhaust the manager's memory
or disk, because the manager knows the size of an object before reading the object, and because an archive has a size
limit. The manager creates one archive at a time, and removes the archive after sending the archive.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

from fastapi import Path, Query
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from batchlab.core import api_types
from batchlab.core.commit import committed
from batchlab.core.errors import NotFound, UsageError
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import Bundle, JobId, Json, Outcome, StageName, TaskMetrics, TaskSet
from batchlab.core.protocol import values
from batchlab.core.protocol.bundle_inputs import ForeignReference, JobObjects
from batchlab.core.protocol.mended_inputs import is_mended, mended_sha256
from batchlab.core.text import size
from batchlab.jobs import results
from batchlab.jobs.attempts import attempt_in, log_end, task_input
from batchlab.jobs.results import FetchLimits, Listed
from batchlab.manager.manager import Manager
from batchlab.server import job_views
from batchlab.server.answers import acquire, current_view
from batchlab.server.http.common import NOT_STORED, Leader, ServerState, StateDep, guarded_router
from batchlab.server.http.job_files import disk_folder, has_room
from batchlab.server.http.task_list import list_of
from batchlab.server.task_index import ListedTask, TaskList

router = guarded_router()

MAX_SHOWN_BYTES = 20_000

Index = Annotated[int, Path(ge=0, le=2**53)]
Seq = Annotated[
    int | None,
    Query(ge=1, le=2**53, description="The seq of the outcome that contains the task, if the client knows the seq"),
]


@router.get("/jobs/{job}/stages/{stage}/tasks/{task}")
async def task(
    manager: Leader, served: StateDep, job: JobId, stage: StageName, task: Index, seq: Seq = None
) -> api_types.TaskView:
    """Return a task with its result, or with its live log while a worker runs it. With `seq`, return the result in the
    outcome with this seq.

    Workers store live logs only while a client requests them, so the first answer about a running task may lack a log.
    """
    return await read_task(manager, served, job, stage, task, seq)


async def read_task(
    manager: Manager,
    served: ServerState,
    job: JobId,
    stage: StageName,
    task: int,
    seq: int | None,
    *,
    with_input: bool = True,
) -> api_types.TaskView:
    """Return the view of a task. Without `with_input`, the view does not contain the input."""
    listed = await list_of(manager, served, job)
    found = _listed_task(listed, stage, task)
    if seq is None and found and found.row >= 0:
        seq = listed.index.bundle(found.row).seq
    bundle: Bundle | None
    if seq is not None:
        view, bundle = await _ended(manager, listed.job, stage, task, seq)
    elif found:
        view, bundle = await _not_ended(manager, listed, found)
    else:
        raise _no_task(job, stage, task)
    if with_input and bundle:
        view["input"], view["input_of"], view["is_input_cut"] = await _input(manager, listed.job, bundle, task)
    return view


async def seq_of(manager: Manager, served: ServerState, job: JobId, stage: StageName, task: int) -> int | None:
    """Return the seq of the outcome with the task's result, or None if the task has not ended."""
    listed = await list_of(manager, served, job)
    found = _listed_task(listed, stage, task)
    if found is None:
        raise _no_task(job, stage, task)
    return listed.index.bundle(found.row).seq if found.row >= 0 else None


def _listed_task(listed: TaskList, stage: StageName, task: int) -> ListedTask | None:
    if all(one.name != stage for one in listed.job.stages):
        raise _no_task(listed.job.id, stage, task)
    return listed.state(stage, task)


def _no_task(job: JobId, stage: StageName, task: int) -> NotFound:
    return NotFound(
        f"Task {task_name(stage, task)} of job {job} does not exist, or is not planned yet.",
        remedy="Check the stage and the number of the task.",
    )


async def _ended(
    manager: Manager, job: JobDef, stage: StageName, task: int, seq: int
) -> tuple[api_types.TaskView, Bundle]:
    """Return the view of a task without its input, according to the outcome with the seq `seq`."""
    bundle, outcome = await ended_task(manager, job.id, stage, task, seq)
    attempt = attempt_in(outcome, task)
    failure = attempt.failure if attempt and attempt.state == "FAILED" else None
    log, is_log_cut = await _log(manager, outcome, task)
    metrics = attempt.metrics if attempt else TaskMetrics()
    view: api_types.TaskView = {
        "seq": seq,
        "stage": stage,
        "task": task,
        "attempt": bundle.attempt,
        "state": attempt.state.lower() if attempt else "retried",
        "worker": outcome.worker,
        "started_s": outcome.started_s,
        "ended_s": outcome.ended_s,
        "run_s": attempt.run_s if attempt else None,
        "cpu_s": metrics.cpu_s,
        "memory_bytes": metrics.memory_bytes,
        "input_bytes": metrics.input_bytes,
        "output_bytes": metrics.output_bytes,
        "failure": job_views.failure_view(seq, outcome, failure) if failure else None,
        "input": "",
        "input_of": "",
        "is_input_cut": False,
        "mended_sha256": mended_sha256(bundle.source),
        "log": log,
        "is_log_cut": is_log_cut,
    }
    return view, bundle


async def ended_task(manager: Manager, job: JobId, stage: StageName, task: int, seq: int) -> tuple[Bundle, Outcome]:
    """Return the bundle and the outcome with the seq `seq`. Raise NotFound if the bundle does not contain the task."""
    rows = await manager.ports.ledger.bundles(job, stage=stage, after_seq=seq - 1, limit=1)
    row = next((row for row in rows if row.seq == seq and task in row.bundle.tasks), None)
    if row is not None:
        key = await manager.ports.keys.key_of((await manager.ports.ledger.job(job)).job)
        outcome = await committed(manager.ports.objects, row.bundle, manager.ports.patience, key)
        if outcome is not None:
            return row.bundle, outcome
    raise _no_task(job, stage, task)


async def _not_ended(manager: Manager, listed: TaskList, found: ListedTask) -> tuple[api_types.TaskView, Bundle | None]:
    """Return the view of a task without a result, and the bundle with its input, or None if the input is unknown."""
    live, run = manager.lives.get(listed.job.id), found.running
    bundle = run.bundle if run else None
    if live and bundle is None:
        sent = live.outstanding.get(found.stage, {}).values()
        bundle = next((one.bundle for one in sent if found.task in one.bundle.tasks), None)
    log, is_log_cut = "", False
    if live and run:
        tails = [tail for tail in await manager.live_logs.read(live) if (tail.stage, tail.task) == found[:2]]
        if tails:
            last = max(tails, key=lambda tail: (tail.attempt, tail.stop))
            log, is_log_cut = last.text[-MAX_SHOWN_BYTES:], last.start > 0 or len(last.text) > MAX_SHOWN_BYTES
    view: api_types.TaskView = {
        "seq": 0,
        "stage": found.stage,
        "task": found.task,
        "attempt": bundle.attempt if bundle else 0,
        "state": found.state.value,
        "worker": run.worker if run else "",
        "started_s": run.since_s if run else None,
        "ended_s": None,
        "run_s": None,
        "cpu_s": None,
        "memory_bytes": None,
        "input_bytes": None,
        "output_bytes": None,
        "failure": None,
        "input": "",
        "input_of": "",
        "is_input_cut": False,
        "mended_sha256": mended_sha256(bundle.source) if bundle else "",
        "log": log,
        "is_log_cut": is_log_cut,
    }
    if bundle is None and not listed.job.stage(found.stage).after:
        bundle = Bundle(listed.job.id, found.stage, TaskSet.from_indices([found.task]))
    return view, bundle


# --- Input ----------------------------------------------------------------------------------------


async def _input(manager: Manager, job: JobDef, bundle: Bundle, task: int) -> tuple[str, str, bool]:
    """Return the task's input as text, the file of the input, and whether the text is incomplete."""
    if job.stage(bundle.stage).gather == "*" and not is_mended(bundle):
        # The input of a gathering task has the size of the results of whole stages, which is too large to show.
        return f"All results of {', '.join(job.stage(bundle.stage).after)}.", "", False
    ports = manager.ports
    task_bundle = Bundle(
        bundle.job, bundle.stage, TaskSet.from_indices([task]), round=bundle.round, source=bundle.source
    )
    try:
        item = await task_input(ports.objects, job, task_bundle, ports.patience)
        return await _describe_item(manager, item, JobObjects.of_job(job))
    except NotFound as error:
        return f"The input is no longer in the bucket: {error.message}", "", False
    except ForeignReference as error:
        return error.message, "", False


async def _describe_item(manager: Manager, item: Json, own: JobObjects) -> tuple[str, str, bool]:
    kind = values.kind(item)
    if kind == "$pickle":
        return "A pickled Python object, which only the task's own code can read.", "", False
    if kind not in ("$file", "$part", "$value"):
        text = json.dumps(item, indent=2, ensure_ascii=False)
        return text[:MAX_SHOWN_BYTES], "", len(text) > MAX_SHOWN_BYTES
    file = str(item.get("name", ""))
    start, stop = 0, MAX_SHOWN_BYTES + 1
    if kind == "$part":
        start, stop = item["start"], min(item["stop"], item["start"] + MAX_SHOWN_BYTES + 1)
        file = f"{file}, bytes {item['start']:,} to {item['stop']:,}"
    else:
        file = f"{file}, {item.get('size', 0):,} bytes" if kind == "$file" else ""
    get = partial(manager.ports.objects.get_range, own.key(item), start, stop)
    data = await manager.ports.patience(get) if stop > start else b""
    beginning = data[:MAX_SHOWN_BYTES]
    if b"\0" in beginning:
        return f"The input is not text. The first bytes are {beginning[:32].hex(' ')}.", file, False
    return beginning.decode(errors="replace"), file, len(data) > MAX_SHOWN_BYTES


# --- Log ------------------------------------------------------------------------------------------


async def _log(manager: Manager, outcome: Outcome, task: int) -> tuple[str, bool]:
    """Return the end of the task's log, and whether the beginning of the log is missing."""
    objects, patience = manager.ports.objects, manager.ports.patience
    try:
        text, before = await log_end(
            outcome=outcome,
            task=task,
            limit=MAX_SHOWN_BYTES,
            read=lambda start, stop: patience(partial(objects.get_range, outcome.log, start, stop)),
        )
    except NotFound:
        return NOT_STORED, False
    return text.decode(errors="replace"), before > 0


MAX_BYTES = 2 * 1024**3
"""Limit in bytes of the results in an archive. `batchlab job results` also fetches larger results."""
MAX_OUTCOMES = 50_000
MAX_VALUE_BYTES = 16 * 1024**2
"""Limit in bytes of the inline values of one result, because all inline values are in memory at the same time."""

_REMEDY = "Use `batchlab job results`, which fetches any number of results from the bucket."


@router.get(
    "/jobs/{job}/results",
    response_class=FileResponse,
    responses={200: {"content": {"application/zip": {}}, "description": "A ZIP archive"}},
)
async def archive(
    manager: Leader, served: StateDep, job: JobId, stage: Annotated[list[str] | None, Query()] = None
) -> FileResponse:
    """Return the job's results as a ZIP archive of the files that `batchlab job results` writes.

    The archive of a running job contains the results so far. An archive has a size of at most 2 GiB. While the manager
    creates or sends an archive, another request gets status 503.
    """
    remedy = "Try again later, or run `batchlab job results`, which needs no archive."
    await acquire(served.archiving, "The manager is creating or sending another archive of results.", remedy)
    try:
        return await _archive(manager, job, stage or (), served.archiving.release)
    except BaseException:
        served.archiving.release()
        raise


async def _archive(manager: Manager, job: JobId, stages: Sequence[str], on_end: Callable[[], None]) -> FileResponse:
    record = await manager.ports.ledger.job(job)
    view = await current_view(manager, job)
    key = await manager.ports.keys.key_of(record.job)
    rows = await manager.ports.ledger.bundles(job, done=True, limit=MAX_OUTCOMES + 1)
    if len(rows) > MAX_OUTCOMES:
        raise _too_large(f"has more than {MAX_OUTCOMES:,} outcomes")
    listing = [Listed.from_view(job_views.outcome_view(row, key)) for row in rows if row.completion]
    folder = pathlib.Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="batchlab-results-", dir=disk_folder()))
    try:
        # `_pack` runs on another thread with its own event loop, because `_pack` decodes and writes thousands of
        # results.
        path = await asyncio.to_thread(_pack, manager, view, listing, stages, folder)
    except BaseException:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        raise
    return _Archive(path, folder, on_end, filename=f"{view['id']}.zip")


class _Archive(FileResponse):
    """Response that sends the archive, and then removes the archive, even after an error."""

    def __init__(self, path: pathlib.Path, folder: pathlib.Path, on_end: Callable[[], None], *, filename: str) -> None:
        super().__init__(path, media_type="application/zip", filename=filename)
        self._folder = folder
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


def _too_large(why: str) -> UsageError:
    return UsageError(f"The job {why}, which is too large for an archive.", remedy=_REMEDY)


def _pack(
    manager: Manager, view: api_types.JobView, listing: Sequence[Listed], stages: Sequence[str], folder: pathlib.Path
) -> pathlib.Path:
    total_bytes = 0

    def claim(size_bytes: int) -> None:
        nonlocal total_bytes
        total_bytes += size_bytes
        if total_bytes > MAX_BYTES:
            raise _too_large(f"has more than {size(MAX_BYTES)} of results")
        if not has_room(folder, size_bytes):
            raise UsageError(
                "The manager's disk does not have enough space for an archive of these results.", remedy=_REMEDY
            )

    claim(0)
    objects, patience = manager.ports.objects, manager.ports.patience
    out = folder / "results"
    within = FetchLimits(claim, MAX_VALUE_BYTES, remedy=_REMEDY)
    asyncio.run(results.fetch(objects, view, listing, out, patience=patience, stages=stages, within=within))
    path = folder / "results.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped:
        for file in sorted(out.rglob("*")):
            if file.is_file() and not file.name.startswith(".batchlab"):
                claim(0)
                zipped.write(file, f"{view['id']}/{file.relative_to(out).as_posix()}")
                file.unlink()  # the file is removed to save disk space, because the archive contains the file now
    return path
