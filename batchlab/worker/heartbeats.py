"""Heartbeats of a worker: its identity, its busy slots, and the messages it holds.

Invariant (I6): the worker reports each received or released message soon. When an instance dies,
the manager can therefore return its messages to the queue.

Visibility heartbeat of in-flight messages, and their hand-over to watchdog messages.

Invariant: the visibility of every in-flight message is extended after each third of the timeout, in
batched calls. SQS limits the visibility to 12 h from the receive. Before that, a delayed watchdog
message replaces the message of a running bundle. A worker that receives the watchdog message runs
the bundle again only if its running marker is stale.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from batchlab.core.commit import address
from batchlab.core.errors import BackendError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId
from batchlab.core.port_retries import heed_cancellation
from batchlab.core.ports import MAX_BATCH, Clock, Objects, Queue
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import Beat, Held
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.worker.inflight_message import InflightMessage, WorkerSettings
from batchlab.worker.outbox import Outbox
from batchlab.worker.poison_detection import marker

log = logging.getLogger(__name__)

MOMENT_S = 0.005


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of a worker. `worker` is new at every start, and `instance` names its machine."""

    worker: str
    instance: str
    pool: str
    slots: int
    key: str = field(default="", repr=False)
    """A random secret of the instance, by which the manager recognizes its workers."""


class Heartbeats:
    """Sender of heartbeats. The worker's loop shares the dict `inflight_messages`."""

    def __init__(
        self,
        who: Identity,
        inflight_messages: Mapping[str, InflightMessage],
        outbox: Outbox,
        clock: Clock,
        settings: WorkerSettings,
    ) -> None:
        self._who = who
        self._inflight = inflight_messages
        self._outbox = outbox
        self._clock = clock
        self._settings = settings
        self._due = asyncio.Event()
        self._number = 0
        self._told: Beat | None = None
        self.leaving = False
        outbox.signs = self

    def due(self) -> None:
        """Request a heartbeat soon, after a change."""
        self._due.set()

    async def keep(self) -> None:
        """Send heartbeats forever: soon after each change, and at intervals without changes."""
        while True:
            beat = self._beat(self._held())
            try:
                await self._outbox.event(beat)
                self.heard(beat)
            except BackendError as error:
                heed_cancellation()
                self._told = None
                log.warning("the heartbeat could not be sent: %s", error)
            await asyncio.sleep(self._settings.beat_gap_s)
            with suppress(TimeoutError):
                held = self._told is None or self._told.held
                async with asyncio.timeout(self._settings.beat_s if held else self._settings.idle_beat_s):
                    await self._change()

    async def _change(self) -> None:
        """Wait until the state differs from the last heartbeat."""
        while True:
            await self._due.wait()
            # A bundle that ends immediately after its start needs no heartbeat.
            await asyncio.sleep(MOMENT_S)
            self._due.clear()
            if self._is_news:
                return

    @property
    def _is_news(self) -> bool:
        return self._differs(self._held())

    def _differs(self, held: tuple[Held, ...]) -> bool:
        beat = self._told
        return beat is None or (beat.held, beat.leaving) != (held, self.leaving)

    def news(self) -> Beat | None:
        """See `outbox.HeartbeatSource`."""
        held = self._held()
        return self._beat(held) if self._differs(held) else None

    def heard(self, beat: Beat) -> None:
        """See `outbox.HeartbeatSource`."""
        if self._told is None or self._told.number < beat.number:
            self._told = beat

    async def last(self) -> None:
        """Send the final heartbeat: the worker holds no messages and exits."""
        try:
            await self._outbox.event(self._beat(self._held(), gone=True))
        except BackendError as error:
            # The worker exits anyway, and the fleet notices its end too.
            log.warning("the final heartbeat could not be sent: %s", error)

    def _held(self) -> tuple[Held, ...]:
        return tuple(
            Held(h.queue, h.receipt, h.bundle.job, h.bundle.stage, h.bundle.id, h.running)
            for h in self._inflight.values()
            if h.receipt is not None or h.running
        )

    def _beat(self, held: tuple[Held, ...], *, gone: bool = False) -> Beat:
        self._number += 1
        return Beat(
            self._who.worker,
            self._who.instance,
            self._who.pool,
            self._clock.now_s(),
            self._who.slots,
            sum(h.running for h in self._inflight.values()),
            held,
            self._number,
            leaving=self.leaving,
            gone=gone,
            key=self._who.key,
        )


