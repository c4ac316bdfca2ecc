"""Endpoints of task logs: complete logs of ended tasks, and live logs of running tasks.

Invariant: the ledger lists the outcomes, and the endpoints read the logs of the outcomes from the bucket. An answer
contains at most MAX_BYTES of logs, and has a remark in place of each omitted log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from batchlab.core import api_types
from batchlab.core.errors import NotFound
from batchlab.core.model import JobId, Outcome, StageName
from batchlab.core.ports import BundleRecord
from batchlab.jobs.attempts import Attempt, attempt_in, printed_output
from batchlab.manager.manager import Manager
from batchlab.server import job_views
from batchlab.server.answers import MAX_LISTED, outcomes_page
from batchlab.server.http.common import NOT_STORED, Leader, Limit, Wait, guarded_router, outcomes_of

MAX_BYTES = 32 * 1024**2
LEFT_OUT = "(This log is omitted, because an answer contains up to 32 MiB. Request this task alone.)\n"
PAGE_BUNDLES = 50
"""Number of outcomes whose logs are in one answer to a client that follows a job."""

router = guarded_router()


@dataclass(slots=True)
class _Room:
    """Remaining space for logs in an answer. `is_over` is True after a log was omitted."""

    left_bytes: int = field(default_factory=lambda: MAX_BYTES)
    is_over: bool = False

    def reserve(self, outcome: Outcome, attempt: Attempt) -> bool:
        """Reserve space for a log in the answer. Return False if the log is too large for the remaining space."""
        spans = (stop - start for task, start, stop in outcome.log_spans if task == attempt.task)
        size_bytes = sum(max(0, span) for span in spans)
        if size_bytes > self.left_bytes:
            self.is_over = True
            return False
        self.left_bytes -= size_bytes
        return True


@router.get("/jobs/{job}/logs")
async def logs(
    manager: Leader,
    job: JobId,
    stage: StageName | None = None,
    task: int | None = None,
    limit: Limit = 100,
    failed: bool = False,
    since_s: float | None = None,
) -> api_types.LogsView:
    """Return the logs of a job's tasks, with one log for each attempt, including retried attempts.

    The parameter `failed` selects tasks that failed permanently. The parameter `since_s` selects attempts that ended
    within the last `since_s` seconds.
    """
    record = await manager.ports.ledger.job(job)
    records = await manager.ports.ledger.bundles(job, stage=stage, done=True, failed=failed)
    if task is not None:
        records = [r for r in records if task in r.bundle.tasks]
    if failed:
        # Failures of earlier rounds are outdated, because a retry ran the failed tasks again.
        records = [r for r in records if r.bundle.round == record.round]
    views: list[api_types.LogView] = []
    room = _Room()
    async for _, outcome in outcomes_of(manager, _recent(manager, records, since_s)):
        views += await _logs_of(manager, outcome, task, limit - len(views), room, failed=failed)
        if len(views) >= limit or room.is_over:
            break
    return {"logs": sorted(views, key=lambda log: (log["stage"], log["task"], log["attempt"]))}


@router.get("/jobs/{job}/logs/after")
async def logs_after(
    manager: Leader,
    job: JobId,
    seq: int | None = None,
    stage: StageName | None = None,
    task: int | None = None,
    failed: bool = False,
    since_s: float | None = None,
    wait_s: Wait = 0.0,
) -> api_types.NewLogsView:
    """Return the logs of outcomes with a seq above `seq`, in the order of their seq.

    The manager waits up to `wait_s` seconds until at least one outcome exists.
    """
    live = manager.lives.get(job)
    round_ = live.round if live else (await manager.ports.ledger.job(job)).round
    first_page = await outcomes_page(manager, job, stage, seq, 1, wait_s)
    records: Sequence[BundleRecord] = ()
    if first_page["outcomes"]:
        records = await manager.ports.ledger.bundles(job, stage=stage, done=True, after_seq=seq, limit=PAGE_BUNDLES)
    last = records[-1].seq if records else seq
    matching = [r for r in records if task is None or task in r.bundle.tasks]
    views: list[api_types.LogView] = []
    task_ended = False
    room = _Room()
    bundle_ids = {r.bundle.id for r in _recent(manager, matching, since_s)}
    async for record, outcome in outcomes_of(manager, matching):
        attempt = attempt_in(outcome, task) if task is not None else None
        task_ended = task_ended or (attempt is not None and attempt.state != "RETRIED")
        current = outcome.bundle.round == round_
        if outcome.bundle.id in bundle_ids and (current or not failed):
            views += await _logs_of(manager, outcome, task, MAX_LISTED, room, failed=failed)
        if room.is_over or room.left_bytes < MAX_BYTES / 2:
            last = record.seq  # the next answer contains the logs that did not fit into this answer
            break
    ended = first_page["ended"] and not records
    return {"logs": views, "seq": last, "ended": ended or task_ended}


@router.post("/jobs/{job}/tails")
async def tails(manager: Leader, job: JobId) -> api_types.TailsView:
    """Return the end of the log of each running task of a job.

    Workers store live logs only while a client requests them, so the first answers may be empty. A client that follows
    live logs repeats the request every `every_s` seconds.
    """
    live = manager.lives.get(job)
    if live is None:
        await manager.ports.ledger.job(job)
        return {"tails": [], "every_s": manager.live_logs.every_s}
    tails = sorted(await manager.live_logs.read(live), key=lambda tail: (tail.stage, tail.task, tail.attempt))
    return {"tails": [job_views.tail_view(tail) for tail in tails], "every_s": manager.live_logs.every_s}


def _recent(manager: Manager, records: Sequence[BundleRecord], since_s: float | None) -> Sequence[BundleRecord]:
    if since_s is None:
        return records
    begin_s = manager.ports.clock.now_s() - since_s
    return [r for r in records if r.completion and r.completion.ended_s >= begin_s]


async def _logs_of(
    manager: Manager, outcome: Outcome, task: int | None, limit: int, room: _Room, *, failed: bool
) -> list[api_types.LogView]:
    """Return logs of an outcome: the logs of all tasks, of one task, or of the tasks that failed permanently."""
    attempts = [
        attempt
        for number in dict.fromkeys(span[0] for span in outcome.log_spans)
        if task in (None, number)
        and (attempt := attempt_in(outcome, number))
        and (not failed or attempt.state == "FAILED")
    ][:limit]
    fitting: list[Attempt] = []
    omitted: list[Attempt] = []
    for attempt in attempts:
        (fitting if room.reserve(outcome, attempt) else omitted).append(attempt)
    omitted_views = [job_views.log_view(attempt, LEFT_OUT.encode()) for attempt in omitted]
    ports = manager.ports
    try:
        texts = await printed_output(ports.objects, outcome, [attempt.task for attempt in fitting], ports.patience)
    except NotFound:
        return [job_views.log_view(attempt, NOT_STORED.encode(), False) for attempt in fitting] + omitted_views
    return [job_views.log_view(attempt, texts[attempt.task]) for attempt in fitting] + omitted_views
