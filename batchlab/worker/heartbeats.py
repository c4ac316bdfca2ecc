"""Heartbeats of a worker, and the visibility heartbeat of its in-flight messages.

Invariant (promise I6): a worker reports each received or released message soon. When an instance dies, the manager can
return the messages in the last heartbeat of its worker to the queue.

Invariant: a worker extends the visibility timeout of every in-flight message, early enough to repeat a failed
extension (see `visibility_timeouts.extend_after_s`). SQS limits the visibility of a message to 12 h from the receive.
Before the 12 h limit, a delayed watchdog message replaces the message of a running bundle. The receiver of a watchdog
message runs the bundle again only if the bundle's running marker is stale.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from batchlab.core import visibility_timeouts
from batchlab.core.errors import BackendError
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.ports import MAX_BATCH
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import Beat, HeldBundle
from batchlab.worker.commit_and_forward import fresh_copy
from batchlab.worker.inflight_message import InflightMessage, WorkerContext
from batchlab.worker.poison_detection import marker

log = logging.getLogger(__name__)

SETTLE_S = 0.005
"""Seconds between a change and the heartbeat that reports the change.

A bundle that ends within SETTLE_S does not need a heartbeat.
"""

MERGE_S = 0.1
"""Seconds that a heartbeat waits for the event of a bundle whose commit is in progress.

The message with the event carries the heartbeat.
"""


class Heartbeats:
    """Sender of heartbeats. A heartbeat is sent soon after each change, and at intervals while nothing changes."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._due = asyncio.Event()
        self._number = 0
        self._last_sent: Beat | None = None
        self.leaving = False
        context.outbox.heartbeats = self

    def request(self) -> None:
        """Request a heartbeat soon after a change."""
        self._due.set()

    async def run(self) -> None:
        """Send heartbeats forever."""
        settings = self._context.settings
        while True:
            beat = self._beat(self._held_bundles())
            try:
                await self._context.outbox.send_event(beat)
                self.mark_sent(beat)
            except BackendError as error:
                raise_if_cancelled()
                self._last_sent = None
                log.warning("the heartbeat could not be sent: %s", error)
            await asyncio.sleep(settings.beat_gap_s)
            with suppress(TimeoutError):
                is_busy = self._last_sent is None or self._last_sent.held
                async with asyncio.timeout(settings.beat_s if is_busy else settings.idle_beat_s):
                    await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        """Wait until the state of the worker differs from the last heartbeat."""
        while True:
            await self._due.wait()
            await asyncio.sleep(SETTLE_S if self._may_send_alone() else MERGE_S)
            self._due.clear()
            if self._differs(self._held_bundles()):
                return

    def _may_send_alone(self) -> bool:
        """Return whether no bundle is being committed. The event of a committed bundle can carry the heartbeat."""
        return not any(m.committing and not m.reported for m in self._context.inflight.values())

    def _differs(self, held: tuple[HeldBundle, ...]) -> bool:
        beat = self._last_sent
        return beat is None or (beat.held, beat.leaving) != (held, self.leaving)

    def unsent_beat(self) -> Beat | None:
        """See `outbox.HeartbeatSource`."""
        held = self._held_bundles()
        return self._beat(held) if self._differs(held) else None

    def mark_sent(self, beat: Beat) -> None:
        """See `outbox.HeartbeatSource`."""
        if self._last_sent is None or self._last_sent.number < beat.number:
            self._last_sent = beat

    async def send_final(self) -> None:
        """Send the final heartbeat, which reports that the worker holds no messages and exits."""
        try:
            await self._context.outbox.send_event(self._beat(self._held_bundles(), gone=True))
        except BackendError as error:
            # The worker exits even if the heartbeat fails, and the fleet also detects the exit.
            log.warning("the final heartbeat could not be sent: %s", error)

    def _held_bundles(self) -> tuple[HeldBundle, ...]:
        return tuple(
            HeldBundle(m.queue, m.receipt, m.bundle.job, m.bundle.stage, m.bundle.id, m.running)
            for m in self._context.inflight.values()
            if not m.reported and (m.receipt is not None or m.running)
        )

    def _beat(self, held: tuple[HeldBundle, ...], *, gone: bool = False) -> Beat:
        self._number += 1
        who = self._context.who
        return Beat(
            who.worker,
            who.instance,
            who.pool,
            self._context.clock.now_s(),
            who.slots,
            sum(message.running for message in self._context.inflight.values()),
            held,
            self._number,
            leaving=self.leaving,
            gone=gone,
            key=who.key,
            gpus=who.gpus,
            busy_gpus=sum(len(message.gpus) for message in self._context.inflight.values() if message.running),
        )


RETURN_S = 2.0
"""Seconds until a message returns after a service failed, multiplied by the receive count of the message.

The delay of the return keeps an outage from moving the message to the dead-letter queue.
"""


