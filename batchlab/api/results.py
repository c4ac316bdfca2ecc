"""Endpoints of what came of a job's tasks: outcomes, failures, logs.

Invariant: read from the outcomes in the bucket; the ledger only says which there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from batchlab import views
from batchlab.api.common import MOST, Leader, Limit, Wait, guarded
from batchlab.api.waiting import page
from batchlab.commit import committed
from batchlab.errors import NotFound
from batchlab.manager.manager import Manager
from batchlab.model import JobId, Outcome, StageName
from batchlab.ports import BundleRecord

READ_AT_ONCE = 16

router = guarded()


@router.get("/jobs/{job}/outcomes")
async def outcomes(
    manager: Leader,
    job: JobId,
    stage: StageName | None = None,
    after: int | None = None,
    limit: Limit = MOST,
    wait_s: Wait = 0.0,
) -> views.OutcomesView:
    """Outcomes in the order in which they were folded, those after seq `after`; with `wait_s` the
    answer waits for the first one."""
    return await page(manager, job, stage, after, limit, wait_s)


@router.get("/jobs/{job}/failures")
async def failures(manager: Leader, job: JobId, limit: Limit = 100) -> views.FailuresView:
    """Tasks that failed for good, in the job's present round."""
    round_ = (await manager.ports.ledger.job(job)).round
    records = await manager.ports.ledger.bundles(job, failed=True)
    found: list[views.FailureView] = []
    # What failed in an earlier round has been taken back by the retry.
    async for outcome in _outcomes(manager, [r for r in records if r.bundle.round == round_]):
        found += [views.failure_view(outcome, f) for f in outcome.failed if f.final]
        if len(found) >= limit:
            break
    return {"failures": found[:limit]}


@router.get("/jobs/{job}/logs")
async def logs(
    manager: Leader,
    job: JobId,
    stage: StageName | None = None,
    task: int | None = None,
    limit: Limit = 100,
) -> views.LogsView:
    """What tasks printed, each attempt of its own, also those that were tried again."""
    await manager.ports.ledger.job(job)
    records = await manager.ports.ledger.bundles(job, stage=stage, done=True)
    if task is not None:
        records = [r for r in records if task in r.bundle.tasks]
    found: list[views.LogView] = []
    async for outcome in _outcomes(manager, records):
        spans = [span for span in outcome.log_spans if task is None or span[0] == task]
        found += [await _log(manager, outcome, span) for span in spans[: limit - len(found)]]
        if len(found) >= limit:
            break
    return {"logs": sorted(found, key=lambda log: (log["stage"], log["task"], log["attempt"]))}


async def _log(manager: Manager, outcome: Outcome, span: tuple[int, int, int]) -> views.LogView:
    task, start, stop = span
    objects = manager.ports.objects
    try:
        text = await manager.ports.patience(lambda: objects.get_range(outcome.log, start, stop))
    except NotFound:
        # A bundle's log is stored when its run has ended, its first outcome while a long task runs.
        text = b"(not stored until the long task that follows it in its worker has ended)\n"
    return views.log_view(outcome, task, text)


async def _outcomes(manager: Manager, records: Sequence[BundleRecord]) -> AsyncIterator[Outcome]:
    """The outcomes of these, in order, read some at a time."""
    objects, patience = manager.ports.objects, manager.ports.patience
    for first in range(0, len(records), READ_AT_ONCE):
        some = records[first : first + READ_AT_ONCE]
        read = await asyncio.gather(*(committed(objects, r.bundle, patience) for r in some))
        for outcome in read:
            if outcome:
                yield outcome
