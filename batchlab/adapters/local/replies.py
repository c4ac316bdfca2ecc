"""Replies of workers to clients on the same machine, through one FIFO for each waiting client.

Invariant: a reply is written as a whole or not at all, so a client never reads a part of a reply. A worker learns
whether its reply is in the FIFO of a client that still waits.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from batchlab.adapters.local.local_wakeup_queue import open_writer, wait_until_readable
from batchlab.core.atomic_write import PRIVATE

log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}")
_READ_BYTES = 1 << 16
_STEP_BACK_S = 0.0001
_ABSENT = (errno.ENOENT, errno.ENXIO, errno.EAGAIN, errno.EPIPE)
"""Errors of a client that has left, or that does not read its replies."""


class FifoReplies:
    """Replies port of a worker. `folder` contains the FIFOs of the clients."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def send(self, name: str, text: str) -> bool:
        """Write the reply into the client's FIFO. Return False if the kernel cannot write the reply at once."""
        data = text.encode() + b"\n"
        if not _NAME.fullmatch(name) or len(data) > select.PIPE_BUF:
            return False
        try:
            fifo = os.open(self._folder / name, os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(fifo, data)
            finally:
                os.close(fifo)
        except OSError as error:
            if error.errno not in _ABSENT:
                log.warning("a reply cannot be sent: %s", error)
            return False
        # The kernel may have put the client on the core of this process. The pause of the whole process lets the client
        # run at once.
        time.sleep(_STEP_BACK_S)
        return True


class FifoInbox:
    """FIFO in which one client receives replies. The FIFO is created in `folder`, which must exist."""

    def __init__(self, folder: Path) -> None:
        _remove_abandoned(folder)
        self.name = secrets.token_hex(8)
        self._path = folder / self.name
        os.mkfifo(self._path, PRIVATE)
        # The client opens the FIFO also for writing. Without a writer, the FIFO would be at its end of file. The open
        # fails if another client has just removed the FIFO, because a FIFO without a reader is abandoned.
        self._fifo = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)

    async def receive(self, wait_s: float) -> Sequence[str]:
        """Return the replies in the FIFO, or wait up to `wait_s` seconds for the first reply."""
        if replies := self._read():
            return replies
        await wait_until_readable(self._fifo, wait_s)
        return self._read()

    def _read(self) -> Sequence[str]:
        try:
            # `str.splitlines` would also split a reply at characters such as U+2028.
            return os.read(self._fifo, _READ_BYTES).decode(errors="replace").split("\n")[:-1]
        except BlockingIOError:
            return ()

    def close(self) -> Sequence[str]:
        """Remove the FIFO, and return the replies in the FIFO."""
        self._path.unlink(missing_ok=True)
        try:
            return self._read()
        finally:
            os.close(self._fifo)


def _remove_abandoned(folder: Path) -> None:
    """Remove the FIFOs of killed clients."""
    for path in folder.glob("[0-9a-f]*"):
        with suppress(OSError):
            fifo = open_writer(path)
            if fifo is not None:
                os.close(fifo)
