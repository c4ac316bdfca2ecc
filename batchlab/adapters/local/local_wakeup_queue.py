"""A queue service whose senders and receivers are all on this machine: they ring for each other.

Invariant: messages go through the service alone. A bell only says when to look, and who misses one
looks a while later all the same.

An emulator's long poll looks every 100 ms, which is how long a message would take; and one that is
open when its process is killed swallows the next message for a whole visibility timeout.

How long a queue has been quiet, by which its receivers choose how often they ask.

Invariant: a message now and then is quiet too. An idle grid's workers tell once a minute that they
live; had each of these words the manager look as often as while a job runs, idleness would be paid.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from batchlab.adapters.limits import check_receive
from batchlab.adapters.local.fifo_wakeup import EVERYBODY, Bell, ring
from batchlab.core.errors import Throttled
from batchlab.core.ports import Depth, Message, Outgoing, Queue, QueueSpec

MOST_S = 60.0
"""Longer than this it has not been quiet for what follows a message, however long it was."""


class Quiet:
    """Of one queue, from `now_s` on: times are the loop's, in seconds."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s

    def of_s(self, now_s: float) -> float:
        """The seconds that it has been quiet."""
        return now_s - self._since_s

    def broken(self, now_s: float) -> None:
        """A receive has found something. Half of the quiet is left: one message leaves much of it,
        and a few in a row, as a job sends them, leave next to nothing."""
        self._since_s = now_s - min(self.of_s(now_s), MOST_S) / 2


LOOK_S = 1.0
IDLE_LOOK_S = 60.0
QUIET_SHARE = 0.5
"""What nobody rings for (a visibility timeout that is over, a delay whose sender has died) is found
at the next look: after this share of the time that it has been quiet there, within these bounds."""

KEPT_S = 0.02
"""So long a receiver may take to come back before its bell is taken down, and a ring that it has
got is passed on to another sleeper."""


class Closing(Queue, Protocol):
    """A queue service that is closed."""

    async def close(self) -> None:
        """No other call may follow."""


class RungQueue:
    """`queue` with bells in `folder`, which all its users share."""

    def __init__(self, queue: Closing, folder: Path) -> None:
        self._queue = queue
        self._folder = folder
        self._ears: dict[str, _Ear] = {}
        """Of receivers that are about to come back."""
        self._quiet: dict[str, Quiet] = {}

    async def close(self) -> None:
        """Close the queue."""
        while self._ears:
            self._ears.popitem()[1].close()
        await self._queue.close()

    async def ensure(self, spec: QueueSpec) -> None:
        await self._queue.ensure(spec)

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        await self._queue.send(queue, messages)
        ring(self._folder / queue, sum(message.delay_s < LOOK_S for message in messages))
        loop = asyncio.get_running_loop()
        for delay_s, count in Counter(one.delay_s for one in messages).items():
            if delay_s >= LOOK_S:
                loop.call_later(delay_s, ring, self._folder / queue, count)

    async def receive(
        self,
        queue: str,
        *,
        max_messages: int = 10,
        wait_s: float = 20.0,
        visibility_s: float | None = None,
    ) -> Sequence[Message]:
        check_receive(max_messages, wait_s, visibility_s)

        async def look() -> Sequence[Message]:
            try:
                return await self._queue.receive(
                    queue, max_messages=max_messages, wait_s=0, visibility_s=visibility_s
                )
            except Throttled:
                if not wait_s:
                    raise
                return ()  # too many are in flight: whoever waits, waits for that too

        if not wait_s:
            return await look()
        clock = asyncio.get_running_loop().time
        ends_s = clock() + wait_s
        quiet = self._quiet.setdefault(queue, Quiet(clock()))

        def again_s() -> float:
            return min(max(LOOK_S, QUIET_SHARE * quiet.of_s(clock())), IDLE_LOOK_S)

        ear = self._ears.pop(queue, None) or _Ear(self._folder / queue)
        try:
            found = await ear.listen(look, again_s, ends_s)
        except BaseException:
            ear.close()
            raise
        if found:
            quiet.broken(clock())
        if len(found) == max_messages:
            ear.heeded = False  # there may be more
        if queue not in self._ears:
            self._ears[queue] = ear
            ear.close_later(lambda: self._forget(queue, ear))
        else:
            ear.close()
        return found

    def _forget(self, queue: str, ear: _Ear) -> None:
        if self._ears.get(queue) is ear:
            del self._ears[queue]
            ear.close()

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
        ring(self._folder / queue, EVERYBODY)


class _Ear:
    """A receiver's bell, which stays up from one receive to the next: what has not rung since the
    last look need not be looked for. Requests are dear, bells are not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bell = Bell(folder)
        self._timer: asyncio.TimerHandle | None = None
        self.heeded = False
        """There was nothing left after the bell went up."""
        self._looked_s = 0.0

    async def listen(
        self,
        look: Callable[[], Awaitable[Sequence[Message]]],
        again_s: Callable[[], float],
        ends_s: float,
    ) -> Sequence[Message]:
        """What `look` finds first, or finds at the loop's time `ends_s`; `again_s` gives the
        seconds to the next look."""
        clock = asyncio.get_running_loop().time
        if self._timer:
            self._timer.cancel()
        if not self.heeded and (found := await self._heed(look)):
            return found
        while (left_s := ends_s - clock()) > 0:
            due_s = max(0.0, self._looked_s + again_s() - clock())
            if await self._bell.wait(min(left_s, due_s)):
                self._bell.close()
                self._bell = Bell(self._folder)
            elif left_s < due_s:
                break
            if found := await self._heed(look):
                return found
        return ()

    async def _heed(self, look: Callable[[], Awaitable[Sequence[Message]]]) -> Sequence[Message]:
        self.heeded = False
        found = await look()
        self.heeded = True
        self._looked_s = asyncio.get_running_loop().time()
        return found

    def close_later(self, close: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(KEPT_S, close)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._bell.close():
            # It rang for a message that is now another sleeper's.
            ring(self._folder, 1)
