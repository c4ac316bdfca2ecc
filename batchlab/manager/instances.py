"""The instances that the fleet has, and the keys by which their workers are known again.

Invariant: a beat counts only for an instance that the fleet describes, in that instance's pool, and
with the key of its first beat. A beat of another instance waits here until the fleet describes it,
and leads to nothing before. A leader writes down the digests of the keys, so that the next one
does not bind an instance to whoever is faster.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Collection, Mapping

from batchlab.errors import BackendError
from batchlab.manager.kept import Kept
from batchlab.model import Instance, JobId
from batchlab.protocol import wire
from batchlab.protocol.messages import Beat

log = logging.getLogger(__name__)

MOST_STRANGERS = 1000
"""Instances that beat before the fleet describes them; the oldest is forgotten first."""

Waiting = tuple[Beat, Collection[JobId]]


class Instances:
    """Of one leader."""

    def __init__(self) -> None:
        self._there: Mapping[str, Instance] = {}
        self._digests: dict[str, str] = {}
        """Of each instance's key; "" where a worker of release 0.1.0 has none."""
        self._strangers: dict[str, Waiting] = {}
        self._is_new = False

    def admits(self, beat: Beat, trusted: Collection[JobId] = ()) -> bool:
        """Whether the beat counts now; the first one of an instance binds it to its key."""
        instance = self._there.get(beat.instance)
        if instance is None:
            self._keep(beat, trusted)
            return False
        if instance.pool != beat.pool:
            log.error("a beat names another pool than that of its instance")
            return False
        digest = _digest(beat.key)
        known = self._digests.get(beat.instance, "")
        if not known:
            self._is_new |= known != digest
            self._digests[beat.instance] = digest
        elif not hmac.compare_digest(known, digest):
            log.error("a beat has another key than its instance", extra={"instance": beat.instance})
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
        gone = self._digests.keys() - there.keys()
        for instance in gone:
            del self._digests[instance]
        self._is_new |= bool(gone)
        self._there = there
        return [self._strangers.pop(one) for one in list(self._strangers) if one in there]

    async def load(self, kept: Kept) -> None:
        """Take over the digests that the leader before has written down."""
        try:
            data = await kept.read()
            if data is not None:
                self._digests = {str(k): str(v) for k, v in wire.loads(data)["keys"].items()}
        except (BackendError, AttributeError, KeyError) as error:
            log.warning("the keys of instances cannot be read and are bound anew: %s", error)

    async def save(self, kept: Kept) -> None:
        """Write down the digests, if they have changed."""
        if not self._is_new:
            return
        self._is_new = False
        try:
            await kept.write(self._to_bytes, self._take_in)
        except BackendError as error:
            self._is_new = True
            log.warning("the keys of instances are not written down yet: %s", error)

    def _to_bytes(self) -> bytes:
        return wire.to_bytes({"v": wire.VERSION, "keys": self._digests})

    def _take_in(self, _there: bytes) -> bool:
        # Another leader's, of which some may be older than ours: the fleet is asked at each tick.
        return True


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest() if key else ""
