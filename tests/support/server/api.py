"""A manager with its HTTP API on a real server, in its own thread, over services in memory.

The grid does not have workers. A test does a worker's work itself.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import uvicorn

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.memory.launcher import MemoryState, SimLauncher
from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.memory.queue import SimQueue
from batchlab.adapters.sql import open_memory
from batchlab.client.http import Client
from batchlab.core.api_types import JobView
from batchlab.core.commit import commit
from batchlab.core.job_definition import InputDef, JobDef, StageDef
from batchlab.core.model import Failure, FailureKind, JobId, Pool, Ran, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Ledger, Objects, Outgoing
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.pricing.usage import Accounting
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.commit_keys import jobs_in, with_proofs
from batchlab.core.protocol.messages import Beat, Events, HeldBundle, events_message
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.retry_rule import RetryRule
from batchlab.core.service_settings import ManagerSettings
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.manager.audit_log import AuditLog
from batchlab.manager.manager import Manager
from batchlab.manager.state import LiveJob, Outstanding, Ports
from batchlab.reports.tables.build import Setting
from batchlab.reports.tables.write import Writer
from batchlab.runtime import factory
from batchlab.runtime.home import Home, listen
from batchlab.server import web
from batchlab.server.http import create_app
from batchlab.server.report_writer import HtmlReports

T = TypeVar("T")

TOKEN = "correct horse"
DEADLINE_S = 10.0
MAP = StageName("map")
SETTINGS = ManagerSettings(control_lease_s=0.05, tick_s=0.05, wait_s=0.2)


class Machine:
    """A simulated instance that boots and then waits until it is terminated."""

    ended: str | None = None

    def stop(self, grace_s: float) -> None:
        self.ended = "exit 0"

    def kill(self, reason: str) -> None:
        self.ended = reason


def job(
    name: str = "sums", token: str = "t", *, tasks: int = 4, after: Sequence[StageDef] = (), **stage: Any
) -> JobDef:
    """Return a job with one file per task and, unless `stage` changes the retry rule, one attempt per task."""
    made = object_keys.job_id(name, token)
    first = {"handler": "m:f", "bundle": 1, "retry": RetryRule(attempts=1), **stage}
    return JobDef(
        made,
        name,
        (StageDef(MAP, **first), *after),
        time.time(),
        input=InputDef(keys=tuple(f"{object_keys.raw(made)}{i}" for i in range(tasks))),
        token=token,
        tags=(("team", "blue"),),
    )


@dataclass
class Rig:
    """A running manager with an API. If `lead` is false, the manager does not take the lease.

    With `home`, the ledger and the bucket are in this folder, and stay after the end of the manager. `reports` is a
    folder for temporary files of HTML reports, or None for a page without reports. With `prices`, the manager counts
    usage, and the page shows costs.
    """

    pools: Sequence[Pool] = (Pool("default", max_size=2, slots=2),)
    lead: bool = True
    failure: Callable[[int], Failure] = field(default_factory=lambda: _failure)
    home: Home | None = None
    reports: Path | None = None
    prices: PriceBook | None = None

    def __enter__(self) -> Self:
        self.shutdowns = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="rig")
        self._thread.start()
        assert self._ready.wait(DEADLINE_S)
        self.client = Client(self.url, TOKEN)
        # An SSL context without certificates, because loading certificates takes longer than most tests.
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.http = httpx.Client(base_url=self.url, verify=bare, trust_env=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.client.close()
        self.http.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        clock, ids = WallClock(), RandomIds()
        self.launcher = launcher = SimLauncher(lambda pool, instance: Machine(), random.Random(1))
        self.objects: Objects
        self.ledger: Ledger
        if self.home:
            local = factory.load("local")
            self.objects, self.ledger = local.open_objects(self.home), local.open_ledger(self.home)
        else:
            self.objects, self.ledger = SimObjects(), open_memory()
        self.queue = SimQueue(clock, random.Random(2))
        self.fleet = ManagedFleet(launcher, clock, ids, MemoryState())
        patience = Patience(random.Random(3), limit_s=0.2)
        ports = Ports(self.objects, self.queue, self.fleet, self.ledger, clock, ids, patience)
        accounting = Accounting(lambda _: 0.1) if self.prices else None
        self.audit = AuditLog(ports)
        self.manager = Manager(
            ports,
            SETTINGS,
            self.pools,
            "manager-1",
            schedules=True,
            shares=True,
            accounting=accounting,
            audit=self.audit,
        )
        self.app, self.served = create_app(
            self.manager, token=TOKEN, backend_name="memory", on_shutdown=self._count_shutdown, hosts=["grid.example"]
        )
        reports = None
        if self.reports:
            writer = Writer(self.objects, patience, Setting("local", self.pools, Pace()), self.reports)
            reports = HtmlReports(self.objects, writer, self.reports)
        web.mount(self.app, self.served, prices=self.prices, reports=reports)
        config = uvicorn.Config(self.app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        with listen("127.0.0.1", 0) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            leading = asyncio.create_task(self.manager.run()) if self.lead else None
            if leading:
                await self.manager.is_leader.wait()
            self._ready.set()
            await self._stop.wait()
            server.should_exit = server.force_exit = True
            await serving
        if leading:
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
        await self.audit.close()
        await self.ledger.close()

    def _count_shutdown(self) -> None:
        assert asyncio.get_running_loop() is self._loop
        self.shutdowns += 1

    # --- Actions of a test -------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the manager's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def until(self, look: Callable[[], T], what: str) -> T:
        """Return the first true result of `look`."""
        end_s = time.monotonic() + DEADLINE_S
        while not (found := look()):
            assert time.monotonic() < end_s, f"waited in vain for {what}"
            time.sleep(0.005)
        return found

    def submit(self, job: JobDef, client: Client | None = None) -> str:
        """Upload the raw data, submit the job with the client or as the owner of the grid, and return its id."""

        async def upload() -> None:
            for key in job.input.keys if job.input else ():
                await self.objects.put(key, b"data")

        self.run(upload())
        return (client or self.client).submit(job)["id"]

    def outstanding(self, job: str, count: int) -> list[Outstanding]:
        """Return the job's outstanding bundles, as soon as there are `count` of them."""

        def look() -> list[Outstanding]:
            live = self.manager.lives.get(JobId(job))
            found = live.all_outstanding() if live else []
            return found if len(found) == count else []

        return self.until(look, f"{count} bundles of {job}")

    def work(self, job: str, count: int, *, bad: Collection[int] = ()) -> None:
        """Process the `count` outstanding bundles as a worker would. The tasks in `bad` fail. The method returns when
        the manager has folded the outcomes."""
        self.work_on(job, count, range(count), bad=bad)

    def work_on(self, job: str, count: int, which: Collection[int], *, bad: Collection[int] = ()) -> None:
        """Process only the bundles with the positions `which`, ordered by their tasks."""
        every = sorted(self.outstanding(job, count), key=lambda one: one.bundle.tasks.first)
        found = [every[number] for number in which]
        live = self.manager.lives[JobId(job)]
        self.run(self._work(live, found, bad))
        ids = _ids(found)
        self.until(lambda: not ids & _ids(live.all_outstanding()), "the fold")

    async def _work(self, live: LiveJob, found: Sequence[Outstanding], bad: Collection[int]) -> None:
        for one in found:
            bundle = one.bundle
            now_s = time.time()
            texts = {task: f"task {task}, try {bundle.attempt}\n".encode() for task in bundle.tasks}
            log = object_keys.log(bundle, "x", UNSEALED)
            await self.objects.put(log, b"".join(texts.values()))
            spans, at = [], 0
            for task, text in texts.items():
                spans.append((task, at, at := at + len(text)))
            outcome = settlement.settle(
                live.job,
                bundle,
                [Ran(task, 0.01, task, self.failure(task) if task in bad else None) for task in texts],
                execution="x",
                worker="w",
                started_s=now_s,
                ended_s=now_s + 0.01,
                log=log,
                log_spans=spans,
            )
            key = await self.manager.ports.keys.key_of(live.job)
            await commit(self.objects, outcome, self.manager.ports.patience, key)
            await self.tell(Events(completions=(settlement.completion(outcome),)))

    def beat(self, instance: str, *runs: Outstanding, pool: str = "default", waits: Sequence[Outstanding] = ()) -> Beat:
        """Return a heartbeat in which an instance's worker reports that it runs the bundles `runs`, and holds the
        bundles `waits` without running them."""
        queue = object_keys.tasks_queue(pool)
        held = tuple(
            HeldBundle(queue, o.bundle.id, o.bundle.job, o.bundle.stage, o.bundle.id, is_running)
            for found, is_running in ((runs, True), (waits, False))
            for o in found
        )
        beat = Beat(f"w-{instance}", instance, pool, time.time(), 2, len(runs), held, 1)
        self.run(self.tell(Events(beats=(beat,))))
        self.until(lambda: (seen := self.manager.registry.workers.get(instance)) and seen.beat == beat, "the beat")
        return beat

    async def tell(self, events: Events) -> None:
        jobs, keys = jobs_in(events), self.manager.ports.keys
        known = {job: await keys.key_of((await self.ledger.job(job)).job) for job in jobs}
        body = with_proofs(events_message(events), jobs, lambda job: known[job])
        await self.queue.send(object_keys.EVENTS, [Outgoing(body)])

    def ended(self, job: str) -> JobView:
        """Return the job's view once the job has ended."""
        self.until(lambda: self.client.job(job)["ended_s"], f"the end of {job}")
        return self.client.job(job)

    def instance(self) -> str:
        """Return an instance of the default pool, as soon as there is one."""

        def look() -> list[str]:
            pool = self.client.grid()["pools"][0]
            return [one["id"] for one in pool["instances"] if one["state"] != "Terminated"]

        return self.until(look, "an instance")[0]

    def instances(self, count: int, state: str = "InService") -> list[str]:
        """Return the instances of the default pool, as soon as `count` of them are in `state`."""

        def look() -> list[str]:
            pool = self.client.grid()["pools"][0]
            found = [one["id"] for one in pool["instances"] if one["state"] == state]
            return found if len(found) == count else []

        return self.until(look, f"{count} instances {state}")


def _ids(found: Iterable[Outstanding]) -> set[tuple[str, str]]:
    return {(one.bundle.stage, one.bundle.id) for one in found}


def _failure(task: int) -> Failure:
    return Failure(task, FailureKind.EXCEPTION, f"task {task} is bad", "ValueError", "Traceback")


def later(call: Callable[[], T]) -> Callable[[], T]:
    """Start a blocking call in another thread, and return a function that waits for its result."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()

    def result() -> T:
        thread.join(DEADLINE_S)
        assert results, "the call failed or has not ended"
        return results[0]

    return result


def post(rig: Rig, path: str, body: Any = None) -> httpx.Response:
    """Return the response itself, where the client would raise an error."""
    return rig.http.post(path, json=body, headers={"Authorization": f"Bearer {TOKEN}"})


def get(rig: Rig, path: str) -> httpx.Response:
    return rig.http.get(path, headers={"Authorization": f"Bearer {TOKEN}"})
