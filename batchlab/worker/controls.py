"""What a worker knows of its jobs' control objects, and for how long it may rely on it.

Invariant (I4): a task of a job starts only within `lease_s` after a look at the control object
that allowed it. So the manager, having written "cancel", knows after `lease_s` that no further
task can start, however slow, paused or cut off a worker is, and without asking any.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from batchlab import control
from batchlab.errors import BackendError, NotFound
from batchlab.model import Control, JobId
from batchlab.ports import Clock, Objects
from batchlab.protocol import naming
from batchlab.protocol.live_logs import ASKED_S
from batchlab.waits import heed_cancellation

CLOCKS_S = 60.0
"""By so much the clocks of two machines may differ."""


@dataclass(slots=True)
class _Entry:
    control: Control
    etag: str | None
    asked_s: float
    watchers: int = 0
    is_new: bool = False
    """The object was not there yet."""


class Controls:
    """Polls the control objects of the jobs in hand by ETag, at a third of the lease."""

    def __init__(
        self,
        objects: Objects,
        clock: Clock,
        lease_s: float,
        on_look: Callable[[JobId, Control, float], None],
        on_tail: Callable[[JobId], None] = lambda _: None,
    ) -> None:
        """`on_look(job, control, until_s)` is called after every look at a watched job; tasks
        may start until the monotonic time `until_s`. `on_tail(job)` is called when a look finds
        that somebody has asked anew for what its tasks print."""
        self._objects = objects
        self._clock = clock
        self._lease_s = lease_s
        self._on_look = on_look
        self._on_tail = on_tail
        self._entries: dict[JobId, _Entry] = {}

    async def look(self, job: JobId, *, is_new: bool = False) -> tuple[Control, float]:
        """A fresh look: the control word, and until when (monotonic) it may be relied on.

        The object may not be there yet: not where the job `is_new`, nor while its definition is
        there. Else somebody has removed the job.
        """
        entry = self._entries.get(job)
        # The lease counts from before the request: the answer may be as old as the question.
        asked_s = self._clock.monotonic_s()
        changed: tuple[Control, str | None, bool] | None = None
        tail = 0
        try:
            found = await control.look(self._objects, job, entry.etag if entry else None)
            if found is not None:
                word = found.word
                changed, tail = (word.control, found.etag, False), word.tail
                is_news = entry is not None and asked_s - entry.asked_s <= self._lease_s
                if not is_news and word.tail_s is not None:
                    # It may be of long ago. Where the clocks differ by more, whoever asks now is
                    # heard the next time.
                    old_s = self._clock.now_s() - word.tail_s
                    tail *= abs(old_s) <= ASKED_S + CLOCKS_S
        except NotFound:
            is_new = is_new or (entry is not None and entry.is_new)
            if not is_new:
                is_new = await self._objects.head(naming.spec(job)) is not None
            changed = (Control.RUN if is_new else Control.CANCEL, None, is_new)
        entry = self._entries.get(job)
        if changed is not None:
            said, etag, is_new = changed
            watchers = entry.watchers if entry else 0
            entry = self._entries[job] = _Entry(said, etag, asked_s, watchers, is_new)
        elif entry is None:  # forgotten while the request was under way
            return await self.look(job)
        else:
            entry.asked_s = max(entry.asked_s, asked_s)
        until_s = entry.asked_s + self._lease_s
        self._on_look(job, entry.control, until_s)
        if tail:
            self._on_tail(job)
        return entry.control, until_s

    async def current(self, job: JobId, *, is_new: bool = False) -> tuple[Control, float]:
        """The last look where it is younger than a third of the lease, else a fresh one."""
        entry = self._entries.get(job)
        if entry and self._clock.monotonic_s() - entry.asked_s < self._lease_s / 3:
            return entry.control, entry.asked_s + self._lease_s
        return await self.look(job, is_new=is_new)

    def watch(self, job: JobId) -> None:
        """Keep looking at this job; `current` must have been awaited before."""
        self._entries[job].watchers += 1

    def unwatch(self, job: JobId) -> None:
        self._entries[job].watchers -= 1

    async def poll(self) -> None:
        """Look at every watched job for ever; forget those nobody watches."""
        while True:
            heed_cancellation()
            await asyncio.sleep(self._lease_s / 3)
            for job, entry in list(self._entries.items()):
                if not entry.watchers:
                    if self._clock.monotonic_s() - entry.asked_s > 60 * self._lease_s:
                        del self._entries[job]
                    continue
                try:
                    await self.look(job)
                except BackendError:
                    # No answer: the lease runs out by itself, which stops new tasks. That is the
                    # safe side, so an outage needs no handling of its own here.
                    continue
