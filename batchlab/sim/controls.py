"""Control words of simulated jobs, requests of their users, and waits in virtual time.

Invariant: the record changes nothing. It stores only what has taken effect.

A wait ends at the same time, and in the same order, as one of `asyncio.sleep`. It is used for every
port call and every task, so it must be fast.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from batchlab.core.model import Control, JobId
from batchlab.core.ports import Clock
from batchlab.core.protocol.json_format import Word
from batchlab.manager.jobs.retries import TaskSelection


@dataclass(slots=True)
class JobControls:
    """The control words, cancellations, retries, and ends of all jobs of a world."""

    clock: Clock
    forbidden_s: dict[JobId, float] = field(default_factory=dict)
    """When the cancellation of each job was acknowledged, without jobs that were retried since."""
    _words: dict[str, list[tuple[float, Control]]] = field(default_factory=dict)
    _cancelled: dict[str, int] = field(default_factory=dict)
    """The last round in which each job was cancelled."""
    _ended: set[str] = field(default_factory=set)
    """Jobs of which some round has ended."""
    _retries: dict[JobId, list[int]] = field(default_factory=dict)
    """The number of retries that users asked for, and the number that were answered."""
    choices: dict[JobId, list[TaskSelection | None]] = field(default_factory=dict)
    """The failures that users asked to retry; None for all of them."""

    # --- Control words ---------------------------------------------------------------------------

    def written(self, job: str, word: Word) -> None:
        """Record a control word, as the bucket has it from now on."""
        self._words.setdefault(job, []).append((self.clock.monotonic_s(), word.control))
        if word.control is Control.CANCEL:
            self._cancelled[job] = max(word.round, self._cancelled.get(job, -1))

    def ended(self, job: str) -> None:
        """Record that a round of the job has ended."""
        self._ended.add(job)

    def is_live(self, job: str) -> bool:
        """Return whether no round of the job has ended and its last control word is RUN."""
        words = self._words.get(job, [])
        return job not in self._ended and (not words or words[-1][1] is Control.RUN)

    def live_since_s(self, job: str) -> float:
        """Return when the job was last allowed to go on, or infinity if it is not live."""
        words = self._words.get(job, [])
        return (words[-1][0] if words else 0.0) if self.is_live(job) else math.inf

    def was_stopped(self, job: str, since_s: float) -> bool:
        """Return whether the job was cancelled or paused at any time after `since_s`."""
        words = self._words.get(job, [])
        last = [word for at_s, word in words if at_s <= since_s][-1:]
        later = [word for at_s, word in words if at_s > since_s]
        return any(word is not Control.RUN for word in (*last, *later))

    def stopped_s(self, job: JobId) -> float:
        """Return since when the control object allows no start, or infinity if it allows one."""
        since_s = math.inf
        for at_s, word in reversed(self._words.get(job, [])):
            if word is Control.RUN:
                break
            since_s = at_s
        return since_s

    def was_cancelled(self, job: JobId, round_: int = 0) -> bool:
        """Return whether the job was cancelled, by a user or because of its failures, in `round_`
        or later."""
        cancelled = self._cancelled.get(job, -1)
        return cancelled >= round_

    # --- Requests of users -----------------------------------------------------------------------

    def cancel_asked(self, job: JobId) -> Callable[[], None]:
        """Record that a user cancels the job. The caller calls the returned function once the
        cancellation is acknowledged.

        A cancellation that overlaps a retry does not count, because their order is unknown.
        """
        before = list(self._retries.setdefault(job, [0, 0]))

        def acknowledged() -> None:
            if self._retries[job] == before and before[0] == before[1]:
                self.forbidden_s[job] = self.clock.monotonic_s()

        return acknowledged

    def chosen(self, job: JobId, choice: TaskSelection | None) -> None:
        """Record which failures a user asks to retry; None for all of them."""
        self.choices.setdefault(job, []).append(choice)

    def retry_asked(self, job: JobId) -> Callable[[], None]:
        """Record that a user retries the job. The caller calls the returned function once the
        retry is answered."""
        counts = self._retries.setdefault(job, [0, 0])
        counts[0] += 1
        self.forbidden_s.pop(job, None)

        def answered() -> None:
            counts[1] += 1

        return answered


class Pause:
    """A faster `asyncio.sleep` (for more than 0 s) that stores its event loop. asyncio looks up the
    running loop at each call, which costs a system call for the process id."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, seconds: float) -> None:
        """Wait for that many seconds."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _wake, future)
        try:
            await future
        except BaseException:
            timer.cancel()
            raise


def _wake(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.set_result(None)
