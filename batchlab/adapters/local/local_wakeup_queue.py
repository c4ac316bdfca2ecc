"""Queue port over an emulator's queue. Senders wake waiting receivers.

On one machine, a waiting receiver creates a FIFO, and a sender in another process writes to the FIFO. The module
`network_wakeups` has the wakeups between containers. Invariants: every message goes through the emulator. A wakeup only
makes a receiver poll the emulator. A receiver that misses a wakeup finds the message at its next regular poll. Only one
sender can unlink the name of a FIFO, and this sender must then wake the FIFO's receiver. The FIFO of a receiver that is
awake or has left does not have a name, so senders cannot wake this receiver.

Wakeups replace the emulator's long polls. An emulator's long polls check for messages only every 100 ms, so a message
may wait for 100 ms. A long poll that is open when its process is killed hides the next message for a visibility
timeout.

`IdleTime` measures how long a queue has been idle. Receivers poll an idle queue less often. Invariant: an occasional
message does not end the idle time of a queue. The workers of an idle grid send one heartbeat a minute. If one message
ended the idle time, each heartbeat would make the manager poll as often as during a job.
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
    """FIFO with which a sender wakes one waiting receiver once.

    A FIFO is used instead of a socket, because a socket's path is limited to 107 bytes. A FIFO is used instead of
    inotify, because inotify wakes all receivers.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = secrets.token_hex(8)
        self._path = folder / name
        # The FIFO gets its final name after the receiver has opened the FIFO, because senders remove a FIFO without a
        # reader.
        hidden = folder / f".{name}"
        os.mkfifo(hidden)
        # The receiver opens the FIFO also for writing. Without a writer, the FIFO would be at its end of file and wake
        # the event loop forever.
        self._fd = os.open(hidden, os.O_RDWR | os.O_NONBLOCK)
        hidden.rename(self._path)

    async def wait(self, timeout_s: float) -> bool:
        """Wait for a wakeup. Return True after a wakeup, False after the timeout."""
        return await wait_until_readable(self._fd, timeout_s)

    def close(self) -> bool:
        """Remove the FIFO. Return True if a sender has sent a wakeup or is about to send one.

        Repeated calls of `close` are safe.
        """
        fd, self._fd = self._fd, -1
        try:
            self._path.unlink()
        except FileNotFoundError:
            return True
        finally:
            if fd >= 0:
                os.close(fd)
        return False


async def wait_until_readable(fd: int, timeout_s: float) -> bool:
    """Wait until the FIFO has content. Return False after the timeout."""
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[bool] = loop.create_future()
    loop.add_reader(fd, _set_result, woken, True)
    timer = loop.call_later(timeout_s, _set_result, woken, False)
    try:
        return await woken
    finally:
        timer.cancel()
        loop.remove_reader(fd)


def _set_result(woken: asyncio.Future[bool], is_woken: bool) -> None:
    if not woken.done():
        woken.set_result(is_woken)


async def wait_for_messages(
    folder: Path, poll: Callable[[], Awaitable[tuple[Sequence[Message], float]]], ends_s: float
) -> Sequence[Message]:
    """Return the first messages that `poll` finds, or the result of a last poll at the event loop's time `ends_s`.

    `poll` also returns the seconds until the next poll. A wakeup makes the next poll happen sooner.
    """
    clock = asyncio.get_running_loop().time
    woken = False
    while True:
        if woken:
            # A woken receiver polls before creating the next FIFO, because a wakeup usually means that a message has
            # arrived.
            messages, _ = await poll()
            if messages:
                return messages
        fifo, woken = WakeupFifo(folder), False
        try:
            while not woken:
                # The receiver polls after creating the FIFO. If the receiver polled before creating the FIFO, the
                # receiver would miss a message that is sent in between.
                messages, next_s = await poll()
                left_s = ends_s - clock()
                if messages or left_s <= 0:
                    return messages
                woken = await fifo.wait(min(left_s, next_s))
        finally:
            if fifo.close() and not woken:
                # The wakeup arrived while this receiver was leaving, so another receiver is woken.
                wake(folder, 1)


def has_receiver(folder: Path) -> bool:
    """Return whether a receiver waits, or whether a killed receiver has left its FIFO."""
    try:
        return any(not name.startswith(".") for name in os.listdir(folder))  # noqa: PTH208 - 3 times as fast
    except FileNotFoundError:
        return False


