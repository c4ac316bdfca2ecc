"""Queue port with the behavior of SQS standard queues, over one SQLite file for many processes.

Invariant: a waiting receiver finds a visible message within `POLL_S` seconds, even if a process was killed while waking
the receiver. A waiting receiver usually gets a sent message within about a millisecond.

No call of this queue waits for the disk. A power loss may undo the calls of the last seconds. After a power loss, a
received or deleted message may become visible again, as after its visibility timeout. The manager sends lost messages
again, because the bucket shows which bundles are outstanding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from batchlab.adapters.clock import SingleThread
from batchlab.adapters.limits import (
    MAX_IN_FLIGHT,
    check_batch,
    check_changes,
    check_queue_name,
    check_receive,
    check_send,
)
from batchlab.adapters.local.local_wakeup_queue import ALL_RECEIVERS, has_receiver, wait_for_messages, wake
from batchlab.adapters.local.sqlite_messages import ReceiveResult, SqliteMessages
from batchlab.core.errors import Throttled
from batchlab.core.ports import Clock, Depth, Message, Outgoing, QueueSpec

P = ParamSpec("P")
T = TypeVar("T")

POLL_S = 1.0
"""Interval in seconds at which a waiting receiver checks for messages.

A check shows the receiver when each later message becomes visible, so the receiver waits exactly until then. A wakeup
is needed only for messages that become visible within one interval.
"""

SHORT_CHARACTERS = 64 * 1024
"""Maximum number of characters of the messages in a send that runs on the event loop."""


class SqliteQueue:
    """Queue port over the SQLite file `path`. The folder of the file also contains `wake/` and SQLite's other files.

    A short call that need not wait runs on the event loop's thread, because a change of threads takes as long as the
    call. All other calls run on one thread of the queue object.
    """

    def __init__(self, path: Path, clock: Clock, *, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._messages = SqliteMessages(path, clock, max_in_flight=max_in_flight)
        self._wakeups = path.parent / "wake"
        self._thread = SingleThread("sqlite-queue")

    async def close(self) -> None:
        """Wait for the submitted calls, then close the file and end the thread."""
        await self._thread.close(self._messages.close)

    def is_awaited(self, queue: str) -> bool:
        return has_receiver(self._wakeups / queue)

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a short call and return its result."""
        if await self._may_be_quick():
            with suppress(Throttled), self._messages.at_once():
                return call(*args, **kwargs)
        return await self._at_length(call, *args, **kwargs)

    async def _at_length(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._thread.submit(partial(call, *args, **kwargs)))

    async def _may_be_quick(self) -> bool:
        # The sleep lets other tasks run before this call. Without the sleep, successive calls would never let other
        # tasks run.
        await asyncio.sleep(0)
        return self._thread.is_idle and self._messages.is_open

    async def ensure(self, spec: QueueSpec) -> None:
        check_queue_name(spec.name)
        await self._run(self._messages.ensure, spec)

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        check_send(messages)
        is_short = sum(len(message.body) for message in messages) <= SHORT_CHARACTERS
        run = self._run if is_short else self._at_length
        await run(self._send, queue, messages)

    def _send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        self._messages.send(queue, messages)
        # The wakeup is part of the send call, so the cancellation of the caller cannot prevent the wakeup.
        self._wake_receivers(queue, sum(message.delay_s < POLL_S for message in messages))

    def _wake_receivers(self, queue: str, count: int) -> None:
        wake(self._wakeups / queue, count)

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        check_receive(max_messages, wait_s, visibility_s)
        ends_s = asyncio.get_running_loop().time() + wait_s
        result = await self._receive(queue, max_messages, visibility_s)
        if result.over_limit and wait_s == 0:
            raise Throttled(f"Queue {queue!r} has too many messages in flight.")
        if result.messages or wait_s <= 0:
            return result.messages

        async def poll() -> tuple[Sequence[Message], float]:
            result = await self._receive(queue, max_messages, visibility_s)
            due_s = POLL_S if result.due_in_s is None else max(result.due_in_s, 0.001)
            return result.messages, min(due_s, POLL_S)

        return await wait_for_messages(self._wakeups / queue, poll, ends_s)

    async def _receive(self, queue: str, limit: int, visibility_s: float | None) -> ReceiveResult:
        try:
            is_quick = await self._may_be_quick()
        except asyncio.CancelledError:
            # The message that woke this receiver may still be in the queue, so another receiver is woken.
            self._wake_receivers(queue, 1)
            raise
        if is_quick:
            with suppress(Throttled), self._messages.at_once():
                result = self._receive_batch(queue, limit, visibility_s)
                if result.messages or not result.more:
                    return result
        receiving = self._thread.submit(partial(self._receive_all, queue, limit, visibility_s))
        try:
            return await asyncio.wrap_future(receiving)
        except asyncio.CancelledError:
            # Received messages without a reader would stay hidden for a whole visibility timeout.
            self._thread.submit(partial(self._undo_receive, queue, receiving))
            raise

    def _receive_all(self, queue: str, limit: int, visibility_s: float | None) -> ReceiveResult:
        while True:
            result = self._receive_batch(queue, limit, visibility_s)
            if result.messages or not result.more:
                return result

    def _receive_batch(self, queue: str, limit: int, visibility_s: float | None) -> ReceiveResult:
        result = self._messages.receive(queue, limit, visibility_s)
        if result.dead_letters is not None:
            self._wake_receivers(result.dead_letters, result.moved)
        return result

    def _undo_receive(self, queue: str, receiving: Future[ReceiveResult]) -> None:
        # If the undo fails, the messages become visible at their visibility timeout, so the messages are late but not
        # lost.
        failed = receiving.cancelled() or receiving.exception() is not None
        messages = () if failed else receiving.result().messages
        if messages:
            self._messages.undo(queue, messages)
        # At least one receiver is woken, because the message that woke the canceled receiver may still be in the queue.
        self._wake_receivers(queue, max(1, len(messages)))

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        check_batch(receipts)
        return await self._run(self._messages.delete, queue, receipts)

    async def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        check_changes(changes)
        return await self._run(self._change_visibility, queue, changes)

    def _change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> list[str]:
        refused = self._messages.change_visibility(queue, changes)
        self._wake_receivers(queue, sum(visibility_s < POLL_S for _, visibility_s in changes))
        return refused

    async def depth(self, queue: str) -> Depth:
        return await self._run(self._messages.depth, queue)

    async def purge(self, queue: str) -> None:
        await self._at_length(self._messages.purge, queue)

    async def remove(self, queue: str) -> None:
        await self._at_length(self._messages.remove, queue)
        # Receivers that still wait must see that the queue is removed.
        await self._at_length(self._wake_receivers, queue, ALL_RECEIVERS)
