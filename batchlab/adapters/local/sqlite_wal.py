"""Group commit for a SQLite file in WAL mode.

With `synchronous = NORMAL`, a commit is in the log. The end of a process cannot harm it, but the log may not be on
disk. This module flushes the log outside of SQLite's lock, and calls that wait at the same time share one flush. A
checkpoint flushes both files itself.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from batchlab.core.atomic_write import private, sync_folder
from batchlab.core.errors import BackendError


class WalFlush:
    """Flushes of one SQLite file, for open connections of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="sqlite-flush")
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._has_name = False

    async def __call__(self) -> None:
        """Wait until every committed transaction is on disk. Raise BackendError if the flush fails."""
        if self._next is None:
            # The current flush may have begun before the caller's commit.
            self._next = asyncio.get_running_loop().create_task(self._flush_after(self._current))
            self._next.add_done_callback(_noticed)
        # The cancellation of one caller must not cancel the flush of the others.
        await asyncio.shield(self._next)

    async def _flush_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None and not before.done():
            await asyncio.wait([before])
        self._current, self._next = self._next, None
        await asyncio.wrap_future(self._threads.submit(self._flush))

    def _flush(self) -> None:
        try:
            descriptor = os.open(f"{self._path}-wal", os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            if not self._has_name:
                sync_folder(self._path.parent)
                self._has_name = True
        except FileNotFoundError:
            return  # the last connection was closed, which moved the log into the database
        except OSError as error:
            raise BackendError(f"{self._path} cannot be written: {error.strerror}.") from error

    def close(self) -> None:
        """End the thread after its current flush."""
        self._threads.shutdown(wait=False)


def _noticed(flush: asyncio.Task[None]) -> None:
    # All callers may have been canceled, and asyncio warns about an error that is never read.
    if not flush.cancelled():
        flush.exception()


def make_private(path: Path) -> None:
    """Create the file, empty, if it does not exist, so that only its user may read it.

    SQLite gives the same permissions to the log and the index next to it. This function ignores errors, because SQLite
    later reports why it cannot open a file.
    """
    with suppress(OSError):
        os.close(private(path, os.O_CREAT | os.O_RDWR))
