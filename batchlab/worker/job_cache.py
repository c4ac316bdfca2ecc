"""The definitions of the jobs that a worker has to do with.

What a worker knows of its jobs' control objects, and for how long it may rely on it.

Invariant (I4): a task of a job starts only within `lease_s` after a look at the control object
that allowed it. So the manager, having written "cancel", knows after `lease_s` that no further
task can start, however slow, paused or cut off a worker is, and without asking any.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from batchlab.core import control_object
from batchlab.core.errors import BackendError, NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Control, JobId
from batchlab.core.ports import Clock, Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.live_logs import ASKED_S
from batchlab.core.protocol.seals import UNSEALED, CommitKey, opens
from batchlab.core.retry import Patience, heed_cancellation

KEPT = 64
KEYS_KEPT = 4096


class WrongKeyError(BackendError):
    """A message has another commit key than the definition of its job asks for."""


class Jobs:
    """Each is read once. What a message says of its job counts only if its commit key is the job's:
    whoever may send to the queue could name any job."""

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._jobs: dict[JobId, JobDef] = {}
        self._keys: dict[JobId, CommitKey] = {}
        self._reading: dict[JobId, asyncio.Lock] = {}
        """Messages of one job that come together read its definition once."""

    def knows(self, job: JobId) -> bool:
        """Whether the definition of the job has been read."""
        return job in self._jobs

    def key_of(self, job: JobId) -> CommitKey:
        """Return the commit key of a job whose messages have been received."""
        return self._keys.get(job, UNSEALED)

    async def of(self, job: JobId, key: CommitKey) -> JobDef:
        """Return the job of a message with that commit key.

        NotFound if the job has been removed, WrongKeyError if the key is not the job's.
        """
        if known := self._known(job, key):
            return known
        lock = self._reading.setdefault(job, asyncio.Lock())
        try:
            async with lock:
                return self._known(job, key) or await self._read(job, key)
        finally:
            if not lock.locked():
                self._reading.pop(job, None)

    def _known(self, job: JobId, key: CommitKey) -> JobDef | None:
        """Return the job unless it is to be read: for another commit key it is read again, since it
        may have been removed and submitted anew."""
        known = self._jobs.get(job)
        return known if known and (key == self.key_of(job) or not known.commit_hash) else None

    async def _read(self, job: JobId, key: CommitKey) -> JobDef:
        data = await self._patience(partial(self._objects.get, object_keys.spec(job)))
        known = json_format.job_from_json(json_format.loads(data))
        if known.id != job or not opens(key, known):
            raise WrongKeyError(f"A message of job {job} does not have its commit key.")
        self._jobs[job] = known
        while len(self._jobs) > KEPT:
            del self._jobs[next(iter(self._jobs))]
        if known.commit_hash:
            self._keys[job] = key
            while len(self._keys) > KEYS_KEPT:
                del self._keys[next(iter(self._keys))]
        return known


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
            found = await control_object.look(self._objects, job, entry.etag if entry else None)
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
                is_new = await self._objects.head(object_keys.spec(job)) is not None
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
