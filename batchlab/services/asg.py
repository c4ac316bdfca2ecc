"""EC2 Auto Scaling's own API, as a process.

Invariant: whoever is ended by a signal ends the instances; one that was killed leaves them to the
next with the same state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from batchlab import backends, logs
from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.imds_server import MetadataServer
from batchlab.adapters.state_file import StateFile
from batchlab.asg.metadata import Facts
from batchlab.asg.metrics import MetricStore
from batchlab.asg.running import AsgSettings, application, locked, run
from batchlab.asg.templates import TemplateFile
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.listening import listen
from batchlab.services.stopping import end_instances, stop_by_signal


def asg_main(settings: AsgSettings, on_up: Callable[[str], None]) -> None:
    """Serve Auto Scaling until SIGTERM or SIGINT, then end the instances; `on_up` is given the
    URL. A server that was killed leaves its instances to the next one with the same state."""
    logs.set_up(service="asg")
    with locked(settings.state):
        asyncio.run(_serve_asg(settings, on_up))


async def _serve_asg(settings: AsgSettings, on_up: Callable[[str], None]) -> None:
    clock, facts = WallClock(), Facts()
    templates = TemplateFile(settings.templates, settings.images)
    launcher = backends.open_asg_launcher(settings, templates, clock, facts.signals)
    groups = StateFile(settings.state / "groups.json")
    metrics = MetricStore(clock)
    engine = facts.engine = AutoScaling(
        *(launcher, clock, RandomIds(), groups),
        templates=templates,
        metrics=metrics,
        drain_s=settings.drain_s,
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
