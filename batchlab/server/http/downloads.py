"""Endpoints that send a job's list of tasks as CSV, and the complete log of a task.

Invariants: the manager reads a download piece by piece while it sends the response, so the memory does not depend on
the size. A text of a worker is never a formula of a spreadsheet, and a browser stores a log instead of showing it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from urllib.parse import quote

from fastapi.responses import StreamingResponse

from batchlab.core import api_types
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import task_name
from batchlab.core.model import JobId, StageName
from batchlab.server.http.common import Leader, StateDep, guarded_router
from batchlab.server.http.task_list import MAX_LISTED_TASKS, SearchText, tasks
from batchlab.server.http.tasks import Index, Seq, ended_task, seq_of
from batchlab.server.task_index import TaskState

router = guarded_router()

COLUMNS = (
    *("stage", "task", "state", "attempt", "worker", "run_s"),
    *("cpu_s", "memory_bytes", "input_bytes", "output_bytes", "input", "mended_sha256"),
)
"""Columns of the CSV file, which have the names of the fields of TaskRowView."""
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""First characters by which a spreadsheet recognizes a formula."""
PIECE_BYTES = 1024 * 1024


@router.get(
    "/jobs/{job}/tasks.csv",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {}}, "description": "A CSV file"}},
)
async def tasks_csv(
    manager: Leader,
    served: StateDep,
    job: JobId,
    stage: StageName | None = None,
    state: TaskState | None = None,
    search: SearchText = "",
) -> StreamingResponse:
    """Return all tasks of a list as a CSV file with a header. Times are in seconds.

    A text that a spreadsheet could take for a formula begins with an apostrophe.
    """

    async def page_from(after: str | None) -> api_types.TasksView:
        return await tasks(manager, served, job, stage, state, search, after, MAX_LISTED_TASKS)

    # An error of the first page is an error response.
    first = await page_from(None)

    async def rows() -> AsyncIterator[str]:
        page: api_types.TasksView | None = first
        yield _lines([COLUMNS])
        while page:
            yield _lines([[_cell(dict(one)[name]) for name in COLUMNS] for one in page["tasks"]])
            page = await page_from(page["next"]) if page["next"] else None

    return StreamingResponse(rows(), media_type="text/csv", headers=_as_file(f"{job}-tasks.csv"))


def _lines(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value


@router.get(
    "/jobs/{job}/stages/{stage}/tasks/{task}/log",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/plain": {}}, "description": "A text file"}},
)
async def task_log(
    manager: Leader, served: StateDep, job: JobId, stage: StageName, task: Index, seq: Seq = None
) -> StreamingResponse:
    """Return the complete log of an ended task. With `seq`, return the log in the outcome with this seq."""
    name = task_name(stage, task)
    seq = seq or await seq_of(manager, served, job, stage, task)
    if seq is None:
        raise NotFound(f"Task {name} of job {job} has no complete log.", remedy="Wait until the task has ended.")
    _, outcome = await ended_task(manager, job, stage, task, seq)
    spans = sorted((start, stop) for owner, start, stop in outcome.log_spans if owner == task)
    ranges = [(at, min(at + PIECE_BYTES, stop)) for start, stop in spans for at in range(start, stop, PIECE_BYTES)]

    async def read(start: int, stop: int) -> bytes:
        return await manager.ports.patience(partial(manager.ports.objects.get_range, outcome.log, start, stop))

    # If the log does not exist, the response is an error.
    first = await read(*ranges[0]) if ranges else b""

    async def pieces() -> AsyncIterator[bytes]:
        yield first
        for start, stop in ranges[1:]:
            yield await read(start, stop)

    return StreamingResponse(pieces(), media_type="text/plain", headers=_as_file(f"{job}-{stage}-{task}.log"))


def _as_file(name: str) -> dict[str, str]:
    return {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}", "X-Content-Type-Options": "nosniff"}
