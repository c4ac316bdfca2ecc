"""A toy grid for the tests of the simulator. The workers of the toy grid commit the messages of a queue.

Run as a program, this module prints the event log of one seed, so that a test can compare processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from batchlab.core.errors import AlreadyExists, BackendError
from batchlab.sim.actors import Actor
from batchlab.sim.event_log import EventLog
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import Faults, Weather
from batchlab.sim.port_wrappers import wrap

VISIBILITY_S = 30.0
LATE_S = (1.0, 90.0)
ROUGH = Weather(
    kill_before=0.01,
    kill_after=0.01,
    throttled=0.02,
    unreachable=0.02,
    answer_lost=0.02,
    delayed=0.02,
    conflict=0.05,
    duplicated=0.1,
    lost=0.1,
    dropped=0.05,
)


@dataclass
class Entry:
    queue: str
    body: str
    visible_s: float = 0.0


class ToyQueue:
    """A toy queue with at-least-once delivery. A message that is not deleted becomes visible again after
    VISIBILITY_S."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._sent = 0

    async def send(self, queue: str, messages: Sequence[str]) -> None:
        for body in messages:
            self._sent += 1
            self.entries[f"m{self._sent}"] = Entry(queue, body)

    async def receive(self, queue: str, *, wait_s: float = 20.0) -> Sequence[tuple[str, str]]:
        now_s = asyncio.get_running_loop().time
        end_s = now_s() + wait_s
        while True:
            mine = [(key, e) for key, e in self.entries.items() if e.queue == queue]
            found = [(key, e) for key, e in mine if e.visible_s <= now_s()][:3]
            for _, entry in found:
                entry.visible_s = now_s() + VISIBILITY_S
            if found or now_s() >= end_s:
                return [(key, entry.body) for key, entry in found]
            await asyncio.sleep(0.5)

    async def delete(self, queue: str, receipts: Sequence[str]) -> None:
        for receipt in receipts:
            self.entries.pop(receipt, None)


class ToyStore:
    """A toy store with conditional puts, which counts the effective writes per key."""

    def __init__(self) -> None:
        self.objects: dict[str, str] = {}
        self.writes = 0

    async def put(self, key: str, data: str, *, if_absent: bool = False) -> None:
        if if_absent and key in self.objects:
            raise AlreadyExists(f"{key} is there.")
        self.objects[key] = data
        self.writes += 1

    async def list(self, prefix: str) -> AsyncIterator[Sequence[str]]:
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        for i in range(0, len(keys), 4):
            yield keys[i : i + 4]

    def peek(self, key: str) -> str | None:
        return self.objects.get(key)


@dataclass
class Toy:
    """One run of the toy grid. `workers` workers commit `items` items, and a supervisor restarts dead workers."""

    faults: Faults
    items: int = 8
    workers: int = 3
    loop: SimLoop = field(default_factory=SimLoop)
    queue: ToyQueue = field(default_factory=ToyQueue)
    store: ToyStore = field(default_factory=ToyStore)
    deaths: int = 0

    def __post_init__(self) -> None:
        self.log = EventLog(self.loop.time)

    def run(self) -> Toy:
        self.loop.run(self._main(), limit_s=20_000, limit_steps=1_000_000)
        return self

    async def _main(self) -> None:
        reconciler = wrap(self.queue, "queue", Actor("main"), log=self.log)
        async with asyncio.TaskGroup() as group:
            keepers = [group.create_task(self._keep(f"w-{i}"), name=f"keeper-{i}") for i in range(self.workers)]
            while missing := [str(i) for i in range(self.items) if not self._has(i)]:
                await reconciler.send("work", missing)
                await asyncio.sleep(120)
            for keeper in keepers:
                keeper.cancel()

    def _has(self, item: int) -> bool:
        return f"out/{item}" in self.store.objects

    async def _keep(self, name: str) -> None:
        while True:
            actor = Actor(name)
            await asyncio.wait([actor.spawn(self._work(actor))])
            assert not actor.alive, f"{name} ended by itself"
            self.deaths += 1
            await asyncio.sleep(1)

    async def _work(self, actor: Actor) -> None:
        queue = wrap(self.queue, "queue", actor, self.faults, self.log)
        store = wrap(self.store, "objects", actor, self.faults, self.log)
        while True:
            try:
                found = await queue.receive("work")
                async with asyncio.TaskGroup() as group:
                    for receipt, body in found:
                        group.create_task(self._commit(queue, store, receipt, body))
                [page async for page in store.list("out/")]
            except* BackendError:
                await asyncio.sleep(1)

    async def _commit(self, queue: ToyQueue, store: ToyStore, receipt: str, body: str) -> None:
        with contextlib.suppress(AlreadyExists):
            await store.put(f"out/{body}", f"result of {body}", if_absent=True)
        await queue.send("events", [body])
        await queue.delete("work", [receipt])


def rough(seed: int) -> Toy:
    """Return a run with every kind of fault."""
    return Toy(Faults(random.Random(seed), ROUGH, delay_s=LATE_S)).run()


if __name__ == "__main__":
    print(rough(int(sys.argv[1])).log.text(), end="")
