"""Care with bundles that came back without an outcome: some of them kill their workers.

Invariant (I7): such a bundle is halved until its tasks stand alone; a task alone that was started
LOSS_LIMIT times without an outcome is FAILED. Only starts that were written down count, so a
message that lay prefetched in a dying worker is not blamed, and a task's own retries are untouched.
"""

from __future__ import annotations

import logging
from functools import partial

from batchlab.commit import commit, committed
from batchlab.errors import BackendError, NotFound
from batchlab.model import Bundle, Outcome
from batchlab.patience import Patience
from batchlab.ports import Clock, Objects
from batchlab.protocol import naming, settle, wire
from batchlab.worker.hand import Hand

log = logging.getLogger(__name__)


def marker(worker: str, now_s: float) -> bytes:
    """The content of start and running markers."""
    return wire.to_bytes({"v": wire.VERSION, "worker": worker, "at_s": now_s})


class Suspects:
    """The careful path of one worker."""

    def __init__(self, objects: Objects, clock: Clock, patience: Patience, worker: str) -> None:
        self._objects = objects
        self._clock = clock
        self._patience = patience
        self._worker = worker

    async def verdict(self, hand: Hand) -> Outcome | None:
        """What has become of the bundle: its outcome if there is one or must be one now, None
        where it should be run."""
        bundle = hand.bundle
        done = await committed(self._objects, bundle, self._patience)
        if done:
            return done
        judged: Outcome | None = None
        now_s = self._clock.now_s()
        if len(bundle.tasks) > 1:
            if hand.suspicion > 1:
                judged = settle.bisect(
                    bundle, execution=hand.execution, worker=self._worker, now_s=now_s
                )
        else:
            starts = await self._starts(bundle)
            if starts >= settle.LOSS_LIMIT:
                judged = settle.poisoned(
                    bundle,
                    f"killed its worker {starts} times: each started it and ended without a word",
                    execution=hand.execution,
                    worker=self._worker,
                    now_s=now_s,
                )
        return await commit(self._objects, judged, self._patience) if judged else None

    async def begin(self, hand: Hand) -> None:
        """Write down that a suspect is being started, before it is."""
        if len(hand.bundle.tasks) == 1:
            key = naming.starts(hand.bundle) + hand.execution
            data = marker(self._worker, self._clock.now_s())
            await self._patience(partial(self._objects.put, key, data))

    async def withdraw(self, hand: Hand) -> None:
        """The start came to nothing through no fault of the task: the worker is leaving, or a
        service did not answer."""
        if hand.suspicion and len(hand.bundle.tasks) == 1:
            key = naming.starts(hand.bundle) + hand.execution
            try:
                await self._objects.delete([key])
            except BackendError as error:
                # One start too many is counted; it takes three to condemn.
                log.warning("the start of %s is not taken back: %s", hand.bundle.id, error)

    async def runs_elsewhere(self, bundle: Bundle, stale_s: float) -> bool:
        """Whether a handed-over bundle's worker still refreshes its running marker."""
        try:
            data = await self._patience(partial(self._objects.get, naming.running(bundle)))
        except NotFound:
            return False
        age_s = self._clock.now_s() - float(wire.loads(data)["at_s"])
        return age_s < stale_s

    async def _starts(self, bundle: Bundle) -> int:
        return await starts_of(self._objects, bundle)


async def starts_of(objects: Objects, bundle: Bundle) -> int:
    """How often a suspect was started without an outcome."""
    return sum([len(page) async for page in objects.list(naming.starts(bundle))])
