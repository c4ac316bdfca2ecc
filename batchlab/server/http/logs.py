"""Endpoints of task logs: complete logs of ended tasks, and live logs of running tasks.

Invariant: the endpoints read logs from the bucket, and the ledger lists the outcomes. An answer
contains at most MAX_BYTES of logs, and it marks the logs that are left out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from batchlab.core import api_types
from batchlab.core.errors import NotFound
from batchlab.core.model import JobId, Outcome, StageName
from batchlab.core.ports import BundleRecord
from batchlab.jobs.attempts import Attempt, attempt_in, printed
from batchlab.manager.manager import Manager
from batchlab.server import job_views
from batchlab.server.http.common import MAX_LISTED, NOT_STORED, Leader, Limit, Wait, guarded, outcomes_of
from batchlab.server.http.jobs import page

MAX_BYTES = 32 * 1024**2
LEFT_OUT = "(left out: an answer holds up to 32 MiB. Name this task alone, or ask for fewer.)\n"
PAGE_BUNDLES = 50
"""Number of outcomes whose logs form one answer to a client that follows a job."""

router = guarded()


@dataclass(slots=True)
class _Room:
    """Remaining size of an answer."""

    left_bytes: int = field(default_factory=lambda: MAX_BYTES)
    is_over: bool = False
    """A log was left out. No further log is added, because it would seem to follow directly."""

    def takes(self, outcome: Outcome, attempt: Attempt) -> bool:
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
    """Return the logs of tasks, one for each attempt, including retried attempts. `failed` selects
    tasks that failed permanently. `since_s` selects attempts that ended within this number of
    seconds."""
    record = await manager.ports.ledger.job(job)
    records = await manager.ports.ledger.bundles(job, stage=stage, done=True, failed=failed)
    if task is not None:
        records = [r for r in records if task in r.bundle.tasks]
    if failed:
        # Failures of earlier rounds are outdated, because the retry ran their tasks again.
        records = [r for r in records if r.bundle.round == record.round]
    found: list[api_types.LogView] = []
    room = _Room()
    async for _, outcome in outcomes_of(manager, _recent(manager, records, since_s)):
        async for log in _of(manager, outcome, task, limit - len(found), room, failed=failed):
            found.append(log)  # noqa: PERF401 - its length limits the reads
        if len(found) >= limit or room.is_over:
            break
    return {"logs": sorted(found, key=lambda log: (log["stage"], log["task"], log["attempt"]))}


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
    """Return the logs of outcomes with a seq above `seq`, in the order of their seq. The answer
    waits for the first outcome."""
    live = manager.lives.get(job)
    round_ = live.round if live else (await manager.ports.ledger.job(job)).round
    waited = await page(manager, job, stage, seq, 1, wait_s)
    records: Sequence[BundleRecord] = ()
    if waited["outcomes"]:
        records = await manager.ports.ledger.bundles(job, stage=stage, done=True, after_seq=seq, limit=PAGE_BUNDLES)
    last = records[-1].seq if records else seq
    wanted = [r for r in records if task is None or task in r.bundle.tasks]
    found: list[api_types.LogView] = []
    over = False
    room = _Room()
    bundle_ids = {r.bundle.id for r in _recent(manager, wanted, since_s)}
    async for record, outcome in outcomes_of(manager, wanted):
        attempt = attempt_in(outcome, task) if task is not None else None
        over = over or (attempt is not None and attempt.state != "RETRIED")
        current = outcome.bundle.round == round_
        if outcome.bundle.id in bundle_ids and (current or not failed):
            found += [log async for log in _of(manager, outcome, task, MAX_LISTED, room, failed=failed)]
        if room.is_over or room.left_bytes < MAX_BYTES / 2:
            last = record.seq  # the next answer contains the other logs
            break
    ended = waited["ended"] and not records
    return {"logs": found, "seq": last, "ended": ended or over}


@router.post("/jobs/{job}/tails")
async def tails(manager: Leader, job: JobId) -> api_types.TailsView:
    """Return the end of the logs of running tasks. Workers store live logs only while a client
    requests them, so the first answers may be empty. A client repeats the request every `every_s`
    seconds."""
    live = manager.lives.get(job)
    if live is None:
        await manager.ports.ledger.job(job)
        return {"tails": [], "every_s": manager.live_logs.every_s}
    tails = await manager.live_logs.read(live)
    shown = sorted((tail.stage, tail.task, tail.attempt, tail) for tail in tails)
    return {"tails": [job_views.tail_view(tail) for *_, tail in shown], "every_s": manager.live_logs.every_s}


def _recent(manager: Manager, records: Sequence[BundleRecord], since_s: float | None) -> Sequence[BundleRecord]:
    if since_s is None:
        return records
    begin_s = manager.ports.clock.now_s() - since_s
    return [r for r in records if r.completion and r.completion.ended_s >= begin_s]


async def _of(
    manager: Manager, outcome: Outcome, task: int | None, limit: int, room: _Room, *, failed: bool
) -> AsyncIterator[api_types.LogView]:
    """Return the logs of an outcome: of all tasks, of one task, or of the tasks that failed
    permanently."""
    wanted = [
        attempt
        for number in dict.fromkeys(span[0] for span in outcome.log_spans)
        if task in (None, number)
        and (attempt := attempt_in(outcome, number))
        and (not failed or attempt.state == "FAILED")
    ][:limit]
    fits: list[Attempt] = []
    left_out: list[Attempt] = []
    for one in wanted:
        (fits if room.takes(outcome, one) else left_out).append(one)
    for attempt, text in await _texts(manager, outcome, fits):
        yield job_views.log_view(attempt, text if text is not None else NOT_STORED.encode(), text is not None)
    for attempt in left_out:
        yield job_views.log_view(attempt, LEFT_OUT.encode())


async def _texts(
    manager: Manager, outcome: Outcome, wanted: Sequence[Attempt]
) -> Sequence[tuple[Attempt, bytes | None]]:
    objects, patience = manager.ports.objects, manager.ports.patience
    try:
        texts = await printed(objects, outcome, [attempt.task for attempt in wanted], patience)
    except NotFound:
        return [(attempt, None) for attempt in wanted]
    return [(attempt, texts[attempt.task]) for attempt in wanted]
