"""A backend as it is written down, in `backends/<name>/backend.toml`.

Invariant: plain data and what follows from it; nothing is opened, and no adapter is known here.

What forecasts take from runs that were measured, as plain values.

Alone in its file, since every backend's descriptor has one: each worker's start reads it, and needs
nothing else of a scenario.

Endpoints that a user names, with a bucket as their path, and names of buckets.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from batchlab.core.capabilities import (
    NO_CAPABILITIES,
    Capabilities,
    backend_names,
    capabilities_in,
    read_descriptor,
)
from batchlab.core.errors import UsageError
from batchlab.core.model import Pool
from batchlab.core.pricing.request_costs import Pace
from batchlab.manager.settings import ManagerSettings
from batchlab.runtime.home import Place
from batchlab.worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a simulated grid takes from runs that were measured on `backend`.

    `boot_s` is from launch to InService by pool, `other_boot_s` that of pools which are not named
    there; where it is None they boot as long as the scenario says. `call_s` are the least and the
    most that a port call takes. `bundle_s` is what a bundle takes beyond its tasks and what it
    computes (below), `submit_s` from a job's submission until its first bundle can be received,
    `end_s` from its last task's end to its own. `stretch` is measured over declared task time, by
    "template/stage". `manager_s` is from when a manager is started, in place of one that has died,
    until it stands for the lead. `bundle_cpu_s` is what all processes of the grid compute for a
    bundle, where they share `cores`; with 0 cores that is no matter.
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
    """How many records it was made of."""
    compressed: float = 1.0
    """What the times of those runs had been divided by."""


VARIABLE = "BATCHLAB_ENDPOINT"
"""Environment variable that names an endpoint where no option does."""

_ENDPOINT = re.compile(
    r"(?P<url>https?://[^/?#@\s]+)/?(?P<bucket>[a-z0-9][a-z0-9-]{1,26}[a-z0-9])?/?"
)
# The bucket's name begins the names of queues, of which SQS takes 80 characters without dots; that
# of a pool's dead letters takes 51 of them.


def place_of(endpoint: str, scheme: str = "") -> Place:
    """Return the URL and the bucket, which is "" if the endpoint names none; UsageError.

    With a `scheme`, the endpoint must be the address of a bucket, such as gs://my-bucket.
    """
    if scheme:
        return _bucket_of(endpoint, scheme)
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None:
        # A name and password in it are for nobody's eyes.
        shown = re.sub(r"//[^/@]*@", "//…@", endpoint)
        raise UsageError(
            f"The endpoint {shown!r} is not a URL with a bucket's name as its path.",
            remedy="Write for example http://127.0.0.1:4566 or http://127.0.0.1:4566/my-bucket, "
            "with 3 to 28 small letters, digits and hyphens.",
        )
    return Place(found["url"], found["bucket"] or "", named=True)


def _bucket_of(address: str, scheme: str) -> Place:
    found = re.fullmatch(rf"({scheme}://)([a-z0-9][a-z0-9._-]{{1,220}}[a-z0-9])/?", address)
    if found is None:
        raise UsageError(
            f"The endpoint {address!r} is not the address of a bucket.",
            remedy=f"Write for example {scheme}://my-bucket.",
        )
    return Place(found[1], found[2], named=True)


def fresh_bucket() -> str:
    """A name that no other grid has."""
    return f"batchlab-{secrets.token_hex(5)}"


D = TypeVar("D", bound="Descriptor")


@dataclass(frozen=True, slots=True)
class Image:
    """What is put into the containers for the users' tasks: Debian's packages and PyPI's."""

    apt: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor as read from its file."""

    name: str
    description: str
    objects: str
    """The module whose `open_objects` opens the bucket."""
    queue: str
    ledger: str
    fleet: str
    manager: ManagerSettings
    worker: WorkerSettings
    pools: tuple[Pool, ...]
    emulator: str | None = None
    """What is started where no endpoint is named."""
    endpoint: str | None = None
    """What the user has named: a URL, perhaps with a bucket as its path."""
    image: Image = Image()
    usual: Calibration = field(default_factory=lambda: Calibration(""))
    """What a forecast takes of it where nothing was calibrated."""
    bucket_scheme: str = ""
    """The scheme of the address by which `--endpoint` names an existing bucket, such as "gs"."""
    extra: str | None = None
    """The extra of the installation that this backend needs."""
    capabilities: Capabilities = NO_CAPABILITIES

    @property
    def pace(self) -> Pace:
        """How often its workers ask, by which requests are derived where none are counted."""
        manager, worker = self.manager, self.worker
        return Pace(worker.control_lease_s, worker.visibility_s, worker.beat_s, manager.tick_s)


def read(kind: type[D], name: str, endpoint: str | None = None) -> D:
    """That of this name as a `kind`, with the endpoint that is named here or by BATCHLAB_ENDPOINT.

    UsageError for a name that is none, and for an endpoint where there is no use for one.
    """
    if name not in backend_names():
        raise UsageError(
            f"There is no backend {name!r}.", remedy=f"There are {', '.join(backend_names())}."
        )
    doc = read_descriptor(name)
    emulator = doc.get("emulator")
    capabilities = capabilities_in(doc)
    scheme = doc.get("bucket_scheme", "")
    takes_endpoint = capabilities.takes_endpoint or bool(scheme)
    if endpoint and not takes_endpoint:
        raise UsageError(
            f"The backend {name} has no use for an endpoint.",
            remedy="Leave out --endpoint."
            + (" AWS_ENDPOINT_URL names a substitute for AWS." if capabilities.stack else ""),
        )
    if takes_endpoint and (endpoint := endpoint or os.environ.get(VARIABLE)):
        place_of(endpoint, scheme)
    return kind(
        name,
        doc["description"],
        doc["objects"],
        doc["queue"],
        doc["ledger"],
        doc["fleet"],
        ManagerSettings(**doc.get("manager", {})),
        WorkerSettings(**doc.get("worker", {})),
        tuple(_pool(p) for p in doc["pools"]),
        emulator,
        endpoint or None,
        Image(**{source: tuple(some) for source, some in doc.get("image", {}).items()}),
        _usual(name, doc.get("usual", {})),
        scheme,
        doc.get("extra"),
        capabilities,
    )


def _pool(doc: dict[str, Any]) -> Pool:
    if doc.get("max_size") == "cpus":
        doc = {**doc, "max_size": max(2, _cores())}
    return Pool(**doc)


def _usual(name: str, doc: dict[str, Any]) -> Calibration:
    if "call_s" in doc:
        least_s, most_s = doc["call_s"]
        doc = {**doc, "call_s": (least_s, most_s)}
    if doc.get("cores") == "cpus":
        doc = {**doc, "cores": _cores()}
    return Calibration(name, **doc)


def _cores() -> int:
    """How many this process may run on, where the system says that: in a container, or under
    taskset, not all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def with_pools(backend: D, pools: Sequence[Pool]) -> D:
    """The backend with the user's own pools in place of its default ones."""
    return replace(backend, pools=tuple(pools)) if pools else backend
