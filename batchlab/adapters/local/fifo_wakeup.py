"""How a sender in one process wakes a receiver that sleeps in another: a FIFO per sleeper.

Invariant: whoever takes a bell's name away owes its sleeper a ring, and each bell is taken by one
ringer, so no ring is spent on a sleeper that has already been woken or has left.
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
    """One sleeper's registration, good for one ring.

    A FIFO, not a socket: its path may be longer than 107 bytes. Not inotify: it wakes everybody.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = secrets.token_hex(8)
        self._path = folder / name
        # It gets its name when somebody listens: a FIFO without a reader passes for a dead one.
        hidden = folder / f".{name}"
        os.mkfifo(hidden)
        # Open for writing too: without a writer the end of file would keep the loop spinning.
        self._fd = os.open(hidden, os.O_RDWR | os.O_NONBLOCK)
        hidden.rename(self._path)

    async def wait(self, timeout_s: float) -> bool:
        """Sleep until rung, True, or until the time is over, False."""
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
        """Stop listening; True where somebody has rung or is about to."""
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
    """What `look` finds first, or finds at the loop's time `ends_s`.

    It also answers in how many seconds to look again; sooner, if somebody rings.
    """
    clock = asyncio.get_running_loop().time
    rung = False
    while True:
        if rung:
            # Before the next bell is made: mostly we were rung for what lies there now.
            found, _ = await look()
            if found:
                return found
        bell, rung = Bell(folder), False
        try:
            while not rung:
                # After the bell is up, or a send in between would be missed.
                found, again_s = await look()
                left_s = ends_s - clock()
                if found or left_s <= 0:
                    return found
                rung = await bell.wait(min(left_s, again_s))
        finally:
            if bell.close() and not rung:
                # It rang while we were leaving: that message is another sleeper's.
                ring(folder, 1)


def ring(folder: Path, count: int) -> None:
    """Wake up to `count` sleepers, and clear away the bells of processes that died."""
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
        # It left after we took its name, and seeing that it passes the ring on itself.
        return True
    finally:
        os.close(fd)
    return True
