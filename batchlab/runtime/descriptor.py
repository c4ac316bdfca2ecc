"""Descriptors of backends, addresses of endpoints, and the environment variables of instances.

A descriptor is the content of `backends/<name>/backend.toml`. Invariant: the module does not import adapters and does
not open files or connections of a grid.

A release contains the environment variables of a stack's manager and workers. Invariants: no variable of a release is a
secret, because every reader of the stack's bucket can read the release. Each value of a variable means the same to
systemd and to Docker.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from batchlab.core import logs
from batchlab.core.capabilities import NO_CAPABILITIES, Capabilities, backend_names, capabilities_in, read_descriptor
from batchlab.core.errors import UsageError
from batchlab.core.model import Pool
from batchlab.core.operating_system import cpu_count
from batchlab.core.service_settings import ManagerSettings, WorkerSettings
from batchlab.runtime.home import Place

if TYPE_CHECKING:
    from batchlab.core.pricing.request_costs import Pace


@dataclass(frozen=True, slots=True)
class Calibration:
    """Times of a simulated grid, which were measured in runs on the backend `backend`.

    - `boot_s`: time from launch to InService, by pool. `other_boot_s` applies to all pools that `boot_s` does not
      contain. If `other_boot_s` is None, the scenario defines the boot time of the other pools.
    - `call_s`: the shortest and the longest time of a port call.
    - `bundle_s`: the time of a bundle beyond its tasks and `bundle_cpu_s`.
    - `submit_s`: time from a job's submission until a worker can receive its first bundle.
    - `end_s`: time from the end of a job's last task to the end of the job.
    - `stretch`: measured task time divided by declared task time, by "template/stage".
    - `manager_s`: time from the start of a replacement manager until it tries to become the
      leader.
    - `bundle_cpu_s`: CPU time of all processes of the grid for a bundle, if they share `cores`. With 0 `cores`,
      `bundle_cpu_s` is ignored.
    """

    backend: str
    boot_s: Mapping[str, float] = field(default_factory=dict)
    call_s: tuple[float, float] = (0.002, 0.020)
    bundle_s: float = 0.0
    submit_s: float = 0.0
    end_s: float = 0.0
    stretch: Mapping[str, float] = field(default_factory=dict)
    other_boot_s: float | None = None
    manager_s: float = 3.0
    bundle_cpu_s: float = 0.0
    cores: int = 0
    runs: int = 0
    """Number of recorded runs in which the times were measured."""
    compressed: float = 1.0
    """Factor by which the times of the scenario were divided in the measured runs."""


VARIABLE = "BATCHLAB_ENDPOINT"
"""Environment variable that names an endpoint if the option --endpoint is not given."""

_ENDPOINT = re.compile(r"(?P<url>https?://[^/?#@\s]+)/?(?P<bucket>[a-z0-9][a-z0-9-]{1,26}[a-z0-9])?/?")
# The names of a grid's queues start with the bucket's name. SQS allows 80 characters without dots in the name of a
# queue. The name of a dead-letter queue needs up to 51 characters after the bucket's name.


def parse_endpoint(endpoint: str, scheme: str = "") -> Place:
    """Return the URL and the bucket of an endpoint. The bucket is "" if the endpoint does not name a bucket.

    With a `scheme`, the endpoint must be the address of a bucket, such as gs://my-bucket. Raise UsageError if the
    endpoint is invalid.
    """
    if scheme:
        match = re.fullmatch(rf"({scheme}://)([a-z0-9][a-z0-9._-]{{1,220}}[a-z0-9])/?", endpoint)
        if match is None:
            raise UsageError(
                f"The endpoint {endpoint!r} is not the address of a bucket.",
                remedy=f"Write for example {scheme}://my-bucket.",
            )
        return Place(match[1], match[2], named=True)
    match = _ENDPOINT.fullmatch(endpoint)
    if match is None:
        # The error must not show the user name and the password in the URL.
        shown = re.sub(r"//[^/@]*@", "//…@", endpoint)
        raise UsageError(
            f"The endpoint {shown!r} is not a URL with a bucket's name as its path.",
            remedy="Write for example http://127.0.0.1:4566 or http://127.0.0.1:4566/my-bucket, "
            "with 3 to 28 small letters, digits, and hyphens.",
        )
    return Place(match["url"], match["bucket"] or "", named=True)


def new_bucket_name() -> str:
    """Return a new name for a bucket. The name has a random part."""
    return f"batchlab-{secrets.token_hex(5)}"


D = TypeVar("D", bound="Descriptor")


@dataclass(frozen=True, slots=True)
class Image:
    """Packages of Debian and PyPI that the containers provide for users' tasks."""

    apt: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Descriptor of a backend, which was read from the backend's file."""

    name: str
    description: str
    objects: str
    """Name of the module whose function `open_objects` opens the bucket."""
    objects_name: str
    """Name of the object store in the documentation."""
    queue: str
    ledger: str
    fleet: str
    manager: ManagerSettings
    worker: WorkerSettings
    pools: tuple[Pool, ...]
    emulator: str | None = None
    """Name of the emulator that the grid starts if the user does not name an endpoint."""
    endpoint: str | None = None
    """URL of the endpoint that the user named. The path of the URL may be a bucket."""
    image: Image = Image()
    usual: Calibration = field(default_factory=lambda: Calibration(""))
    """Times of a simulated grid for a forecast without a calibration."""
    bucket_scheme: str = ""
    """Scheme of the addresses of buckets in the option `--endpoint`, such as "gs"."""
    extra: str | None = None
    """Name of the extra that the backend needs."""
    capabilities: Capabilities = NO_CAPABILITIES

    @property
    def pace(self) -> Pace:
        """Intervals at which the backend's manager and workers send requests.

        The numbers of requests that were not counted are derived from the intervals.
        """
        from batchlab.core.pricing.request_costs import Pace

        manager, worker = self.manager, self.worker
        return Pace(worker.control_lease_s, worker.visibility_s, worker.beat_s, manager.tick_s)


