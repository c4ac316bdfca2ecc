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

LOOKS = 6
"""Number of reads of the leader beat in `orphan_s`."""
MISSING_LOOK_S = 300.0
"""Seconds between two reads if the grid does not end without a manager."""


class LeaderWatch:
    """Watch of the leader beat. The clocks of the manager and the worker need not agree."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        self._objects = objects
        self._clock = clock
        self._etag: str | None = None
        self._after_s = 0.0
        self._stale_s = 0.0
        """Seconds for which the reads have found the same leader beat. The time of failed reads does not count, because
        an outage of the bucket also prevents the renewal of the leader beat."""
        self._asked_s = clock.monotonic_s()

    @property
    def _pause_s(self) -> float:
        return self._after_s / LOOKS if self._after_s else MISSING_LOOK_S

    async def wait_until_orphaned(self, is_idle: Callable[[], bool]) -> None:
        """Return when the leader beat is stale and the worker is idle."""
        while True:
            await self._look()
            # One more pause lets the scheduled action of the group lower the desired capacity first.
            if self._after_s and self._stale_s >= self._after_s + self._pause_s and is_idle():
                log.warning("no manager has led for %.0f s, so this worker ends", self._stale_s)
                return
            await asyncio.sleep(self._pause_s)

    async def _look(self) -> None:
        before_s, self._asked_s = self._asked_s, self._clock.monotonic_s()
        try:
            changed = await self._objects.get_if_changed(object_keys.LEADER, self._etag)
            if changed is None:
                # A process that was suspended counts only as much time as two pauses.
                self._stale_s += min(self._asked_s - before_s, 2 * self._pause_s)
                return
            content, self._etag = changed
            self._after_s = leader_beat.from_bytes(content).orphan_s
        except NotFound:
            self._etag, self._after_s = None, 0.0
        except BatchlabError as error:
            raise_if_cancelled()
            log.warning("the leader beat cannot be read: %s", error)
            return
        self._stale_s = 0.0
