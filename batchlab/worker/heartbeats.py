"""A worker's signs of life: who it is, how busy, and which messages it holds.

Invariant (I6): soon after anything is taken or let go, the manager can know it, so that it can give
back what an instance held when that dies.
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
from batchlab.worker.inflight_message import Hand
from batchlab.worker.outbox import Outbox
from batchlab.worker.settings import WorkerSettings

log = logging.getLogger(__name__)

MOMENT_S = 0.005


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the worker is: `worker` is new at every start, `instance` names its machine."""

    worker: str
    instance: str
    pool: str
    slots: int
    key: str = field(default="", repr=False)
    """A random secret of the instance, by which the manager knows its workers again."""


class Beats:
    """Tells of `hands`, a dict shared with the worker's loop."""

    def __init__(
        self,
        who: Identity,
        hands: Mapping[str, Hand],
        outbox: Outbox,
        clock: Clock,
        settings: WorkerSettings,
    ) -> None:
        self._who = who
        self._hands = hands
        self._outbox = outbox
        self._clock = clock
        self._settings = settings
        self._due = asyncio.Event()
        self._number = 0
        self._told: Beat | None = None
        self.leaving = False
        outbox.signs = self

    def due(self) -> None:
        """Something has changed: beat soon."""
        self._due.set()

    async def keep(self) -> None:
        """Beat for ever: soon after a change, and now and then without one."""
        while True:
            beat = self._beat(self._held())
            try:
                await self._outbox.event(beat)
                self.heard(beat)
            except BackendError as error:
                heed_cancellation()
                self._told = None
                log.warning("no sign of life could be sent: %s", error)
            await asyncio.sleep(self._settings.beat_gap_s)
            with suppress(TimeoutError):
                held = self._told is None or self._told.held
                async with asyncio.timeout(
                    self._settings.beat_s if held else self._settings.idle_beat_s
                ):
                    await self._change()

    async def _change(self) -> None:
        """Wait until there is something else to tell."""
        while True:
            await self._due.wait()
            # A bundle that ends as soon as it has begun is not worth a message.
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
        """See outbox.SignsOfLife."""
        held = self._held()
        return self._beat(held) if self._differs(held) else None

    def heard(self, beat: Beat) -> None:
        """See outbox.SignsOfLife."""
        if self._told is None or self._told.number < beat.number:
            self._told = beat

    async def last(self) -> None:
        """Say that everything has been given back, where somebody hears it."""
        try:
            await self._outbox.event(self._beat(self._held(), gone=True))
        except BackendError as error:
            # It is so, and the fleet sees it too: no reason to end in an error.
            log.warning("the last sign of life could not be sent: %s", error)

    def _held(self) -> tuple[Held, ...]:
        return tuple(
            Held(h.queue, h.receipt, h.bundle.job, h.bundle.stage, h.bundle.id, h.running)
            for h in self._hands.values()
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
            sum(h.running for h in self._hands.values()),
            held,
            self._number,
            leaving=self.leaving,
            gone=gone,
            key=self._who.key,
        )
