"""Faults of a scenario, injected into a simulated grid, with evidence of their effects.

Evidence is counted from effects in the simulated world. A fault without an effect is reported as
not injected.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.model import Market
from batchlab.core.ports import MAX_BATCH, MAX_DELAY_S, MAX_WAIT_S, Clock, Notice, Outgoing
from batchlab.runtime.factory import Backend
from batchlab.scenarios.forecast.jobs import ALL_WORKERS, SimulatedWork
from batchlab.scenarios.forecast.machines import Machines
from batchlab.scenarios.model.distributions import Stream
from batchlab.scenarios.model.values import Fault, FaultName, Scenario
from batchlab.scenarios.record import InjectedFault
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import FaultKind, Faults, Point
from batchlab.sim.world import SimWorker, World

DELAY_RANGE_S = (1.0, 60.0)
"""Range of the delay of a delayed message."""


@dataclass(slots=True)
class ServiceFaults:
    """Faults of services at this time.

    `cut_off` counts the partitions of each actor, and the rates are shares of all S3 requests and
    of all sent messages.
    """

    cut_off: Counter[str] = field(default_factory=Counter)
    s3_errors: float = 0.0
    duplicates: float = 0.0
    delays: float = 0.0
    hits: Counter[str] = field(default_factory=Counter)
    """Number of effects, by "s3", "duplicates", "delays", or an actor's name."""


class ScenarioCallFaults(Faults):
    """Latencies of a grid's calls, and the call faults of a scenario."""

    def __init__(self, rng: random.Random, trouble: ServiceFaults, *, latency_s: tuple[float, float]) -> None:
        super().__init__(rng, latency_s=latency_s, answers=False)
        self._trouble = trouble

    def due(self, point: Point, label: str) -> FaultKind | None:
        trouble = self._trouble
        if trouble.cut_off and trouble.cut_off.get(point.actor):
            return FaultKind.UNREACHABLE
        if trouble.s3_errors and label.startswith("objects.") and point.chance < trouble.s3_errors:
            return FaultKind.THROTTLED
        return None

    def happened(self, point: Point, kind: FaultKind) -> None:
        what = "s3" if kind is FaultKind.THROTTLED else point.actor
        self._trouble.hits[what] += 1


class FaultyQueue(SimQueue):
    """Queue that may duplicate or delay messages.

    `squeeze` divides the delays. The choice depends only on `seed` and the message.
    """

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        trouble: ServiceFaults,
        *,
        seed: int,
        squeeze: float = 1.0,
        fifo: bool = False,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        super().__init__(clock, rng, fifo=fifo, max_wait_s=max_wait_s)
        self._trouble = trouble
        self._seed = seed
        self._squeeze = squeeze

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        if not self._trouble.duplicates and not self._trouble.delays:
            await super().send(queue, messages)
            return
        outgoings = list(map(self._late, messages))
        rate = self._trouble.duplicates
        twice = [outgoing for outgoing in outgoings if self._luck("duplicates", outgoing).unit() < rate]
        await super().send(queue, outgoings)
        for start in range(0, len(twice), MAX_BATCH):
            await super().send(queue, twice[start : start + MAX_BATCH])
        self._trouble.hits["duplicates"] += len(twice)

    def _late(self, message: Outgoing) -> Outgoing:
        luck = self._luck("delays", message)
        if luck.unit() >= self._trouble.delays:
            return message
        self._trouble.hits["delays"] += 1
        least_s, most_s = DELAY_RANGE_S
        late_s = (least_s + (most_s - least_s) * luck.unit(1)) / self._squeeze
        return replace(message, delay_s=min(MAX_DELAY_S, message.delay_s + late_s))

    def _luck(self, what: str, message: Outgoing) -> Stream:
        return Stream(self._seed, what, message.body)


KILLED = "exit -9"
INTERRUPTED = "Spot interruption"

SETTLE_S = 0.001
"""Time in which a crash takes effect."""

SLOW_DISK_START_S = 1.0
"""Delay of a bundle's start on a slow disk."""

NO_INSTANCE = "no instance{of} was in service then"

