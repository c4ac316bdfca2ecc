"""Wakeup of a waiting receiver by a sender in another process, with one FIFO per receiver.

Each FIFO is called a bell. Invariant: only one sender can unlink the name of a bell, and it must
then ring this bell. So no ring goes to a receiver that is already awake or has left.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from batchlab.core.ports import Message

EVERYBODY = 1_000_000


class Bell:
    """Registration of one waiting receiver. It can be rung once.

    It is a FIFO because a socket's path is limited to 107 bytes, and inotify wakes all receivers.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = secrets.token_hex(8)
        self._path = folder / name
        # The FIFO gets its name after it is open, because senders remove a FIFO without a reader.
        hidden = folder / f".{name}"
        os.mkfifo(hidden)
        # It is also opened for writing. Otherwise it would be at its end of file, and wake the loop
        # forever.
        self._fd = os.open(hidden, os.O_RDWR | os.O_NONBLOCK)
        hidden.rename(self._path)

    async def wait(self, timeout_s: float) -> bool:
        """Wait for a ring. Return True if it came, False after the timeout."""
        loop = asyncio.get_running_loop()
        rung: asyncio.Future[bool] = loop.create_future()
        loop.add_reader(self._fd, _settle, rung, True)
        timer = loop.call_later(timeout_s, _settle, rung, False)
        try:
            return await rung
        finally:
            timer.cancel()
            loop.remove_reader(self._fd)

    def close(self) -> bool:
        """Remove the bell. Return True if a sender has rung it or is about to."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return True
        finally:
            os.close(self._fd)
        return False


def _settle(rung: asyncio.Future[bool], has_rung: bool) -> None:
    if not rung.done():
        rung.set_result(has_rung)


async def listen(
    folder: Path,
    look: Callable[[], Awaitable[tuple[Sequence[Message], float]]],
    ends_s: float,
) -> Sequence[Message]:
    """Return what `look` finds first, or what it finds at the loop's time `ends_s`.

    `look` also returns the seconds until the next call. A ring makes this call happen sooner.
    """
    clock = asyncio.get_running_loop().time
    rung = False
    while True:
        if rung:
            # This call precedes the next bell, because the ring usually means that a message has
            # arrived.
            found, _ = await look()
            if found:
                return found
        bell, rung = Bell(folder), False
        try:
            while not rung:
                # This call follows the creation of the bell. Otherwise a send in between would be
                # missed.
                found, again_s = await look()
                left_s = ends_s - clock()
                if found or left_s <= 0:
                    return found
                rung = await bell.wait(min(left_s, again_s))
        finally:
            if bell.close() and not rung:
                # The ring arrived while this receiver was leaving, so another receiver gets it.
                ring(folder, 1)


def ring(folder: Path, count: int) -> None:
    """Wake up to `count` receivers, and remove the bells of dead processes."""
    if count <= 0:
        return
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            if not entry.name.startswith("."):
                count -= _rang(folder / entry.name)
            if count <= 0:
                return


def _rang(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        path.unlink(missing_ok=True)
        return False
    try:
        path.unlink()
        os.write(fd, b"!")
    except FileNotFoundError:
        return False
    except BrokenPipeError:
        # The receiver left after its bell was unlinked. It sees this and passes the ring on.
        return True
    finally:
        os.close(fd)
    return True
