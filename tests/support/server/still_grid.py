"""The web page of a grid that does not change.

Invariant: the page always shows the same content. The clock does not move, the fleet and the queues are tables, no
worker runs, and the content of the ledger and the bucket is fixed.
"""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Self, cast

import uvicorn

from batchlab.adapters.clock import RandomIds
from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.client.http import Client
from batchlab.core.commit import commit
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Control, JobId, JobState, Market, Ran, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import AddCut, AddJob, Cut, Ending, Finish, Fleet, Fold, MoveJob, Queue, SetControl
from batchlab.core.pricing import price_book
from batchlab.core.pricing.request_costs import RequestCounter, Requests
from batchlab.core.pricing.usage import Account, Kind, Life
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.messages import Beat, HeldBundle, Tail, to_bytes
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.schedules import Definition, RunState, ScheduledRun, When
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager.manager import Manager
from batchlab.manager.spending import JobUsage
from batchlab.manager.stage_plans import StagePlans
from batchlab.manager.state import Ports, WorkerStatus
from batchlab.runtime import factory
from batchlab.runtime.home import Home, listen, listen_locally
from batchlab.server import web
from batchlab.server.http import create_app
from batchlab.server.manager_service import accounting_of
from tests.support.server.still_tables import (
    BAD,
    CANCELLED,
    DONE,
    FAILED,
    GROUPS,
    LARGE,
    LONG,
    NOW_S,
    OK,
    PAUSED,
    POLICY,
    POOLS,
    PRICES,
    RUNS,
    TOTAL,
    WAITS,
    StandingClock,
    StillFleet,
    StillQueue,
    failure,
    metrics,
    moments,
)

TOKEN = "correct horse"
DEADLINE_S = 10.0


