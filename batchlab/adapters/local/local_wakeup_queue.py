"""Queue on one machine whose senders wake its receivers, over the queue of an emulator.

Senders ring the bells of receivers (see `fifo_wakeup`). Invariant: messages go only through the emulator. A ring only
makes a receiver look. A receiver that misses a ring finds the message at its next regular look.

This avoids an emulator's long polls. They look only every 100 ms, so a message would take that long. A long poll that
is open when its process is killed hides the next message for a visibility timeout.

`IdleTime` measures how long a queue has been quiet. Receivers of quiet queues look less often. Invariant: an occasional
message does not end the quiet. The workers of an idle grid send one heartbeat a minute. Without this rule, each would
make the manager look as often as during a job.

Wakeup of a waiting receiver by a sender in another process, with one FIFO per receiver.

Each FIFO is called a bell. Invariant: only one sender can unlink the name of a bell, and it must then ring this bell.
So no ring goes to a receiver that is already awake or has left.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from batchlab.adapters.limits import check_receive
from batchlab.core.errors import Throttled
from batchlab.core.ports import Depth, Message, Outgoing, Queue, QueueSpec

ALL_RECEIVERS = 1_000_000


class WakeupFifo:
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
        # It is also opened for writing. Otherwise it would be at its end of file, and wake the loop forever.
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


async def wait_for_messages(
    folder: Path, look: Callable[[], Awaitable[tuple[Sequence[Message], float]]], ends_s: float
) -> Sequence[Message]:
    """Return what `look` finds first, or what it finds at the loop's time `ends_s`.

    `look` also returns the seconds until the next call. A ring makes this call happen sooner.
    """
    clock = asyncio.get_running_loop().time
    rung = False
    while True:
        if rung:
            # This call precedes the next bell, because the ring usually means that a message has arrived.
            messages, _ = await look()
            if messages:
                return messages
        bell, rung = WakeupFifo(folder), False
        try:
            while not rung:
                # This call follows the creation of the bell. Otherwise a send in between would be missed.
                messages, again_s = await look()
                left_s = ends_s - clock()
                if messages or left_s <= 0:
                    return messages
                rung = await bell.wait(min(left_s, again_s))
        finally:
            if bell.close() and not rung:
                # The ring arrived while this receiver was leaving, so another receiver gets it.
                wake(folder, 1)


def wake(folder: Path, count: int) -> None:
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
                count -= _wake_one(folder / entry.name)
            if count <= 0:
                return


def _wake_one(path: Path) -> bool:
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


MAX_IDLE_S = 60.0
"""Maximum quiet time in seconds that counts when a message arrives."""


class IdleTime:
    """IdleTime time of one queue since `now_s`. Times are the event loop's, in seconds."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s

    def of_s(self, now_s: float) -> float:
        """Return the quiet time in seconds."""
        return now_s - self._since_s

    def broken(self, now_s: float) -> None:
        """Halve the quiet time, because a receive found messages.

        One message leaves half of it. Several in a row, as during a job, leave almost nothing.
        """
        self._since_s = now_s - min(self.of_s(now_s), MAX_IDLE_S) / 2


POLL_S = 1.0
MAX_POLL_S = 60.0
POLL_SHARE = 0.5
"""Share of the quiet time after which a receiver looks again, between `POLL_S` and `MAX_POLL_S`.

These looks find messages without a ring: the visibility timeout has ended, or the sender of a delayed message has died.
"""

LINGER_S = 0.02
"""Time in seconds for which a receiver's bell stays in place after a receive.

If the receiver does not return in this time, the bell is removed, and its ring goes to another receiver.
"""


class QueueService(Queue, Protocol):
    """A queue service with a `close` method."""

    async def close(self) -> None:
        """Close the service. No other call may follow."""


