"""Faults of a scenario, injected into a simulated grid.

The evidence of a fault counts the fault's effects in the simulated world. A fault without an effect is reported as not
injected.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.model import Market
from batchlab.core.ports import MAX_BATCH, MAX_DELAY_S, MAX_WAIT_S, Clock, Notice, Outgoing
from batchlab.core.text import KILLED, count
from batchlab.manager.ledger_rebuild import RebuildResult
from batchlab.runtime.factory import Backend
from batchlab.scenarios.forecast.simulated_work import ALL_WORKERS, Machines, SimulatedWork
from batchlab.scenarios.model.distributions import Stream
from batchlab.scenarios.model.values import Fault, FaultName, Scenario
from batchlab.scenarios.record import InjectedFault
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import FaultKind, Faults, Point
from batchlab.sim.world import SimWorker, World

DELAY_RANGE_S = (1.0, 60.0)
"""Minimum and maximum delay in seconds of a delayed message."""


@dataclass(slots=True)
class ServiceFaults:
    """Current faults of a simulated grid that affect its services.

    `cut_off` counts the partition faults of each actor. The rates are shares of all S3 requests or of all sent
    messages.
    """

    cut_off: Counter[str] = field(default_factory=Counter)
    s3_errors: float = 0.0
    duplicates: float = 0.0
    delays: float = 0.0
    hits: Counter[str] = field(default_factory=Counter)
    """Number of calls that the faults affected, by the name of the rate or of the actor."""


class ScenarioCallFaults(Faults):
    """Latencies of a grid's calls, and the faults that affect calls."""

    def __init__(self, rng: random.Random, services: ServiceFaults, *, latency_s: tuple[float, float]) -> None:
        super().__init__(rng, latency_s=latency_s, answers=False)
        self._services = services

    def due(self, point: Point, label: str) -> FaultKind | None:
        services = self._services
        if services.cut_off and services.cut_off.get(point.actor):
            return FaultKind.UNREACHABLE
        if services.s3_errors and label.startswith("objects.") and point.chance < services.s3_errors:
            return FaultKind.THROTTLED
        return None

    def happened(self, point: Point, kind: FaultKind) -> None:
        self._services.hits["s3_errors" if kind is FaultKind.THROTTLED else point.actor] += 1


class FaultyQueue(SimQueue):
    """Queue that may duplicate or delay messages.

    The queue divides the delays by `compressed`. The choice of affected messages depends only on `seed` and the
    message.
    """

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        services: ServiceFaults,
        *,
        seed: int,
        compressed: float = 1.0,
        fifo: bool = False,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        super().__init__(clock, rng, fifo=fifo, max_wait_s=max_wait_s)
        self._services = services
        self._seed = seed
        self._compressed = compressed

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        rate = self._services.duplicates
        if not rate and not self._services.delays:
            await super().send(queue, messages)
            return
        sent = list(map(self._delay, messages))
        duplicates = [message for message in sent if self._stream("duplicates", message).unit() < rate]
        await super().send(queue, sent)
        for start in range(0, len(duplicates), MAX_BATCH):
            await super().send(queue, duplicates[start : start + MAX_BATCH])
        self._services.hits["duplicates"] += len(duplicates)

    def _delay(self, message: Outgoing) -> Outgoing:
        stream = self._stream("delays", message)
        if stream.unit() >= self._services.delays:
            return message
        self._services.hits["delays"] += 1
        least_s, most_s = DELAY_RANGE_S
        delay_s = (least_s + (most_s - least_s) * stream.unit(1)) / self._compressed
        return replace(message, delay_s=min(MAX_DELAY_S, message.delay_s + delay_s))

    def _stream(self, what: str, message: Outgoing) -> Stream:
        return Stream(self._seed, what, message.body)


INTERRUPTED = "Spot interruption"

SETTLE_S = 0.001
"""Time in seconds within which a crash takes effect."""

SLOW_DISK_START_S = 1.0
"""Delay in seconds of a bundle's start on a slow disk."""

