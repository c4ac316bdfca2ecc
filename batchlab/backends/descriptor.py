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
from batchlab.model import Pool
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
    runs_in: str = "processes"
    """What manager and workers are: "processes" of this machine, "containers", or instances that a
    stack on "aws" has made."""
    image: Image = Image()
    usual: Calibration = field(default_factory=lambda: Calibration(""))
    """What a forecast takes of it where nothing was calibrated."""

    @property
    def is_one_machine(self) -> bool:
        """Whether its instances are processes of this machine: they are in no market and in no
        zone, they share a disk, and nobody starts a manager again but whoever wants one."""
        return self.fleet == "process"

    @property
    def keeps_home(self) -> bool:
        """Whether a manager finds the home of the one before it, and in that whose lease need not
        run out. The next one of a stack is on another instance."""
        return self.fleet != "simulated" and not self.is_deployed

    @property
    def keeps_files(self) -> bool:
        """Whether the bucket is a folder in the home, to be read without anybody's help."""
        return self.objects == "files"

    @property
    def pace(self) -> Pace:
        """How often its workers ask, by which requests are derived where none are counted."""
        manager, worker = self.manager, self.worker
        return Pace(worker.control_lease_s, worker.visibility_s, worker.beat_s, manager.tick_s)

    @property
    def is_deployed(self) -> bool:
        """Whether a stack on AWS is the grid: it makes queues and groups, and runs the manager."""
        return self.runs_in == "aws"

    @property
    def extra(self) -> str | None:
        """The extra of the installation that has what this backend needs and others do not."""
        if self.is_deployed:
            return "aws"
        if self.runs_in == "containers":
            return "docker"
        return "ministack" if self.queue == "sqs" else None


def names() -> list[str]:
    """The backends there are."""
    return sorted(p.parent.name for p in package_data.folder("backends").glob("*/backend.toml"))


def read(kind: type[D], name: str, endpoint: str | None = None) -> D:
    """That of this name as a `kind`, with the endpoint that is named here or by BATCHLAB_ENDPOINT.

    UsageError for a name that is none, and for an endpoint where there is no use for one.
    """
    path = package_data.folder("backends") / name / "backend.toml"
    if name not in names():
        raise UsageError(
            f"There is no backend {name!r}.", remedy=f"There are {', '.join(names())}."
        )
    doc = tomllib.loads(path.read_text())
    emulator = doc.get("emulator")
    takes_endpoint = doc["objects"] == "s3" and doc.get("runs_in") != "aws"
    if endpoint and not takes_endpoint:
        raise UsageError(
            f"The backend {name} has no use for an endpoint.",
            remedy="Leave out --endpoint."
            + (" What stands in AWS's place AWS_ENDPOINT_URL names." if name == "aws" else ""),
        )
    if takes_endpoint and (endpoint := endpoint or os.environ.get(VARIABLE)):
        place_of(endpoint)
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
        doc.get("runs_in", "processes"),
        Image(**{source: tuple(some) for source, some in doc.get("image", {}).items()}),
        _usual(name, doc.get("usual", {})),
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
