"""What a simulated queue holds: its messages, where each of them is, and who waits for one.

Invariant: these change nothing by themselves; SimQueue is their only user.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from batchlab.ports import Message, QueueSpec


@dataclass(slots=True, eq=False)
class Entry:
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


class Bag:
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
class Waiter:
    """A receive that waits, and what it asked for. `given` is what it has been handed: None that
    its time is over, or that the queue is gone."""

    limit: int
    visibility_s: float | None
    given: asyncio.Future[list[Message] | None]


@dataclass(slots=True, eq=False)
class QueueState:
    """`ready` holds visible numbers in order of arrival, `window` those next in turn, both with
    leftovers of messages that are gone; `hidden` is a heap by `visible_s`, with leftovers too."""

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
