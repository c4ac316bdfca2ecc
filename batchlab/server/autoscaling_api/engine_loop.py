"""Process that serves the API of EC2 Auto Scaling: the loop of the engine, and the HTTP server.

Invariant: SIGTERM or SIGINT ends the process and its instances. The instances of a killed process continue to run, and
the next process with the same state folder manages these instances.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from batchlab.adapters.aws.metadata_server import MetadataServer
from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.local.state_files import Keys, StateFile
from batchlab.core import logs
from batchlab.core.errors import BackendError, Refused
from batchlab.core.port_retries import set_within
from batchlab.core.ports import Clock
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.runtime import factory
from batchlab.runtime.home import listen
from batchlab.server.autoscaling_api import metadata
from batchlab.server.autoscaling_api.app import App, Service
from batchlab.server.autoscaling_api.cloudwatch import CloudWatch, MetricStore
from batchlab.server.autoscaling_api.launch_templates import TemplateFile
from batchlab.server.autoscaling_api.metadata import InstanceFacts, NoticeService
from batchlab.server.autoscaling_api.query_protocol import QueryService, model
from batchlab.server.autoscaling_api.scheduled_changes import act
from batchlab.server.shutdown import end_instances, stop_by_signal

log = logging.getLogger(__name__)

TICK_S = 1.0
"""Interval in seconds between two ticks of the engine while the groups do not change.

A shorter interval is not needed, because cooldowns and timeouts are whole seconds.
"""


@dataclass(frozen=True, slots=True)
class AsgSettings:
    """Settings of `batchlab asg serve`."""

    state: Path
    """Folder that stores the state of the groups."""
    templates: Path
    launcher: str = "process"
    host: str = "127.0.0.1"
    port: int = 0
    key: Keys | None = None
    drain_s: float = 30.0
    """Time in seconds within which an instance must end before the process kills the instance."""
    grid: str = "asg"
    """Name of the grid, which is a part of container names and labels."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Additional labels of containers."""
    images: tuple[str, ...] = ()
    """Images that containers may use. A container with an image from this list must not run as root.

    If `images` is empty, all images and users are allowed.
    """
    scale: float = 1.0
    """Share of its instance type's processors and memory that a container gets."""
    metadata_port: int | None = None
    """Port of the instances' metadata service on `host`. If the port is None, no metadata service runs."""


@contextmanager
def lock(state: Path) -> Iterator[None]:
    """Create the state folder `state` and hold the folder's lock, so that only one server uses the folder.

    Raise Refused if another server holds the lock.
    """
    state.mkdir(parents=True, exist_ok=True)
    with (state / "server.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"Another `batchlab asg serve` uses the folder {state}.",
                remedy="End that server, or name another folder with --state.",
            ) from error
        yield


def application(
    engine: AutoScaling, clock: Clock, changed: asyncio.Event, *, metrics: MetricStore, key: Keys | None = None
) -> App:
    """Return the ASGI application that passes requests to the engine and stores the metrics that the engine reads.

    Each action on the engine sets the event `changed`.
    """
    service = QueryService(model("autoscaling"), act(engine, changed.set))
    services: dict[str, Service] = {
        "autoscaling": service,
        "monitoring": CloudWatch(metrics),
        metadata.NAME: NoticeService(engine, changed.set),
    }
    # Request ids are random, as on AWS.
    return App(services, "autoscaling", clock, lambda: str(uuid.uuid4()), key=key)  # noqa: TID251 - see above


async def run(
    engine: AutoScaling, app: App, listener: socket.socket, changed: asyncio.Event, stop: asyncio.Event
) -> None:
    """Run the HTTP server and the engine until `stop` is set or SIGTERM or SIGINT arrives. Raise the error of the
    server or of the engine's loop.
    """
    keeping = asyncio.create_task(_keep(engine, changed))
    serving = asyncio.create_task(_serve(app, listener, stop))
    await asyncio.wait({keeping, serving}, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    keeping.cancel()
    for result in await asyncio.gather(keeping, serving, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


async def _keep(engine: AutoScaling, changed: asyncio.Event) -> None:
    """Tick the engine about once per second, and at once when `changed` is set. The function never returns.

    The loop of the engine logs a failed tick and repeats the tick. The loop logs repeated failures with the same reason
    only once. The loop must not end, because the end of the server's process ends every instance.
    """
    last_failure = ""
    while True:
        changed.clear()
        try:
            await engine.tick()
            for notification in engine.take_notifications():
                hook, change = notification.hook, f"{notification.origin} to {notification.destination}"
                name, group = hook.lifecycle_hook_name, hook.auto_scaling_group_name
                log.info("%s waits in hook %s of %s (%s)", notification.instance_id, name, group, change)
            last_failure = ""
        except Exception as error:
            if repr(error) != last_failure:
                trace = None if isinstance(error, BackendError) else error
                log.warning("the engine's tick failed: %s", error, exc_info=trace)
            last_failure = repr(error)
        await set_within(changed, TICK_S)


async def _serve(app: App, listener: socket.socket, stop: asyncio.Event) -> None:
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            interface="asgi3",
            log_config=None,  # the process configures its own logs
            log_level="warning",
            timeout_graceful_shutdown=2,
            lifespan="off",
            proxy_headers=False,
            server_header=False,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    stopping.cancel()
    await serving


def asg_main(settings: AsgSettings, on_up: Callable[[str], None]) -> None:
    """Serve Auto Scaling until SIGTERM or SIGINT, and then end the instances. `on_up` is called with the server's
    URL.
    """
    logs.set_up(service="asg")
    with lock(settings.state):
        asyncio.run(_serve_asg(settings, on_up))


async def _serve_asg(settings: AsgSettings, on_up: Callable[[str], None]) -> None:
    clock, facts = WallClock(), InstanceFacts()
    templates = TemplateFile(settings.templates, settings.images)
    launcher = factory.open_asg_launcher(settings, templates, clock, facts.signals)
    groups = StateFile(settings.state / "groups.json")
    metrics = MetricStore(clock)
    engine = facts.engine = AutoScaling(
        launcher,
        clock,
        RandomIds(),
        groups,
        templates=templates,
        metrics=metrics,
        drain_s=settings.drain_s,
        one_machine=True,
    )
    stop = stop_by_signal()
    listener = listen(settings.host, settings.port)
    metadata = MetadataServer(facts.of(launcher, templates, clock), clock)
    if settings.metadata_port is not None:
        await metadata.start(settings.host, settings.metadata_port)
    on_up(f"http://{settings.host}:{listener.getsockname()[1]}")
    app = application(engine, clock, launcher.changed, metrics=metrics, key=settings.key)
    try:
        await run(engine, app, listener, launcher.changed, stop)
    finally:
        await metadata.close()
        await end_instances(launcher, settings.drain_s)
