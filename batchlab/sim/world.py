"""The whole grid in one process and in virtual time, on in-memory services whose calls may fail.

The manager, fleet, and worker objects are the product's own.

Invariant: a world is a function of its seed and its arguments. A second run of the same world gives the same event log
byte for byte.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from batchlab.adapters.memory.launcher import SimLauncher
from batchlab.adapters.memory.ledger import SimLedger
from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.errors import BackendError, NotFound, Refused
from batchlab.core.job_definition import JobDef
from batchlab.core.model import GroupView, JobId, LifecycleState, Pool
from batchlab.core.notifications import Notification, NotificationSettings, Target
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, Fleet, Ids, JobRecord, JobRows, Launcher, Objects
from batchlab.core.pricing.usage import Accounting
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.service_settings import ManagerSettings, WorkerSettings
from batchlab.core.text import KILLED
from batchlab.manager.audit_log import AuditLog
from batchlab.manager.context import NotificationChannels
from batchlab.manager.manager import Manager
from batchlab.manager.recorder import ReportQueue
from batchlab.manager.state import Ports
from batchlab.sim.actors import CURRENT, Actor, ActorKilled, SimClock, SimIds, SkewedClock
from batchlab.sim.audit_checks import UserChange
from batchlab.sim.event_log import EventLog
from batchlab.sim.event_loop import Crashed, SimLoop
from batchlab.sim.faults import Faults
from batchlab.sim.fleet import AutoScalingService, FleetState, SimFleet
from batchlab.sim.lying_insider import Insider
from batchlab.sim.lying_worker import Liar, WorkerPorts
from batchlab.sim.port_wrappers import wrap
from batchlab.sim.runtime_checks import Start, Watch
from batchlab.sim.storage_faults import Damage
from batchlab.sim.tasks import AttemptInput, Script, ScriptedRunner
from batchlab.sim.worker_rights import Rights
from batchlab.worker.inflight_message import Identity, Runner
from batchlab.worker.loop import Worker

if TYPE_CHECKING:
    from batchlab.sim.cached_ledger import CachedLedger

EPOCH_S = 1_700_000_000.0
LED_SHARE = 0.75
"""Share of `orphan_s` after which a manager that leads without a pause must have postponed the scheduled actions."""
RESTART_S = 3.0
"""Average seconds between the death of a manager and the start of the next manager."""

SLOWNESS = 15.0
"""Factor by which a slow worker's tasks take longer."""

DIRECTORY = NotificationSettings((Target("everybody", "webhook", "https://target.invalid/"),))

MANAGER = ManagerSettings(drain_target_s=10.0, silence_s=120.0, control_lease_s=4.0)
WORKER = WorkerSettings(control_lease_s=4.0)


T = TypeVar("T")
RunnerFactory = Callable[["World", Callable[[], None], Objects], Runner]


@dataclass(slots=True)
class ManagerProcess:
    """A manager with the actor, clock, and asyncio task of its process."""

    manager: Manager
    actor: Actor
    clock: SkewedClock
    task: asyncio.Task[None]