HitAndEvidence = tuple[Sequence[str], str]
"""Hit targets, and the observed evidence."""


@dataclass(slots=True)
class FaultTimeline:
    """Faults of one run."""

    scenario: Scenario
    like: Backend
    world: World
    machines: Machines
    plays: SimulatedWork
    trouble: ServiceFaults
    now_s: Callable[[], float]
    impossible: Mapping[FaultName, str]
    injected: list[InjectedFault] = field(default_factory=list)
    down: int = 0
    """Number of faults that prevent a restart of the manager."""
    still: Counter[str] = field(default_factory=Counter)
    """Number of pauses of each instance."""
    _up: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Inject all faults at their times. Return after the last one is over."""
        faults = sorted(self.scenario.faults, key=lambda one: one.at_s)
        self.injected = list(await asyncio.gather(*map(self._at, faults)))

    async def may_start(self) -> None:
        """Wait until a manager may be started again."""
        while self.down:
            self._up.clear()
            await self._up.wait()

    async def _at(self, fault: Fault) -> InjectedFault:
        await asyncio.sleep(max(0.0, fault.at_s - self.now_s()))
        acts: dict[FaultName, Callable[[Fault], Awaitable[HitAndEvidence]]] = {
            FaultName.KILL: self._kill,
            FaultName.PAUSE: self._pause,
            FaultName.PARTITION: self._cut_off,
            FaultName.SPOT_WAVE: self._wave,
            FaultName.ZONE_LOSS: self._lose_zone,
            FaultName.S3_ERRORS: self._fail_s3,
            FaultName.SQS_DUPLICATES: self._duplicate,
            FaultName.SQS_DELAYS: self._delay,
            FaultName.SLOW_DISK: self._slow_disks,
            FaultName.MANAGER_CRASH: self._crash_manager,
            FaultName.DATABASE_LOSS: self._lose_ledger,
        }
        at_s = self.now_s()
        if fault.name in self.impossible:
            return InjectedFault(fault.name.value, at_s, impossible=self.impossible[fault.name])
        self.world.note("timeline", f"{fault.name.value} begins")
        try:
            targets, evidence = await acts[fault.name](fault)
        except _NothingHit as why:
            return InjectedFault(fault.name.value, at_s, impossible=str(why))
        self.world.note("timeline", f"{fault.name.value}: {evidence}")
        return InjectedFault(fault.name.value, at_s, tuple(targets), evidence)

    def _targets(self, fault: Fault, *, market: Market | None = None, zone: str = "") -> list[str]:
        """Return the targets of a fault, the oldest first, as in a replay.

        Raise _NothingHit if there are none.
        """
        alive = self.machines.alive(fault.pool)
        names = [
            name
            for name, life in alive.items()
            if (market is None or life.machine.market is market) and (not zone or life.machine.zone == zone)
        ]
        count = len(names) if zone else fault.among(len(names))
        if not count:
            what = f" of pool {fault.pool}" if fault.pool else ""
            raise _NothingHit(NO_INSTANCE.format(of=f"{' on Spot' if market else ''}{what}"))
        return self.machines.oldest_first(names)[:count]

    def _held(self, names: Sequence[str]) -> list[str]:
        """Return the executions that run on these instances."""
        chosen = {self._worker(name).worker.who.worker for name in names}
        return [one for one, worker in self.plays.running.items() if worker in chosen]

    async def _take_away(self, names: Sequence[str], how: str) -> tuple[int, int]:
        """Crash these instances. Return the numbers of ended instances and of lost bundles."""
        held = self._held(names)
        for name in names:
            self.world.launcher.crash(name, how)
        await asyncio.sleep(SETTLE_S)
        dead = sum(self._worker(name).ended is not None for name in names)
        return dead, sum(one not in self.plays.running for one in held)

    def _worker(self, name: str) -> SimWorker:
        return self.world.workers[name]

    async def _kill(self, fault: Fault) -> HitAndEvidence:
        names = self._targets(fault)
        dead, lost = await self._take_away(names, KILLED)
        return names, f"{_instances(dead)} ended as by SIGKILL, with {_bundles(lost)} that ran"

    async def _pause(self, fault: Fault) -> HitAndEvidence:
        names = self._targets(fault)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        for name in names:
            self._worker(name).actor.freeze()
        self.still.update(names)
        held = len(self._held(names))
        await asyncio.sleep(fault.for_s)
        parked = 0
        self.still.subtract(names)
        for name in names:
            actor = self._worker(name).actor
            parked += loop.parked(actor)
            self.world.watch.disturbed(actor)
            # A pause that begins when another one ends may be processed first.
            if not self.still[name]:
                actor.thaw()
        return names, (
            f"{_instances(len(names))} stood still for {fault.for_s:g} s with {_bundles(held)} "
            f"that ran; {parked} of their steps had waited when they went on"
        )

    async def _cut_off(self, fault: Fault) -> HitAndEvidence:
        names = self._targets(fault)
        actors = [self._worker(name).actor.name for name in names]
        before = sum(self.trouble.hits[actor] for actor in actors)
        self.trouble.cut_off.update(actors)
        await asyncio.sleep(fault.for_s)
        self.trouble.cut_off.subtract(actors)
        self.trouble.cut_off = +self.trouble.cut_off
        calls = sum(self.trouble.hits[actor] for actor in actors) - before
        if not calls:
            raise _NothingHit("the instances made no call during the fault")
        return names, f"{calls} calls of {_instances(len(names))} reached no service"

    async def _wave(self, fault: Fault) -> HitAndEvidence:
        # Processes have no market, so any instance is taken. It gets a normal drain, without the
        # time of its end.
        here = self.like.capabilities.one_machine
        names = self._targets(fault, market=None if here else Market.SPOT)
        held = len(self._held(names))
        by_s = self.world.clock.now_s() + fault.notice_s
        for name in names:
            self._worker(name).worker.drain(None if here else Notice(INTERRUPTED, by_s))
        await asyncio.sleep(fault.notice_s)
        left = [name for name in names if self._worker(name).ended is None]
        _, lost = await self._take_away(left, INTERRUPTED)
        gone = sum(self._worker(name).ended is not None for name in names)
        alone = len(names) - len(left)
        return names, (
            f"{_instances(gone)}{'' if here else ' on Spot'} went {fault.notice_s:g} s after "
            f"{'its' if gone == 1 else 'their'} notice at the latest, {alone} by "
            f"{'itself' if alone == 1 else 'themselves'}; of {_bundles(held)} that ran {lost} "
            f"{'was' if lost == 1 else 'were'} lost"
        )

    async def _lose_zone(self, fault: Fault) -> HitAndEvidence:
        zone = self.machines.zone(fault.zone)
        refused, since_s = self.machines.refused, self.now_s()
        self.machines.lost_zones.append(zone)
        try:
            names = self._targets(fault, zone=zone)
        except _NothingHit:
            names = []
        for name in names:
            self.world.launcher.crash(name, f"zone {zone} is lost")
        booting = self.machines.booting(zone)
        for name in booting:
            self.world.launcher.crash(name, f"zone {zone} is lost")
        dead = [*names, *booting]
        await asyncio.sleep(fault.for_s)
        self.machines.lost_zones.remove(zone)
        launched = self.machines.since(since_s)
        here = sum(life.machine.zone == zone for life in launched)
        none = self.machines.refused - refused
        if not (dead or launched or none):
            raise _NothingHit(f"no instance was in {zone}, and no launch happened before its return")
        return dead, (
            f"{_instances(len(dead))} of {zone} died; until it was back {none} launches were "
            f"refused, {len(launched) - here} went to other zones and {here} to it"
        )

    async def _fail_s3(self, fault: Fault) -> HitAndEvidence:
        before = self.trouble.hits["s3"]
        self.trouble.s3_errors += fault.rate
        await asyncio.sleep(fault.for_s)
        self.trouble.s3_errors = max(0.0, self.trouble.s3_errors - fault.rate)
        return ("S3",), f"{self._hits('s3', before, 'request')} were answered 503"

    async def _duplicate(self, fault: Fault) -> HitAndEvidence:
        before = self.trouble.hits["duplicates"]
        self.trouble.duplicates += fault.rate
        await asyncio.sleep(fault.for_s)
        self.trouble.duplicates = max(0.0, self.trouble.duplicates - fault.rate)
        return ("SQS",), f"{self._hits('duplicates', before, 'message')} came twice"

    async def _delay(self, fault: Fault) -> HitAndEvidence:
        before = self.trouble.hits["delays"]
        self.trouble.delays += fault.rate
        await asyncio.sleep(fault.for_s)
        self.trouble.delays = max(0.0, self.trouble.delays - fault.rate)
        return ("SQS",), f"{self._hits('delays', before, 'message')} came late"

    def _hits(self, what: str, before: int, one: str) -> str:
        """Return the number of hits since `before` as text. Raise _NothingHit if there are none."""
        count = self.trouble.hits[what] - before
        if not count:
            raise _NothingHit(f"no {one} was affected: there were none, or too few")
        return f"{count} {one}{'s' * (count != 1)}"

    async def _slow_disks(self, fault: Fault) -> HitAndEvidence:
        disks = self.plays.disks
        bundles, tasks, added_s = disks.slowed_bundles, disks.slowed_tasks, disks.added_s
        if self.like.capabilities.one_machine:  # and has one disk
            names, slow = self.machines.oldest_first(self.machines.alive()), [ALL_WORKERS]
        else:
            names = self._targets(fault)
            slow = [self._worker(name).worker.who.worker for name in names]
        disks.start_s = SLOW_DISK_START_S / self.scenario.compressed
        disks.slow.update(slow)
        await asyncio.sleep(fault.for_s)
        disks.slow.subtract(slow)
        disks.slow = +disks.slow
        if disks.slowed_bundles == bundles and disks.slowed_tasks == tasks:
            raise _NothingHit("no bundle began on a slow disk")
        return names, (
            f"{_bundles(disks.slowed_bundles - bundles)} began late and "
            f"{disks.slowed_tasks - tasks} tasks with I/O were slower, by "
            f"{disks.added_s - added_s:.1f} s together"
        )

    async def _crash_manager(self, fault: Fault) -> HitAndEvidence:
        post = self.world.leader
        if post is None:
            raise _NothingHit("no manager ran then")
        jobs, died_s = len(post.manager.lives), self.now_s()
        # On other backends, Docker or the group restarts the manager at its own time.
        held = self.like.capabilities.local_manager
        self.down += held
        post.actor.kill()
        if held:
            await asyncio.sleep(fault.for_s)
            self.down -= 1
            self._up.set()
        await self._led()
        return (post.actor.name,), (
            f"{post.actor.name} died with {jobs} jobs in hand; {self.world.last_owner} was started "
            f"and led {self.now_s() - died_s:.1f} s later"
        )

    async def _led(self) -> None:
        while (manager := self.world.manager) is None or not manager.is_leader.is_set():  # noqa: ASYNC110
            await asyncio.sleep(1.0 / self.scenario.compressed)

    async def _lose_ledger(self, fault: Fault) -> HitAndEvidence:
        ledger = self.world.ledger
        before = await self._known_jobs()
        if not before:
            raise _NothingHit("the ledger had no jobs")
        await ledger.forget()
        left = await self._known_jobs()
        await asyncio.sleep(fault.for_s)
        self.world.rebuilding += 1
        found = await self.world.ask(lambda m: m.rebuild_ledger(), "rebuild the ledger")
        self.world.rebuilding -= 1
        return ("the ledger",), (
            f"of {before} jobs the ledger knew {left} after the loss; {fault.for_s:g} s later "
            f"{found} were rebuilt from the bucket"
        )

    async def _known_jobs(self) -> int:
        return len(await self.world.ledger.jobs(limit=1_000_000))


class _NothingHit(Exception):
    """The fault had no target or no effect."""


def _instances(count: int) -> str:
    return f"{count} instance{'s' * (count != 1)}"


def _bundles(count: int) -> str:
    return f"{count} bundle{'s' * (count != 1)}"