class VisibilityHeartbeat:
    """Visibility heartbeat of the in-flight messages."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    async def run(self) -> None:
        """Extend visibilities, hand over long-running bundles, and refresh markers forever."""
        while True:
            raise_if_cancelled()
            await asyncio.sleep(visibility_timeouts.shortest_s(self._context.settings.visibility_s) / 6)
            try:
                await self._extend()
            except BackendError as error:
                # The next tick tries the extension again, when at least half of the timeout remains.
                log.warning("visibility could not be extended: %s", error)
            for inflight in list(self._context.inflight.values()):
                try:
                    await self._stop_if_superseded(inflight)
                except BackendError as error:
                    log.warning("a bundle without a message may run in vain: %s", error)
                try:
                    await self._hand_over(inflight)
                except BackendError as error:
                    log.warning("a long-running bundle could not be handed over yet: %s", error)

    async def _extend(self) -> None:
        now_s = self._context.clock.monotonic_s()
        visibility_s = self._context.settings.visibility_s
        by_queue: dict[str, list[InflightMessage]] = {}
        for message in self._context.inflight.values():
            if message.receipt is not None and now_s >= message.extend_at_s - 0.001:
                by_queue.setdefault(message.queue, []).append(message)
        for name, messages in by_queue.items():
            for i in range(0, len(messages), MAX_BATCH):
                batch = messages[i : i + MAX_BATCH]
                timed = [(message, self._timeout_s(message, now_s)) for message in batch]
                changes = [(message.receipt, timeout_s) for message, timeout_s in timed if message.receipt is not None]
                refused = await self._context.queue.change_visibility(name, changes)
                for message, timeout_s in timed:
                    # The call may have taken longer than the new timeout.
                    message.visible_at_s = now_s + timeout_s
                    message.extend_at_s = now_s + visibility_timeouts.extend_after_s(timeout_s, visibility_s)
                    if message.receipt in refused:
                        # After a refused extension, another worker may have the message. The run continues, because the
                        # first commit decides.
                        message.receipt = None

    def _timeout_s(self, message: InflightMessage, now_s: float) -> float:
        run_s = message.task.run_s if message.running else None
        return visibility_timeouts.extension_s(run_s, now_s - message.received_s, self._context.settings.visibility_s)

    def _is_due(self, last_s: float) -> bool:
        """Return whether a third of the visibility timeout has passed since the monotonic time `last_s`."""
        return self._context.clock.monotonic_s() - last_s >= self._context.settings.visibility_s / 3 - 0.001

    async def _stop_if_superseded(self, inflight: InflightMessage) -> None:
        """Stop the run of a bundle without a message if another worker has committed an outcome. After the outcome of a
        bundle with a speculative copy, the manager deletes the other message of the bundle."""
        now_s, bundle = self._context.clock.monotonic_s(), inflight.bundle
        if inflight.receipt is not None or inflight.definition is None or not inflight.stage.may_be_copied:
            return
        if inflight.committing or inflight.is_superseded or inflight.is_handing_off:
            return
        if not self._is_due(inflight.outcome_read_s):
            return
        # A failed call is tried again at the next tick, because patience would delay the extension of other messages.
        found = await self._context.objects.head(object_keys.outcome(bundle, inflight.key))
        inflight.outcome_read_s = now_s
        # The worker itself may have committed the bundle during the call.
        is_own = inflight.committing or inflight.is_handing_off or inflight.bundle != bundle
        if found is not None and not is_own:
            inflight.is_superseded = True
            inflight.handle.end()

    async def _hand_over(self, inflight: InflightMessage) -> None:
        settings, now_s = self._context.settings, self._context.clock.monotonic_s()
        if inflight.is_copy:
            return  # the original message of the bundle has a watchdog message
        if now_s - inflight.received_s < settings.hand_over_s:
            return
        if inflight.marked_s is None or now_s - inflight.marked_s >= settings.marker_s:
            name = object_keys.running(inflight.bundle, inflight.key)
            data = marker(inflight.execution, self._context.clock.now_s(), name, inflight.key)
            await self._context.objects.put(name, data)
            inflight.marked_s = self._context.clock.monotonic_s()
        if inflight.handed_over or inflight.definition is None:
            return
        now_s = self._context.clock.now_s()
        copy = fresh_copy(inflight, now_s, delay_s=settings.watchdog_s, watchdog=True)
        await self._context.outbox.send([copy])
        inflight.handed_over = True
        receipt, inflight.receipt = inflight.receipt, None
        if receipt is not None:
            await self._context.outbox.delete(inflight.queue, receipt)

    async def return_later(self, inflight: InflightMessage) -> None:
        """Make the message visible again after a short delay."""
        receipt, inflight.receipt = inflight.receipt, None
        if receipt is None:
            return
        try:
            wait_s = RETURN_S * inflight.message.receive_count
            await self._context.queue.change_visibility(inflight.queue, [(receipt, wait_s)])
        except BackendError as error:
            log.warning("a message returns only when its visibility timeout ends: %s", error)
