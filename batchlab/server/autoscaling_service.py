"""Process that serves the API of EC2 Auto Scaling.

Invariant: SIGTERM or SIGINT ends the process and its instances. The instances of a killed process
stay, and the next process with the same state folder manages them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from batchlab.adapters.aws.metadata_server import MetadataServer
from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.local.fleet_state_file import StateFile
from batchlab.core import logs
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.runtime import factory
from batchlab.runtime.listening import listen
from batchlab.server.autoscaling_api.cloudwatch import MetricStore
from batchlab.server.autoscaling_api.engine_loop import AsgSettings, application, locked, run
from batchlab.server.autoscaling_api.launch_templates import TemplateFile
from batchlab.server.autoscaling_api.metadata import Facts
from batchlab.server.shutdown import end_instances, stop_by_signal


def asg_main(settings: AsgSettings, on_up: Callable[[str], None]) -> None:
    """Serve Auto Scaling until SIGTERM or SIGINT, then end the instances. `on_up` is called with
    the URL. The instances of a killed server stay, and the next server with the same state manages
    them."""
    logs.set_up(service="asg")
    with locked(settings.state):
        asyncio.run(_serve_asg(settings, on_up))


async def _serve_asg(settings: AsgSettings, on_up: Callable[[str], None]) -> None:
    clock, facts = WallClock(), Facts()
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
