"""Asks the workers of a job for what its running tasks print, and reads what they have stored.

Invariant: the word that the workers follow stays what it is: it is written again only in the place
of the one that was read, with a number that has grown. However many ask, that costs a GET and a PUT
in half of the time for which a request holds, and a LIST in half of a control lease. What is kept
in memory is bounded, and dropped soon after the last one has looked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from batchlab.core import control_object
from batchlab.core.errors import Malformed, TooLarge, TooNew
from batchlab.core.model import BundleId, Control, JobId, StageName
from batchlab.core.ports import ObjectInfo
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.live_logs import ASKED_S, Tail, from_bytes
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob, Ports

log = logging.getLogger(__name__)

JOB_BYTES = 8 * 1024 * 1024
ALL_BYTES = 8 * JOB_BYTES
"""The most that is kept in memory of what workers have stored: those of one job, and all."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """What one worker has stored; `size` in bytes."""

    etag: str
    size: int
    tails: Sequence[Tail]


@dataclass(slots=True)
class _Looked:
    """What was stored by each worker, by key. Times are monotonic."""

    asked_s: float = float("-inf")
    read_s: float = float("-inf")
    wanted_s: float = float("-inf")
    stored: dict[str, _Stored] = field(default_factory=dict)


class Tails:
    """Of all jobs that a manager conducts."""

    def __init__(self, ports: Ports, settings: ManagerSettings) -> None:
        self._ports = ports
        self.every_s = settings.control_lease_s
        """How often there may be something new."""
        self._jobs: dict[JobId, _Looked] = {}

    async def of(self, live: LiveJob) -> list[Tail]:
        """What the job's running tasks have printed so far, as far as it is stored; and ask that it
        is stored from now on."""
        looked = self._jobs[live.id] = self._jobs.pop(live.id, _Looked())
        looked.wanted_s = self._ports.clock.monotonic_s()
        await self._ask(live, looked)
        await self._read(live, looked)
        self._make_room()
        return [tail for one in looked.stored.values() for tail in _running(live, one.tails)]

    async def _ask(self, live: LiveJob, looked: _Looked) -> None:
        now_s = self._ports.clock.monotonic_s()
        if now_s - looked.asked_s < ASKED_S / 2:
            return
        async with live.control_lock:
            if await self._say(live):
                looked.asked_s = now_s

    async def _say(self, live: LiveJob) -> bool:
        """Whether the workers will hear of it; where not, whoever asks next tries again."""
        objects, patience = self._ports.objects, self._ports.patience
        found = await control_object.spoken(objects, live.id, patience)
        # Where there is none, it comes when the job has run for a moment.
        word = found.word if found else json_format.Word(Control.RUN, round=live.round)
        if word.control is not live.record.control or word.control is Control.CANCEL:
            return False
        asked = replace(word, tail=word.tail + 1, tail_s=self._ports.clock.now_s())
        return await control_object.say(objects, live.id, asked, patience, over=found)

    def _make_room(self) -> None:
        """Of those that nobody has looked at for longest all is read anew."""
        sizes = [sum(one.size for one in looked.stored.values()) for looked in self._jobs.values()]
        too_much = sum(sizes) - ALL_BYTES
        for looked, size in zip(self._jobs.values(), sizes, strict=True):
            if too_much <= 0:
                return
            looked.stored, looked.read_s = {}, float("-inf")
            too_much -= size

    def forget(self) -> None:
        """Drop what nobody has asked for lately; to be called now and then."""
        now_s = self._ports.clock.monotonic_s()
        for job, looked in list(self._jobs.items()):
            if looked.wanted_s < now_s - 2 * ASKED_S:
                del self._jobs[job]

    async def _read(self, live: LiveJob, looked: _Looked) -> None:
        now_s = self._ports.clock.monotonic_s()
        if now_s - looked.read_s < self.every_s / 2:
            return
        looked.read_s = now_s
        stored: dict[str, _Stored] = {}
        left = JOB_BYTES
        async for page in self._ports.objects.list(object_keys.tails(live.id)):
            for info in page:
                known = looked.stored.get(info.key)
                if known is None or known.etag != info.etag:
                    if info.size > left:
                        continue  # of so many workers some are enough
                    known = await self._stored(info, left)
                elif not _running(live, known.tails):
                    known = _Stored(info.etag, 0, ())  # it has ended, or its worker has
                if known.size <= left:
                    stored[info.key] = known
                    left -= known.size
        looked.stored = stored

    async def _stored(self, info: ObjectInfo, limit: int) -> _Stored:
        """Return what a worker has stored, or nothing if it cannot be read or has more than `limit`
        bytes: a worker may have written it again since it was listed."""
        get = partial(self._ports.objects.get, info.key, limit=limit)
        try:
            data = await self._ports.patience(get)
            return _Stored(info.etag, len(data), from_bytes(data))
        except (Malformed, TooLarge, TooNew) as error:
            log.error("went on without %s: %s", info.key, error.message)
            return _Stored(info.etag, 0, ())


def _running(live: LiveJob, tails: Sequence[Tail]) -> list[Tail]:
    """What a worker stored last of a bundle that has ended since is no news."""
    return [
        tail
        for tail in tails
        if BundleId(tail.bundle) in live.outstanding.get(StageName(tail.stage), {})
    ]
