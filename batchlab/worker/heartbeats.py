"""Heartbeats of a worker: its identity, its busy slots, and the messages it holds.

Invariant (I6): the worker reports each received or released message soon. When an instance dies,
the manager can therefore return its messages to the queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from batchlab.core.errors import BackendError
from batchlab.core.ports import Clock
from batchlab.core.protocol.messages import Beat, Held
from batchlab.core.retry import heed_cancellation
from batchlab.worker.inflight_message import InflightMessage
from batchlab.worker.outbox import Outbox
from batchlab.worker.settings import WorkerSettings

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
                async with asyncio.timeout(
                    self._settings.beat_s if held else self._settings.idle_beat_s
                ):
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
        told = self._told
        return told is None or (told.held, told.leaving) != (held, self.leaving)

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
