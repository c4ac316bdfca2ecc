"""The last check before a job ends: what was counted is what is committed.

Invariant: a sealed job ends only when each bundle that the ledger has counted has its outcome in
the bucket, under its sealed name. A worker with the job's commit key can prove events of outcomes
that it never committed.
"""

from __future__ import annotations

import asyncio
from functools import partial

from batchlab.manager.live import LiveJob, Ports
from batchlab.model import Bundle
from batchlab.protocol import naming

FEW = 8
"""So many bundles are asked for one by one, which is faster than a listing."""
_PAGE = 2_000


async def uncommitted(ports: Ports, live: LiveJob) -> list[Bundle]:
    """Return bundles that were counted and have no outcome object, none for an unsealed job."""
    key = await ports.keys.of(live.job)
    if not key:
        return []
    named: dict[str, Bundle] = {}
    last: int | None = None
    while rows := await ports.ledger.bundles(live.id, done=True, after_seq=last, limit=_PAGE):
        named |= {naming.outcome(row.bundle, key): row.bundle for row in rows}
        last = rows[-1].seq
        if len(rows) < _PAGE:
            break
    if len(named) <= FEW:
        heads = [ports.patience(partial(ports.objects.head, name)) for name in named]
        found = await asyncio.gather(*heads)
        return [one for one, head in zip(named.values(), found, strict=True) if head is None]
    for stage in live.job.stages:
        async for page in ports.objects.list(naming.outcomes(live.id, stage.name)):
            for info in page:
                named.pop(info.key, None)
    return list(named.values())
