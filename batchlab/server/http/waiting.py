"""Long polls: waits for a new version of a job, and for outcomes of its tasks.

Invariant: changes wake the waiting requests, which do not poll.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from batchlab.core import api_types
from batchlab.core.model import JobId, Outcome, StageName
from batchlab.core.ports import BundleRecord
from batchlab.core.protocol import settlement
from batchlab.core.protocol.seals import CommitKey
from batchlab.manager.manager import Manager
from batchlab.manager.state import LiveJob
from batchlab.server.http.common import MOST
from batchlab.server.views import jobs


async def news(live: LiveJob, version: int, wait_s: float) -> None:
    """Wait until the job's version differs from `version`, at most `wait_s`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await live.news(version)


async def first(manager: Manager, job: JobId, wait_s: float) -> api_types.OutcomesView:
    """Return the first outcomes of a new job as soon as they are committed. At this time, they may
    not be counted yet."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + wait_s
    if live := manager.lives.get(job):
        live.listeners += 1
        try:
            while not (
                live.first_outcomes or live.folds or live.record.state.ended or loop.time() >= end_s
            ):
                await news(live, live.version, end_s - loop.time())
            if live.first_outcomes and not live.folds:
                key = await manager.ports.keys.of(live.job)
                return {
                    "outcomes": [_uncounted(one, key) for one in live.first_outcomes],
                    "ended": False,
                }
        finally:
            live.listeners -= 1
            if not live.listeners:
                live.told.clear()
    return await page(manager, job, None, None, MOST, end_s - loop.time())


def _uncounted(outcome: Outcome, key: CommitKey) -> api_types.OutcomeView:
    record = BundleRecord(outcome.bundle, settlement.completion(outcome), api_types.UNCOUNTED)
    return jobs.outcome_view(record, key, outcome)


async def page(
    manager: Manager,
    job: JobId,
    stage: StageName | None,
    after: int | None,
    limit: int,
    wait_s: float,
) -> api_types.OutcomesView:
    """Return outcomes with a seq above `after`, of one stage or of all. The answer waits for the
    first one."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + wait_s
    while True:
        live = manager.lives.get(job)
        # Read the number of folds before the outcomes, so that an outcome that is folded in between
        # is not missed.
        folds = live.folds if live else 0
        record = live.record if live else await manager.ports.ledger.job(job)
        ended = record.state.ended
        found = await _after(manager, live, job, stage, after, limit)
        if found or ended or live is None or loop.time() >= end_s:
            key = await manager.ports.keys.of(record.job)
            return {
                "outcomes": [jobs.outcome_view(row, key, one) for row, one in found],
                "ended": ended and len(found) < limit,
            }
        while live.folds == folds and not live.record.state.ended and loop.time() < end_s:
            await news(live, live.version, end_s - loop.time())


async def _after(
    manager: Manager,
    live: LiveJob | None,
    job: JobId,
    stage: StageName | None,
    after: int | None,
    limit: int,
) -> Sequence[tuple[BundleRecord, Outcome | None]]:
    recent = live.outcomes_after(after) if live else None
    if recent is not None:
        return [one for one in recent if stage in (None, one[0].bundle.stage)][:limit]
    found = await manager.ports.ledger.bundles(
        job, stage=stage, done=True, after_seq=after, limit=limit
    )
    return [(one, None) for one in found]