@dataclass(slots=True)
class World:
    """A grid to run on the current SimLoop.

    `script` defines the simulated tasks. `make_runner` replaces the runner of simulated tasks, for example by a runner
    of real handlers. The wall clock of each process is off by up to `skew_s`. The clock of the simulated services is
    exact.

    Without `watched`, the steps of the protocol are not checked. For a worker with thousands of tasks, the checks of
    the protocol cost as much as the worker itself. With `accounting`, the managers record the usage of the grid. With
    `reports`, the managers record the data of reports. With `schedules`, the managers submit jobs at the due times of
    schedules. With `notifies`, the managers notify a target of each job's end. With `shares`, the managers follow the
    fair-share policy in the bucket. With `one_machine`, all instances use the GPUs of one machine. With `audited`, the
    managers write an audit log.

    With `sql`, the ledger is the product's SQL ledger on an in-memory SQLite database. Without `sql`, the ledger is
    SimLedger, which gives the same answers as the SQL ledger in a tenth of the time.
    """

    seed: int
    pools: Sequence[Pool]
    faults: Faults | None = None
    script: Script | None = None
    make_runner: RunnerFactory | None = None
    manager_settings: ManagerSettings = MANAGER
    worker_settings: WorkerSettings = WORKER
    logged: bool = True
    skew_s: float = 0.0
    watched: bool = True
    accounting: Accounting | None = None
    reports: ReportQueue | None = None
    sql: bool = True
    schedules: bool = False
    notifies: bool = False
    shares: bool = False
    one_machine: bool = False
    audited: bool = False
    slow_share: float = 0.0
    """Share of the instances whose tasks take SLOWNESS times as long."""
    log: EventLog | None = field(init=False)
    objects: SimObjects = field(init=False)
    queue: SimQueue = field(init=False)
    ledger: CachedLedger | SimLedger = field(init=False)
    clock: SimClock = field(init=False)
    launcher: SimLauncher = field(init=False)
    watch: Watch = field(init=False)
    damage: Damage = field(init=False)
    manager_processes: list[ManagerProcess] = field(init=False, default_factory=list)
    """Running managers, sorted by start time with the oldest manager first."""
    workers: dict[str, SimWorker] = field(init=False, default_factory=dict)
    managers: int = field(init=False, default=0)
    rebuilding: int = field(init=False, default=0)
    """Number of ledger rebuilds that are due or in progress. Until a rebuild ends, the ledger may be incomplete."""
    rebuilds: int = field(init=False, default=0)
    """Number of ledger rebuilds so far."""
    may_start: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    """Event that is set unless no manager may start."""
    ends: int = field(init=False, default=0)
    """Number of scheduled actions that have ended a pool so far."""
    _led_since_s: dict[str, float] = field(init=False, default_factory=dict)
    """Time since which a manager has led without a pause, by the manager's name."""
    _state: FleetState = field(init=False, default_factory=FleetState)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self.may_start.set()
        self.log = EventLog(loop.time) if self.logged else None
        self.clock = SimClock(loop, EPOCH_S)
        self.objects = SimObjects()
        self.queue = SimQueue(self.clock, self.rng("queue"))
        if self.sql:
            # SQLAlchemy is imported late, because forecasts do not use SQL, and the import takes longer than many
            # forecasts.
            from batchlab.adapters.sql.ledger import open_memory_as
            from batchlab.sim.cached_ledger import CachedLedger

            self.ledger = open_memory_as(CachedLedger)
        else:
            self.ledger = SimLedger()
        self.launcher = SimLauncher(self._boot, self.rng("boot"))
        self.watch = Watch(
            clock=self.clock,
            queue=self.queue,
            fail=loop.fail,
            frozen=loop.is_frozen,
            thawed_s=loop.thawed_s,
            visibility_s=self.worker_settings.visibility_s,
            lease_s=self.worker_settings.control_lease_s,
            lead_ttl_s=self.manager_settings.lease_ttl_s,
            silence_s=self.manager_settings.silence_s,
        )
        self.watch.shares.is_on = self.shares
        self.watch.shares.pools = {pool.name: pool for pool in self.pools}
        self.watch.shares.window = self.manager_settings.window
        self.watch.gpus.pools = {pool.name: pool for pool in self.pools if pool.gpus}
        self.watch.gpus.max_size = self._max_size
        self.watch.gpus.is_shared = self.one_machine
        self.damage = Damage(self.objects, self.ledger, self.watch.trust.touched, self.watch.damaged)
        self.watch.are_looks_slow = bool(self.faults and self.faults.slow_looks_s)
        if self.watched:
            self.objects.written = self.watch.on_write
            self.queue.lapsed = self.watch.on_lapse

    def rng(self, name: str) -> random.Random:
        """Return a random source that depends only on the seed and `name`."""
        return random.Random(f"{self.seed}/{name}")  # noqa: S311 - simulation

    @property
    def starts(self) -> list[tuple[float, JobId, str, int]]:
        """The (time, job, stage, task) of every task start."""
        return [(start.at_s, start.job, start.stage, start.task) for start in self.watch.starts]

    def note(self, actor: str, event: str) -> None:
        """Log an event that is not a port call."""
        if self.log is not None:
            self.log.add(actor, event)

    # --- Actors ----------------------------------------------------------------------------------

    @property
    def leader(self) -> ManagerProcess | None:
        """The youngest manager that considers itself the leader, or the youngest manager if no manager does."""
        alive = [process for process in self.manager_processes if process.actor.alive]
        leaders = [process for process in alive if process.manager.is_leader.is_set()] or alive
        return leaders[-1] if leaders else None

    @property
    def manager(self) -> Manager | None:
        return self.leader.manager if self.leader else None

    @property
    def last_owner(self) -> str:
        """Name under which the most recently started manager holds the lease."""
        return f"manager-{self.managers}"

    def start_manager(self) -> asyncio.Task[None]:
        """Start a manager, even if other managers are running."""
        self.managers += 1
        owner = self.last_owner
        actor, rng = Actor(owner), self.rng(owner)
        ids, clock = SimIds(rng), self._clock_of(rng)
        fleet = self._fleet(self._wrap(self.launcher, "launcher", actor), clock, ids)
        if self.manager_settings.orphan_s:
            fleet.scheduling = self._wrap(fleet.scheduling, "scheduling", actor, stream="/scheduling")
        ports = Ports(
            self._wrap(self.objects, "objects", actor),
            self._wrap(self.queue, "queue", actor),
            cast(Fleet, fleet),
            self._wrap(self.ledger, "ledger", actor),
            clock,
            ids,
            Patience(rng),
        )
        audit = AuditLog(ports) if self.audited else None
        manager = Manager(
            ports=ports,
            settings=self.manager_settings,
            pools=self.pools,
            owner=owner,
            accounting=self.accounting,
            reports=self.reports,
            channels=NotificationChannels(lambda: DIRECTORY, self._on_notification) if self.notifies else None,
            schedules=self.schedules,
            shares=self.shares,
            one_machine=self.one_machine,
            audit=audit,
        )
        fleet.registry = manager.registry
        task = actor.spawn(_run(manager, audit) if audit else manager.run(), name=owner)
        process = ManagerProcess(manager, actor, clock, task)
        self.manager_processes.append(process)
        task.add_done_callback(lambda _: self._ended(process))
        return task

    def _fleet(self, launcher: Launcher, clock: Clock, ids: Ids) -> SimFleet:
        return SimFleet(
            launcher,
            clock,
            ids,
            self._state,
            drain_s=self.worker_settings.drain_s + 5.0,
            fail=self.watch.fail,
            on_replace=self._on_replacement,
            on_end=self._on_end,
            service_clock=self.clock,
            one_machine=self.one_machine,
            is_managed_service=self.manager_settings.orphan_s > 0 or self.ends > 0 or self.has_scheduled_ends(),
        )

    def running_instances(self) -> list[str]:
        """Return the instances of the fleet that have not ended."""
        members = [member for group in self._state.groups() for member in group.members.values()]
        saved = [m.instance.id for m in members if m.state is not LifecycleState.TERMINATED]
        return saved + [name for name, worker in self.workers.items() if worker.ended is None and name not in saved]

    def _max_size(self, pool: str) -> int:
        return max((group.pool.max_size for group in self._state.groups() if group.pool.name == pool), default=0)

    def has_scheduled_ends(self) -> bool:
        """Return whether any group has a scheduled action."""
        return any(group.end_s is not None for group in self._state.groups())

    async def serve_groups(self) -> None:
        """Perform the groups' scheduled actions, as EC2 Auto Scaling does, and record which managers lead, forever."""
        ids = SimIds(self.rng("auto scaling"))
        new_fleet = partial(self._fleet, self.launcher, self.clock, ids)
        await AutoScalingService(new_fleet, self._state, self.clock, self._record_leaders).run()

    def _record_leaders(self) -> bool:
        """Update `_led_since_s`, and return whether any manager leads."""
        now_s, before = self.clock.monotonic_s(), self._led_since_s
        leaders = [process for process in self.manager_processes if process.actor.alive]
        leaders = [one for one in leaders if one.manager.is_leader.is_set() and not self.watch.frozen(one.actor)]
        self._led_since_s = {one.actor.name: before.get(one.actor.name, now_s) for one in leaders}
        return bool(leaders)

    def _on_end(self, pool: str) -> None:
        """Check that a scheduled action ends a pool only if no manager has led for a while."""
        self.ends += 1
        self._record_leaders()
        longest_s = self.clock.monotonic_s() - min(self._led_since_s.values(), default=self.clock.monotonic_s())
        is_expected = longest_s < self.manager_settings.orphan_s * LED_SHARE
        self.watch.check(is_expected, "orphans", f"pool {pool} ends, although a manager leads ({longest_s:.0f} s)")
        self.note("auto scaling", f"ends pool {pool}")

    async def _on_notification(self, _target: Target, notification: Notification) -> None:
        """Check that the fact in a received notification is already in the bucket."""
        round_ = json.loads(notification.body)["job"]["round"]
        key = object_keys.final(JobId(notification.job), round_)
        is_stored = await self.objects.head(key)
        ending = json_format.ending_from_json(json_format.loads(await self.objects.get(key))) if is_stored else None
        self.watch.on_notification(notification.job, notification.moment, ending)

    def _on_replacement(self, instance: str, cause: str) -> None:
        """Check that the manager has a valid reason to replace the instance."""
        worker = self.workers.get(instance)
        if worker is not None:
            self.watch.on_replace(worker.actor, cause)

    def _ended(self, process: ManagerProcess) -> None:
        """Remove a manager that was killed, stopped, or deposed, and end the manager's process and open requests."""
        self.manager_processes.remove(process)
        self._check_exit(process.actor, process.task)
        process.actor.kill()

    def _check_exit(self, actor: Actor, main: asyncio.Task[None]) -> None:
        """Check that a process ended only because of errors of services."""
        error = None if main.cancelled() else main.exception()
        if error is not None and actor.alive and not _of_services(error):
            crash = Crashed(f"{actor.name} ended with an error of its own: {error!r}")
            crash.__cause__ = error
            self.watch.fail(crash)

    def _clock_of(self, rng: random.Random) -> SkewedClock:
        return SkewedClock(self.clock, rng.uniform(-self.skew_s, self.skew_s))

    def _wrap(self, inner: T, port: str, actor: Actor, rights: Rights | None = None, stream: str = "") -> T:
        watch = self.watch if self.watched else None
        return wrap(inner, port, actor, self.faults, self.log, watch, rights, stream)

    async def supervise(self) -> None:
        """Start a manager, and start a new manager some time after the end of each manager, forever."""
        rng = self.rng("supervisor")
        while True:
            await asyncio.wait([self.start_manager()])
            await asyncio.sleep(rng.uniform(0.5, 1.5) * RESTART_S)
            await self.may_start.wait()

    def _boot(self, pool: Pool, instance: str) -> SimWorker:
        worker = SimWorker(self, pool, instance)
        self.workers[instance] = worker
        return worker

    def runner(self, die: Callable[[], None], objects: Objects, instance: str) -> Runner:
        """Return a runner for the worker of an instance."""
        if self.make_runner is not None:
            return self.make_runner(self, die, objects)
        assert self.script is not None
        is_slow = self.slow_share > 0 and self.rng(f"slow/{instance}").random() < self.slow_share
        return ScriptedRunner(self.script, self.clock, self._start, die, SLOWNESS if is_slow else 1.0)

    def _start(self, scene: AttemptInput) -> Callable[[], None]:
        now_s = self.clock.monotonic_s()
        job, stage = scene.job.id, scene.stage.name
        start = Start(now_s, CURRENT.get(), job, stage, scene.task, scene.bundle.round, scene.item)
        self.watch.on_start(start)
        self.watch.on_task(scene.bundle, scene.task, start.actor)
        self.watch.gpus.on_start(start.actor, scene.stage, scene.gpus)

        def ended() -> None:
            start.ended_s = self.clock.monotonic_s()
            self.watch.gpus.on_end(start.actor, scene.gpus)

        return ended

    # --- The user --------------------------------------------------------------------------------

    async def ask(self, call: Callable[[Manager], object], name: str) -> object:
        """Send a request to the current leader, and repeat the request until an answer arrives.

        Return Refused if the manager refuses the request.
        """
        while True:
            leader = self.leader
            if leader and leader.manager.is_leader.is_set():
                task = leader.actor.spawn(_call(call, leader.manager), name=name)
                await asyncio.wait([task])
                if not task.cancelled():
                    error = task.exception()
                    if error is None or isinstance(error, Refused):
                        return error if error else task.result()
                    if leader.actor.alive and not isinstance(error, BackendError):
                        raise error
            await asyncio.sleep(1.0)

    async def change(self, change: UserChange, call: Callable[[Manager], object], name: str) -> object:
        """Send a user's request for a change, and return as `ask` does."""
        return await self.ask(partial(self.watch.audits.perform, change, call), name)

    async def submit(self, job: JobDef) -> None:
        """Submit a job repeatedly until a manager accepts the job."""
        await self.ask(lambda m: m.job_commands.submit(job), f"submit {job.id}")

    async def find(self, job: JobId) -> JobRecord | None:
        """Return the job in the ledger, or None if the ledger does not have the job."""
        if not isinstance(self.ledger, SimLedger):
            return await self.ledger.find(job)
        try:
            return await self.ledger.job(job)
        except NotFound:
            return None

    async def rows(self, job: JobId) -> JobRows:
        """Return the job and its stages in the ledger. Raise NotFound if the ledger does not have the job."""
        if not isinstance(self.ledger, SimLedger):
            return await self.ledger.cached_rows(job)
        return await self.ledger.rows(job)

    async def ended(self, job: JobId) -> JobRecord:
        """Wait for the end of a job, and return the job."""
        while True:
            record = await self.find(job)
            if record is not None and record.state.ended:
                return record
            await asyncio.sleep(1.0)

    async def groups(self) -> Sequence[GroupView]:
        """Return the fleet of the leader."""
        assert self.manager is not None
        return await self.manager.ports.fleet.describe()


