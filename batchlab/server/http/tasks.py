"""Endpoint of one task: its end, its input, and its log.

Invariant: the endpoint never unpickles a value, because that could run code. An answer contains at
most SHOWN_BYTES of the input and of the log.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

from fastapi import Path, Query

from batchlab.core import api_types
from batchlab.core.commit import committed
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, JobId, Json, Outcome, StageName, TaskSet
from batchlab.core.ports import BundleRecord
from batchlab.core.protocol import values
from batchlab.core.protocol.references import ForeignReference, Own
from batchlab.core.task_names import task_name
from batchlab.jobs.attempts import attempt_in, log_end, task_input
from batchlab.manager.manager import Manager
from batchlab.server.http.common import NOT_STORED, Leader, guarded
from batchlab.server.views import jobs

router = guarded()

SHOWN_BYTES = 20_000
ROWS_AT_ONCE = 2000

Index = Annotated[int, Path(ge=0, le=2**53)]
Seq = Annotated[
    int | None, Query(ge=1, le=2**53, description="The outcome that tells of it, where known")
]


@router.get("/jobs/{job}/stages/{stage}/tasks/{task}")
async def task(
    manager: Leader, job: JobId, stage: StageName, task: Index, seq: Seq = None
) -> api_types.TaskView:
    """Return an ended task according to its last outcome, or to the outcome `seq`."""
    record = await manager.ports.ledger.job(job)
    row = await _row(manager, job, stage, task, seq)
    objects, patience = manager.ports.objects, manager.ports.patience
    key = await manager.ports.keys.of(record.job)
    outcome = await committed(objects, row.bundle, patience, key) if row else None
    if row is None or outcome is None:
        raise NotFound(
            f"No outcome tells of task {task_name(stage, task)} of job {job}.",
            remedy="It may not have ended yet, or there is no such task.",
        )
    attempt = attempt_in(outcome, task)
    failure = attempt.failure if attempt and attempt.state == "FAILED" else None
    given, of, is_cut = await _input(manager, record.job, row.bundle, task)
    log, is_log_cut = await _log(manager, outcome, task)
    return {
        "seq": row.seq or 0,
        "stage": stage,
        "task": task,
        "attempt": row.bundle.attempt,
        "state": attempt.state.lower() if attempt else "retried",
        "worker": outcome.worker,
        "started_s": outcome.started_s,
        "ended_s": outcome.ended_s,
        "failure": jobs.failure_view(row.seq or 0, outcome, failure) if failure else None,
        "input": given,
        "input_of": of,
        "is_input_cut": is_cut,
        "log": log,
        "is_log_cut": is_log_cut,
    }


async def _row(
    manager: Manager, job: JobId, stage: StageName, task: int, seq: int | None
) -> BundleRecord | None:
    """Return the bundle whose outcome contains the task: the one with this `seq`, or the latest."""
    ledger = manager.ports.ledger
    if seq is not None:
        rows = await ledger.bundles(job, stage=stage, after_seq=seq - 1, limit=1)
        return next((r for r in rows if r.seq == seq and task in r.bundle.tasks), None)
    found: BundleRecord | None = None
    last = 0
    while rows := await ledger.bundles(job, stage=stage, after_seq=last, limit=ROWS_AT_ONCE):
        found = next((r for r in reversed(rows) if task in r.bundle.tasks), found)
        last = rows[-1].seq or 0
    return found


# --- Input ----------------------------------------------------------------------------------------


async def _input(manager: Manager, job: JobDef, bundle: Bundle, task: int) -> tuple[str, str, bool]:
    """Return the input as text, its file, and whether the text is incomplete."""
    if job.stage(bundle.stage).gather == "*":
        # The input has the size of the results of whole stages, which is too large to show.
        return f"All results of {', '.join(job.stage(bundle.stage).after)}.", "", False
    ports = manager.ports
    one = Bundle(
        bundle.job, bundle.stage, TaskSet.of([task]), round=bundle.round, source=bundle.source
    )
    try:
        item = await task_input(ports.objects, job, one, ports.patience)
        return await _shown(manager, item, Own.of(job))
    except NotFound as error:
        return f"It is not in the bucket any more: {error.message}", "", False
    except ForeignReference as error:
        return error.message, "", False


async def _shown(manager: Manager, item: Json, own: Own) -> tuple[str, str, bool]:
    kind = values.kind(item)
    if kind == "$pickle":
        return "A pickled Python object, which only the task's own code can read.", "", False
    if kind in ("$file", "$part", "$value"):
        start = item["start"] if kind == "$part" else 0
        stop = item["stop"] if kind == "$part" else start + SHOWN_BYTES + 1
        end = min(stop, start + SHOWN_BYTES + 1)
        get = partial(manager.ports.objects.get_range, own.key(item), start, end)
        data = await manager.ports.patience(get) if end > start else b""
        text, is_cut = _text(data)
        return text, _of(item, kind), is_cut
    text = json.dumps(item, indent=2, ensure_ascii=False)
    return text[:SHOWN_BYTES], "", len(text) > SHOWN_BYTES


def _of(item: Json, kind: str) -> str:
    name = str(item.get("name", ""))
    if kind == "$part":
        return f"{name}, bytes {item['start']:,} to {item['stop']:,}"
    return f"{name}, {item.get('size', 0):,} bytes" if kind == "$file" else ""


def _text(data: bytes) -> tuple[str, bool]:
    shown = data[:SHOWN_BYTES]
    if b"\0" in shown:
        return f"Not text; it begins with the bytes {shown[:32].hex(' ')}.", False
    return shown.decode(errors="replace"), len(data) > SHOWN_BYTES


# --- Log ------------------------------------------------------------------------------------------


async def _log(manager: Manager, outcome: Outcome, task: int) -> tuple[str, bool]:
    """Return the end of the task's log, and whether it is incomplete."""
    objects, patience = manager.ports.objects, manager.ports.patience
    try:
        text, before = await log_end(
            outcome=outcome,
            task=task,
            limit=SHOWN_BYTES,
            read=lambda start, stop: patience(partial(objects.get_range, outcome.log, start, stop)),
        )
    except NotFound:
        return NOT_STORED, False
    return text.decode(errors="replace"), before > 0
