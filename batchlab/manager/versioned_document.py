"""An object of the bucket that the leader keeps for itself and writes again and again.

Invariant: it is written over nothing but what was read. A leader that was killed between two
writes, or stood still while another one led, finds what is there by then, and takes that in first.
On S3 equal contents have equal ETags. That does no harm: the content is the whole state, so a write
over an equal content takes in all that is there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from batchlab.core.errors import AlreadyExists, BackendError, NotFound
from batchlab.manager.state import Ports

UNREADABLE = (BackendError, AttributeError, KeyError, TypeError, ValueError)
"""What is raised for what a later release has written, or nobody."""
REWRITES = 8
"""Others write only while a lead changes, so a few tries are plenty."""


class Kept:
    """The object of one key, by the version that was read or written last."""

    def __init__(self, ports: Ports, key: str) -> None:
        self._ports = ports
        self._key = key
        self._etag: str | None = None

    async def read(self) -> bytes | None:
        """What is there, None where nothing is; BackendError."""
        get = partial(self._ports.objects.get_if_changed, self._key, None)
        try:
            found = await self._ports.patience(get)
        except NotFound:
            found = None
        self._etag = found[1] if found else None
        return found[0] if found else None

    async def write(self, made: Callable[[], bytes], take_in: Callable[[bytes], bool]) -> None:
        """Put what `made()` gives in the place of what was read; BackendError.

        Where it is another one by now, `take_in` gets that, and `made` is asked again; nothing is
        written where `take_in` answers False.
        """
        for left in reversed(range(REWRITES)):
            data = made()
            put = partial(
                self._ports.objects.put,
                self._key,
                data,
                if_absent=self._etag is None,
                if_match=self._etag,
            )
            try:
                self._etag = await self._ports.patience(put)
            except (AlreadyExists, NotFound):
                if not left:
                    raise
            else:
                return
            there = await self.read()
            if there == data:
                return  # ours, whose answer was lost
            if there is not None and not take_in(there):
                return
