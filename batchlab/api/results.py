"""Endpoints of what came of a job's tasks: their outcomes.

Invariant: read from the outcomes in the bucket; the ledger only says which there are.
"""

from __future__ import annotations

from batchlab import views
from batchlab.api.common import MOST, Leader, Limit, Wait, guarded
from batchlab.api.waiting import page
from batchlab.model import JobId, StageName

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
