"""An object in the bucket that only the leader writes.

Invariant: a write replaces only the version that was read. After a crash or a pause, another leader
may have written the object. The manager merges that version before it writes. On S3, equal contents
have equal ETags. This is safe, because the content is the whole state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from batchlab.core.errors import AlreadyExists, BackendError, NotFound
from batchlab.manager.state import Ports

UNREADABLE = (BackendError, AttributeError, KeyError, TypeError, ValueError)
"""Errors raised for a document of a later release, or for a damaged document."""
REWRITES = 8
"""Other managers write only during a change of leader, so few attempts are enough."""


class VersionedDocument:
    """One object key, with the version that was read or written last."""

    def __init__(self, ports: Ports, key: str) -> None:
        self._ports = ports
        self._key = key
        self._etag: str | None = None

    async def read(self) -> bytes | None:
        """Return the content, or None if the object does not exist. Raises BackendError."""
        get = partial(self._ports.objects.get_if_changed, self._key, None)
        try:
            found = await self._ports.patience(get)
        except NotFound:
            found = None
        self._etag = found[1] if found else None
        return found[0] if found else None

    async def write(self, made: Callable[[], bytes], take_in: Callable[[bytes], bool]) -> None:
        """Replace the version that was read with the result of `made()`. Raises BackendError.

        If the object has changed, `take_in` receives the new content, and `made` is called again.
        Nothing is written if `take_in` returns False.
        """
        for left in reversed(range(REWRITES)):
            data = made()
            put = partial(self._ports.objects.put, self._key, data, if_absent=self._etag is None, if_match=self._etag)
            try:
                self._etag = await self._ports.patience(put)
            except (AlreadyExists, NotFound):
                if not left:
                    raise
            else:
                return
            there = await self.read()
            if there == data:
                return  # the write succeeded, but its response was lost
            if there is not None and not take_in(there):
                return
