"""Group commit for a SQLite file in WAL mode.

With `synchronous = NORMAL` a commit is in the log, which no process's end can harm, but the log
may not be on the disk. Here a flush of the log follows outside of SQLite's lock, and calls that
wait at the same time share one flush. A checkpoint flushes both files itself.
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
    """The flushes of one SQLite file, for connections of this process that are open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="sqlite-flush")
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._has_name = False

    async def __call__(self) -> None:
        """Wait until every transaction that has been committed is on the disk; BackendError."""
        if self._next is None:
            # The flush under way may have begun before the caller's commit.
            self._next = asyncio.get_running_loop().create_task(self._flush_after(self._current))
            self._next.add_done_callback(_noticed)
        # A caller that is cancelled must not take the flush from the others.
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
            return  # the last connection was closed, which has put the log into the database
        except OSError as error:
            raise BackendError(f"{self._path} cannot be written: {error.strerror}.") from error

    def close(self) -> None:
        """End the thread once its flush has ended."""
        self._threads.shutdown(wait=False)


def _noticed(flush: asyncio.Task[None]) -> None:
    # Every caller may have been cancelled, and asyncio complains of an error that is not read.
    if not flush.cancelled():
        flush.exception()


def make_private(path: Path) -> None:
    """Make the file, empty, if it does not exist, so that only its user may read it.

    SQLite gives the same permissions to the log and the index next to it. It also reports why a
    file cannot be opened, so that error is left to it.
    """
    with suppress(OSError):
        os.close(private(path, os.O_CREAT | os.O_RDWR))