RETURN_S = 2.0
"""Seconds until a message returns after a service failed, multiplied by its receive count. An
outage must not move the message to the dead-letter queue."""


class VisibilityHeartbeat:
    """Visibility heartbeat of `inflight_messages`, which the worker's loop shares."""

    def __init__(
        self,
        inflight_messages: dict[str, InflightMessage],
        queue: Queue,
        objects: Objects,
        clock: Clock,
        outbox: Outbox,
        settings: WorkerSettings,
    ) -> None:
        self._inflight = inflight_messages
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
            for inflight in list(self._inflight.values()):
                try:
                    await self._hand_over(inflight, job_of)
                except BackendError as error:
                    log.warning("a long-running bundle could not be handed over yet: %s", error)

    async def _extend(self) -> None:
        now_s = self._clock.monotonic_s()
        visibility_s = self._settings.visibility_s
        due = [
            h
            for h in self._inflight.values()
            if h.receipt is not None and now_s - h.extended_s >= visibility_s / 3 - 0.001
        ]
        by_queue: dict[str, list[InflightMessage]] = {}
        for inflight in due:
            by_queue.setdefault(inflight.queue, []).append(inflight)
        for name, inflight_messages in by_queue.items():
            for i in range(0, len(inflight_messages), MAX_BATCH):
                batch = inflight_messages[i : i + MAX_BATCH]
                changes = [(h.receipt, visibility_s) for h in batch if h.receipt is not None]
                refused = await self._queue.change_visibility(name, changes)
                for inflight in batch:
                    inflight.extended_s = now_s
                    if inflight.receipt in refused:
                        # Another worker may have the message now. The run continues, because the
                        # first commit decides.
                        inflight.receipt = None

    async def _hand_over(
        self, inflight: InflightMessage, job_of: Callable[[JobId, CommitKey], Awaitable[JobDef]]
    ) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - inflight.received_s < self._settings.hand_over_s:
            return
        if inflight.marked_s is None or now_s - inflight.marked_s >= self._settings.marker_s:
            await self._mark(inflight)
        if inflight.handed_over:
            return
        job = await job_of(inflight.bundle.job, inflight.task.key)
        losses = inflight.bundle.losses + inflight.message.receive_count - 1
        message = address(
            job,
            replace(inflight.bundle, losses=losses),
            inflight.key,
            delay_s=self._settings.watchdog_s,
            now_s=self._clock.now_s(),
            watchdog=True,
            trace=inflight.trace,
        )
        await self._outbox.send([message])
        inflight.handed_over = True
        receipt, inflight.receipt = inflight.receipt, None
        if receipt is not None:
            await self._outbox.delete(inflight.queue, receipt)

    async def _mark(self, inflight: InflightMessage) -> None:
        name = object_keys.running(inflight.bundle, inflight.key)
        await self._objects.put(name, marker(inflight.execution, self._clock.now_s(), name, inflight.key))
        inflight.marked_s = self._clock.monotonic_s()

    async def give_back_later(self, inflight: InflightMessage) -> None:
        """Make the message visible again after a short delay."""
        receipt, inflight.receipt = inflight.receipt, None
        if receipt is None:
            return
        try:
            wait_s = RETURN_S * inflight.message.receive_count
            await self._queue.change_visibility(inflight.queue, [(receipt, wait_s)])
        except BackendError as error:
            log.warning("a message returns only when its visibility timeout ends: %s", error)
