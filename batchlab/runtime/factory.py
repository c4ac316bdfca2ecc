"""Composition root that creates the adapters named in a backend's descriptor.

A backend is a named choice of adapters, described in `backends/<name>/backend.toml`. The module descriptor.py reads the
descriptor, locations.py finds the grid's parts, and factory.py opens the adapters. Adapters are imported on first use,
so a backend does not need another backend's dependencies.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.core import installation, operating_system
from batchlab.core.atomic_write import PRIVATE_FOLDER, Sync, read_sync
from batchlab.core.errors import Unreachable, UsageError
from batchlab.runtime import aws_deployment, compose_deployment, descriptor
from batchlab.runtime.descriptor import VARIABLE, Image, new_bucket_name, with_pools
from batchlab.runtime.home import Home
from batchlab.runtime.locations import BackendLocations, client_environment

if TYPE_CHECKING:
    from batchlab.adapters.aws.fleet import DrainHook
    from batchlab.adapters.aws.instance_metadata import Imds
    from batchlab.adapters.aws.metadata_server import Signals
    from batchlab.adapters.aws.sqs import SqsQueue
    from batchlab.adapters.docker.launcher import ContainerLauncher
    from batchlab.adapters.docker.mixed_launcher import MixedLauncher
    from batchlab.adapters.limits import Bucket
    from batchlab.adapters.local.local_wakeup_queue import WakeupQueue
    from batchlab.adapters.local.ministack import Emulator
    from batchlab.adapters.local.processes import ProcessLauncher
    from batchlab.adapters.local.sqlite_queue import SqliteQueue
    from batchlab.core.model import Pool
    from batchlab.core.port_retries import Patience
    from batchlab.core.ports import Clock, DirectQueue, Fleet, Ids, Ledger, LocalFiles, Objects, Replies, ReplyInbox
    from batchlab.core.pricing.request_costs import RequestCounter
    from batchlab.core.tracing import Tracer
    from batchlab.manager.context import Deliver
    from batchlab.server.autoscaling_api.engine_loop import AsgSettings
    from batchlab.server.autoscaling_api.launch_templates import TemplateFile


__all__ = [
    "VARIABLE",
    "Backend",
    "Image",
    "client_environment",
    "load",
    "new_bucket_name",
    "open_asg_launcher",
    "patience",
    "with_pools",
]


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend(BackendLocations):
    """A named choice of adapters. Each `open_` method of a backend opens one adapter for a home."""

    def open_clock(self) -> Clock:
        from batchlab.adapters.clock import WallClock

        return WallClock()

    def open_tracer(self, service: str, instance: str) -> Tracer:
        """Return the tracer configured by the OTEL_* variables, or a no-op tracer."""
        from batchlab.core.tracing import NO_TRACER

        if not _is_traced(os.environ):
            return NO_TRACER
        try:
            from batchlab.adapters.opentelemetry import OtelTracer
        except ImportError:
            log.warning(
                "Traces are disabled. OTEL_EXPORTER_OTLP_ENDPOINT is set, but batchlab's extra `otel` is not "
                "installed. %s",
                installation.remedy("otel"),
            )
            return NO_TRACER
        return OtelTracer(f"batchlab-{service}", instance)

    def open_deliveries(self, home: Home, clock: Clock) -> Deliver:
        """Return the function that delivers notifications."""
        from batchlab.adapters.aws.endpoint import Endpoint
        from batchlab.adapters.notifications import Deliveries

        def endpoint_of(region: str) -> Endpoint:
            """Return the endpoint of SNS: the grid's own endpoint if the grid has one, or else AWS."""
            if not self.capabilities.s3_endpoint:
                return Endpoint(None, region)
            return replace(self.services(home).endpoint, region=region)

        return Deliveries(clock, endpoint_of)

    def open_ids(self) -> Ids:
        from batchlab.adapters.clock import RandomIds

        return RandomIds()

    def open_objects(self, home: Home, tally: RequestCounter | None = None) -> Objects:
        """Open the grid's bucket. `tally` counts the requests to the bucket. Raise Unreachable if the grid has never
        been up.
        """
        if self.capabilities.simulated:
            raise _not_a_process("objects", self.objects)
        bucket = self._bucket(home, tally)
        objects: Objects = import_module(self.objects).open_objects(bucket)
        return objects

    def _bucket(self, home: Home, tally: RequestCounter | None) -> Bucket:
        from batchlab.adapters.limits import Bucket

        if self.capabilities.local_bucket:
            home.make()
            return Bucket(folder=home.objects, sync=read_sync())
        if self.bucket_scheme:
            return Bucket(self.place(home).bucket, tally=tally)
        self.check_installed("boto3")
        services = self.services(home)
        return Bucket(services.bucket, endpoint=services.endpoint, tally=tally)

    def open_local_files(self, home: Home) -> LocalFiles | None:
        """Return the files of the bucket, or None if the bucket is not a folder of this machine."""
        if not self.capabilities.local_bucket:
            return None
        from batchlab.adapters.local.objects import FilesInPlace

        return FilesInPlace(home.objects)

    def open_bucket(self, home: Home) -> Objects:
        """Open the bucket for a command that does not need a manager. The call does not change the files of a home.

        Raise Unreachable if the bucket is in the grid's own emulator and the grid is not up.
        """
        if self.capabilities.local_bucket and home.objects.is_dir():
            from batchlab.adapters.local.objects import LocalObjects

            return LocalObjects(home.objects, read_sync())
        record = home.record()
        is_up = record is not None and record.backend == self.name
        if self.capabilities.s3_endpoint and not is_up:
            place = self.place(home)
            if not place.named:
                raise Unreachable(
                    f"The bucket of the grid on {self.name} in {home.path} is in an emulator, "
                    "which runs only while the grid is up.",
                    remedy=f"Start the grid with `batchlab grid up --backend {self.name}`.",
                )
        return self.open_objects(home)

    def open_queue(
        self, home: Home, clock: Clock, tally: RequestCounter | None = None
    ) -> SqliteQueue | WakeupQueue | SqsQueue:
        """Open the grid's queues. `tally` counts the requests to the queues. Raise Unreachable if the grid has never
        been up.
        """
        if self.queue == "sqlite":
            from batchlab.adapters.local.sqlite_queue import SqliteQueue

            home.make()
            folder = self.folder(home)
            folder.mkdir(exist_ok=True)
            return SqliteQueue(folder / home.queue_file.name, clock)
        _require("queue", self.queue, "sqs")
        self.check_installed("boto3")
        from batchlab.adapters.aws.network_wakeups import NetworkWakeups
        from batchlab.adapters.aws.sqs import SqsQueue
        from batchlab.adapters.local.local_wakeup_queue import LocalWakeupQueue, WakeupQueue

        services, makes = self.services(home), not self.capabilities.stack
        queue = SqsQueue(services.endpoint, prefix=services.queue_prefix, makes=makes, tally=tally)
        if self.capabilities.container_manager and (address := compose_deployment.broadcast_address(home)):
            return WakeupQueue(queue, NetworkWakeups(address))
        if not self.capabilities.one_machine:
            return queue
        # The instances and the clients of the backend run on one machine, so a sender can wake a receiver on this
        # machine.
        return LocalWakeupQueue(queue, home.backend_folder(self.name) / "wake")

    def open_replies(self, home: Home) -> Replies | None:
        """Open the replies of workers to clients, or return None if the clients run on other machines."""
        if not self.capabilities.one_machine:
            return None
        from batchlab.adapters.local.replies import FifoReplies

        return FifoReplies(self._replies_folder(home))

    def open_inbox(self, home: Home) -> ReplyInbox:
        """Open an inbox for replies of the workers on this machine."""
        from batchlab.adapters.local.replies import FifoInbox

        return FifoInbox(self._replies_folder(home))

    def _replies_folder(self, home: Home) -> Path:
        return self.folder(home) / "replies"

    def permit_direct_calls(self, home: Home) -> None:
        """Create the folder of replies, without which clients do not make direct calls, or remove the folder.

        The backend must run on one machine. Only the manager begins the trace of a job, and only the manager can wait
        until the ledger's row of a single call is on the disk (`Sync.ALL`).
        """
        is_flushed = self.capabilities.local_bucket and read_sync() is Sync.ALL
        if self.capabilities.one_machine and not is_flushed and not _is_traced(os.environ):
            self._replies_folder(home).mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        else:
            import shutil

            shutil.rmtree(self._replies_folder(home), ignore_errors=True)

    def open_direct_queue(self, home: Home, clock: Clock) -> DirectQueue | None:
        """Open the grid's queues for direct calls, or return None if the grid's manager does not permit direct
        calls."""
        if not self.capabilities.one_machine or not self._replies_folder(home).exists():
            return None
        from batchlab.core.ports import DirectQueue

        queue = self.open_queue(home, clock)
        return queue if isinstance(queue, DirectQueue) else None

    def open_ledger(self, home: Home) -> Ledger:
        if self.ledger == "postgres":
            from batchlab.adapters.sql import open_postgres

            at = self.deployment(home)
            return open_postgres(at.postgres_url(compose_deployment.password_file(home).read_text()))
        if self.ledger == "deployed":
            from batchlab.runtime.stack_connections import open_ledger

            aws_deployment.folder(home).mkdir(parents=True, exist_ok=True)
            return open_ledger(self.stack(home), aws_deployment.folder(home) / home.ledger_file.name)
        _require("ledger", self.ledger, "sqlite")
        from batchlab.adapters.sql import open_sqlite

        home.make()
        folder = self.folder(home)
        folder.mkdir(exist_ok=True)
        path = folder / home.ledger_file.name
        return open_sqlite(path, read_sync()) if self.capabilities.local_bucket else open_sqlite(path)

    def ledger_in(self, home: Home) -> Path | None:
        """Return the file of the ledger in the home, or None if the home does not have the ledger of a grid."""
        path = self.folder(home) / home.ledger_file.name
        return path if self.ledger == "sqlite" and path.is_file() else None

    def read_ledger(self, home: Home) -> Ledger:
        """Open the ledger in the home for reading, while no grid is up. Raise Unreachable if the ledger does not
        exist."""
        from batchlab.adapters.sql import read_sqlite

        path = self.ledger_in(home)
        if path is None:
            raise Unreachable(f"The folder {home.path} does not have the ledger of a grid on {self.name}.")
        return read_sqlite(path)

    def open_launcher(self, home: Home, clock: Clock) -> ProcessLauncher | MixedLauncher | None:
        """Return the launcher of instances, or None if an Auto Scaling service launches the instances.

        Raise UsageError if a pool has an image and Docker does not answer.
        """
        if self.fleet == "autoscaling":
            return None
        _require("fleet", self.fleet, "process")
        from batchlab.adapters.local.fork_server import ForkServer
        from batchlab.adapters.local.processes import ProcessLauncher

        python = [sys.executable, "-P", "-m"]
        grid = ["--home", str(home.path), "--backend", self.name]
        program = [*python, "batchlab"]

        def argv(pool: Pool, instance: str) -> Sequence[str]:
            worker = [*program, "worker", *grid, "--pool", pool.name, "--slots", str(pool.slots)]
            return [*worker, "--gpus", str(pool.gpus), "--instance", instance]

        log = home.fleet / "logs" / "fork-server.log"
        fork_server = None
        if operating_system.CAN_FORK:
            fork_server = ForkServer([*python, "batchlab.cli.fork_server_main", *grid], program, log)
        processes = ProcessLauncher(home.fleet, argv, clock, dict(os.environ), fork_server, home.scratch)
        if not descriptor.images_of(self.pools):
            return processes
        from batchlab.adapters.docker.mixed_launcher import MixedLauncher

        return MixedLauncher(processes, self._open_container_launcher(home, clock))

    def _open_container_launcher(self, home: Home, clock: Clock) -> ContainerLauncher:
        """Return the launcher of the pools with an image. Their containers see the grid's folder under its own path."""
        from batchlab.adapters.docker.container import Template
        from batchlab.adapters.docker.launcher import ContainerLauncher
        from batchlab.core import container_images, instance_types
        from batchlab.runtime import compose_project, pool_images

        images = pool_images.provide_all(descriptor.images_of(self.pools), home.fleet / "image.log", log.info)
        folder = str(home.path.resolve())

        def template(pool: Pool) -> Template:
            grid = ["--home", folder, "--backend", self.name]
            own = ["--pool", pool.name, "--slots", str(pool.slots), "--gpus", str(pool.gpus)]
            own += ["--instance", "{instance}"]
            return Template(
                images[pool.name].tag,
                ("worker", *grid, *own),
                # Local instances have no network of their own, and their programs may use the machine's network.
                "host",
                {**descriptor.inherited_variables(os.environ), container_images.VARIABLE: images[pool.name].reference},
                user=f"{os.getuid()}:{os.getgid()}",
                folders=(folder,),
                gpus=pool.gpus if descriptor.uses_gpu_devices() else 0,
            )

        project = compose_project.local_name(home)
        return ContainerLauncher(
            template,
            instance_types.load(),
            clock,
            home.fleet / "containers",
            grid=project.removeprefix("batchlab-"),
            labels={compose_project.LABEL: project, compose_project.HOME_LABEL: str(home.path)},
        )

    def import_for_worker(self) -> None:
        """Import the modules with which a worker opens its bucket and its queues."""
        import_module(self.objects)
        if self.queue == "sqlite":
            import batchlab.adapters.local.sqlite_queue
        else:
            import batchlab.adapters.aws.network_wakeups
            import batchlab.adapters.aws.sqs
            import batchlab.adapters.local.local_wakeup_queue  # noqa: F401

    def open_fleet(self, home: Home, launcher: ProcessLauncher | MixedLauncher | None, clock: Clock) -> Fleet:
        if launcher is None:
            from batchlab.adapters.aws.fleet import Ec2Fleet
            from batchlab.adapters.aws.group_descriptions import GroupParameters

            if self.capabilities.stack:
                stack = self.stack(home)
                from batchlab.adapters.aws.endpoint import Endpoint

                endpoint = Endpoint(region=stack.region)
                return Ec2Fleet(endpoint, clock, None, prefix=stack.groups_prefix)
            at = self.deployment(home)
            form = GroupParameters(compose_deployment.TEMPLATE, zones=compose_deployment.ZONES)
            here = compose_deployment.autoscaling(home, at)
            return Ec2Fleet(here, clock, form, prefix=f"{at.project}-")
        from batchlab.adapters.local.state_files import StateFile
        from batchlab.fleet.fleet_port import ManagedFleet

        return ManagedFleet(
            launcher,
            clock,
            self.open_ids(),
            StateFile(home.fleet / "groups.json"),
            drain_s=self.worker.drain_s + 5.0,
            one_machine=self.capabilities.one_machine,
        )

    def open_drain_hook(self, home: Home, pool: str, imds: Imds) -> DrainHook | None:
        """Return the lifecycle hook that a worker on a terminating instance completes at its end.

        Return None if the backend does not use a lifecycle hook for ending instances.
        """
        if not self.capabilities.termination_hook:
            return None
        from batchlab.adapters.aws.endpoint import Endpoint
        from batchlab.adapters.aws.fleet import DrainHook

        at = self.stack(home)
        return DrainHook(Endpoint(region=at.region), f"{at.groups_prefix}{pool}", imds)

    def open_emulator(self, home: Home) -> Emulator | None:
        """Return the grid's own emulator, or None if the user named an endpoint or the backend does not need an
        emulator.
        """
        if self.emulator is None or self.find_place(home):
            return None
        _require("emulator", self.emulator, "ministack")
        from batchlab.adapters.local.ministack import Emulator, install

        home.make()
        return Emulator(install(lambda _: None), home.backend_folder(self.name))


