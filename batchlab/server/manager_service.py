"""Manager process, with the manager's ports, API, web page, and local workers.

Invariant: SIGTERM ends the manager, leaves no process running, and loses no data. After the kill of a manager, the next
manager continues with the stored data and with the workers that still run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from batchlab.core import gc_control, logs
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.model import JobId, Pool
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.pricing.price_book import HOURS_A_MONTH, WORKER_DISK_GB
from batchlab.core.pricing.request_costs import RequestCounter, usd_of
from batchlab.core.pricing.usage import Accounting, Kind
from batchlab.runtime import factory
from batchlab.runtime.aws_deployment import prices_of
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, ManagerRecord
from batchlab.server.shutdown import end_instances, end_with, stop_by_signal

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from batchlab.adapters.docker.mixed_launcher import MixedLauncher
    from batchlab.adapters.local.processes import ProcessLauncher
    from batchlab.core.ports import Clock
    from batchlab.manager.manager import Manager
    from batchlab.server.http.common import ServerState
    from batchlab.server.http_server import Server
    from batchlab.server.quick_api import QuickApi

T = TypeVar("T")

log = logging.getLogger(__name__)

LEASE_RETRY_S = 1.0
"""Pause in seconds between the loss of the lease and the next attempt to acquire the lease."""
LOADING_SWITCH_S = 0.0005
"""Time in seconds after which a thread that imports modules yields to the event loop.

With Python's default of 5 ms, each of the many short steps until the first launch waited 5 ms for the thread.
"""
API_IDLE_S = 2.0
"""Time in seconds without live and new jobs after which the manager loads the API, unless a request needs the API
before.