def _of_services(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_of_services, error.exceptions))
    return isinstance(error, BackendError | ActorKilled)


async def _run(manager: Manager, audit: AuditLog) -> None:
    """Run a manager, and store the audit records that wait at its end."""
    try:
        await manager.run()
    finally:
        await audit.close()


async def _call(call: Callable[[Manager], object], manager: Manager) -> object:
    result = call(manager)
    return await result if asyncio.iscoroutine(result) else result


class SimWorker:
    """A worker in an instance of the simulated launcher."""

    def __init__(self, world: World, pool: Pool, instance: str) -> None:
        self.ended: str | None = None
        self.instance = instance
        self.actor = Actor(f"worker-{instance}")
        self._world = world
        rng = world.rng(f"worker/{instance}")
        self.clock = world._clock_of(rng)
        self.rights = Rights(partial(world.watch.trust.on_denial, self.actor), pool.name)
        rights = self.rights if world.watched else None
        objects = world._wrap(world.objects, "objects", self.actor, rights)
        queue = world._wrap(world.queue, "queue", self.actor, rights)
        self.who = Identity(f"w-{instance}", instance, pool.name, pool.slots, f"key-{instance}", pool.gpus)
        world.watch.gpus.on_boot(self.actor, pool)
        self.worker = Worker(
            self.who,
            objects,
            queue,
            self.clock,
            world.runner(self._die, objects, instance),
            Patience(rng),
            world.worker_settings,
            ends_without_manager=world.manager_settings.orphan_s > 0,
        )
        main = self.actor.spawn(self.worker.run(), name=f"worker {instance}")
        main.add_done_callback(self._exited)

    def begin_to_lie(self, rng: random.Random, pace: float) -> None:
        """Make the worker lie from now on. A lying worker stops receiving messages in half of the cases."""
        world = self._world
        world.watch.trust.on_corruption(self.actor)
        self.rights.deaf = rng.random() < 0.5
        rights = Rights(partial(world.watch.trust.on_denial, self.actor), self.who.pool)
        ports = WorkerPorts(
            self.actor,
            self.who,
            world._wrap(world.objects, "objects", self.actor, rights),
            world._wrap(world.queue, "queue", self.actor, rights),
            world.clock,
            world.watch.trust,
            world.objects,
        )
        liar = Liar(ports, rng)
        insider = Insider(ports, liar, world.rng(f"insider/{self.instance}"))
        self.actor.spawn(liar.lie(pace), name=f"liar {self.instance}")
        self.actor.spawn(insider.lie(pace), name=f"insider {self.instance}")

    def stop(self, grace_s: float) -> None:  # noqa: ARG002 - the launcher keeps the deadline
        """Simulate SIGTERM."""
        if self.ended is None:
            self._world.watch.on_drain(self.actor)
            self.worker.drain()

    def kill(self, reason: str) -> None:
        """Simulate SIGKILL."""
        if self.ended is None:
            self.ended = reason
            self._world.watch.on_kill(self.actor)
            self.actor.kill()

    def _die(self) -> None:
        self.kill(KILLED)

    def _exited(self, main: asyncio.Task[None]) -> None:
        """Record whether the worker ended by a drain or by a fault."""
        if self.ended is None:
            self._world._check_exit(self.actor, main)
            crashed = main.cancelled() or main.exception()
            self.ended = KILLED if crashed else "exit 0"
            if crashed:
                self._world.watch.on_kill(self.actor)
            else:
                self._world.watch.on_exit(self.actor)
                self._world.watch.gpus.check_free(self.actor, self.worker.free_gpus)
            self.actor.kill()