def open_asg_launcher(
    settings: AsgSettings, templates: TemplateFile, clock: Clock, signals: Callable[[str], Signals]
) -> ProcessLauncher | ContainerLauncher:
    """Return the launcher that the option `--launcher` of `asg serve` names. Raise UsageError for an unknown launcher
    name.

    The Docker launcher passes `signals` to its instances through the metadata service.
    """
    if settings.launcher == "process":
        from batchlab.adapters.local.processes import ProcessLauncher

        return ProcessLauncher(settings.state, templates.argv, clock, dict(os.environ))
    if settings.launcher != "docker":
        raise UsageError(
            f"Unknown launcher {settings.launcher!r}.", remedy="Use --launcher process or --launcher docker."
        )
    from batchlab.adapters.docker.container import Template
    from batchlab.adapters.docker.launcher import ContainerLauncher
    from batchlab.core import instance_types

    def template(pool: Pool) -> Template:
        version = templates.launched(pool)
        return Template(
            version.image,
            tuple(templates.argv(pool, "{instance}")),
            version.network,
            type=version.type,
            user=version.user,
            system=version.system,
            gpus=version.gpus if version.gpu_devices else 0,
        )

    return ContainerLauncher(
        template,
        instance_types.load(),
        clock,
        settings.state,
        grid=settings.grid.removeprefix("batchlab-"),
        labels={**settings.labels, "batchlab.grid": settings.grid},
        scale=settings.scale,
        signals=signals,
    )