def wake(folder: Path, count: int) -> None:
    """Wake up to `count` receivers, and remove the FIFOs of dead processes."""
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


def open_writer(path: Path) -> int | None:
    """Open a FIFO for writing. Remove a FIFO without a reader.

    Return None if the FIFO does not exist or was removed.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        path.unlink(missing_ok=True)
        return None


def _wake_one(path: Path) -> bool:
    fd = open_writer(path)
    if fd is None:
        return False
    try:
        path.unlink()
        os.write(fd, b"!")
    except FileNotFoundError:
        return False
    except BrokenPipeError:
        # The receiver left after a sender had unlinked its FIFO. The receiver that left notices the missing name and
        # wakes another receiver.
        return True
    finally:
        os.close(fd)
    return True


MAX_IDLE_S = 60.0
"""Maximum idle time in seconds from which `halve` starts."""


class IdleTime:
    """Idle time of one queue, which starts at `now_s`. Times are in seconds of the event loop's clock."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s

    def idle_s(self, now_s: float) -> float:
        return now_s - self._since_s

    def halve(self, now_s: float) -> None:
        """Halve the idle time, because a receive found messages.

        Several receives in a row, as during a job, reduce the idle time to almost zero.
        """
        self._since_s = now_s - min(self.idle_s(now_s), MAX_IDLE_S) / 2


POLL_S = 1.0
MAX_POLL_S = 60.0
POLL_SHARE = 0.5
"""Share of the idle time after which a receiver polls again, between `POLL_S` and `MAX_POLL_S`.

Regular polls find messages that become visible without a wakeup: after a visibility timeout, or after the death of a
delayed message's sender.
"""

LINGER_S = 0.02
"""Time in seconds for which a receiver's bell stays open after a receive.

If the receiver does not return in `LINGER_S` seconds, its bell is closed, and a wakeup goes to another receiver.
"""


class QueueService(Queue, Protocol):
    """A queue service with a `close` method."""

    async def close(self) -> None:
        """Close the service, after which no method may be called."""


class Bell(Protocol):
    """Wakeups of one receiver, from the creation of the bell on."""

    async def wait(self, timeout_s: float) -> bool:
        """Wait for a wakeup. Return True after a wakeup, False after the timeout."""

    def close(self) -> bool:
        """Release the bell. Return True if it has a wakeup that another receiver must get."""


class Wakeups(Protocol):
    """Wakeups of the receivers of all queues."""

    def open(self, queue: str) -> Bell:
        """Return the bell of a new receiver. Raise Unreachable if the receiver cannot be woken."""

    def wake(self, queue: str, count: int) -> None:
        """Wake at least `count` receivers of a queue if there are as many. A wakeup may be lost."""

    def close(self) -> None: ...


