"""The instances that the fleet has, and the keys by which their workers are known again.

Invariant: a beat counts only for an instance that the fleet describes, in that instance's pool, and
with the key of its first beat. A beat of another instance waits here until the fleet describes it,
and leads to nothing before. The first key wins: no worker can know the id of an instance before
that instance has beaten, since ids are random and a worker's role lists no instances. A rule by
which a second key ends the instance would let a worker end others whose ids it learns later. The
digest of a key is in the bucket before a beat with that key
counts, so the next leader does not bind an instance to another key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from batchlab.core.errors import BackendError, Malformed, TooNew
from batchlab.core.model import Instance, JobId
from batchlab.core.protocol import json_format
from batchlab.core.protocol.field_checks import UNREADABLE
from batchlab.core.protocol.messages import Beat
from batchlab.manager.versioned_document import Kept

log = logging.getLogger(__name__)

MOST_STRANGERS = 1000
"""Instances that beat before the fleet describes them; the oldest is forgotten first."""

Waiting = tuple[Beat, Collection[JobId]]


class Instances:
    """Of one leader."""

    def __init__(self, kept: Kept, refused: Callable[[str, str], None]) -> None:
        """`refused` is called with the instance of each beat that does not count, and with why."""
        self._kept = kept
        self._refused = refused
        self._there: Mapping[str, Instance] = {}
        self._digests: dict[str, str] = {}
        """Of each instance's key; "" where a worker of release 0.1.0 has none."""
        self._unsaved: dict[str, str] = {}
        """Digests of first beats that the bucket may not have yet."""
        self._strangers: dict[str, Waiting] = {}
        self._are_changed = False
        """Instances are gone whose digests the bucket still has, or silences have grown."""
        self.quiet_s: dict[str, float] = {}
        """For how long each instance has been silent, if that is long."""
        self._saving = asyncio.Lock()

    async def bind(self, beats: Iterable[Beat]) -> None:
        """Bind each described instance that has no key yet to the key of its first beat, and store
        the digests. Where they cannot be stored, these beats do not count yet."""
        for beat in beats:
            instance = self._there.get(beat.instance)
            if instance is not None and instance.pool == beat.pool:
                digest = _digest(beat.key)
                known = self._digests.get(beat.instance)
                if known is None or (not known and digest):
                    self._unsaved.setdefault(beat.instance, digest)
        if self._unsaved:
            await self.save()

    def admits(self, beat: Beat, trusted: Collection[JobId] = ()) -> bool:
        """Whether the beat counts now: it has the key that its instance is bound to."""
        instance = self._there.get(beat.instance)
        known = self._digests.get(beat.instance)
        if instance is None or (known is None and instance.pool == beat.pool):
            self._keep(beat, trusted)
            return False
        if instance.pool != beat.pool:
            self._refused(beat.instance, "it names another pool than that of its instance")
            return False
        if known is None or not hmac.compare_digest(known, _digest(beat.key)):
            self._refused(beat.instance, "it has another key than its instance")
            return False
        return True

    def _keep(self, beat: Beat, trusted: Collection[JobId]) -> None:
        known = self._strangers.get(beat.instance)
        if known is None or (known[0].key == beat.key and known[0].number <= beat.number):
            self._strangers[beat.instance] = beat, trusted
        while len(self._strangers) > MOST_STRANGERS:
            del self._strangers[next(iter(self._strangers))]

    def launched_s(self, instance: str) -> float | None:
        """When the instance was launched (seconds of the epoch), None if it is not known."""
        known = self._there.get(instance)
        return known.launched_s if known else None

    def see(self, there: Mapping[str, Instance]) -> list[Waiting]:
        """Take the instances that the fleet describes; return the beats of those that were not
        described when they came."""
        for digests in (self._digests, self._unsaved):
            for instance in digests.keys() - there.keys():
                del digests[instance]
                self._are_changed = True
        self._there = there
        return [self._strangers.pop(one) for one in list(self._strangers) if one in there]

    def note_quiet(self, quiet_s: Mapping[str, float]) -> None:
        """Take the silences that the next leader is to go on with, and store them soon."""
        self._are_changed = self._are_changed or self.quiet_s != quiet_s
        self.quiet_s = dict(quiet_s)

    async def load(self) -> None:
        """Take over what the leader before has stored: digests and silences; BackendError."""
        try:
            data = await self._kept.read()
            self._digests = {} if data is None else _from_bytes(data)
            self.quiet_s = {} if data is None else _quiet_in(data)
        except (Malformed, TooNew, *UNREADABLE) as error:
            # Only a manager may write the object.
            log.error("the keys of instances cannot be read and are bound anew: %s", error)

    async def save(self) -> None:
        """Store the digests if they have changed."""
        async with self._saving:
            if not self._unsaved and not self._are_changed:
                return
            self._are_changed = False
            saved = dict(self._unsaved)
            try:
                await self._kept.write(self._to_bytes, self._take_in)
            except BackendError as error:
                self._are_changed = True
                log.warning("the keys of instances are not stored yet: %s", error)
                return
            for instance in sorted(saved.keys() & self._unsaved.keys()):
                self._digests[instance] = self._unsaved.pop(instance)

    def _to_bytes(self) -> bytes:
        keys = dict(sorted((self._digests | self._unsaved).items()))
        return json_format.to_bytes(
            {"v": json_format.VERSION, "keys": keys, "quiet_s": dict(sorted(self.quiet_s.items()))}
        )

    def _take_in(self, there: bytes) -> bool:
        # Another leader's: a beat with such a key may have counted there. Some may be older than
        # ours: the fleet is asked at each tick.
        try:
            stored = _from_bytes(there)
        except (Malformed, TooNew, *UNREADABLE) as error:
            log.error("the keys of instances cannot be read and are replaced: %s", error)
            return True
        self._digests |= stored
        for instance in stored.keys() & self._unsaved.keys():
            del self._unsaved[instance]
        return True


def _from_bytes(data: bytes) -> dict[str, str]:
    return {str(k): str(v) for k, v in json_format.loads(data)["keys"].items()}


def _quiet_in(data: bytes) -> dict[str, float]:
    # A manager of release 0.1.0 stored none.
    return {str(k): float(v) for k, v in json_format.loads(data).get("quiet_s", {}).items()}


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest() if key else ""
