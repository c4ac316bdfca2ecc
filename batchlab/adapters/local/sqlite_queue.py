"""SQS standard queues on one machine: one SQLite file, any number of processes.

Invariant: a message that is visible is never left lying beside a sleeping receiver for longer
than `LOOK_S`, whoever was killed while waking it, and mostly for about a millisecond.

No call waits for the disk. A power cut may undo the calls of the last seconds, all after some
moment. A received or deleted message then comes back, as after its visibility timeout. The manager
sends a lost message again: it knows from the bucket which bundles are outstanding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from batchlab.adapters.limits import (
    MAX_IN_FLIGHT,
    check_batch,
    check_changes,
    check_queue_name,
    check_receive,
    check_send,
)
from batchlab.adapters.local.fifo_wakeup import EVERYBODY, listen, ring
from batchlab.adapters.local.sqlite_messages import SqliteMessages, Taken
from batchlab.adapters.threads import OneThread
from batchlab.core.errors import Throttled
from batchlab.core.ports import Clock, Depth, Message, Outgoing, QueueSpec

P = ParamSpec("P")
T = TypeVar("T")

LOOK_S = 1.0
"""A sleeping receiver looks this often. So it knows of everything that becomes visible later than
this, sleeps exactly until then, and needs to be woken only for what becomes visible sooner."""

SHORT_CHARACTERS = 64 * 1024
"""What a send may have in all and still be short."""


class SqliteQueue:
    """The Queue port over the SQLite file `path`; beside it lie `wake/` and SQLite's own files.

    A call runs on the event loop's thread where it is short and nobody has to be waited for, since
    the way to another thread and back takes as long; otherwise on one thread of this object.
    """

    def __init__(self, path: Path, clock: Clock, *, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._messages = SqliteMessages(path, clock, max_in_flight=max_in_flight)
        self._wake = path.parent / "wake"
        self._thread = OneThread("sqlite-queue")

    async def close(self) -> None:
        """Close the file and end the thread, after what it still has to do."""
        await self._thread.close(self._messages.close)

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a short call."""
        if await self._may_be_quick():
            with suppress(Throttled), self._messages.at_once():
                return call(*args, **kwargs)
        return await self._at_length(call, *args, **kwargs)

    async def _at_length(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._thread.submit(partial(call, *args, **kwargs)))

    async def _may_be_quick(self) -> bool:
        # Others have their turn first: calls one after the other would keep it from them.
        await asyncio.sleep(0)
        return self._thread.is_idle and self._messages.is_open

    async def ensure(self, spec: QueueSpec) -> None:
        check_queue_name(spec.name)
        await self._run(self._messages.ensure, spec)

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        check_send(messages)
        is_short = sum(len(one.body) for one in messages) <= SHORT_CHARACTERS
        run = self._run if is_short else self._at_length
        await run(self._send, queue, messages)

    def _send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        self._messages.send(queue, messages)
        # Here, so that a caller who is cancelled now cannot prevent it.
        self._ring(queue, sum(message.delay_s < LOOK_S for message in messages))

    def _ring(self, queue: str, count: int) -> None:
        ring(self._wake / queue, count)

    async def receive(
        self,
        queue: str,
        *,
        max_messages: int = 10,
        wait_s: float = 20.0,
        visibility_s: float | None = None,
    ) -> Sequence[Message]:
        check_receive(max_messages, wait_s, visibility_s)
        ends_s = asyncio.get_running_loop().time() + wait_s
        taken = await self._take(queue, max_messages, visibility_s)
        if taken.over_limit and wait_s == 0:
            raise Throttled(f"Queue {queue!r} has too many messages in flight.")
        if taken.messages or wait_s <= 0:
            return taken.messages

        async def look() -> tuple[Sequence[Message], float]:
            taken = await self._take(queue, max_messages, visibility_s)
            due_s = LOOK_S if taken.due_in_s is None else max(taken.due_in_s, 0.001)
            return taken.messages, min(due_s, LOOK_S)

        return await listen(self._wake / queue, look, ends_s)

    async def _take(self, queue: str, limit: int, visibility_s: float | None) -> Taken:
        try:
            is_quick = await self._may_be_quick()
        except asyncio.CancelledError:
            # What this receive was woken for may still lie there.
            self._ring(queue, 1)
            raise
        if is_quick:
            with suppress(Throttled), self._messages.at_once():
                taken = self._take_some(queue, limit, visibility_s)
                if taken.messages or not taken.more:
                    return taken
        taking = self._thread.submit(partial(self._take_now, queue, limit, visibility_s))
        try:
            return await asyncio.wrap_future(taking)
        except asyncio.CancelledError:
            # Messages that nobody will see would stay hidden for a whole visibility timeout.
            self._thread.submit(partial(self._take_back, queue, taking))
            raise

    def _take_now(self, queue: str, limit: int, visibility_s: float | None) -> Taken:
        while True:
            taken = self._take_some(queue, limit, visibility_s)
            if taken.messages or not taken.more:
                return taken

    def _take_some(self, queue: str, limit: int, visibility_s: float | None) -> Taken:
        taken = self._messages.receive(queue, limit, visibility_s)
        if taken.dead_letters is not None:
            self._ring(taken.dead_letters, taken.moved)
        return taken

    def _take_back(self, queue: str, taking: Future[Taken]) -> None:
        # Should this fail, the messages come back at their timeout: late, not lost.
        failed = taking.cancelled() or taking.exception() is not None
        messages = () if failed else taking.result().messages
        if messages:
            self._messages.undo(queue, messages)
        # At least once: what this receive was woken for may still lie there.
        self._ring(queue, max(1, len(messages)))

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        check_batch(receipts)
        return await self._run(self._messages.delete, queue, receipts)

    async def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]]
    ) -> Sequence[str]:
        check_changes(changes)
        return await self._run(self._change_visibility, queue, changes)

    def _change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> list[str]:
        refused = self._messages.change_visibility(queue, changes)
        self._ring(queue, sum(visibility_s < LOOK_S for _, visibility_s in changes))
        return refused

    async def depth(self, queue: str) -> Depth:
        return await self._run(self._messages.depth, queue)

    async def purge(self, queue: str) -> None:
        await self._at_length(self._messages.purge, queue)

    async def remove(self, queue: str) -> None:
        await self._at_length(self._messages.remove, queue)
        # Who still sleeps there shall see that it is gone.
        await self._at_length(self._ring, queue, EVERYBODY)
