"""Reading the outcomes that workers have left in the bucket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from batchlab.commit import committed
from batchlab.manager.manager import Manager
from batchlab.model import Outcome
from batchlab.ports import BundleRecord

READ_AT_ONCE = 16

NOT_STORED = "(not stored until the long task that follows it in its worker has ended)\n"
"""A bundle's log is stored when its run has ended, its first outcome while a long task runs."""


async def outcomes_of(
    manager: Manager, records: Sequence[BundleRecord]
) -> AsyncIterator[tuple[BundleRecord, Outcome]]:
    """The outcomes of these, all of one job, in order, read some at a time."""
    if not records:
        return
    objects, patience = manager.ports.objects, manager.ports.patience
    key = await manager.ports.keys.of((await manager.ports.ledger.job(records[0].bundle.job)).job)
    for first in range(0, len(records), READ_AT_ONCE):
        some = records[first : first + READ_AT_ONCE]
        read = await asyncio.gather(*(committed(objects, r.bundle, patience, key) for r in some))
        for record, outcome in zip(some, read, strict=True):
            if outcome:
                yield record, outcome
