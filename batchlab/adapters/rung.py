"""A queue service whose senders and receivers are all on this machine: they ring for each other.

Invariant: messages go through the service alone. A bell only says when to look, and who misses one
looks within `LOOK_S` all the same.

An emulator's long poll looks every 100 ms, which is how long a message would take; and one that is
open when its process is killed swallows the next message for a whole visibility timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from batchlab.adapters.limits import check_receive
from batchlab.adapters.wake import listen, ring
from batchlab.errors import Throttled
from batchlab.ports import Depth, Message, Outgoing, Queue, QueueSpec

LOOK_S = 1.0
"""What nobody rings for (a delay, a visibility timeout that is over) is found so late at most."""

_ALL = 1_000_000


class Closing(Queue, Protocol):
    """A queue service that is closed."""

    async def close(self) -> None:
        """No other call may follow."""


class RungQueue:
    """`queue` with bells in `folder`, which all its users share."""

    def __init__(self, queue: Closing, folder: Path) -> None:
        self._queue = queue
        self._folder = folder

    async def close(self) -> None:
        """Close the queue."""
        await self._queue.close()

    async def ensure(self, spec: QueueSpec) -> None:
        await self._queue.ensure(spec)

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        await self._queue.send(queue, messages)
        ring(self._folder / queue, sum(message.delay_s < LOOK_S for message in messages))

    async def receive(
        self,
        queue: str,
        *,
        max_messages: int = 10,
        wait_s: float = 20.0,
        visibility_s: float | None = None,
    ) -> Sequence[Message]:
        check_receive(max_messages, wait_s, visibility_s)

        async def look() -> tuple[Sequence[Message], float]:
            try:
                found = await self._queue.receive(
                    queue, max_messages=max_messages, wait_s=0, visibility_s=visibility_s
                )
            except Throttled:
                if not wait_s:
                    raise
                found = ()  # too many are in flight: whoever waits, waits for that too
            return found, LOOK_S

        ends_s = asyncio.get_running_loop().time() + wait_s
        found, _ = await look()
        return found if found or not wait_s else await listen(self._folder / queue, look, ends_s)

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        return await self._queue.delete(queue, receipts)

    async def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]]
    ) -> Sequence[str]:
        refused = await self._queue.change_visibility(queue, changes)
        ring(self._folder / queue, sum(visibility_s < LOOK_S for _, visibility_s in changes))
        return refused

    async def depth(self, queue: str) -> Depth:
        return await self._queue.depth(queue)

    async def purge(self, queue: str) -> None:
        await self._queue.purge(queue)

    async def remove(self, queue: str) -> None:
        await self._queue.remove(queue)
        # Who still sleeps there shall see that it is gone.
        ring(self._folder / queue, _ALL)
