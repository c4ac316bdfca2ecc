"""World events: random faults that hit a world without a port call.

Invariant: the pause before each world event, and the target of the event, are drawn separately for each event. The
omission of one event does not change the other events, as long as their targets exist.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from batchlab.core.errors import BackendError, Refused
from batchlab.core.text import KILLED
from batchlab.manager import fleet_commands
from batchlab.sim.actors import Actor, SkewedClock
from batchlab.sim.audit_checks import OPERATOR, UserChange
from batchlab.sim.faults import DAMAGES, WEATHER, FaultKind, Faults
from batchlab.sim.world import SimWorker, World

T = TypeVar("T")

MAX_EVENTS = 40
GAP_S = (0.5, 15.0)
"""Range of seconds between two world events. A world has at most MAX_EVENTS events."""

STALL_S = (5.0, 60.0)
NOTICE_S = 120.0
JUMPS_S = (-86_400.0, -3_600.0, -30.0, -2.0, 2.0, 30.0, 3_600.0, 86_400.0)
SHORTAGE_S = (10.0, 120.0)
LOST_S = (0.5, 20.0)
HELD_S = (5.0, 60.0)
MOMENTS, MOMENT_S = 2_000, 0.004
"""Limits of the wait for an unacknowledged write: a power cut waits at most MOMENTS times MOMENT_S seconds."""
MAX_LOST_MESSAGES = 3
"""Maximum number of messages that a power cut removes from a queue."""
AGES_S = (0.0, 10.0, 60.0)

Act = Callable[[random.Random], Awaitable[str | None]]
"""Function that performs a world event. An Act returns a description of its target, or None if no target existed."""


class WorldFaults:
    """Source of the world events of one world."""

    def __init__(self, world: World, faults: Faults, pace: float) -> None:
        self._world = world
        self._faults = faults
        self._pace = pace
        self._after: list[asyncio.Task[None]] = []
        self._shortages = 0
        self._acts: dict[FaultKind, Act] = {
            FaultKind.REDELIVERED: partial(self._hit_a_message, world.queue.redeliver),
            FaultKind.VANISHED: partial(self._hit_a_message, world.queue.drop),
            FaultKind.PURGED: partial(self._hit_a_queue, world.queue.purge),
            FaultKind.EXPIRED: self._expire_messages,
            FaultKind.REMOVED: partial(self._hit_a_queue, world.queue.remove),
            FaultKind.SHUFFLED: self._shuffle_messages,
            FaultKind.CLOCK_JUMPED: self._jump_clock,
            FaultKind.STALLED: self._stall_process,
            FaultKind.CRASHED: partial(self._crash_instance, KILLED),
            FaultKind.SPOT_NOTICE: self._send_spot_notice,
            FaultKind.SPOT_KILL: partial(self._crash_instance, "Spot interruption"),
            FaultKind.NO_CAPACITY: self._refuse_capacity,
            FaultKind.SCALED_IN: self._scale_in,
            FaultKind.SCALED_BY_HAND: self._scale_by_hand,
            FaultKind.SECOND_MANAGER: self._start_second_manager,
            FaultKind.MANAGER_STOPPED: self._stop_manager,
            FaultKind.LEDGER_LOST: self._lose_ledger,
            FaultKind.LEDGER_REBUILT: self._rebuild_ledger,
            FaultKind.CORRUPTED: self._make_worker_lie,
            FaultKind.UNSYNCED: self._cut_power,
            **{kind: partial(self._damage_object, kind) for kind in DAMAGES},
            FaultKind.FROZEN: self._freeze_worker,
        }

    async def inject(self) -> None:
        """Perform the world events, and return when the lasting effects of all events have ended."""
        for _ in range(MAX_EVENTS):
            point = self._faults.next(WEATHER)
            rng = random.Random(point.pick)  # noqa: S311 - simulation
            await asyncio.sleep(rng.uniform(*GAP_S) * self._pace)
            kind = self._faults.due(point, WEATHER)
            if kind is None:
                continue
            target = await self._acts[kind](rng)
            if target is not None:
                self._faults.happened(point, kind)
                self._world.note(WEATHER, f"#{point.call} {kind.value} {target}")
        for task in self._after:
            await task

    def _later(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        self._after.append(asyncio.create_task(coro, name=name))

    # --- Queues ----------------------------------------------------------------------------------

    def _queues(self, rng: random.Random) -> list[str]:
        names = list(self._world.queue.names())
        rng.shuffle(names)
        return names

    async def _hit_a_message(self, act: Callable[[str, random.Random], str | None], rng: random.Random) -> str | None:
        for name in self._queues(rng):
            if (message := act(name, rng)) is not None:
                return f"{message} of {name}"
        return None

    async def _hit_a_queue(self, act: Callable[[str], Awaitable[None]], rng: random.Random) -> str | None:
        for name in self._queues(rng)[:1]:
            await act(name)
            return name
        return None

    async def _expire_messages(self, rng: random.Random) -> str | None:
        age_s = rng.choice(AGES_S)
        for name in self._queues(rng):
            if expired := self._world.queue.expire(name, age_s):
                return f"{expired} of {name}"
        return None

    async def _shuffle_messages(self, rng: random.Random) -> str | None:
        for name in self._queues(rng):
            if self._world.queue.shuffle(name, rng):
                return name
        return None

    # --- Processes -------------------------------------------------------------------------------

    def _workers(self) -> list[SimWorker]:
        return [worker for worker in self._world.workers.values() if worker.ended is None]

    def _a_process(self, rng: random.Random) -> tuple[Actor, SkewedClock] | None:
        # The choice of a process prefers managers, because managers are few, and faults of managers find more bugs.
        managers = [(process.actor, process.clock) for process in self._world.manager_processes if process.actor.alive]
        workers = [(worker.actor, worker.clock) for worker in self._workers()]
        return _choose(rng, managers if managers and rng.random() < 0.4 else managers + workers)

    async def _jump_clock(self, rng: random.Random) -> str | None:
        process = self._a_process(rng)
        if process is None:
            return None
        actor, clock = process
        seconds = rng.choice(JUMPS_S) * rng.uniform(0.5, 1.0)
        clock.off_s += seconds
        self._world.watch.start_times.is_exact = False
        return f"{actor.name} by {seconds:.3f} s"

    async def _stall_process(self, rng: random.Random) -> str | None:
        process = self._a_process(rng)
        if process is None:
            return None
        actor, seconds = process[0], rng.uniform(*STALL_S)
        actor.freeze()

        async def thaw() -> None:
            await asyncio.sleep(seconds)
            self._world.watch.on_fault(actor)
            actor.thaw()

        self._later(thaw(), f"thaw {actor.name}")
        return f"{actor.name} for {seconds:.3f} s"

    async def _freeze_worker(self, rng: random.Random) -> str | None:
        """Freeze a worker forever.

        The instance of a frozen worker continues to run until a manager ends the instance.
        """
        silences = self._world.watch.silences
        worker = _choose(rng, self._workers())
        if worker is None or any(other.actor in silences.stopped for other in self._workers()):
            return None
        worker.actor.freeze()
        silences.on_stop(worker.actor)
        return worker.actor.name

    async def _make_worker_lie(self, rng: random.Random) -> str | None:
        trust = self._world.watch.trust
        worker = _choose(rng, [worker for worker in self._workers() if not trust.is_liar(worker.actor)])
        if worker is None:
            return None
        worker.begin_to_lie(rng, self._pace)
        return worker.actor.name

    async def _damage_object(self, kind: FaultKind, rng: random.Random) -> str | None:
        return self._world.damage.strike(kind, rng)

    async def _cut_power(self, rng: random.Random) -> str | None:
        """End every process, and undo some writes that may not be on the disk.

        A power cut may undo any unacknowledged write. Messages do not wait for the disk, and neither do folds and ends
        of jobs in the ledger.
        """
        world, watch = self._world, self._world.watch
        for _ in range(MOMENTS):
            if watch.unsynced.before():
                break
            await asyncio.sleep(MOMENT_S)
        lost = {key: data for key, data in watch.unsynced.before().items() if rng.random() < 0.7}
        for process in list(world.manager_processes):
            process.actor.kill()
        for instance, ended in (await world.launcher.running()).items():
            if ended is None:
                world.launcher.crash(instance)
        for key, before in lost.items():
            world.objects.damage(key, before)
            watch.on_undo(key, before)
        for name in world.queue.names():
            for _ in range(rng.randint(0, MAX_LOST_MESSAGES)):
                world.queue.drop(name, rng)
        if rng.random() < 0.5:
            world.damage.lose_folds()
            watch.forget_counts()
        return f"without {', '.join(lost) or 'a lost write'}"

    # --- Instances -------------------------------------------------------------------------------

    async def _an_instance(self, rng: random.Random) -> str | None:
        running = await self._world.launcher.running()
        return _choose(rng, [name for name, ended in running.items() if ended is None])

    async def _crash_instance(self, reason: str, rng: random.Random) -> str | None:
        instance = await self._an_instance(rng)
        if instance is not None:
            self._world.launcher.crash(instance, reason)
        return instance

    async def _send_spot_notice(self, rng: random.Random) -> str | None:
        instance = await self._an_instance(rng)
        if instance is not None:
            await self._world.launcher.terminate(instance, grace_s=NOTICE_S)
        return instance

    async def _refuse_capacity(self, rng: random.Random) -> str | None:
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
        leader = self._world.leader
        if leader is None or not leader.manager.is_leader.is_set():
            return None
        fleet = leader.manager.ports.fleet
        views = await fleet.describe()
        chosen = _choose(rng, [i for view in views for i in view.instances if i.state.value == "InService"])
        if chosen is None:
            return None
        decrement = rng.random() < 0.5
        call = fleet.terminate(chosen.pool, [chosen.id], decrement=decrement, cause=fleet_commands.CAUSE)
        # Scale-in is refused below the group's min, and by a manager that is not the leader.
        with suppress(Refused, BackendError):
            await call
        return chosen.id

    async def _scale_by_hand(self, rng: random.Random) -> str | None:
        pool = rng.choice(list(self._world.pools))
        max_size = rng.randint(max(1, pool.min_size), pool.max_size + 2)
        desired = rng.randint(pool.min_size, max_size)
        if self._world.one_machine and pool.gpus:
            max_size, desired = min(max_size, 1), min(desired, 1)
        drained = rng.random() < 0.3
        seconds = rng.uniform(*HELD_S)

        async def by_hand_for_a_while() -> None:
            if drained:
                drain = UserChange(OPERATOR, "grid drain", pool.name)
                await self._world.change(drain, lambda m: fleet_commands.drain(m, pool.name), "drain")
            else:
                await self._world.change(
                    UserChange(OPERATOR, "grid scale", pool.name, f"max {max_size}"),
                    lambda m: fleet_commands.scale(m, pool.name, max_size=max_size, desired=desired),
                    "scale",
                )
            await asyncio.sleep(seconds)
            await self._world.change(
                UserChange(OPERATOR, "grid scale", pool.name, "auto true"),
                lambda m: fleet_commands.scale(m, pool.name, min_size=pool.min_size, max_size=pool.max_size, auto=True),
                "hand back",
            )

        self._later(by_hand_for_a_while(), f"{pool.name} by hand")
        return f"{pool.name} to {'nothing' if drained else desired} for {seconds:.3f} s"

    async def _start_second_manager(self, _rng: random.Random) -> str | None:
        if len(self._world.manager_processes) != 1 or not self._world.may_start.is_set():
            return None
        self._world.start_manager()
        return f"manager-{self._world.managers}"

    async def _stop_manager(self, rng: random.Random) -> str | None:
        process = _choose(rng, self._world.manager_processes)
        if process is None:
            return None
        process.task.cancel()
        return process.actor.name

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
        change = UserChange(OPERATOR, "grid rebuild-ledger", "")
        await self._world.change(change, lambda m: m.rebuild_ledger(), "rebuild the ledger")
        self._world.rebuilding -= 1
        self._world.watch.forget_counts()


def _choose(rng: random.Random, choices: Sequence[T]) -> T | None:
    return rng.choice(choices) if choices else None
