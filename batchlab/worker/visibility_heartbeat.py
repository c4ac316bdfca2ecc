"""Visibility heartbeat of in-flight messages, and their hand-over to watchdog messages.

Invariant: the visibility of every in-flight message is extended after each third of the timeout, in
batched calls. SQS limits the visibility to 12 h from the receive. Before that, a delayed watchdog
message replaces the message of a running bundle. A worker that receives the watchdog message runs
the bundle again only if its running marker is stale.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from batchlab.core.commit import address
from batchlab.core.errors import BackendError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId
from batchlab.core.ports import MAX_BATCH, Clock, Objects, Queue
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.seals import CommitKey
from batchlab.core.retry import heed_cancellation
from batchlab.worker.inflight_message import Hand
from batchlab.worker.outbox import Outbox
from batchlab.worker.poison_detection import marker
from batchlab.worker.settings import WorkerSettings

log = logging.getLogger(__name__)

RETURN_S = 2.0
"""Seconds until a message returns after a service failed, multiplied by its receive count. An
outage must not move the message to the dead-letter queue."""


class Tenure:
    """Visibility heartbeat of the messages in `hands`, shared with the worker's loop."""

    def __init__(
        self,
        hands: dict[str, Hand],
        queue: Queue,
        objects: Objects,
        clock: Clock,
        outbox: Outbox,
        settings: WorkerSettings,
    ) -> None:
        self._hands = hands
        self._queue = queue
        self._objects = objects
        self._clock = clock
        self._outbox = outbox
        self._settings = settings

    async def keep(self, job_of: Callable[[JobId, CommitKey], Awaitable[JobDef]]) -> None:
        """Extend visibilities, hand over long-running bundles, and refresh markers forever."""
        while True:
            heed_cancellation()
            await asyncio.sleep(self._settings.visibility_s / 6)
            try:
                await self._extend()
            except BackendError as error:
                # The next tick tries again. At least half of the timeout is left.
                log.warning("visibility could not be extended: %s", error)
            for hand in list(self._hands.values()):
                try:
                    await self._hand_over(hand, job_of)
                except BackendError as error:
                    log.warning("a long-running bundle could not be handed over yet: %s", error)

    async def _extend(self) -> None:
        now_s = self._clock.monotonic_s()
        visibility_s = self._settings.visibility_s
        due = [
            h
            for h in self._hands.values()
            if h.receipt is not None and now_s - h.extended_s >= visibility_s / 3 - 0.001
        ]
        by_queue: dict[str, list[Hand]] = {}
        for hand in due:
            by_queue.setdefault(hand.queue, []).append(hand)
        for name, hands in by_queue.items():
            for i in range(0, len(hands), MAX_BATCH):
                batch = hands[i : i + MAX_BATCH]
                changes = [(h.receipt, visibility_s) for h in batch if h.receipt is not None]
                refused = await self._queue.change_visibility(name, changes)
                for hand in batch:
                    hand.extended_s = now_s
                    if hand.receipt in refused:
                        # Another worker may have the message now. The run continues, because the
                        # first commit decides.
                        hand.receipt = None

    async def _hand_over(
        self, hand: Hand, job_of: Callable[[JobId, CommitKey], Awaitable[JobDef]]
    ) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - hand.received_s < self._settings.hand_over_s:
            return
        if hand.marked_s is None or now_s - hand.marked_s >= self._settings.marker_s:
            await self._mark(hand)
        if hand.handed_over:
            return
        job = await job_of(hand.bundle.job, hand.task.key)
        losses = hand.bundle.losses + hand.message.receive_count - 1
        message = address(
            job,
            replace(hand.bundle, losses=losses),
            hand.key,
            delay_s=self._settings.watchdog_s,
            now_s=self._clock.now_s(),
            watchdog=True,
            trace=hand.trace,
        )
        await self._outbox.send([message])
        hand.handed_over = True
        receipt, hand.receipt = hand.receipt, None
        if receipt is not None:
            await self._outbox.delete(hand.queue, receipt)

    async def _mark(self, hand: Hand) -> None:
        name = object_keys.running(hand.bundle, hand.key)
        await self._objects.put(name, marker(hand.execution, self._clock.now_s(), name, hand.key))
        hand.marked_s = self._clock.monotonic_s()

    async def give_back_later(self, hand: Hand) -> None:
        """Make the message visible again after a short delay."""
        receipt, hand.receipt = hand.receipt, None
        if receipt is None:
            return
        try:
            wait_s = RETURN_S * hand.message.receive_count
            await self._queue.change_visibility(hand.queue, [(receipt, wait_s)])
        except BackendError as error:
            log.warning("a message returns only when its visibility timeout ends: %s", error)