class LocalWakeupQueue:
    """Queue port over `queue`, with bells in `folder`. All users of the queue share this folder."""

    def __init__(self, queue: QueueService, folder: Path) -> None:
        self._queue = queue
        self._folder = folder
        self._ears: dict[str, _Receiver] = {}
        """Bells of receivers that are expected to return soon."""
        self._quiet: dict[str, IdleTime] = {}

    async def close(self) -> None:
        while self._ears:
            self._ears.popitem()[1].close()
        await self._queue.close()

    async def ensure(self, spec: QueueSpec) -> None:
        await self._queue.ensure(spec)

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        await self._queue.send(queue, messages)
        wake(self._folder / queue, sum(message.delay_s < POLL_S for message in messages))
        loop = asyncio.get_running_loop()
        for delay_s, count in Counter(outgoing.delay_s for outgoing in messages).items():
            if delay_s >= POLL_S:
                loop.call_later(delay_s, wake, self._folder / queue, count)

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        check_receive(max_messages, wait_s, visibility_s)

        async def look() -> Sequence[Message]:
            try:
                return await self._queue.receive(queue, max_messages=max_messages, wait_s=0, visibility_s=visibility_s)
            except Throttled:
                if not wait_s:
                    raise
                return ()  # too many messages are in flight, so a waiting receiver waits on

        if not wait_s:
            return await look()
        clock = asyncio.get_running_loop().time
        ends_s = clock() + wait_s
        quiet = self._quiet.setdefault(queue, IdleTime(clock()))

        def again_s() -> float:
            return min(max(POLL_S, POLL_SHARE * quiet.of_s(clock())), MAX_POLL_S)

        ear = self._ears.pop(queue, None) or _Receiver(self._folder / queue)
        try:
            messages = await ear.wait_for_messages(look, again_s, ends_s)
        except BaseException:
            ear.close()
            raise
        if messages:
            quiet.broken(clock())
        if len(messages) == max_messages:
            ear.heeded = False  # there may be more messages
        if queue not in self._ears:
            self._ears[queue] = ear
            ear.close_later(lambda: self._forget(queue, ear))
        else:
            ear.close()
        return messages

    def _forget(self, queue: str, ear: _Receiver) -> None:
        if self._ears.get(queue) is ear:
            del self._ears[queue]
            ear.close()

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        return await self._queue.delete(queue, receipts)

    async def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        refused = await self._queue.change_visibility(queue, changes)
        wake(self._folder / queue, sum(visibility_s < POLL_S for _, visibility_s in changes))
        return refused

    async def depth(self, queue: str) -> Depth:
        return await self._queue.depth(queue)

    async def purge(self, queue: str) -> None:
        await self._queue.purge(queue)

    async def remove(self, queue: str) -> None:
        await self._queue.remove(queue)
        # Receivers that still wait must see that the queue is removed.
        wake(self._folder / queue, ALL_RECEIVERS)


class _Receiver:
    """WakeupFifo of a receiver, kept from one receive to the next.

    A receiver needs no look if the bell has not rung since its last look. This saves requests, which cost far more than
    bells.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bell = WakeupFifo(folder)
        self._timer: asyncio.TimerHandle | None = None
        self.heeded = False
        """Whether a look after the creation of the bell found all messages."""
        self._looked_s = 0.0

    async def wait_for_messages(
        self, look: Callable[[], Awaitable[Sequence[Message]]], again_s: Callable[[], float], ends_s: float
    ) -> Sequence[Message]:
        """Return what `look` finds first, or what it finds at the loop's time `ends_s`.

        `again_s` returns the seconds until the next look.
        """
        clock = asyncio.get_running_loop().time
        if self._timer:
            self._timer.cancel()
        if not self.heeded and (messages := await self._heed(look)):
            return messages
        while (left_s := ends_s - clock()) > 0:
            due_s = max(0.0, self._looked_s + again_s() - clock())
            if await self._bell.wait(min(left_s, due_s)):
                self._bell.close()
                self._bell = WakeupFifo(self._folder)
            elif left_s < due_s:
                break
            if messages := await self._heed(look):
                return messages
        return ()

    async def _heed(self, look: Callable[[], Awaitable[Sequence[Message]]]) -> Sequence[Message]:
        self.heeded = False
        messages = await look()
        self.heeded = True
        self._looked_s = asyncio.get_running_loop().time()
        return messages

    def close_later(self, close: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, close)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._bell.close():
            # The ring was for a message that another receiver must take.
            wake(self._folder, 1)
