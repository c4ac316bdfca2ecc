"""SQS standard queues in memory, for the simulator.

Invariant: no operation but a waiting receive awaits anything, and all choices come from the random
source handed in, so equal calls at equal times give equal answers.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from batchlab.adapters.limits import (
    MAX_IN_FLIGHT,
    check_batch,
    check_changes,
    check_queue_name,
    check_receive,
    check_send,
)
from batchlab.errors import NotFound, Throttled
from batchlab.ports import MAX_VISIBILITY_S, Clock, Depth, Message, Outgoing, QueueSpec

_DISORDER = 32
"""A receive picks among this many of the oldest: SQS's order is loose, not random."""

# An epoch second as a float is this exact; a timer may fire that much too early.
_TICK_S = 1e-6


@dataclass(slots=True, eq=False)
class _Entry:
    """A message in its queue; `visible` says where it is, `visible_s` until when it is hidden."""

    number: int
    body: str
    sent_s: float
    visible_s: float
    visible: bool = False
    receives: int = 0
    received_s: float = 0.0
    first_received_s: float = 0.0

    @property
    def receipt(self) -> str:
        return f"{self.number}.{self.receives}"


class _Bag:
    """Numbers to pick from at random; adding, removing and picking take constant time."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._places: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int) -> None:
        self._places[number] = len(self._numbers)
        self._numbers.append(number)

    def discard(self, number: int) -> None:
        place = self._places.pop(number, None)
        if place is None:
            return
        last = self._numbers.pop()
        if last != number:
            self._numbers[place] = last
            self._places[last] = place

    def pick(self, rng: random.Random) -> int | None:
        return self._numbers[rng.randrange(len(self._numbers))] if self._numbers else None


@dataclass(slots=True, eq=False)
class _Queue:
    """`ready` holds visible numbers in order of arrival, `window` those next in turn, both with
    leftovers of messages that are gone; `hidden` is a heap by `visible_s`, with leftovers too."""

    spec: QueueSpec
    entries: OrderedDict[int, _Entry] = field(default_factory=OrderedDict)
    everyone: _Bag = field(default_factory=_Bag)
    in_flight: _Bag = field(default_factory=_Bag)
    ready: deque[int] = field(default_factory=deque)
    window: list[int] = field(default_factory=list)
    visible: int = 0
    hidden: list[tuple[float, int]] = field(default_factory=list)
    waiters: OrderedDict[int, asyncio.Future[None]] = field(default_factory=OrderedDict)
    timer: asyncio.TimerHandle | None = None
    timer_s: float = 0.0


class SimQueue:
    """The Queue port in memory, on any asyncio loop whose time agrees with `clock`.

    `rng` decides in which order messages come. Receives past `max_in_flight` are Throttled where
    they do not wait, and empty where they do, as from SQS.
    """

    def __init__(
        self, clock: Clock, rng: random.Random, *, max_in_flight: int = MAX_IN_FLIGHT
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._max_in_flight = max_in_flight
        self._queues: dict[str, _Queue] = {}
        self._sent = 0
        self._waits = 0

    def _found(self, name: str) -> _Queue:
        try:
            queue = self._queues[name]
        except KeyError as error:
            raise NotFound(f"No queue {name!r}.") from error
        now_s = self._clock.now_s()
        while queue.hidden and queue.hidden[0][0] <= now_s + _TICK_S:
            due_s, number = heappop(queue.hidden)
            entry = queue.entries.get(number)
            if entry is not None and not entry.visible and entry.visible_s == due_s:
                self._show(queue, entry)
        while queue.entries:
            oldest = next(iter(queue.entries.values()))
            if oldest.sent_s + queue.spec.retention_s > now_s:
                break
            self._forget(queue, oldest)
        return queue

    def _show(self, queue: _Queue, entry: _Entry) -> None:
        entry.visible = True
        queue.visible += 1
        queue.in_flight.discard(entry.number)
        queue.ready.append(entry.number)

    def _hide(self, queue: _Queue, entry: _Entry, until_s: float) -> None:
        entry.visible_s = until_s
        heappush(queue.hidden, (until_s, entry.number))

    def _forget(self, queue: _Queue, entry: _Entry) -> None:
        del queue.entries[entry.number]
        queue.everyone.discard(entry.number)
        queue.in_flight.discard(entry.number)
        queue.visible -= entry.visible

    def _stir(self, queue: _Queue) -> None:
        """Wake one waiter if there is something for it; it stirs again when it has taken."""
        if queue.visible and len(queue.in_flight) < self._max_in_flight:
            while queue.waiters:
                _, waiter = queue.waiters.popitem(last=False)
                if not waiter.done():
                    waiter.set_result(None)
                    return
        elif queue.waiters:
            self._arm(queue)

    def _arm(self, queue: _Queue) -> None:
        """Have the queue looked at when its next hidden message appears."""
        while queue.hidden:
            due_s, number = queue.hidden[0]
            entry = queue.entries.get(number)
            if entry is not None and not entry.visible and entry.visible_s == due_s:
                break
            heappop(queue.hidden)
        else:
            return
        if queue.timer is not None:
            if queue.timer_s <= due_s:
                return
            queue.timer.cancel()
        queue.timer_s = due_s
        queue.timer = asyncio.get_running_loop().call_later(
            max(0.0, due_s - self._clock.now_s()), self._appeared, queue
        )

    def _appeared(self, queue: _Queue) -> None:
        queue.timer = None
        if self._queues.get(queue.spec.name) is queue:
            self._stir(self._found(queue.spec.name))

    async def ensure(self, spec: QueueSpec) -> None:
        check_queue_name(spec.name)
        if spec.dead_letters is not None:
            self._found(spec.dead_letters)
        if spec.name in self._queues:
            self._queues[spec.name].spec = spec
        else:
            self._queues[spec.name] = _Queue(spec)

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        check_send(messages)
        found, now_s = self._found(queue), self._clock.now_s()
        for message in messages:
            self._sent += 1
            entry = _Entry(self._sent, message.body, now_s, now_s)
            self._enter(found, entry)
            if message.delay_s > 0:
                self._hide(found, entry, now_s + message.delay_s)
            else:
                self._show(found, entry)
        self._stir(found)

    def _enter(self, queue: _Queue, entry: _Entry) -> None:
        queue.entries[entry.number] = entry
        queue.everyone.add(entry.number)

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
        while True:
            found = self._found(queue)
            messages = self._take(found, max_messages, visibility_s)
            if messages:
                self._stir(found)
                return messages
            if asyncio.get_running_loop().time() >= ends_s - _TICK_S:
                break
            await self._wait(found, ends_s)
        if wait_s == 0 and len(found.in_flight) >= self._max_in_flight:
            raise Throttled(f"Queue {queue!r} has too many messages in flight.")
        return messages

    async def _wait(self, queue: _Queue, ends_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._waits += 1
        number, waiter = self._waits, loop.create_future()
        queue.waiters[number] = waiter
        self._arm(queue)
        timer = loop.call_at(ends_s, _settle, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                # Woken and cancelled at once: what woke it is another waiter's.
                self._stir(queue)
            raise
        finally:
            timer.cancel()
            queue.waiters.pop(number, None)

    def _take(self, queue: _Queue, limit: int, visibility_s: float | None) -> list[Message]:
        spec, now_s = queue.spec, self._clock.now_s()
        limit = min(limit, self._max_in_flight - len(queue.in_flight))
        dead = self._queues.get(spec.dead_letters or "")
        hidden_s = now_s + (spec.visibility_s if visibility_s is None else visibility_s)
        messages: list[Message] = []
        while len(messages) < limit and (entry := self._draw(queue)) is not None:
            if entry.sent_s + spec.retention_s <= now_s:
                self._forget(queue, entry)
            elif dead is not None and entry.receives >= spec.max_receives:
                self._forget(queue, entry)
                self._enter(dead, entry)
                self._show(dead, entry)
                self._stir(dead)
            else:
                messages.append(self._receive(queue, entry, now_s, hidden_s))
        return messages

    def _draw(self, queue: _Queue) -> _Entry | None:
        while True:
            while queue.ready and len(queue.window) < _DISORDER:
                queue.window.append(queue.ready.popleft())
            if not queue.window:
                return None
            place = self._rng.randrange(len(queue.window))
            number = queue.window[place]
            queue.window[place] = queue.window[-1]
            queue.window.pop()
            entry = queue.entries.get(number)
            if entry is not None:
                return entry

    def _receive(self, queue: _Queue, entry: _Entry, now_s: float, hidden_s: float) -> Message:
        entry.visible = False
        queue.visible -= 1
        entry.receives += 1
        entry.received_s = now_s
        if entry.receives == 1:
            entry.first_received_s = now_s
        queue.in_flight.add(entry.number)
        self._hide(queue, entry, hidden_s)
        return Message(
            id=str(entry.number),
            body=entry.body,
            receipt=entry.receipt,
            receive_count=entry.receives,
            sent_s=entry.sent_s,
            first_received_s=entry.first_received_s,
        )

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        check_batch(receipts)
        found = self._found(queue)
        refused = []
        for receipt in receipts:
            entry = _entry(found, receipt)
            if entry is None:
                refused.append(receipt)
            else:
                self._forget(found, entry)
        self._stir(found)
        return refused

    async def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]]
    ) -> Sequence[str]:
        check_changes(changes)
        found, now_s = self._found(queue), self._clock.now_s()
        refused = []
        for receipt, visibility_s in changes:
            entry, until_s = _entry(found, receipt), now_s + visibility_s
            if entry is None or entry.visible or until_s > entry.received_s + MAX_VISIBILITY_S:
                refused.append(receipt)
            elif visibility_s > 0:
                self._hide(found, entry, until_s)
            else:
                self._show(found, entry)
        self._stir(found)
        return refused

    async def depth(self, queue: str) -> Depth:
        found = self._found(queue)
        in_flight = len(found.in_flight)
        delayed = len(found.entries) - found.visible - in_flight
        return Depth(visible=found.visible, in_flight=in_flight, delayed=delayed)

    async def purge(self, queue: str) -> None:
        found = self._found(queue)
        for entry in list(found.entries.values()):
            self._forget(found, entry)

    async def remove(self, queue: str) -> None:
        found = self._queues.pop(queue, None)
        if found is not None:
            # Who still waits there shall see that it is gone.
            for waiter in found.waiters.values():
                _settle(waiter)

    def redeliver(self, queue: str, rng: random.Random) -> str | None:
        """A fault: a random message in flight is visible again although its holder works on it.

        Returns its id, None where none is in flight.
        """
        found = self._found(queue)
        number = found.in_flight.pick(rng)
        if number is None:
            return None
        self._show(found, found.entries[number])
        self._stir(found)
        return str(number)

    def drop(self, queue: str, rng: random.Random) -> str | None:
        """A fault: a random message is lost. Returns its id, None where the queue is empty."""
        found = self._found(queue)
        number = found.everyone.pick(rng)
        if number is None:
            return None
        self._forget(found, found.entries[number])
        return str(number)


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _entry(queue: _Queue, receipt: str) -> _Entry | None:
    number, _, _ = receipt.partition(".")
    entry = queue.entries.get(int(number)) if number.isdecimal() else None
    return entry if entry is not None and entry.receipt == receipt else None
