"""The engine kept going beside the server that answers for it."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from batchlab.adapters.local.access_keys import Keys
from batchlab.core.errors import BackendError, Refused
from batchlab.core.ports import Clock
from batchlab.core.retry import set_within
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.server.autoscaling_api import metadata
from batchlab.server.autoscaling_api.app import App, Service
from batchlab.server.autoscaling_api.cloudwatch import CloudWatch, MetricStore
from batchlab.server.autoscaling_api.metadata import NoticeService
from batchlab.server.autoscaling_api.query_protocol import QueryService, model
from batchlab.server.autoscaling_api.scheduled_changes import act

log = logging.getLogger(__name__)

TICK_S = 1.0
"""How often the engine looks where nothing happens: cooldowns and timeouts are whole seconds."""


@dataclass(frozen=True, slots=True)
class AsgSettings:
    """What `asg serve` is told."""

    state: Path
    """The folder that the groups are kept in."""
    templates: Path
    launcher: str = "process"
    host: str = "127.0.0.1"
    port: int = 0
    key: Keys | None = None
    drain_s: float = 30.0
    """How long an instance may take to end before it is killed."""
    grid: str = "asg"
    """What containers are named and labelled with."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """More labels for them."""
    images: tuple[str, ...] = ()
    """The only images of containers, none of which may then be root's; any without names."""
    scale: float = 1.0
    """A container's share of its instance type's processors and memory."""
    metadata_port: int | None = None
    """Where the instances' metadata service listens, beside the host; None: there is none."""


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Be the only server over this folder, which is made; Refused while another is."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "server.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"Auto Scaling is served from {state} already.",
                remedy="End that server, or name another folder with --state.",
            ) from error
        yield


def application(
    engine: AutoScaling,
    clock: Clock,
    changed: asyncio.Event,
    *,
    metrics: MetricStore,
    key: Keys | None = None,
) -> App:
    """What answers for the engine, and takes in the metrics that it looks at; each action sets
    `changed`."""
    service = QueryService(model("autoscaling"), act(engine, changed.set))
    services: dict[str, Service] = {
        "autoscaling": service,
        "monitoring": CloudWatch(metrics),
        metadata.NAME: NoticeService(engine, changed.set),
    }
    return App(services, "autoscaling", clock, _request_id, key=key)


def _request_id() -> str:
    return str(uuid.uuid4())  # noqa: TID251 - as random as AWS's, and nothing depends on it


async def run(
    engine: AutoScaling,
    app: App,
    listener: socket.socket,
    changed: asyncio.Event,
    stop: asyncio.Event,
) -> None:
    """Serve and tick until `stop` is set or SIGTERM or SIGINT comes; raises what either does."""
    keeping = asyncio.create_task(_keep(engine, changed))
    serving = asyncio.create_task(_serve(app, listener, stop))
    await asyncio.wait({keeping, serving}, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    keeping.cancel()
    for result in await asyncio.gather(keeping, serving, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


async def _keep(engine: AutoScaling, changed: asyncio.Event) -> None:
    """Tick about every second, and at once when `changed` is set; forever.

    A tick that fails is logged, the same failure once, and tried again: to end here would end
    every instance.
    """
    failing = ""
    while True:
        changed.clear()
        try:
            await engine.tick()
            for one in engine.take_notifications():
                hook, way = one.hook, f"{one.origin} to {one.destination}"
                name, group = hook.lifecycle_hook_name, hook.auto_scaling_group_name
                log.info("%s waits in hook %s of %s (%s)", one.instance_id, name, group, way)
            failing = ""
        except Exception as error:
            if repr(error) != failing:
                trace = None if isinstance(error, BackendError) else error
                log.warning("the groups cannot be kept in order: %s", error, exc_info=trace)
            failing = repr(error)
        await set_within(changed, TICK_S)


async def _serve(app: App, listener: socket.socket, stop: asyncio.Event) -> None:
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            interface="asgi3",
            log_config=None,  # its lines are ours
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
