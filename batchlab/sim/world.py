"""The whole grid in one process and in virtual time: the same manager, fleet and worker objects
as everywhere, on in-memory services, with every port call a place where something may go wrong.

Invariant: a world is a function of its seed and its arguments; running it again gives the same
event log byte for byte.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from batchlab.adapters.sim.launcher import MemoryState, SimLauncher
from batchlab.adapters.sim.objects import SimObjects
from batchlab.adapters.sim.queue import SimQueue
from batchlab.adapters.sql.ledger import SqlLedger, open_memory
from batchlab.errors import BackendError, Refused
from batchlab.fleet.group import ManagedFleet
from batchlab.jobdef import JobDef
from batchlab.manager.live import ManagerSettings, Ports
from batchlab.manager.manager import Manager
from batchlab.model import GroupView, JobId, Pool
from batchlab.patience import Patience
from batchlab.ports import Clock, JobRecord, Objects
from batchlab.sim.actors import Actor
from batchlab.sim.faults import Faults
from batchlab.sim.log import EventLog
from batchlab.sim.loop import SimClock, SimIds
from batchlab.sim.runner import Scene, Script, ScriptedRunner
from batchlab.sim.wrappers import wrap
from batchlab.worker.beats import Identity
from batchlab.worker.loop import Worker
from batchlab.worker.runner import Runner
from batchlab.worker.settings import WorkerSettings

EPOCH_S = 1_700_000_000.0
RESTART_S = 3.0
"""From the death of a manager to the start of the next, on average."""

MANAGER = ManagerSettings(drain_target_s=10.0, silence_s=120.0, control_lease_s=4.0)
WORKER = WorkerSettings(control_lease_s=4.0)


RunnerFactory = Callable[["World", Callable[[], None], Objects], Runner]


@dataclass(slots=True)
class World:
    """A grid to be run on the current SimLoop. `script` says what simulated tasks do;
    `make_runner` replaces them by something else (real handlers)."""

    seed: int
    pools: Sequence[Pool]
    faults: Faults | None = None
    script: Script | None = None
    make_runner: RunnerFactory | None = None
    manager_settings: ManagerSettings = MANAGER
    worker_settings: WorkerSettings = WORKER
    logged: bool = True
    log: EventLog | None = field(init=False)
    objects: SimObjects = field(init=False)
    queue: SimQueue = field(init=False)
    ledger: SqlLedger = field(init=False)
    clock: SimClock = field(init=False)
    launcher: SimLauncher = field(init=False)
    manager: Manager | None = field(init=False, default=None)
    manager_actor: Actor | None = field(init=False, default=None)
    workers: dict[str, SimWorker] = field(init=False, default_factory=dict)
    starts: list[tuple[float, JobId, str, int]] = field(init=False, default_factory=list)
    """(time, job, stage, task) of every task that began."""
    managers: int = field(init=False, default=0)
    _store: MemoryState = field(init=False, default_factory=MemoryState)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.log = EventLog(loop.time) if self.logged else None
        self.clock = SimClock(loop, EPOCH_S)
        self.objects = SimObjects()
        self.queue = SimQueue(self.clock, self.rng("queue"))
        self.ledger = open_memory()
        self.launcher = SimLauncher(self._boot, self.rng("boot"))

    def rng(self, name: str) -> random.Random:
        """An independent stream of the seed. A text seed is hashed the same in every process."""
        return random.Random(f"{self.seed}/{name}")  # noqa: S311 - simulation

    # --- Actors ----------------------------------------------------------------------------------

    def start_manager(self) -> asyncio.Task[None]:
        """Start a manager, the first or the next."""
        self.managers += 1
        actor = Actor("manager")
        rng = self.rng(f"manager/{self.managers}")
        ids = SimIds(rng)
        patience = Patience(rng)
        fleet = ManagedFleet(
            wrap(self.launcher, "launcher", actor, self.faults, self.log),
            self.clock,
            ids,
            self._store,
            drain_s=self.worker_settings.drain_s + 5.0,
        )
        ports = Ports(
            wrap(self.objects, "objects", actor, self.faults, self.log),
            wrap(self.queue, "queue", actor, self.faults, self.log),
            fleet,
            wrap(self.ledger, "ledger", actor, self.faults, self.log),
            self.clock,
            ids,
            patience,
        )
        owner = f"manager-{self.managers}"
        self.manager = Manager(ports, self.manager_settings, self.pools, owner)
        self.manager_actor = actor
        return actor.spawn(self.manager.run(), name=owner)

    async def supervise(self) -> None:
        """Start a manager, and the next one some time after it dies, for ever."""
        rng = self.rng("supervisor")
        while True:
            await asyncio.wait([self.start_manager()])
            await asyncio.sleep(rng.uniform(0.5, 1.5) * RESTART_S)

    def _boot(self, pool: Pool, instance: str) -> SimWorker:
        worker = SimWorker(self, pool, instance)
        self.workers[instance] = worker
        return worker

    def runner(self, die: Callable[[], None], objects: Objects) -> Runner:
        """A runner for one worker."""
        if self.make_runner is not None:
            return self.make_runner(self, die, objects)
        assert self.script is not None
        return ScriptedRunner(self.script, self.clock, self._started, die)

    def _started(self, scene: Scene) -> None:
        self.starts.append((self.clock.monotonic_s(), scene.job.id, scene.stage.name, scene.task))

    # --- The user --------------------------------------------------------------------------------

    async def ask(self, call: Callable[[Manager], object], name: str) -> object:
        """Make a request of whichever manager leads, again and again until it is answered, as a
        person would. A request that the manager refuses is answered."""
        while True:
            manager, actor = self.manager, self.manager_actor
            if manager and actor and actor.alive and manager.is_leader.is_set():
                task = actor.spawn(_made(call, manager), name=name)
                await asyncio.wait([task])
                if not task.cancelled():
                    error = task.exception()
                    if error is None or isinstance(error, Refused):
                        return error if error else task.result()
                    if actor.alive and not isinstance(error, BackendError):
                        raise error
            await asyncio.sleep(1.0)

    async def submit(self, job: JobDef) -> None:
        """Submit a job until it is accepted."""
        await self.ask(lambda m: m.requests.submit(job), f"submit {job.id}")

    async def ended(self, job: JobId) -> JobRecord:
        """Wait for the end of a job."""
        while True:
            record = await self.ledger.job(job)
            if record.state.ended:
                return record
            await asyncio.sleep(1.0)

    async def groups(self) -> Sequence[GroupView]:
        """The fleet as the leader sees it."""
        assert self.manager is not None
        return await self.manager.ports.fleet.describe()


async def _made(call: Callable[[Manager], object], manager: Manager) -> object:
    result = call(manager)
    return await result if asyncio.iscoroutine(result) else result


class SimWorker:
    """A worker as an instance of the simulated launcher."""

    def __init__(self, world: World, pool: Pool, instance: str) -> None:
        self.ended: str | None = None
        self.instance = instance
        self.actor = Actor(f"worker-{instance}")
        clock: Clock = world.clock
        rng = world.rng(f"worker/{instance}")
        objects = wrap(world.objects, "objects", self.actor, world.faults, world.log)
        queue = wrap(world.queue, "queue", self.actor, world.faults, world.log)
        self.worker = Worker(
            Identity(f"w-{instance}", instance, pool.name, pool.slots),
            objects,
            queue,
            clock,
            world.runner(self._die, objects),
            Patience(rng),
            world.worker_settings,
        )
        life = self.actor.spawn(self.worker.run(), name=f"worker {instance}")
        life.add_done_callback(self._over)

    def stop(self, grace_s: float) -> None:  # noqa: ARG002 - the launcher keeps the deadline
        """SIGTERM."""
        if self.ended is None:
            self.worker.drain()

    def kill(self, reason: str) -> None:
        """SIGKILL, from outside."""
        if self.ended is None:
            self.ended = reason
            self.actor.kill()

    def _die(self) -> None:
        self.kill("exit -9")

    def _over(self, life: asyncio.Task[None]) -> None:
        """It has drained, or a fault has killed its actor."""
        if self.ended is None:
            self.ended = "exit -9" if life.cancelled() or life.exception() else "exit 0"
