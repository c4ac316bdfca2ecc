"""World events of the weather: faults that hit a world without a port call.

Invariant: the pause before each world event, and its target, are drawn separately for each event.
So an event can be left out and the others stay the same, as long as their targets exist.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from batchlab.core.errors import BackendError, Refused
from batchlab.manager import fleet_commands
from batchlab.sim.actors import Actor, SkewedClock
from batchlab.sim.faults import DAMAGES, SKY, FaultKind, Faults
from batchlab.sim.world import SimWorker, World

T = TypeVar("T")

LOOKS = 40
GAP_S = (0.5, 15.0)
"""Range of seconds between two world events. After LOOKS of them, the weather stays fair."""

STALL_S = (5.0, 60.0)
NOTICE_S = 120.0
JUMPS_S = (-86_400.0, -3_600.0, -30.0, -2.0, 2.0, 30.0, 3_600.0, 86_400.0)
SHORTAGE_S = (10.0, 120.0)
LOST_S = (0.5, 20.0)
HELD_S = (5.0, 60.0)
MOMENTS, MOMENT_S = 2_000, 0.004
"""Longest wait in seconds of a power cut for a moment with an unacknowledged write."""
MAX_LOST = 3
"""Largest number of messages that a power cut removes from a queue."""
AGES_S = (0.0, 10.0, 60.0)

Act = Callable[[random.Random], Awaitable[str | None]]
"""An event of the weather. It returns the name of its target, or None if no target existed."""


class Sky:
    """The weather of one world."""

    def __init__(self, world: World, faults: Faults, pace: float) -> None:
        self._world = world
        self._faults = faults
        self._pace = pace
        self._after: list[asyncio.Task[None]] = []
        self._shortages = 0
        self._acts: dict[FaultKind, Act] = {
            FaultKind.REDELIVERED: self._redeliver,
            FaultKind.VANISHED: self._drop,
            FaultKind.PURGED: self._purge,
            FaultKind.EXPIRED: self._expire,
            FaultKind.REMOVED: self._remove,
            FaultKind.SHUFFLED: self._shuffle,
            FaultKind.CLOCK_JUMPED: self._jump,
            FaultKind.STALLED: self._stall,
            FaultKind.CRASHED: self._crash,
            FaultKind.SPOT_NOTICE: self._notice,
            FaultKind.SPOT_KILL: self._take_away,
            FaultKind.NO_CAPACITY: self._run_short,
            FaultKind.SCALED_IN: self._scale_in,
            FaultKind.SCALED_BY_HAND: self._scale,
            FaultKind.SECOND_MANAGER: self._second,
            FaultKind.MANAGER_STOPPED: self._stop,
            FaultKind.LEDGER_LOST: self._lose_ledger,
            FaultKind.LEDGER_REBUILT: self._rebuild_ledger,
            FaultKind.CORRUPTED: self._corrupt,
            FaultKind.UNSYNCED: self._cut_power,
            **{kind: partial(self._damage, kind) for kind in DAMAGES},
            FaultKind.FROZEN: self._freeze,
        }

    async def change(self) -> None:
        """Run the events. Return when the weather is fair and the users have restored what they
        changed."""
        for _ in range(LOOKS):
            point = self._faults.next(SKY)
            rng = random.Random(point.pick)  # noqa: S311 - simulation
            await asyncio.sleep(rng.uniform(*GAP_S) * self._pace)
            kind = self._faults.due(point, SKY)
            if kind is None:
                continue
            hit = await self._acts[kind](rng)
            if hit is not None:
                self._faults.happened(point, kind)
                self._world.note(SKY, f"#{point.call} {kind.value} {hit}")
        for task in self._after:
            await task

    def _later(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        self._after.append(asyncio.create_task(coro, name=name))

    # --- Queues ----------------------------------------------------------------------------------

    def _queues(self, rng: random.Random) -> list[str]:
        names = list(self._world.queue.names())
        rng.shuffle(names)
        return names

    async def _redeliver(self, rng: random.Random) -> str | None:
        for name in self._queues(rng):
            if (message := self._world.queue.redeliver(name, rng)) is not None:
                return f"{message} of {name}"
        return None

    async def _drop(self, rng: random.Random) -> str | None:
        for name in self._queues(rng):
            if (message := self._world.queue.drop(name, rng)) is not None:
                return f"{message} of {name}"
        return None

    async def _purge(self, rng: random.Random) -> str | None:
        for name in self._queues(rng)[:1]:
            await self._world.queue.purge(name)
            return name
        return None

    async def _expire(self, rng: random.Random) -> str | None:
        age_s = rng.choice(AGES_S)
        for name in self._queues(rng):
            if gone := self._world.queue.expire(name, age_s):
                return f"{gone} of {name}"
        return None

    async def _remove(self, rng: random.Random) -> str | None:
        for name in self._queues(rng)[:1]:
            await self._world.queue.remove(name)
            return name
        return None

    async def _shuffle(self, rng: random.Random) -> str | None:
        for name in self._queues(rng):
            if self._world.queue.shuffle(name, rng):
                return name
        return None

    # --- Processes -------------------------------------------------------------------------------

    def _processes(self) -> list[tuple[Actor, SkewedClock]]:
        managers = [(post.actor, post.clock) for post in self._world.posts if post.actor.alive]
        return managers + [(worker.actor, worker.clock) for worker in self._workers()]

    def _workers(self) -> list[SimWorker]:
        return [worker for worker in self._world.workers.values() if worker.ended is None]

    def _a_process(self, rng: random.Random) -> tuple[Actor, SkewedClock] | None:
        # Managers are few, and faults that hit them find more bugs.
        processes = self._processes()
        managers = [pair for pair in processes if pair[0].name.startswith("manager")]
        return _one(rng, managers if managers and rng.random() < 0.4 else processes)

    async def _jump(self, rng: random.Random) -> str | None:
        hit = self._a_process(rng)
        if hit is None:
            return None
        actor, clock = hit
        seconds = rng.choice(JUMPS_S) * rng.uniform(0.5, 1.0)
        clock.off_s += seconds
        self._world.watch.start_times.is_exact = False
        return f"{actor.name} by {seconds:.3f} s"

    async def _stall(self, rng: random.Random) -> str | None:
        hit = self._a_process(rng)
        if hit is None:
            return None
        actor, seconds = hit[0], rng.uniform(*STALL_S)
        actor.freeze()

        async def thaw() -> None:
            await asyncio.sleep(seconds)
            self._world.watch.disturbed(actor)
            actor.thaw()

        self._later(thaw(), f"thaw {actor.name}")
        return f"{actor.name} for {seconds:.3f} s"

    async def _freeze(self, rng: random.Random) -> str | None:
        """Stop a worker for ever. Its instance runs on until a manager ends it."""
        silences = self._world.watch.silences
        worker = _one(rng, self._workers())
        if worker is None or any(sim_worker.actor in silences.stopped for sim_worker in self._workers()):
            return None
        worker.actor.freeze()
        silences.stops(worker.actor)
        return worker.actor.name

    async def _corrupt(self, rng: random.Random) -> str | None:
        trust = self._world.watch.trust
        honest = [sim_worker for sim_worker in self._workers() if not trust.is_liar(sim_worker.actor)]
        worker = _one(rng, honest)
        if worker is None:
            return None
        worker.begin_to_lie(rng, self._pace)
        return worker.actor.name

    async def _damage(self, kind: FaultKind, rng: random.Random) -> str | None:
        return self._world.damage.strike(kind, rng)

    async def _cut_power(self, rng: random.Random) -> str | None:
        """End every process. Any unacknowledged write may be lost, and so may writes that do not
        wait for the disk: messages, and folds and ends in the ledger."""
        world, watch = self._world, self._world.watch
        for _ in range(MOMENTS):
            if watch.unsynced.before():
                break
            await asyncio.sleep(MOMENT_S)
        lost = {key: data for key, data in watch.unsynced.before().items() if rng.random() < 0.7}
        for post in list(world.posts):
            post.actor.kill()
        for instance, ended in (await world.launcher.running()).items():
            if ended is None:
                world.launcher.crash(instance)
        for key, before in lost.items():
            world.objects.damage(key, before)
            watch.taken_back(key, before)
        for name in world.queue.names():
            for _ in range(rng.randint(0, MAX_LOST)):
                world.queue.drop(name, rng)
        if rng.random() < 0.5:
            world.damage.lose_folds()
            watch.forget_counts()
        return f"without {', '.join(lost) or 'a lost write'}"

    # --- Instances -------------------------------------------------------------------------------

    async def _an_instance(self, rng: random.Random) -> str | None:
        running = await self._world.launcher.running()
        return _one(rng, [name for name, ended in running.items() if ended is None])

    async def _crash(self, rng: random.Random) -> str | None:
        instance = await self._an_instance(rng)
        if instance is not None:
            self._world.launcher.crash(instance)
        return instance

    async def _take_away(self, rng: random.Random) -> str | None:
        instance = await self._an_instance(rng)
        if instance is not None:
            self._world.launcher.crash(instance, "Spot interruption")
        return instance

    async def _notice(self, rng: random.Random) -> str | None:
        instance = await self._an_instance(rng)
        if instance is not None:
            await self._world.launcher.terminate(instance, grace_s=NOTICE_S)
        return instance

    async def _run_short(self, rng: random.Random) -> str | None:
        seconds = rng.uniform(*SHORTAGE_S)
        self._shortages += 1

        async def recover() -> None:
            await asyncio.sleep(seconds)
            self._shortages -= 1

        def refuse(_pool: object, _instance: str) -> str | None:
            return "InsufficientInstanceCapacity" if self._shortages else None

        self._world.launcher.refuse = refuse
        self._later(recover(), "capacity returns")
        return f"for {seconds:.3f} s"

    # --- People ----------------------------------------------------------------------------------

    async def _scale_in(self, rng: random.Random) -> str | None:
        post = self._world.post
        if post is None or not post.manager.is_leader.is_set():
            return None
        views = await post.manager.ports.fleet.describe()
        instances = [i for view in views for i in view.instances if i.state.value == "InService"]
        chosen = _one(rng, instances)
        if chosen is None:
            return None
        fleet, decrement = post.manager.ports.fleet, rng.random() < 0.5
        call = fleet.terminate(chosen.pool, [chosen.id], decrement=decrement, cause=fleet_commands.CAUSE)
        with suppress(Refused, BackendError):  # The group would go below min, or the manager is not the leader.
            await call
        return chosen.id

    async def _scale(self, rng: random.Random) -> str | None:
        pool = rng.choice(list(self._world.pools))
        most = rng.randint(max(1, pool.min_size), pool.max_size + 2)
        desired = rng.randint(pool.min_size, most)
        drained = rng.random() < 0.3
        seconds = rng.uniform(*HELD_S)

        async def by_hand_for_a_while() -> None:
            if drained:
                await self._world.ask(lambda m: fleet_commands.drain(m, pool.name), "drain")
            else:
                await self._world.ask(
                    lambda m: fleet_commands.scale(m, pool.name, max_size=most, desired=desired), "scale"
                )
            await asyncio.sleep(seconds)
            await self._world.ask(
                lambda m: fleet_commands.scale(m, pool.name, min_size=pool.min_size, max_size=pool.max_size, auto=True),
                "hand back",
            )

        self._later(by_hand_for_a_while(), f"{pool.name} by hand")
        return f"{pool.name} to {'nothing' if drained else desired} for {seconds:.3f} s"

    async def _second(self, _rng: random.Random) -> str | None:
        if len(self._world.posts) != 1:
            return None
        self._world.start_manager()
        return f"manager-{self._world.managers}"

    async def _stop(self, rng: random.Random) -> str | None:
        post = _one(rng, self._world.posts)
        if post is None:
            return None
        post.task.cancel()
        return post.actor.name

    async def _lose_ledger(self, rng: random.Random) -> str | None:
        seconds = rng.uniform(*LOST_S)
        await self._world.ledger.forget()
        self._world.damage.save_ledger()
        self._later(self._rebuild(seconds), "rebuild the ledger")
        return f"for {seconds:.3f} s"

    async def _rebuild_ledger(self, _rng: random.Random) -> str | None:
        self._later(self._rebuild(0.0), "rebuild the ledger")
        return "now"

    async def _rebuild(self, after_s: float) -> None:
        self._world.rebuilding += 1
        self._world.rebuilds += 1
        await asyncio.sleep(after_s)
        await self._world.ask(lambda m: m.rebuild_ledger(), "rebuild the ledger")
        self._world.rebuilding -= 1
        self._world.watch.forget_counts()


def _one(rng: random.Random, choices: Sequence[T]) -> T | None:
    return rng.choice(choices) if choices else None
