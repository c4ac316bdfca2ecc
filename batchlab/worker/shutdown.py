"""A worker's end: it asks whether its instance may go on, and leaves in the time it has (I6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from batchlab.core.errors import BackendError
from batchlab.core.ports import Clock, Notice, Notices
from batchlab.core.retry import heed_cancellation, set_within
from batchlab.worker.inflight_message import Hand
from batchlab.worker.work_handoff import Slots

log = logging.getLogger(__name__)

POLL_S = 5.0
"""How often AWS recommends to ask for a Spot interruption notice."""

LEAVE_S = 5.0
"""What committing and giving back may take, once the last task has been ended."""


async def heed(notices: Notices, leave: Callable[[Notice], None]) -> None:
    """Ask until there is a notice, and then `leave`.

    Whoever cannot be asked is asked again; that is logged when it begins and when it ends.
    """
    silent = False
    while True:
        try:
            notice = await notices.notice()
        except BackendError as error:
            heed_cancellation()
            if not silent:
                log.warning("nobody says whether this instance may go on: %s", error)
            silent = True
        else:
            if silent:
                log.info("there is somebody again who says whether this instance may go on")
            silent = False
            if notice is not None:
                log.warning("leaving: %s", notice.why)
                leave(notice)
                return
        await asyncio.sleep(POLL_S)


class Departure:
    """How a worker leaves: what waits is given back at once, what runs may take the shortest of the
    times that it was told of. `hands` is a dict shared with the worker's loop."""

    def __init__(
        self, clock: Clock, drain_s: float, hands: Mapping[str, Hand], slots: Slots
    ) -> None:
        self._clock = clock
        self._drain_s = drain_s
        self._hands = hands
        self._slots = slots
        self._left_s = drain_s
        self._due_s: float | None = None

    def told(self, notice: Notice | None) -> None:
        """It is to leave: by the notice's time, or within `drain_s` where nobody says when.

        Told again, an earlier end holds from then on, and a later one changes nothing: after a
        Spot notice of two minutes, a SIGTERM still means soon.
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
        """Let no further task start."""
        for hand in list(self._hands.values()):
            hand.handle.stop = True
            if hand.waiting:
                self._slots.refuse(hand.waiting)

    async def over(self, empty: asyncio.Event) -> None:
        """Wait until nothing is in hand; what still runs when the time is up is ended."""
        if not await set_within(empty, self._left_s):
            self._end()
            await empty.wait()

    def _end(self) -> None:
        for hand in list(self._hands.values()):
            hand.handle.kill = True
