"""Watch of the leader beat, which ends an idle worker on an instance of its own after the end of the last manager.

Scale-in does not end an instance with scale-in protection, and only a manager removes the protection. Therefore, such a
worker must end itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from batchlab.core.errors import BatchlabError, NotFound
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.ports import Clock, Objects
from batchlab.core.protocol import leader_beat, object_keys

log = logging.getLogger(__name__)


class LeaderWatch:
    """Watch of the leader beat. The clocks of the manager and the worker need not agree."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        self._objects = objects
        self._clock = clock
        self._etag: str | None = None
        self._orphan_s = 0.0
        """Value of `orphan_s` in the last leader beat, or 0 without a leader beat."""
        self._stale_s = 0.0
        """Seconds for which the reads have found the same leader beat. The time of failed reads does not count, because
        an outage of the bucket also prevents the renewal of the leader beat."""
        self._asked_s = clock.monotonic_s()

    async def wait_until_orphaned(self, is_idle: Callable[[], bool]) -> None:
        """Return when the leader beat is stale and the worker is idle."""
        while True:
            await self._read_beat()
            pause_s = leader_beat.round_s(self._orphan_s)
            # One more pause lets the scheduled action of the group lower the desired capacity first.
            if self._orphan_s and self._stale_s >= self._orphan_s + pause_s and is_idle():
                log.warning("no manager has led for %.0f s, so this worker ends", self._stale_s)
                return
            await asyncio.sleep(pause_s)

    async def _read_beat(self) -> None:
        before_s, self._asked_s = self._asked_s, self._clock.monotonic_s()
        try:
            changed = await self._objects.get_if_changed(object_keys.LEADER, self._etag)
            if changed is None:
                # A process that was suspended counts only as much time as two pauses.
                self._stale_s += min(self._asked_s - before_s, 2 * leader_beat.round_s(self._orphan_s))
                return
            content, self._etag = changed
            self._orphan_s = leader_beat.from_bytes(content).orphan_s
        except NotFound:
            self._etag, self._orphan_s = None, 0.0
        except BatchlabError as error:
            raise_if_cancelled()
            log.warning("the leader beat cannot be read: %s", error)
            return
        self._stale_s = 0.0