def load(name: str, endpoint: str | None = None) -> Backend:
    """Return the backend `name`.

    The endpoint is the argument `endpoint`, or else the value of BATCHLAB_ENDPOINT. Raise UsageError if the backend
    does not exist or cannot use the endpoint.
    """
    return descriptor.read(Backend, name, endpoint)


def _is_traced(environ: Mapping[str, str]) -> bool:
    """Return whether the OTEL_* environment variables enable traces with a protocol that batchlab supports."""
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not endpoint or is_off or environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol in (None, "", "http/protobuf"):
        return True
    log.warning(
        "Traces are disabled. OTEL_EXPORTER_OTLP_PROTOCOL is %s, but only http/protobuf is supported.", protocol
    )
    return False


def patience() -> Patience:
    """Return the Patience for backends other than the simulator. The jitter of retries differs between processes."""
    from batchlab.core.port_retries import Patience

    return Patience(random.Random())  # noqa: S311 - jitter, not a secret


def _require(port: str, name: str, supported: str) -> None:
    if name != supported:
        raise _not_a_process(port, name)


def _not_a_process(port: str, name: str) -> UsageError:
    return UsageError(
        f"This backend's {port} adapter {name!r} runs only inside the simulator.",
        remedy="Run a job there with `batchlab run FILE --backend sim`.",
    )