NO_INSTANCE = "no instance{of} was in service then"

TargetsAndEvidence = tuple[Sequence[str], str]
"""Targets of a fault, and the observed evidence of the fault."""


class NothingHit(Exception):
    """The fault did not have a target or an effect. The exception's message gives the reason."""


@dataclass(slots=True)
class FaultTimeline:
    """Faults of one simulated run. `impossible` maps each fault that is skipped to the reason."""

    scenario: Scenario
    backend: Backend
    world: World
    machines: Machines
    work: SimulatedWork
    services: ServiceFaults
    now_s: Callable[[], float]
    impossible: Mapping[FaultName, str]
    injected: list[InjectedFault] = field(default_factory=list)
    restart_blocks: int = 0
    """Number of current faults that prevent a restart of the manager."""
    pauses: Counter[str] = field(default_factory=Counter)
    """Number of current pause faults of each instance."""
    _unblocked: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Inject all faults at their times. Return after the last fault has ended."""
        faults = sorted(self.scenario.faults, key=lambda fault: fault.at_s)
        self.injected = list(await asyncio.gather(*map(self._inject, faults)))

    async def wait_for_restart(self) -> None:
        """Wait until no fault prevents a restart of the manager."""
        while self.restart_blocks:
            self._unblocked.clear()
            await self._unblocked.wait()

    async def _inject(self, fault: Fault) -> InjectedFault:
        await asyncio.sleep(max(0.0, fault.at_s - self.now_s()))
        actions: dict[FaultName, Callable[[Fault], Awaitable[TargetsAndEvidence]]] = {
            FaultName.KILL: self._kill,
            FaultName.PAUSE: self._pause,
            FaultName.PARTITION: self._partition,
            FaultName.SPOT_WAVE: self._interrupt_spot,
            FaultName.ZONE_LOSS: self._lose_zone,
            FaultName.S3_ERRORS: partial(self._raise_rate, "s3_errors", "S3", "request", "answered with 503"),
            FaultName.SQS_DUPLICATES: partial(self._raise_rate, "duplicates", "SQS", "message", "delivered twice"),
            FaultName.SQS_DELAYS: partial(self._raise_rate, "delays", "SQS", "message", "delivered late"),
            FaultName.SLOW_DISK: self._slow_disks,
            FaultName.MANAGER_CRASH: self._crash_manager,
            FaultName.DATABASE_LOSS: self._lose_ledger,
        }
        name, at_s = fault.name.value, self.now_s()
        if fault.name in self.impossible:
            return InjectedFault(name, at_s, impossible=self.impossible[fault.name])
        self.world.note("timeline", f"{name} begins")
        try:
            targets, evidence = await actions[fault.name](fault)
        except NothingHit as reason:
            return InjectedFault(name, at_s, impossible=str(reason))
        self.world.note("timeline", f"{name}: {evidence}")
        return InjectedFault(name, at_s, tuple(targets), evidence)

    def _targets(self, fault: Fault, *, market: Market | None = None, zone: str = "") -> list[str]:
        """Return the target instances of a fault, the oldest instance first. A replay selects targets in the same
        order.

        Raise NothingHit if the fault does not have a target.
        """
        names = [
            name
            for name, life in self.machines.alive(fault.pool).items()
            if (market is None or life.machine.market is market) and (not zone or life.machine.zone == zone)
        ]
        number = len(names) if zone else fault.among(len(names))
        if not number:
            what = f" of pool {fault.pool}" if fault.pool else ""
            raise NothingHit(NO_INSTANCE.format(of=f"{' on Spot' if market else ''}{what}"))
        return self.machines.oldest_first(names)[:number]

    def _executions(self, names: Sequence[str]) -> list[str]:
        workers = {self._worker(name).worker.who.worker for name in names}
        return [execution for execution, worker in self.work.running.items() if worker in workers]

    async def _crash(self, names: Sequence[str], how: str) -> tuple[int, int]:
        """Crash the instances in `names`. Return the number of ended instances and the number of lost bundles."""
        executions = self._executions(names)
        for name in names:
            self.world.launcher.crash(name, how)
        await asyncio.sleep(SETTLE_S)
        ended = sum(self._worker(name).ended is not None for name in names)
        return ended, sum(execution not in self.work.running for execution in executions)

    def _worker(self, name: str) -> SimWorker:
        return self.world.workers[name]

    async def _kill(self, fault: Fault) -> TargetsAndEvidence:
        names = self._targets(fault)
        ended, lost = await self._crash(names, KILLED)
        return names, f"{count(ended, 'instance')} ended with SIGKILL, and lost {count(lost, 'running bundle')}"

    async def _pause(self, fault: Fault) -> TargetsAndEvidence:
        names = self._targets(fault)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        for name in names:
            self._worker(name).actor.freeze()
        self.pauses.update(names)
        bundles = len(self._executions(names))
        await asyncio.sleep(fault.for_s)
        steps = 0
        self.pauses.subtract(names)
        for name in names:
            actor = self._worker(name).actor
            steps += loop.parked(actor)
            self.world.watch.on_fault(actor)
            # If a pause fault begins at the moment at which another pause fault ends, the new fault may be counted
            # first.
            if not self.pauses[name]:
                actor.thaw()
        return names, (
            f"{count(len(names), 'instance')} with {count(bundles, 'running bundle')} were frozen for "
            f"{fault.for_s:g} s; {steps} of their steps were delayed until the end"
        )

    async def _partition(self, fault: Fault) -> TargetsAndEvidence:
        names = self._targets(fault)
        actors = [self._worker(name).actor.name for name in names]
        before = sum(self.services.hits[actor] for actor in actors)
        self.services.cut_off.update(actors)
        await asyncio.sleep(fault.for_s)
        self.services.cut_off.subtract(actors)
        self.services.cut_off = +self.services.cut_off
        calls = sum(self.services.hits[actor] for actor in actors) - before
        if not calls:
            raise NothingHit("the instances made no call during the fault")
        return names, f"{calls} calls of {count(len(names), 'instance')} could not reach a service"

    async def _interrupt_spot(self, fault: Fault) -> TargetsAndEvidence:
        # On a backend with one machine, instances are processes and not Spot Instances. The fault therefore interrupts
        # any process by a normal drain without an end time.
        has_market = not self.backend.capabilities.one_machine
        names = self._targets(fault, market=Market.SPOT if has_market else None)
        bundles = len(self._executions(names))
        by_s = self.world.clock.now_s() + fault.notice_s
        for name in names:
            self._worker(name).worker.drain(Notice(INTERRUPTED, by_s) if has_market else None)
        await asyncio.sleep(fault.notice_s)
        late = [name for name in names if self._worker(name).ended is None]
        _, lost = await self._crash(late, INTERRUPTED)
        ended = sum(self._worker(name).ended is not None for name in names)
        return names, (
            f"{count(ended, 'instance')}{' on Spot' if has_market else ''} ended within {fault.notice_s:g} s of the "
            f"interruption notice, {len(names) - len(late)} before the deadline; {lost} of "
            f"{count(bundles, 'running bundle')} were lost"
        )

    async def _lose_zone(self, fault: Fault) -> TargetsAndEvidence:
        zone = self.machines.zone(fault.zone)
        refused_before, since_s = self.machines.refused, self.now_s()
        self.machines.lost_zones.append(zone)
        try:
            names = self._targets(fault, zone=zone)
        except NothingHit:
            names = []
        ended = [*names, *self.machines.booting(zone)]
        for name in ended:
            self.world.launcher.crash(name, f"zone {zone} is lost")
        await asyncio.sleep(fault.for_s)
        self.machines.lost_zones.remove(zone)
        launched = self.machines.since(since_s)
        inside = sum(life.machine.zone == zone for life in launched)
        refused = self.machines.refused - refused_before
        if not (ended or launched or refused):
            raise NothingHit(f"no instance was in {zone}, and no launch happened before its return")
        return ended, (
            f"{count(len(ended), 'instance')} of {zone} died; until the zone returned, {refused} launches were "
            f"refused, {len(launched) - inside} went to other zones, and {inside} to this zone"
        )

    async def _raise_rate(self, rate: str, service: str, unit: str, effect: str, fault: Fault) -> TargetsAndEvidence:
        before = self.services.hits[rate]
        setattr(self.services, rate, getattr(self.services, rate) + fault.rate)
        await asyncio.sleep(fault.for_s)
        setattr(self.services, rate, max(0.0, getattr(self.services, rate) - fault.rate))
        hits = self.services.hits[rate] - before
        if not hits:
            raise NothingHit(f"no {unit} was affected: there were none, or too few")
        return (service,), f"{count(hits, unit)} {'was' if hits == 1 else 'were'} {effect}"

    async def _slow_disks(self, fault: Fault) -> TargetsAndEvidence:
        disks = self.work.disks
        bundles, tasks, added_s = disks.slowed_bundles, disks.slowed_tasks, disks.added_s
        if self.backend.capabilities.one_machine:  # on a backend with one machine, all workers share one disk
            names, slow = self.machines.oldest_first(self.machines.alive()), [ALL_WORKERS]
        else:
            names = self._targets(fault)
            slow = [self._worker(name).worker.who.worker for name in names]
        disks.start_s = SLOW_DISK_START_S / self.scenario.compressed
        disks.slow.update(slow)
        await asyncio.sleep(fault.for_s)
        disks.slow.subtract(slow)
        disks.slow = +disks.slow
        bundles, tasks = disks.slowed_bundles - bundles, disks.slowed_tasks - tasks
        if not (bundles or tasks):
            raise NothingHit("no bundle began on a slow disk")
        added_s = disks.added_s - added_s
        return names, (
            f"{count(bundles, 'bundle')} began late and {tasks} tasks with I/O were slower, by {added_s:.1f} s in total"
        )

    async def _crash_manager(self, fault: Fault) -> TargetsAndEvidence:
        leader = self.world.leader
        if leader is None:
            raise NothingHit("no manager ran then")
        jobs, died_s = len(leader.manager.lives), self.now_s()
        # Without a local manager, Docker or the Auto Scaling group decides when the manager restarts.
        waits = self.backend.capabilities.local_manager
        self.restart_blocks += waits
        leader.actor.kill()
        if waits:
            await asyncio.sleep(fault.for_s)
            self.restart_blocks -= 1
            self._unblocked.set()
        while (manager := self.world.manager) is None or not manager.is_leader.is_set():  # noqa: ASYNC110
            await asyncio.sleep(1.0 / self.scenario.compressed)
        return (leader.actor.name,), (
            f"{leader.actor.name} died with {count(jobs, 'active job')}; its successor {self.world.last_owner} "
            f"led {self.now_s() - died_s:.1f} s later"
        )

    async def _lose_ledger(self, fault: Fault) -> TargetsAndEvidence:
        ledger = self.world.ledger

        async def count_jobs() -> int:
            return len(await ledger.jobs(limit=1_000_000))

        before = await count_jobs()
        if not before:
            raise NothingHit("the ledger was empty")
        await ledger.forget()
        after = await count_jobs()
        await asyncio.sleep(fault.for_s)
        self.world.rebuilding += 1
        rebuilt = await self.world.ask(lambda manager: manager.rebuild_ledger(), "rebuild the ledger")
        self.world.rebuilding -= 1
        if not isinstance(rebuilt, RebuildResult):
            raise NothingHit(f"the manager could not rebuild the ledger: {rebuilt}")
        return ("the ledger",), (
            f"the ledger lost {before - after} of {count(before, 'job')}; {fault.for_s:g} s later the manager rebuilt "
            f"{count(rebuilt.jobs, 'job')} from the bucket"
        )