@dataclass
class StillGrid:
    """A server of the page at `url`. If `empty` is true, the grid does not have jobs, schedules, or instances."""

    home: Home
    empty: bool = False

    def __enter__(self) -> Self:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="still")
        self._thread.start()
        assert self._ready.wait(DEADLINE_S)
        # The client uses the socket, because signed requests need a running clock.
        self.client = Client(self.url, TOKEN, self._socket)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        ports = Ports(
            SimObjects(),
            cast(Queue, StillQueue()),
            cast(Fleet, StillFleet()),
            open_memory(),
            StandingClock(),
            RandomIds(),
            Patience(random.Random(3), limit_s=0.2),
        )
        self.manager = manager = Manager(
            ports=ports,
            settings=ManagerSettings(),
            pools=POOLS,
            owner="manager-1",
            accounting=accounting_of(self.home, POOLS, RequestCounter()),
            schedules=True,
            shares=True,
        )
        app, self.served = create_app(
            manager,
            token=TOKEN,
            backend_name="aws",
            capabilities=factory.load("aws").capabilities,
            on_shutdown=lambda: None,
        )
        web.mount(app, self.served, prices=price_book.load(self.home.path))
        assert manager.scheduler
        manager.scheduler._is_read.set()
        if not self.empty:
            await self._fill(ports)
            self.served.history.moments.extend(moments())
        manager.is_leader.set()
        config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        local = listen_locally(self.home)
        assert local
        with listen("127.0.0.1", 0) as listener, local[0]:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self._socket = local[1]
            serving = asyncio.create_task(server.serve(sockets=[listener, local[0]]))
            self._ready.set()
            await self._stop.wait()
            server.should_exit = server.force_exit = True
            await serving
        await ports.ledger.close()

    # --- Content of the grid ---------------------------------------------------------------------

    async def _fill(self, ports: Ports) -> None:
        await self._ran(ports, LONG, 10, NOW_S - 199_990, 190.0, total=True, within_s=250.0)
        await self._ended(ports, LONG, JobState.SUCCEEDED, "", NOW_S - 199_700)
        await self._ran(ports, CANCELLED, 60, NOW_S - 89_990, 12.0, only=20)
        await self._ended(ports, CANCELLED, JobState.CANCELLED, "its user has cancelled it", NOW_S - 89_000)
        await self._ran(ports, OK, 40, NOW_S - 28_790, 1.2, total=True)
        await self._ended(ports, OK, JobState.SUCCEEDED, "", NOW_S - 28_700)
        await self._ran(ports, FAILED, 24, NOW_S - 5_390, 0.5, bad=range(9))
        why = "9 of 24 tasks of stage prices failed, and its failure policy allows none"
        await self._ended(ports, FAILED, JobState.FAILED, why, NOW_S - 5_300)
        await self._ran(ports, RUNS, LARGE, NOW_S - 1_500, 0.18, only=DONE, bad=range(BAD), within_s=1_430.0)
        await self._ran(ports, PAUSED, 60, NOW_S - 890, 4.0, only=14, within_s=800.0)
        await ports.ledger.apply(MoveJob(PAUSED.id, JobState.PAUSED, 0))
        await ports.ledger.apply(SetControl(PAUSED.id, Control.PAUSE, 0))
        await ports.ledger.apply(AddJob(WAITS, JobState.SCHEDULED))
        await self.manager._adoption.adopt_active()
        await self.manager.fair_share.change(lambda _: POLICY)
        self._work()
        await self._print(ports)
        self._spend()
        await self._schedule()

    async def _ran(
        self,
        ports: Ports,
        job: JobDef,
        tasks: int,
        start_s: float,
        run_s: float,
        *,
        only: int | None = None,
        bad: range = range(0),
        total: bool = False,
        within_s: float = 80.0,
    ) -> None:
        """Add a job with `tasks` tasks. Only the first `only` tasks have ended within `within_s` seconds, and the tasks
        in `bad` failed. If `total` is true, the second stage has ended too."""
        await ports.ledger.apply(AddJob(job, JobState.SUBMITTED))
        assert job.input
        for number, key in enumerate(job.input.keys):
            await ports.objects.put(key, f"row {number}\nSKU-{number:05}\n".encode())
        if tasks <= 100:
            await StagePlans(ports).plan_input(job, job.stages[0])
        size = max(1, tasks // 100)
        edges = [*range(0, tasks, size), tasks]
        bundles = tuple(Bundle(job.id, PRICES, TaskSet.span(a, b)) for a, b in pairwise(edges))
        await ports.ledger.apply(AddCut(Cut(job.id, PRICES, 0, 0, bundles, TaskSet(), tasks)))
        done = [bundle for bundle in bundles if bundle.tasks.first < (tasks if only is None else only)]
        # Three workers with two slots each run the bundles one after the other.
        step_s = within_s / (len(done) / 6)
        for number, bundle in enumerate(done):
            turn, slot = divmod(number, 6)
            begin_s = start_s + turn * step_s + slot * step_s / 9
            worker = f"w-{slot % 3}c9f2ab"
            await self._outcome(ports, job, bundle, (begin_s, begin_s + step_s * 0.85), run_s, bad, worker)
        if total:
            last = Bundle(job.id, TOTAL, TaskSet.from_indices([0]))
            begin_s = start_s + (len(done) // 6 + 1) * step_s
            await ports.ledger.apply(AddCut(Cut(job.id, TOTAL, 0, 0, (last,), TaskSet(), 1)))
            await self._outcome(ports, job, last, (begin_s, begin_s + 5), run_s, range(0), "w-0c9f2ab")

    async def _outcome(
        self,
        ports: Ports,
        job: JobDef,
        bundle: Bundle,
        times_s: tuple[float, float],
        run_s: float,
        bad: range,
        worker: str,
    ) -> None:
        log = object_keys.log(bundle, "x", UNSEALED)
        spans, at, text = [], 0, b""
        if len(bundle.tasks) == 1:
            for task in bundle.tasks:
                text += f"reading row {task}\nlooking up SKU-{task:05}\n".encode()
                spans.append((task, at, at := len(text)))
            await ports.objects.put(log, text)
        ran = [
            # Some tasks take three times as long, so that durations vary.
            Ran(t, run_s * (1 + 2 * (t % 7 == 0)), t, failure(t) if t in bad else None, metrics(t, run_s))
            for t in bundle.tasks
        ]
        outcome = settlement.settle(
            job=job,
            bundle=bundle,
            ran=ran,
            execution="x",
            worker=worker,
            started_s=times_s[0],
            ended_s=times_s[1],
            log=log,
            log_spans=spans,
        )
        if outcome.failed or bundle.tasks.first < 1_000:
            await commit(ports.objects, outcome, ports.patience, await ports.keys.key_of(job))
        await ports.ledger.apply(Fold([settlement.completion(outcome)], [{}]))

    async def _ended(self, ports: Ports, job: JobDef, state: JobState, reason: str, ended_s: float) -> None:
        rows = await ports.ledger.rows(job.id)
        closed = {
            stage.counts.stage: (stage.counts.planned or 1) - stage.counts.terminal
            for stage in rows.stages
            if not stage.counts.ended
        }
        await ports.ledger.apply(Finish(job.id, Ending(state, reason, ended_s, closed), 0))

    def _work(self) -> None:
        """Let three workers report their running bundles."""
        manager = self.manager
        bundles = sorted(manager.lives[RUNS.id].all_outstanding(), key=lambda one: one.bundle.tasks.first)
        for number, instance in enumerate(GROUPS[0].instances[:3]):
            held = tuple(
                HeldBundle("q", None, RUNS.id, PRICES, one.bundle.id, running=turn < 2)
                for turn, one in enumerate(bundles[number * 3 : number * 3 + 3])
            )
            beat = Beat(
                worker=f"w-{number}c9f2ab",
                instance=instance.id,
                pool="default",
                at_s=NOW_S - 1,
                slots=2,
                busy=2,
                held=held,
                number=7,
            )
            since_s = manager.ports.clock.monotonic_s() - 8 * (number + 1)
            manager.registry.workers[instance.id] = WorkerStatus(
                beat, since_s, {one: since_s for one in held if one.running}
            )

    async def _print(self, ports: Ports) -> None:
        """Store the live log of a task of the first running bundle."""
        held = self.manager.registry.workers[GROUPS[0].instances[0].id].beat.held[0]
        text = "".join(f"reading row {row}\nlooking up SKU-{row:05}\n" for row in range(62_250, 62_262))
        tail = Tail(PRICES, 62_250, 1, 0, held.bundle, "x", 0, len(text), text)
        await ports.objects.put(object_keys.tail(RUNS.id, "w-0c9f2ab"), to_bytes([tail]))

    def _spend(self) -> None:
        spending = self.manager.spending
        assert spending
        kinds = {
            Kind("default", "c7g.large"): 5_120.0,
            Kind("default", "c7g.large", Market.SPOT): 2_970.0,
            Kind("large-memory", "r7g.2xlarge"): 360.0,
        }
        requests = Requests(48_210.4, 1_204, 6_120, 9_344)
        spending.meter.total = Account(dict(kinds), requests=requests, bundles=900)
        live = self.manager.lives[RUNS.id]
        live.account = Account(dict(list(kinds.items())[:2]), requests=requests.times(0.8))
        for instance in GROUPS[0].instances[:4]:
            kind = Kind("default", "c7g.large", instance.machine.market)
            spending.meter.lives[instance.id] = Life(kind)
        spending._ended[FAILED.id] = JobUsage(Account({Kind("default", "c7g.large"): 360.0}))
        spending.caps.max_cost_usd = 20.0

    async def _schedule(self) -> None:
        scheduler = self.manager.scheduler
        assert scheduler
        day_s = 86_400.0
        definitions = [
            Definition(
                name="nightly-prices",
                job="nightly-prices",
                when=When("0 2 * * 1-5", "Europe/Berlin"),
                template="",
                prewarm_s=600.0,
                missed_within_s=21_600.0,
                source="/home/ana/prices/job.yaml",
            ),
            Definition("month-end", "month-end", When("0 6 L * *"), "", capacity=8, prewarm_s=300),
            Definition("stocktaking", "quarterly", When(at_s=NOW_S + 3 * day_s), ""),
        ]
        for definition in definitions:
            template = replace(OK, id=JobId(f"{definition.name}-template"), name=definition.job)
            await scheduler.add(definition, template, replacing=False)
        await scheduler.pause("month-end")
        due_s = NOW_S - 36_000
        runs = (
            ScheduledRun(
                due_s=due_s - 5 * day_s,
                token="a",
                state=RunState.ENDED,
                decided_s=due_s - 5 * day_s,
                job=LONG.id,
                started_s=due_s - 5 * day_s + 1,
                ended_s=due_s - 5 * day_s + 92,
                result="SUCCEEDED",
            ),
            ScheduledRun(
                due_s=due_s - 4 * day_s,
                token="b",
                state=RunState.SKIPPED,
                decided_s=due_s - 4 * day_s + 200,
                reason="the run due at 2026-03-25 02:00:00 CET had not ended",
            ),
            ScheduledRun(
                due_s=due_s - 3 * day_s,
                token="c",
                state=RunState.ENDED,
                decided_s=due_s - 3 * day_s + 200,
                job=CANCELLED.id,
                started_s=due_s - 3 * day_s + 1,
                ended_s=due_s - 3 * day_s + 400,
                result="FAILED",
                reason="9 of 40 tasks of stage prices failed, and its failure policy allows none",
            ),
            ScheduledRun(
                due_s=due_s,
                token="d",
                state=RunState.ENDED,
                decided_s=due_s,
                job=OK.id,
                started_s=due_s + 1,
                ended_s=due_s + 91,
                result="SUCCEEDED",
                asked="somebody",
            ),
        )
        kept = scheduler.store.schedules["nightly-prices"]
        assert await scheduler.store.put(replace(kept, runs=runs))
        scheduler.notes = [
            "schedule nightly-prices: the run due at 2026-03-26 02:00:00 CET is skipped: the run "
            "due at 2026-03-25 02:00:00 CET had not ended"
        ]
