"""Final checks of a job: every counted bundle is committed, and every planned task has ended.

Invariants: a job with a commit key ends only when the bucket has a sealed outcome for each bundle that the ledger
counts. The bucket is checked, because a worker with the job's commit key can send events of outcomes that it never
committed. A worker with the commit key can also commit outcomes without their follow-up bundles. Every job ends, even
if all of its bundles have ended before some of its tasks (promise I7).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from enum import Enum, auto
from functools import partial

from batchlab.core.model import Bundle, JobId
from batchlab.core.protocol import object_keys
from batchlab.manager.state import LiveJob, Ports

MAX_SINGLE_REQUESTS = 8
"""Maximum number of bundles whose outcomes are checked with single requests, which are faster than a listing."""
_PAGE = 2_000
MAX_JOBS = 1_000


async def uncommitted_bundles(ports: Ports, live: LiveJob) -> list[Bundle]:
    """Return the job's counted bundles without an outcome object. For a job without a commit key, the returned list is
    empty."""
    key = await ports.keys.key_of(live.job)
    if not key:
        return []
    named: dict[str, Bundle] = {}
    last: int | None = None
    while rows := await ports.ledger.bundles(live.id, done=True, after_seq=last, limit=_PAGE):
        named |= {object_keys.outcome(row.bundle, key): row.bundle for row in rows}
        last = rows[-1].seq
        if len(rows) < _PAGE:
            break
    if len(named) <= MAX_SINGLE_REQUESTS:
        heads = [ports.patience(partial(ports.objects.head, name)) for name in named]
        object_infos = await asyncio.gather(*heads)
        return [bundle for bundle, head in zip(named.values(), object_infos, strict=True) if head is None]
    for stage in live.job.stages:
        async for page in ports.objects.list(object_keys.outcomes(live.id, stage.name)):
            for info in page:
                named.pop(info.key, None)
    return list(named.values())


class Recovery(Enum):
    """Action for a job whose bundles have all ended, although some of its tasks have not ended."""

    NONE = auto()
    RESTORE = auto()
    """Restore the job from the bucket, where only committed outcomes count."""
    FAIL = auto()
    """End the job, because a restore from the bucket has not changed the job's state."""


class LostTasks:
    """Detector of jobs with tasks that are in no bundle."""

    def __init__(self, ports: Ports, wait_s: float) -> None:
        """A recovery starts after a job has lacked bundles for `wait_s` seconds, because counters and bundles change
        one by one."""
        self._clock = ports.clock
        self._wait_s = wait_s
        self._since_s: OrderedDict[tuple[JobId, int], float] = OrderedDict()
        self._restored: OrderedDict[tuple[JobId, int], None] = OrderedDict()

    def recovery(self, live: LiveJob) -> Recovery:
        name = live.id, live.round
        if not live.lacks_bundles:
            self._since_s.pop(name, None)
            return Recovery.NONE
        now_s = self._clock.monotonic_s()
        since_s = self._since_s.setdefault(name, now_s)
        if len(self._since_s) > MAX_JOBS:
            self._since_s.popitem(last=False)
        if now_s - since_s < self._wait_s:
            return Recovery.NONE
        del self._since_s[name]
        if name in self._restored:
            return Recovery.FAIL
        self._restored[name] = None
        if len(self._restored) > MAX_JOBS:
            self._restored.popitem(last=False)
        return Recovery.RESTORE