The import of the API uses most of a core for half a second. The import would delay the first jobs of a grid, which
often follow each other after a short pause, and the end of a grid that runs a single job.
"""
MAX_API_DELAY_S = 30.0
"""Maximum time in seconds from the start until the manager loads the API."""
_API_MODULES = ("fastapi", "pydantic", "python_multipart", "starlette", "uvicorn")
DELIVERY_WAIT_S = 3.0
"""Time in seconds that an ending manager waits for the first delivery attempts of new notifications."""


@dataclass(frozen=True, slots=True)
class ManagerOptions:
    """Options of a manager process.

    If `parent` is not 0, the manager process ends when the process `parent` ends. The web page accepts the names of
    this machine, `host`, and `hosts` in the Host header.
    """

    home: Home
    backend: Backend
    host: str = "127.0.0.1"
    port: int = 0
    parent: int = 0
    hosts: Sequence[str] = ()


def manager_main(options: ManagerOptions) -> None:
    """Run a manager until SIGTERM, SIGINT, a shutdown request, or the end of its parent process."""
    logs.set_up(service="manager")
    for name in _API_MODULES:
        if find_spec(name) is None:  # The API is imported later, but an incomplete installation must not start.
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    async def manage() -> None:
        stop = stop_by_signal()
        async with _emulator_running(options.home, options.backend):
            clock = options.backend.open_clock()
            with _prepared_launcher(options, clock) as launcher:
                await _lead(options, stop, clock, launcher)

    with options.home.lock():
        asyncio.run(manage())


@asynccontextmanager
async def _emulator_running(home: Home, backend: Backend) -> AsyncIterator[None]:
    """Run the block while the backend's emulator of AWS runs, if the backend has an emulator.

    The function `_emulator_running` starts, supervises, and stops the emulator.
    """
    emulator = backend.open_emulator(home)
    if emulator is None:
        backend.settle(home, None)
        yield
        return
    settle = partial(backend.settle, home, emulator)
    try:
        emulator.start()
        settle()
        supervising = asyncio.create_task(emulator.supervise(settle))
        try:
            yield
        finally:
            supervising.cancel()
            await asyncio.gather(supervising, return_exceptions=True)
    finally:
        emulator.stop()


@contextmanager
def _prepared_launcher(options: ManagerOptions, clock: Clock) -> Iterator[ProcessLauncher | MixedLauncher | None]:
    """Run the block with the backend's launcher, if the backend has a launcher, and then end the fork server.

    The fork server imports its modules while this process imports the manager's modules.
    """
    launcher = options.backend.open_launcher(options.home, clock)
    if launcher is None:
        yield None
        return
    launcher.prepare()
    try:
        yield launcher
    finally:
        launcher.end_fork_server()


async def _lead(
    options: ManagerOptions, stop: asyncio.Event, clock: Clock, launcher: ProcessLauncher | MixedLauncher | None
) -> None:
    home, backend = options.home, options.backend
    from batchlab.manager.audit_log import AuditLog
    from batchlab.manager.collector import events_queue
    from batchlab.manager.context import NotificationChannels
    from batchlab.manager.counters import Counters
    from batchlab.manager.manager import LEASE, Manager
    from batchlab.manager.recorder import ReportQueue
    from batchlab.manager.state import Ports
    from batchlab.runtime import settings
    from batchlab.runtime.home import listen, listen_locally, remove_socket
    from batchlab.server.report_writer import open_reporter

    ids = backend.open_ids()
    ledger = backend.open_ledger(home)
    tally = RequestCounter()
    queue = backend.open_queue(home, clock, tally)
    ports = Ports(
        backend.open_objects(home, tally),
        queue,
        backend.open_fleet(home, launcher, clock),
        ledger,
        clock,
        ids,
        factory.patience(),
    )
    owner = ids.fresh("manager")
    logs.add_process_fields(manager=owner)
    # The release of the lease is not retried, so that the user sees a damaged file or a newer file format at once. The
    # manager process holds the lock of the home, so the previous manager has ended, and the lease of the previous
    # manager can be released.
    await ledger.release(LEASE, home.last_owner() or owner)
    if backend.capabilities.local_queue:
        await queue.ensure(events_queue(backend.manager))
    pools = backend.pools_in(home)
    accounting = accounting_of(home, pools, tally)
    counts, audit = Counters(), AuditLog(ports)
    reports = ReportQueue(open_reporter(backend, home, ports.objects, pools), counts)
    tracer = backend.open_tracer("manager", owner)
    recent = logs.Recent()
    logging.getLogger("batchlab").addHandler(recent)
    new_manager = partial(
        Manager,
        ports=ports,
        settings=backend.manager,
        pools=pools,
        owner=owner,
        accounting=accounting,
        reports=reports,
        counts=counts,
        tracer=tracer,
        channels=NotificationChannels(
            settings.notification_watcher(home, in_container=backend.capabilities.container_manager),
            backend.open_deliveries(home, clock),
        ),
        recent=recent,
        audit=audit,
        schedules=True,
        shares=True,
        one_machine=backend.capabilities.shares_gpus,
    )
    token = await asyncio.to_thread(backend.api_token, home)
    logs.hide(token, *(value for pool in pools for _, value in pool.env))
    listeners = [listen(options.host, options.port)]
    loop = asyncio.get_running_loop()
    url = f"http://{options.host}:{listeners[0].getsockname()[1]}"
    if backend.capabilities.local_manager and (local := listen_locally(home)):
        listeners.append(local[0])
        home.write_socket(owner, local[1])
    backend.permit_direct_calls(home)
    # The record is written before this manager leads, because the next manager must know the owner of the lease. A
    # request that arrives before the server runs waits for the server.
    home.write_record(ManagerRecord(url, os.getpid(), owner, backend.name, options.parent))
    lead = _Lead(_with_reasons(new_manager()))
    leading = loop.create_task(_lead_on(lead, new_manager))
    watching: list[asyncio.Task[None]] = [loop.create_task(end_with(options.parent, stop))]

    async def load_api() -> ASGIApp:
        app, served = await _load(partial(_api, lead, token, options, stop.set))
        lead.serve(served)
        # The import of the history module is fast, because a thread has just imported the API, on which the history
        # module depends.
        from batchlab.server.http.history import record_history

        watching.append(loop.create_task(record_history(served.history, lambda: lead.manager)))
        return app

    # The server is created while the workers boot, because both take about the same time.
    try:
        server, quick_api = await _load(partial(_server, lead, token, backend, load_api))
    except BaseException:
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
        await _end_instances(launcher, backend)
        raise
    # While uvicorn serves, uvicorn handles SIGTERM and SIGINT. The process ends when the uvicorn server returns.
    serving = loop.create_task(server.serve(sockets=listeners))
    loading = loop.create_task(_load_later(quick_api, lead))
    watching.append(loading)
    if launcher:
        watching.append(loop.create_task(_wake_on_change(lead, launcher.changed)))
    log.info("manager %s listens on %s", owner, url)
    stopping = loop.create_task(stop.wait())
    await _first_end({stopping, leading, serving}, loading)
    log.info("manager %s ends", owner)
    if (notifier := lead.manager.notifier) and lead.manager.is_leader.is_set():
        # The user of a grid that runs a single job and then stops still waits for the job's notification.
        await notifier.wait_for_attempts(DELIVERY_WAIT_S)
    server.end()
    for task in (leading, stopping, *watching):
        task.cancel()
    results = await asyncio.gather(leading, serving, loading, stopping, *watching, return_exceptions=True)
    await _end_instances(launcher, backend)
    await audit.close()
    remove_socket(home)
    await queue.close()
    await ledger.close()
    await tracer.close()
    for result in results[:3]:
        if isinstance(result, Exception):
            raise result


async def _end_instances(launcher: ProcessLauncher | MixedLauncher | None, backend: Backend) -> None:
    # Without a launcher, the instances belong to an AWS service and outlive the manager.
    if launcher:
        await end_instances(launcher, backend.worker.drain_s)


@dataclass
class _Lead:
    """Holder of the current manager object.

    The API reads the manager from `served`, which is None until the API exists.
    """

    manager: Manager
    served: ServerState | None = None

    def replace_manager(self, manager: Manager) -> None:
        self.manager = manager
        if self.served:
            self.served.manager = manager

    def serve(self, served: ServerState) -> None:
        self.served = served
        served.manager = self.manager


async def _load(create: Callable[[], T]) -> T:
    """Return the result of `create`, which imports many modules on a thread while the event loop continues."""
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(LOADING_SWITCH_S)
    gc_control.pause()
    try:
        return await asyncio.to_thread(create)
    finally:
        gc_control.resume()
        sys.setswitchinterval(switch_s)


def _server(
    lead: _Lead, token: str, backend: Backend, load_api: Callable[[], Awaitable[ASGIApp]]
) -> tuple[Server, QuickApi]:
    """Create the server. The server serves the API as soon as `load_api` has loaded the API."""
    from batchlab.server.http_server import Server
    from batchlab.server.quick_api import QuickApi

    quick_api = QuickApi(token, backend.name, lambda: lead.manager, load_api)
    return Server(quick_api), quick_api


def _api(
    lead: _Lead, token: str, options: ManagerOptions, on_shutdown: Callable[[], None]
) -> tuple[ASGIApp, ServerState]:
    """Create the API and the web page.

    The imports and routes of the API and the web page take as long as all other steps of a manager's start.
    """
    from batchlab.adapters.local.state_files import StateFile
    from batchlab.server import web
    from batchlab.server.http import create_app
    from batchlab.server.report_writer import open_html_reports

    home, backend = options.home, options.backend
    app, served = create_app(
        lead.manager,
        token=token,
        backend_name=backend.name,
        capabilities=backend.capabilities,
        on_shutdown=on_shutdown,
        # After a manager on the user's machine ends, another program may listen on the manager's port and receive the
        # requests of an open page. The sessions of a manager on the user's machine are therefore not stored and end
        # with the manager.
        sessions=StateFile(home.sessions_file) if backend.capabilities.remote_manager else None,
        hosts=[options.host, *options.hosts],
    )
    try:
        prices = prices_of(home)
    except UsageError as error:
        log.warning("the web page shows no costs: %s", error)
        prices = None
    reports = open_html_reports(backend, home, lead.manager.ports.objects, backend.pools_in(home))
    web.mount(app, served, prices=prices, reports=reports, pace=backend.pace)
    return app, served


async def _load_later(quick_api: QuickApi, lead: _Lead) -> None:
    """Load the API when the grid is idle, unless a request has loaded the API before.

    Raise the error of the import, also if a request has caused the import.
    """
    step_s = API_IDLE_S / 8
    waited_s = idle_s = 0.0
    adopted = 0
    while idle_s < API_IDLE_S and waited_s < MAX_API_DELAY_S and not quick_api.has_begun_loading:
        await asyncio.sleep(step_s)
        waited_s += step_s
        lives = lead.manager.lives
        is_idle = lead.manager.is_leader.is_set() and not lives and lives.adopted == adopted
        adopted = lives.adopted
        idle_s = idle_s + step_s if is_idle else 0.0
    # The end of the manager cancels this function, but requests that have arrived before still wait for the API.
    await asyncio.shield(quick_api.start_loading())


async def _first_end(ends: set[asyncio.Task[Any]], loading: asyncio.Task[None]) -> None:
    """Wait for the end of a task of `ends`, or for a failure of `loading`."""
    done, _ = await asyncio.wait({*ends, loading}, return_when=asyncio.FIRST_COMPLETED)
    if done == {loading} and not loading.cancelled() and loading.exception() is None:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)


async def _lead_on(lead: _Lead, new_manager: Callable[[], Manager]) -> None:
    """Run the manager, and create a new manager object after each loss of the lease.

    A full disk, a long outage of the database, or another manager can cause a loss of the lease.

    Raise BackendError if the first attempt to acquire the lease fails, so that the user sees the error at once.
    """
    has_led = False
    while True:
        try:
            await lead.manager.run()
        except* BackendError as errors:
            if not (has_led or lead.manager.has_led):
                raise
            log.warning("the backend does not respond: %s", errors.exceptions[0])
        raise_if_cancelled()
        has_led = True
        await asyncio.sleep(LEASE_RETRY_S)
        log.warning("the manager tries to get the lease again")
        lead.replace_manager(_with_reasons(new_manager()))


def _with_reasons(manager: Manager) -> Manager:
    """Give the manager's notifications the function that explains why a job does not progress."""
    from batchlab.server import job_facts
    from batchlab.server.wait_reasons import why

    async def explain(job: JobId) -> str:
        return why(await job_facts.gather(manager, job))

    if manager.notifier:
        manager.notifier.explain = explain
    return manager


async def _wake_on_change(lead: _Lead, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        lead.manager.wake()


def accounting_of(home: Home, pools: Sequence[Pool], tally: RequestCounter) -> Accounting:
    """Return the accounting of the grid. If the price book cannot be read, the accounting does not have prices."""
    try:
        book = prices_of(home)
    except UsageError as error:
        log.warning("the grid has no prices, so cost caps have no effect: %s", error)
        return Accounting(tally=tally)
    if book.mismatch:
        log.warning("cost caps: %s", book.mismatch)
    instance_types = {pool.name: pool.instance_type for pool in pools}
    disk_usd_h = book.price("ebs", "gp3_usd_per_gb_month") * WORKER_DISK_GB / HOURS_A_MONTH

    def usd_h(kind: Kind) -> float:
        return book.rate(kind.type, kind.market, instance_types.get(kind.pool, "")).high + disk_usd_h

    return Accounting(usd_h, lambda requests: sum(usd_of(requests, book)), tally)