class FifoWakeups:
    """Wakeups by FIFOs in a folder that all users of the queues share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, queue: str) -> WakeupFifo:
        return WakeupFifo(self._folder / queue)

    def wake(self, queue: str, count: int) -> None:
        wake(self._folder / queue, count)

    def close(self) -> None:
        """Do nothing, because each receiver closes its FIFO."""


class WakeupQueue:
    """Queue port over the queue service `queue`, whose senders wake receivers by `wakeups`."""

    def __init__(self, queue: QueueService, wakeups: Wakeups) -> None:
        self._queue = queue
        self._wakeups = wakeups
        self._receivers: dict[str, _Receiver] = {}
        """Receivers that are expected to wait again soon, by the name of the queue."""
        self._idle_times: dict[str, IdleTime] = {}

    async def close(self) -> None:
        while self._receivers:
            self._receivers.popitem()[1].close()
        await self._queue.close()
        self._wakeups.close()

    async def ensure(self, spec: QueueSpec) -> None:
        await self._queue.ensure(spec)

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        await self._queue.send(queue, messages)
        self._wakeups.wake(queue, sum(message.delay_s < POLL_S for message in messages))
        loop = asyncio.get_running_loop()
        for delay_s, count in Counter(message.delay_s for message in messages).items():
            if delay_s >= POLL_S:
                loop.call_later(delay_s, self._wakeups.wake, queue, count)

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        check_receive(max_messages, wait_s, visibility_s)

        async def poll() -> Sequence[Message]:
            try:
                return await self._queue.receive(queue, max_messages=max_messages, wait_s=0, visibility_s=visibility_s)
            except Throttled:
                if not wait_s:
                    raise
                return ()  # Too many messages are in flight, so the receiver continues to wait.

        if not wait_s:
            return await poll()
        clock = asyncio.get_running_loop().time
        ends_s = clock() + wait_s
        idle_time = self._idle_times.setdefault(queue, IdleTime(clock()))

        def next_s() -> float:
            return min(max(POLL_S, POLL_SHARE * idle_time.idle_s(clock())), MAX_POLL_S)

        receiver = self._receivers.pop(queue, None) or _Receiver(self._wakeups, queue)
        try:
            messages = await receiver.wait_for_messages(poll, next_s, ends_s)
        except BaseException:
            receiver.close()
            raise
        if messages:
            idle_time.halve(clock())
        if len(messages) == max_messages:
            receiver.has_all = False  # The queue may contain more messages than this receive returned.
        if queue not in self._receivers:
            self._receivers[queue] = receiver
            receiver.timer = asyncio.get_running_loop().call_later(LINGER_S, self._forget, queue, receiver)
        else:
            receiver.close()
        return messages

    def _forget(self, queue: str, receiver: _Receiver) -> None:
        if self._receivers.get(queue) is receiver:
            del self._receivers[queue]
            receiver.close()

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        return await self._queue.delete(queue, receipts)

    async def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        refused = await self._queue.change_visibility(queue, changes)
        self._wakeups.wake(queue, sum(visibility_s < POLL_S for _, visibility_s in changes))
        return refused

    async def depth(self, queue: str) -> Depth:
        return await self._queue.depth(queue)

    async def purge(self, queue: str) -> None:
        await self._queue.purge(queue)

    async def remove(self, queue: str) -> None:
        await self._queue.remove(queue)
        # Receivers that still wait must see that the queue is removed.
        self._wakeups.wake(queue, ALL_RECEIVERS)


class LocalWakeupQueue(WakeupQueue):
    """Queue port over the queue service `queue`, with FIFOs in `folder`.

    All users of the queue share the folder of FIFOs.
    """

    def __init__(self, queue: QueueService, folder: Path) -> None:
        super().__init__(queue, FifoWakeups(folder))
        self._folder = folder

    def is_awaited(self, queue: str) -> bool:
        return has_receiver(self._folder / queue)


class _Receiver:
    """Receiver with a bell that stays open from one receive to the next.

    A receiver does not need another poll if no sender has woken the receiver since its last poll. An open bell saves
    requests, which cost far more than bells.
    """

    def __init__(self, wakeups: Wakeups, queue: str) -> None:
        self._wakeups = wakeups
        self._queue = queue
        self._bell = wakeups.open(queue)
        self._polled_s = 0.0
        self.timer: asyncio.TimerHandle | None = None
        """Timer that closes the receiver unless the receiver waits again."""
        self.has_all = False
        """Whether a poll after the creation of the bell found all messages."""

    async def wait_for_messages(
        self, poll: Callable[[], Awaitable[Sequence[Message]]], next_s: Callable[[], float], ends_s: float
    ) -> Sequence[Message]:
        """Return the first messages that `poll` finds until the event loop's time `ends_s`.

        `next_s` returns the seconds from one poll to the next.
        """
        clock = asyncio.get_running_loop().time
        if self.timer:
            self.timer.cancel()
        if not self.has_all and (messages := await self._poll(poll)):
            return messages
        while (left_s := ends_s - clock()) > 0:
            due_s = max(0.0, self._polled_s + next_s() - clock())
            if await self._bell.wait(min(left_s, due_s)):
                self._bell.close()
                self._bell = self._wakeups.open(self._queue)
            elif left_s < due_s:
                break
            if messages := await self._poll(poll):
                return messages
        return ()

    async def _poll(self, poll: Callable[[], Awaitable[Sequence[Message]]]) -> Sequence[Message]:
        self.has_all = False
        messages = await poll()
        self.has_all = True
        self._polled_s = asyncio.get_running_loop().time()
        return messages

    def close(self) -> None:
        if self.timer:
            self.timer.cancel()
        if self._bell.close():
            # The wakeup was for a message that another receiver must take.
            self._wakeups.wake(self._queue, 1)
