"""Shutdown of a worker: termination notices, and the drain within the remaining time (I6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from batchlab.core.errors import BackendError
from batchlab.core.ports import Clock, Notice, Notices
from batchlab.core.retry import heed_cancellation, set_within
from batchlab.worker.inflight_message import InflightMessage
from batchlab.worker.work_handoff import Slots

log = logging.getLogger(__name__)

POLL_S = 5.0
"""Seconds between two checks for a Spot interruption notice, as AWS recommends."""

LEAVE_S = 5.0
"""Seconds reserved to commit and return bundles after the last task has ended."""


async def poll_notices(notices: Notices, leave: Callable[[Notice], None]) -> None:
    """Poll until there is a notice, then call `leave`.

    A failed poll is repeated. The log records the first failure and the recovery.
    """
    silent = False
    while True:
        try:
            notice = await notices.notice()
        except BackendError as error:
            heed_cancellation()
            if not silent:
                log.warning("termination notices cannot be read: %s", error)
            silent = True
        else:
            if silent:
                log.info("termination notices can be read again")
            silent = False
            if notice is not None:
                log.warning("leaving: %s", notice.why)
                leave(notice)
                return
        await asyncio.sleep(POLL_S)


class Shutdown:
    """Drain of a worker. Waiting bundles are returned at once, and running tasks get a time limit.

    The worker's loop shares `inflight_messages`.
    """

    def __init__(
        self,
        clock: Clock,
        drain_s: float,
        inflight_messages: Mapping[str, InflightMessage],
        slots: Slots,
    ) -> None:
        self._clock = clock
        self._drain_s = drain_s
        self._inflight = inflight_messages
        self._slots = slots
        self._left_s = drain_s
        self._due_s: float | None = None

    def told(self, notice: Notice | None) -> None:
        """Set the time limit: the notice's time, or `drain_s` if there is none.

        The earliest limit of several notices applies. For example, a SIGTERM after a two-minute
        Spot notice shortens the limit.
        """
        left_s = self._drain_s
        if notice is not None and notice.by_s is not None:
            left_s = max(0.0, notice.by_s - LEAVE_S - self._clock.now_s())
        due_s = self._clock.monotonic_s() + left_s
        if self._due_s is None:
            self._left_s = left_s
        elif due_s < self._due_s:
            asyncio.get_running_loop().call_later(left_s, self._end)
        else:
            return
        self._due_s = due_s

    def hand_back(self) -> None:
        """Prevent further starts of tasks, and return waiting bundles."""
        for inflight in list(self._inflight.values()):
            inflight.handle.stop = True
            if inflight.waiting:
                self._slots.refuse(inflight.waiting)

    async def over(self, empty: asyncio.Event) -> None:
        """Wait until no message is in flight. Kill running tasks when the time is up."""
        if not await set_within(empty, self._left_s):
            self._end()
            await empty.wait()

    def _end(self) -> None:
        for inflight in list(self._inflight.values()):
            inflight.handle.kill = True