def read(kind: type[D], name: str, endpoint: str | None = None) -> D:
    """Return the descriptor of the backend `name` as an object of the class `kind`.

    The endpoint is the argument `endpoint`, or else the value of BATCHLAB_ENDPOINT. Raise UsageError if the backend
    does not exist or cannot use the endpoint.
    """
    if name not in backend_names():
        raise UsageError(f"Unknown backend {name!r}.", remedy=f"The backends are {', '.join(backend_names())}.")
    doc = read_descriptor(name)
    capabilities = capabilities_in(doc)
    scheme = doc.get("bucket_scheme", "")
    takes_endpoint = capabilities.s3_endpoint or bool(scheme)
    if endpoint and not takes_endpoint:
        raise UsageError(
            f"The backend {name} does not use an endpoint.",
            remedy="Leave out --endpoint."
            + (" To replace AWS by another service, set AWS_ENDPOINT_URL." if capabilities.stack else ""),
        )
    if takes_endpoint and (endpoint := endpoint or os.environ.get(VARIABLE)):
        parse_endpoint(endpoint, scheme)
    return kind(
        name,
        doc["description"],
        doc["objects"],
        doc["objects_name"],
        doc["queue"],
        doc["ledger"],
        doc["fleet"],
        ManagerSettings(**doc.get("manager", {})),
        WorkerSettings(**doc.get("worker", {})),
        tuple(_pool(p) for p in doc["pools"]),
        doc.get("emulator"),
        endpoint or None,
        Image(**{source: tuple(packages) for source, packages in doc.get("image", {}).items()}),
        _usual(name, doc.get("usual", {})),
        scheme,
        doc.get("extra"),
        capabilities,
    )


def _pool(doc: dict[str, Any]) -> Pool:
    if doc.get("max_size") == "cpus":
        doc = {**doc, "max_size": max(2, cpu_count())}
    return Pool(**doc)


def _usual(name: str, doc: dict[str, Any]) -> Calibration:
    if "call_s" in doc:
        doc = {**doc, "call_s": tuple(doc["call_s"])}
    if doc.get("cores") == "cpus":
        doc = {**doc, "cores": cpu_count()}
    return Calibration(name, **doc)


def with_pools(backend: D, pools: Sequence[Pool]) -> D:
    """Return the backend with `pools` instead of its default pools, unless `pools` is empty."""
    return replace(backend, pools=tuple(pools)) if pools else backend


def pool_option(pool: Pool) -> str:
    """Return a pool in the form of the option --pool."""
    gpus = f",gpus={pool.gpus}" if pool.gpus else ""
    image = f",image={pool.image}" if pool.image else ""
    return f"{pool.name}:{pool.min_size}-{pool.max_size}x{pool.slots}{gpus}{image}"


def uses_gpu_devices() -> bool:
    """Return whether containers get the GPUs that their pool declares, which BATCHLAB_DOCKER_GPUS=0 prevents."""
    return os.environ.get("BATCHLAB_DOCKER_GPUS") != "0"


def images_of(pools: Sequence[Pool]) -> dict[str, str]:
    """Return the image of each pool that has an image, by name of the pool."""
    return {pool.name: pool.image for pool in pools if pool.image}


FILE = "environment"
"""Name of the file in a release that contains environment variables."""
INHERITED = (
    logs.LEVEL_VARIABLE,
    logs.FORMAT_VARIABLE,
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_SERVICE_NAME",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    "OTEL_BSP_SCHEDULE_DELAY",
)
"""Environment variables that a grid in containers inherits from the command `grid up`.

OTEL_EXPORTER_OTLP_HEADERS is not inherited, because the variable may contain a key, and every task can read the
environment variables of its worker.
"""
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9_./:,=@%+*?&~-]*")


def check(variables: Mapping[str, str], where: str) -> None:
    """Raise UsageError for an environment variable that cannot be passed to instances or must stay secret."""
    for name, value in variables.items():
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{where}: {name!r} is not a valid name of a variable.", remedy="Use capital letters, digits, and _."
            )
        if list(logs.secrets_of({name: value})):
            raise UsageError(
                f"{where}: {name} is the name of a secret, and all programs of the stack could read its value in the "
                "stack's bucket.",
                remedy="Write the variable into /etc/batchlab/environment of your own machine image.",
            )
        if not _VALUE.fullmatch(value):
            raise UsageError(
                f"{where}: the value of {name} has characters that systemd and Docker read differently.",
                remedy="Do not use blanks, quotes, $, #, or backslashes.",
            )


def content(variables: Mapping[str, str]) -> bytes:
    """Return the content of the file `environment` in a release."""
    return "".join(f"{name}={value}\n" for name, value in sorted(variables.items())).encode()


def inherited_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of `INHERITED` that are set."""
    return {name: environ[name] for name in INHERITED if environ.get(name)}
