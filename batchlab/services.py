"""The two long-lived processes and how they come and go: the manager, and a worker.

Invariant: whoever is ended by SIGTERM leaves nothing running and nothing lost; whoever is killed
leaves nothing that the next start does not find.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab import backends
from batchlab.adapters.compose import deployment
from batchlab.backends import Backend
from batchlab.errors import BackendError, Unreachable
from batchlab.home import Home, ManagerRecord
from batchlab.manager.collector import events_queue
from batchlab.manager.live import Ports
from batchlab.manager.manager import LEASE, Manager
from batchlab.model import Pool

if TYPE_CHECKING:
    from batchlab.adapters.docker import ContainerLauncher
    from batchlab.adapters.process import ProcessLauncher
    from batchlab.asg.running import AsgSettings

log = logging.getLogger(__name__)

START_S = 30.0
_STARTED: dict[int, subprocess.Popen[bytes]] = {}
"""Managers that this process has started, by pid: a dead child stays a zombie until it is waited
for, and a Popen that is dropped complains."""

ORPHAN_S = 15.0
"""A worker whose manager has been gone for this long drains and ends: nothing is left behind."""


def manager_main(
    home: Home, backend: Backend, *, host: str = "127.0.0.1", port: int = 0, parent: int = 0
) -> None:
    """Run a manager until SIGTERM, SIGINT, a shutdown request, or the end of process `parent`."""
    _log_to_stderr()
    with home.locked():
        asyncio.run(_manage(home, backend, host, port, parent))


async def _manage(home: Home, backend: Backend, host: str, port: int, parent: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _standing(home, backend):
        await _lead(home, backend, host, port, parent, stop)


@asynccontextmanager
async def _standing(home: Home, backend: Backend) -> AsyncIterator[None]:
    """With the backend's endpoint up, and kept up where it is an emulator of the grid's own."""
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


async def _lead(
    home: Home, backend: Backend, host: str, port: int, parent: int, stop: asyncio.Event
) -> None:
    import uvicorn

    from batchlab.api import create_app, listen

    clock, ids = backend.open_clock(), backend.open_ids()
    ledger = backend.open_ledger(home)
    launcher = backend.open_launcher(home, clock)
    queue = backend.open_queue(home, clock)
    ports = Ports(
        backend.open_objects(home),
        queue,
        backend.open_fleet(home, launcher, clock),
        ledger,
        clock,
        ids,
        backends.patience(),
    )
    owner = ids.fresh("manager")
    # The first call of each: a file that is damaged, or of a newer batchlab, is told at once, not
    # waited for like an outage. And we hold the folder's lock, so the manager before us is dead
    # and its lease need not run out.
    await ledger.release(LEASE, home.last_owner() or owner)
    if backend.keeps_files:
        await queue.ensure(events_queue(backend.manager))
    manager = Manager(ports, backend.manager, backend.pools, owner)
    app = create_app(manager, token=home.token(), backend_name=backend.name, on_shutdown=stop.set)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=2,
            lifespan="off",
            proxy_headers=False,
        )
    )
    listener = listen(host, port)
    loop = asyncio.get_running_loop()
    # uvicorn takes SIGTERM and SIGINT for itself while it serves; its return ends us all the same.
    serving = loop.create_task(server.serve(sockets=[listener]))
    leading = loop.create_task(manager.run())
    watching = [
        loop.create_task(_end_with(parent, stop)),
    ]
    if launcher:
        watching.append(loop.create_task(_tell_of_deaths(manager, launcher.changed)))
    url = f"http://{host}:{listener.getsockname()[1]}"
    home.write_record(ManagerRecord(url, os.getpid(), owner, backend.name))
    log.info("manager %s listens on %s", owner, url)
    stopping = loop.create_task(stop.wait())
    await asyncio.wait({stopping, leading, serving}, return_when=asyncio.FIRST_COMPLETED)
    log.info("manager %s ends", owner)
    server.should_exit = True
    for task in (leading, stopping, *watching):
        task.cancel()
    results = await asyncio.gather(leading, serving, stopping, *watching, return_exceptions=True)
    if launcher:  # else they are a service's, and outlive every manager
        await _end_instances(launcher, backend.worker.drain_s)
    await queue.close()
    await ledger.close()
    for result in results[:2]:
        if isinstance(result, Exception):
            raise result


async def _tell_of_deaths(manager: Manager, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        manager.hurry()


async def _end_with(parent: int, stop: asyncio.Event) -> None:
    """Ask to stop once the process that wanted this grid is gone."""
    while parent:
        if os.getppid() != parent:
            stop.set()
            return
        await asyncio.sleep(0.5)


async def _end_instances(launcher: ProcessLauncher | ContainerLauncher, drain_s: float) -> None:
    """Drain every instance, wait, then kill what is left."""
    running = [name for name, ended in (await launcher.running()).items() if ended is None]
    for name in running:
        await launcher.terminate(name, grace_s=drain_s)
    deadline_s = time.monotonic() + drain_s
    while time.monotonic() < deadline_s:
        living = await launcher.running()
        if all(living.get(name) is not None for name in running):
            break
        launcher.changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(launcher.changed.wait(), 0.2)
    await launcher.close(kill=True)


def worker_main(
    home: Home, backend: Backend, *, pool: str = "", slots: int = 0, instance: str = ""
) -> None:
    """Run a worker until SIGTERM, a notice, or until its manager has been gone for a while.

    What is left out the instance's metadata service knows.
    """
    _log_to_stderr()
    asyncio.run(_work(home, backend, pool, slots, instance))


async def _work(home: Home, backend: Backend, pool: str, slots: int, instance: str) -> None:
    from batchlab.adapters.ec2_tags import POOL_TAG, SLOTS_TAG
    from batchlab.adapters.imds import Imds, ImdsNotices
    from batchlab.worker.beats import Identity
    from batchlab.worker.loop import Worker
    from batchlab.worker.process_runner import ProcessRunner
    from batchlab.worker.runner import Scratch

    clock, ids = backend.open_clock(), backend.open_ids()
    imds = None if instance else Imds()
    if imds:
        instance = await asyncio.to_thread(imds.instance_id)
        pool = pool or await asyncio.to_thread(imds.needed_tag, POOL_TAG)
        slots = slots or int(await asyncio.to_thread(imds.needed_tag, SLOTS_TAG))
    objects = backend.open_objects(home)
    runner = ProcessRunner(objects, Scratch(home.scratch / instance), clock, slots)
    worker = Worker(
        Identity(ids.fresh("w"), instance, pool, slots),
        objects,
        backend.open_queue(home, clock),
        clock,
        runner,
        backends.patience(),
        backend.worker,
        ImdsNotices(imds) if imds else None,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.drain)
    orphan = None if imds else loop.create_task(_drain_orphan(home, worker.drain))
    try:
        await worker.run()
    finally:
        if orphan:
            orphan.cancel()


async def _drain_orphan(home: Home, drain: Callable[[], None]) -> None:
    alone_s = 0.0
    while alone_s < ORPHAN_S:
        await asyncio.sleep(1.0)
        alone_s = 0.0 if home.record() else alone_s + 1.0
    log.warning("the manager has been gone for %.0f s: draining", ORPHAN_S)
    drain()


# --- Seen from outside ---------------------------------------------------------------------------


def start_manager(
    home: Home,
    backend: Backend,
    *,
    pools: Sequence[Pool] = (),
    parent: bool = False,
    say: Callable[[str], None] = log.info,
) -> ManagerRecord:
    """Start a manager process and wait until it answers; the one that runs already is taken.

    With `parent` it ends when this process does. `say` hears of what takes long. Raises
    Unreachable with the end of its log, and what `Backend.provide` does.
    """
    if running := home.record():
        return running
    if backend.runs_in == "containers":
        from batchlab import containers

        return containers.up(home, backend, pools, say)
    home.make()
    backend.provide(home, say)
    # -P: the folder the command was called in must not provide modules.
    argv = [sys.executable, "-P", "-m", "batchlab", "manager", "--home", str(home.path)]
    argv += ["--backend", backend.name]
    if backend.endpoint:
        argv += ["--endpoint", backend.endpoint]
    for pool in pools:
        argv += ["--pool", f"{pool.name}:{pool.min_size}-{pool.max_size}x{pool.slots}"]
    if parent:
        argv += ["--parent", str(os.getpid())]
    with home.manager_log.open("ab") as output:
        # A session of its own: Ctrl-C in the terminal must reach only the command in front.
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    _STARTED[process.pid] = process
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        record = home.record()
        if record and record.pid == process.pid:
            return record
        if process.poll() is not None:
            if record:  # another command was faster; its grid is as good
                return record
            break
        time.sleep(0.02)
    raise Unreachable(
        f"The manager did not start: {_last_line(home.manager_log).rstrip('.')}.",
        remedy=f"Its log is {home.manager_log}.",
    )


def stop_manager(home: Home, *, wait_s: float = 30.0) -> bool:
    """End the manager that runs here, with its instances; False where none runs."""
    record = home.record()
    if deployment.read(home) and (record is None or record.backend == deployment.NAME):
        from batchlab import containers

        return containers.down(home, backends.load(deployment.NAME))
    if record is None:
        return False
    if record.backend == deployment.NAME:
        # Its pid is one of its container's: here it is somebody else's.
        raise BackendError(
            f"A manager runs in {home.path} in a container, and nothing says in which.",
            remedy="`batchlab gc` removes it.",
        )
    with suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + wait_s
    while home.record() is not None:
        if time.monotonic() > deadline_s:
            raise BackendError(
                f"The manager (pid {record.pid}) has not ended after {wait_s:.0f} s.",
                remedy=f"Its log is {home.manager_log}.",
            )
        time.sleep(0.02)
    if started := _STARTED.pop(record.pid, None):
        started.wait()
    return True


def asg_main(settings: AsgSettings, on_up: Callable[[str], None]) -> None:
    """Serve Auto Scaling until SIGTERM or SIGINT, then end the instances; `on_up` is given the
    URL. A server that was killed leaves its instances to the next one with the same state."""
    from batchlab.asg.running import locked

    _log_to_stderr()
    with locked(settings.state):
        asyncio.run(_serve_asg(settings, on_up))


async def _serve_asg(settings: AsgSettings, on_up: Callable[[str], None]) -> None:
    from batchlab.adapters.clock import RandomIds, WallClock
    from batchlab.adapters.imds_server import MetadataServer
    from batchlab.adapters.state_file import StateFile
    from batchlab.api import listen
    from batchlab.asg.metadata import Facts
    from batchlab.asg.metrics import MetricStore
    from batchlab.asg.running import application, run
    from batchlab.asg.templates import TemplateFile
    from batchlab.fleet.autoscaling import AutoScaling

    clock, templates, facts = WallClock(), TemplateFile(settings.templates), Facts()
    launcher = backends.open_asg_launcher(settings, templates, clock, facts.signals)
    groups = StateFile(settings.state / "groups.json")
    metrics = MetricStore(clock)
    engine = facts.engine = AutoScaling(
        *(launcher, clock, RandomIds(), groups),
        templates=templates,
        metrics=metrics,
        drain_s=settings.drain_s,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    listener = listen(settings.host, settings.port)
    metadata = MetadataServer(facts.of(launcher), clock)
    if settings.metadata_port is not None:
        await metadata.start(settings.host, settings.metadata_port)
    on_up(f"http://{settings.host}:{listener.getsockname()[1]}")
    app = application(engine, clock, launcher.changed, metrics=metrics, key=settings.key)
    try:
        await run(engine, app, listener, launcher.changed, stop)
    finally:
        await metadata.close()
        await _end_instances(launcher, settings.drain_s)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=os.environ.get("BATCHLAB_LOG", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
