"""SQS standard queues in memory, for the simulator.

Invariant: only a waiting receive awaits anything, and all random choices come from the given random source. Equal calls
at equal times return equal answers.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
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
from batchlab.core.errors import NotFound, Throttled
from batchlab.core.ports import MAX_WAIT_S, Clock, Depth, Message, Outgoing, QueueSpec
from batchlab.core.service_settings import MAX_VISIBILITY_S


@dataclass(slots=True, eq=False)
class Entry:
    """A message in its queue, with its visibility. A message that is not `visible` is hidden until `visible_s`."""

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


class Bag:
    """Set of numbers of messages for random picks. Adding, removing, and picking a number take constant time."""

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
class Waiter:
    """Arguments and result of a waiting receive.

    The value of `result` is None if the wait has ended or if the queue was removed.
    """

    limit: int
    visibility_s: float | None
    result: asyncio.Future[list[Message] | None]


@dataclass(slots=True, eq=False)
class QueueState:
    """State of one queue. Only `SimQueue` changes the state of a queue.

    `ready` contains the numbers of visible messages in order of arrival, and `window` the next numbers to pick from.
    Both `ready` and `window` may contain numbers of deleted messages. The heap `hidden`, sorted by `visible_s`, may
    also contain numbers of deleted messages.
    """

    spec: QueueSpec
    entries: OrderedDict[int, Entry] = field(default_factory=OrderedDict)
    everyone: Bag = field(default_factory=Bag)
    in_flight: Bag = field(default_factory=Bag)
    ready: deque[int] = field(default_factory=deque)
    window: list[int] = field(default_factory=list)
    visible: int = 0
    hidden: list[tuple[float, int]] = field(default_factory=list)
    waiters: OrderedDict[int, Waiter] = field(default_factory=OrderedDict)
    timer: asyncio.TimerHandle | None = None
    timer_s: float = 0.0


def entry_of(queue: QueueState, receipt: str) -> Entry | None:
    number, _, _ = receipt.partition(".")
    entry = queue.entries.get(int(number)) if number.isdecimal() else None
    return entry if entry is not None and entry.receipt == receipt else None


_DISORDER = 32
"""Number of the oldest messages from which a receive picks. The order of messages in SQS is loose, but not random."""

# Resolution in seconds of an epoch time as a float. A timer may fire too early by the resolution of a float.
_TICK_S = 1e-6


class SimQueue:
    """The Queue port in memory, on any asyncio loop whose time agrees with `clock`.

    `rng` decides the order of messages. Beyond `max_in_flight` messages, a receive without a wait raises Throttled, and
    a waiting receive returns no messages, as with SQS.

    The options `fifo` and `max_wait_s` go beyond SQS, for simulations that are compared with theory or idle for hours.
    With `fifo`, receives return messages in the order in which the messages became visible. A receive may wait for up
    to `max_wait_s` seconds.
    """

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        fifo: bool = False,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self.lapsed: Callable[[str, str], None] = lambda _queue, _receipt: None
        """Callback with (queue, receipt) when the visibility timeout of a message expires."""
        self._clock = clock
        self._rng = rng
        self._max_in_flight = max_in_flight
        self._disorder = 1 if fifo else _DISORDER
        self._max_wait_s = max_wait_s
        self._queues: dict[str, QueueState] = {}
        self._sent = 0
        self._waits = 0
        # The timers of the queue service do not belong to a client, so the timers also fire while a client is frozen.
        self._context = copy_context()

    def _queue(self, name: str) -> QueueState:
        try:
            queue = self._queues[name]
        except KeyError as error:
            raise NotFound(f"No queue {name!r}.") from error
        now_s = self._clock.now_s()
        while queue.hidden and queue.hidden[0][0] <= now_s + _TICK_S:
            due_s, number = heappop(queue.hidden)
            entry = queue.entries.get(number)
            if entry is not None and not entry.visible and entry.visible_s == due_s:
                if entry.receives:
                    self.lapsed(name, entry.receipt)
                self._show(queue, entry)
        while queue.entries:
            oldest = next(iter(queue.entries.values()))
            if oldest.sent_s + queue.spec.retention_s > now_s:
                break
            self._forget(queue, oldest)
        return queue

    def _show(self, queue: QueueState, entry: Entry) -> None:
        entry.visible = True
        queue.visible += 1
        queue.in_flight.discard(entry.number)
        queue.ready.append(entry.number)

    def _hide(self, queue: QueueState, entry: Entry, until_s: float) -> None:
        entry.visible_s = until_s
        heappush(queue.hidden, (until_s, entry.number))

    def _forget(self, queue: QueueState, entry: Entry) -> None:
        del queue.entries[entry.number]
        queue.everyone.discard(entry.number)
        queue.in_flight.discard(entry.number)
        queue.visible -= entry.visible

    def _deliver(self, queue: QueueState) -> None:
        """Deliver messages to the waiting receives in the order of the receives.

        The simulated queue does not check whether a receiver still exists, and neither does SQS.
        """
        while queue.waiters and queue.visible and len(queue.in_flight) < self._max_in_flight:
            number, waiter = next(iter(queue.waiters.items()))
            if not waiter.result.done():
                messages = self._receive_some(queue, waiter.limit, waiter.visibility_s)
                if not messages:
                    break
                waiter.result.set_result(messages)
            del queue.waiters[number]
        if queue.waiters:
            self._arm(queue)

    def _arm(self, queue: QueueState) -> None:
        """Set a timer for the next hidden message that becomes visible."""
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
            max(0.0, due_s - self._clock.now_s()), self._on_timer, queue, context=self._context
        )

    def _on_timer(self, queue: QueueState) -> None:
        queue.timer = None
        if self._queues.get(queue.spec.name) is queue:
            self._deliver(self._queue(queue.spec.name))

    async def ensure(self, spec: QueueSpec) -> None:
        check_queue_name(spec.name)
        if spec.dead_letters is not None:
            self._queue(spec.dead_letters)
        if spec.name in self._queues:
            self._queues[spec.name].spec = spec
        else:
            self._queues[spec.name] = QueueState(spec)

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        check_send(messages)
        queue_state, now_s = self._queue(queue), self._clock.now_s()
        for message in messages:
            self._sent += 1
            entry = Entry(self._sent, message.body, now_s, now_s)
            self._enter(queue_state, entry)
            if message.delay_s > 0:
                self._hide(queue_state, entry, now_s + message.delay_s)
            else:
                self._show(queue_state, entry)
        self._deliver(queue_state)

    def _enter(self, queue: QueueState, entry: Entry) -> None:
        queue.entries[entry.number] = entry
        queue.everyone.add(entry.number)

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        check_receive(max_messages, wait_s, visibility_s, max_wait_s=self._max_wait_s)
        queue_state = self._queue(queue)
        messages = self._receive_some(queue_state, max_messages, visibility_s)
        self._deliver(queue_state)
        if not messages and wait_s > _TICK_S:
            return await self._wait(queue, wait_s, max_messages, visibility_s)
        if not messages and len(queue_state.in_flight) >= self._max_in_flight:
            raise Throttled(f"Queue {queue!r} has too many messages in flight.")
        return messages

    async def _wait(self, name: str, wait_s: float, limit: int, visibility_s: float | None) -> list[Message]:
        loop, queue = asyncio.get_running_loop(), self._queues[name]
        self._waits += 1
        number, waiter = self._waits, Waiter(limit, visibility_s, loop.create_future())
        queue.waiters[number] = waiter
        self._arm(queue)
        timer = loop.call_later(wait_s, _settle, waiter.result, context=self._context)
        try:
            messages = await waiter.result
        except asyncio.CancelledError:
            if waiter.result.done() and not waiter.result.cancelled():
                self._undo_receive(queue, waiter.result.result() or [])
            raise
        finally:
            timer.cancel()
            queue.waiters.pop(number, None)
        if messages is None:
            self._queue(name)
        return messages or []

    def _undo_receive(self, queue: QueueState, messages: Sequence[Message]) -> None:
        """Undo a receive that got its messages and was canceled at the same instant."""
        for message in messages:
            entry = entry_of(queue, message.receipt)
            if entry is not None and not entry.visible:
                entry.receives -= 1
                self._show(queue, entry)
        self._deliver(queue)

    def _receive_some(self, queue: QueueState, limit: int, visibility_s: float | None) -> list[Message]:
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
                self._deliver(dead)
            else:
                messages.append(self._receive(queue, entry, now_s, hidden_s))
        return messages

    def _draw(self, queue: QueueState) -> Entry | None:
        while True:
            while queue.ready and len(queue.window) < self._disorder:
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

    def _receive(self, queue: QueueState, entry: Entry, now_s: float, hidden_s: float) -> Message:
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
        queue_state = self._queue(queue)
        refused = []
        for receipt in receipts:
            entry = entry_of(queue_state, receipt)
            if entry is None:
                refused.append(receipt)
            else:
                self._forget(queue_state, entry)
        self._deliver(queue_state)
        return refused

    async def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        check_changes(changes)
        queue_state, now_s = self._queue(queue), self._clock.now_s()
        refused = []
        for receipt, visibility_s in changes:
            entry, until_s = entry_of(queue_state, receipt), now_s + visibility_s
            if entry is None or entry.visible or until_s > entry.received_s + MAX_VISIBILITY_S:
                refused.append(receipt)
            elif visibility_s > 0:
                self._hide(queue_state, entry, until_s)
            else:
                self._show(queue_state, entry)
        self._deliver(queue_state)
        return refused

    async def depth(self, queue: str) -> Depth:
        queue_state = self._queue(queue)
        in_flight = len(queue_state.in_flight)
        delayed = len(queue_state.entries) - queue_state.visible - in_flight
        return Depth(visible=queue_state.visible, in_flight=in_flight, delayed=delayed)

    async def purge(self, queue: str) -> None:
        queue_state = self._queue(queue)
        for entry in list(queue_state.entries.values()):
            self._forget(queue_state, entry)

    async def remove(self, queue: str) -> None:
        queue_state = self._queues.pop(queue, None)
        if queue_state is not None:
            # Waiting receivers get the answer that the queue does not exist.
            for waiter in queue_state.waiters.values():
                _settle(waiter.result)

    # --- Access for tests ------------------------------------------------------------------------

    def names(self) -> list[str]:
        return sorted(self._queues)

    def bodies(self, queue: str) -> list[str]:
        return [entry.body for entry in self._queues[queue].entries.values()]

    def waiting(self, queue: str) -> list[tuple[str, float]]:
        """Return the body of each visible message that no receiver has received, and the time since which it is
        visible."""
        entries = self._queues[queue].entries.values() if queue in self._queues else ()
        return [(entry.body, entry.visible_s) for entry in entries if entry.visible and not entry.receives]

    def held_s(self, queue: str, receipt: str) -> float:
        """Return the seconds for which the receive with this receipt still hides the message.

        Return 0 if the message is visible or deleted, or if another receive has the message.
        """
        entry = entry_of(self._queues[queue], receipt) if queue in self._queues else None
        if entry is None or entry.visible:
            return 0.0
        return max(0.0, entry.visible_s - self._clock.now_s())

    def redeliver(self, queue: str, rng: random.Random) -> str | None:
        """Inject a fault: make a random message in flight visible while a worker still has the message.

        Return the id of the message, or None if no message is in flight.
        """
        queue_state = self._queue(queue)
        number = queue_state.in_flight.pick(rng)
        if number is None:
            return None
        self._show(queue_state, queue_state.entries[number])
        self._deliver(queue_state)
        return str(number)

    def drop(self, queue: str, rng: random.Random) -> str | None:
        """Inject a fault: lose a random message. Return the id of the lost message, or None if the queue is empty."""
        queue_state = self._queue(queue)
        number = queue_state.everyone.pick(rng)
        if number is None:
            return None
        self._forget(queue_state, queue_state.entries[number])
        return str(number)

    def expire(self, queue: str, age_s: float) -> int:
        """Inject a fault: delete messages sent more than `age_s` ago. Return the number of deleted messages."""
        queue_state, now_s = self._queue(queue), self._clock.now_s()
        old = [entry for entry in queue_state.entries.values() if entry.sent_s + age_s <= now_s]
        for entry in old:
            self._forget(queue_state, entry)
        return len(old)

    def shuffle(self, queue: str, rng: random.Random) -> bool:
        """Inject a fault: shuffle the visible messages. Return False if fewer than two messages are visible."""
        queue_state = self._queue(queue)
        waiting = [number for number in (*queue_state.window, *queue_state.ready) if number in queue_state.entries]
        rng.shuffle(waiting)
        queue_state.window, queue_state.ready = [], deque(waiting)
        return len(waiting) > 1


def _settle(given: asyncio.Future[list[Message] | None]) -> None:
    if not given.done():
        given.set_result(None)
