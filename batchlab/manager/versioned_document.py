"""Document in the bucket that only the leader writes.

Invariant: a write replaces only the version of the document that the leader has read or written last. After a crash or
a pause, another leader may have written the document. The manager merges the other leader's version before it writes
the document. On S3, two versions with equal contents have equal ETags, so a write may replace a version that the leader
has not read. This is safe, because the leader has read the same content.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from batchlab.core.errors import AlreadyExists, BackendError, Malformed, NotFound, Refused, TooLarge
from batchlab.core.protocol import field_checks
from batchlab.manager.state import Ports

log = logging.getLogger(__name__)

UNREADABLE = (BackendError, *field_checks.UNREADABLE)
"""Errors that the read of a damaged document, or of a document of a later release, raises."""
MAX_BYTES = 64 * 2**20
"""Maximum size of a document in bytes. A manager does not read a larger object."""
MAX_WRITES = 8
"""Maximum number of write attempts. Few attempts are enough, because other managers write the document only during a
change of leader."""


class VersionedDocument:
    """Document under one object key, with the version that was read or written last.

    The function `merge` merges stored content into the leader's state, and raises one of UNREADABLE if it cannot read
    the content. A write replaces unreadable content, because a document of a later release must not prevent a manager
    from leading. With `keeps_unreadable`, unreadable content stays in the bucket, and a write raises Refused.
    `is_readable` is false if the content of the last read was unreadable. An object with more than MAX_BYTES is
    unreadable.
    """

    def __init__(
        self, ports: Ports, key: str, merge: Callable[[bytes], None], *, keeps_unreadable: bool = False
    ) -> None:
        self._ports = ports
        self._key = key
        self.merge = merge
        self._keeps_unreadable = keeps_unreadable
        self._etag: str | None = None
        self.is_readable = True

    async def read(self) -> bytes | None:
        """Return the document's content, or None if the document does not exist. Raise Malformed if the object has more
        than MAX_BYTES, and BackendError if the bucket does not respond."""
        objects, key = self._ports.objects, self._key
        try:
            content = await self._ports.patience(partial(objects.get_if_changed, key, None, limit=MAX_BYTES))
        except NotFound:
            content = None
        except TooLarge as error:
            # A write may replace the object, and needs its ETag.
            info = await self._ports.patience(partial(objects.head, key))
            self._etag = info.etag if info else None
            if info is None:
                return None
            raise Malformed(
                f"The stored object {key} has {info.size} bytes, and the limit is {MAX_BYTES} bytes.",
                remedy="Restore the object from a backup, or remove it.",
            ) from error
        self._etag = content[1] if content else None
        return content[0] if content else None

    async def load(self) -> None:
        """Read and merge the document's content. Log unreadable content, and set `is_readable` to false.

        Raise BackendError if the bucket does not respond.
        """
        await self._merge_stored()

    async def write(self, encode: Callable[[], bytes], *, replaces_unreadable: bool = False) -> None:
        """Replace the last read version of the document with the result of `encode`. If another leader has written the
        document, merge the other leader's version first.

        Raise BackendError if the write fails. With `keeps_unreadable`, raise Refused if the stored content is
        unreadable, unless `replaces_unreadable` is true.
        """
        must_read = self._keeps_unreadable and not replaces_unreadable
        for remaining in reversed(range(MAX_WRITES)):
            if must_read and not self.is_readable:
                raise Refused(f"The stored object {self._key} cannot be read, so the manager does not replace it.")
            data = encode()
            put = partial(self._ports.objects.put, self._key, data, if_absent=self._etag is None, if_match=self._etag)
            try:
                self._etag = await self._ports.patience(put)
            except (AlreadyExists, NotFound):
                if not remaining:
                    raise
            else:
                self.is_readable = True
                return
            if await self._merge_stored(data):
                return  # the write succeeded, but its response was lost

    async def _merge_stored(self, own: bytes | None = None) -> bool:
        """Read the document's content, and merge the content unless it is `own`. Return whether the content is
        `own`."""
        try:
            content = await self.read()
        except Malformed as error:
            self._reject(error)
            return False
        self.is_readable = True
        if content is None or content == own:
            return content is not None
        try:
            self.merge(content)
        except UNREADABLE as error:
            self._reject(error)
        return False

    def _reject(self, error: Exception) -> None:
        log.error("the stored object %s cannot be read: %r", self._key, error)
        self.is_readable = False
