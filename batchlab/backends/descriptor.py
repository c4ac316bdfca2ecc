"""A backend as it is written down, in `backends/<name>/backend.toml`.

Invariant: plain data and what follows from it; nothing is opened, and no adapter is known here.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from batchlab import package_data
from batchlab.backends.endpoint import VARIABLE, place_of
from batchlab.costs.requests import Pace
from batchlab.errors import UsageError
from batchlab.manager.settings import ManagerSettings
from batchlab.model import NO_CAPABILITIES, Capabilities, Pool
from batchlab.scenario.calibration import Calibration
from batchlab.worker.settings import WorkerSettings

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


def names() -> list[str]:
    """The backends there are."""
    return sorted(p.parent.name for p in package_data.folder("backends").glob("*/backend.toml"))


def read(kind: type[D], name: str, endpoint: str | None = None) -> D:
    """That of this name as a `kind`, with the endpoint that is named here or by BATCHLAB_ENDPOINT.

    UsageError for a name that is none, and for an endpoint where there is no use for one.
    """
    if name not in names():
        raise UsageError(
            f"There is no backend {name!r}.", remedy=f"There are {', '.join(names())}."
        )
    doc = _read(name)
    emulator = doc.get("emulator")
    capabilities = _capabilities(doc)
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


def capabilities_of(name: str) -> Capabilities:
    """Return the capabilities of the backend of that name, or none for an unknown backend."""
    return _capabilities(_read(name)) if name in names() else NO_CAPABILITIES


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((package_data.folder("backends") / name / "backend.toml").read_text())


def _capabilities(doc: dict[str, Any]) -> Capabilities:
    return Capabilities(**dict.fromkeys(doc["capabilities"], True))


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
