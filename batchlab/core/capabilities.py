"""Capabilities of backends, as their descriptors list them.

All code checks capabilities and never the name of a backend. Because code does not check names of backends, a new
backend needs only a new descriptor.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchlab.core import installation
from batchlab.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Capabilities of a backend. Each capability is false unless the backend's descriptor lists it."""

    local_bucket: bool = False
    """The bucket is a folder of the grid's home, so a client can read the bucket without a manager."""
    local_queue: bool = False
    """The queues are in a file of the grid's home."""
    local_manager: bool = False
    """The manager and the instances run the client's Python on the client's machine."""
    one_machine: bool = False
    """Instances are processes of one machine and share its disk.

    Instances on one machine do not have a purchase option or an availability zone. Only a client can restart a manager
    on the same machine.
    """
    container_manager: bool = False
    """The manager runs in a container, which Docker restarts."""
    remote_manager: bool = False
    """Clients connect to the manager, but cannot start or stop the manager."""
    keeps_home: bool = False
    """A new manager has the home folder of the previous manager, and does not need to wait until the previous manager's
    lease expires.
    """
    s3_endpoint: bool = False
    """The option `--endpoint` may set the endpoint of S3 and SQS, whose default is AWS's own endpoint."""
    stack: bool = False
    """A CloudFormation stack created the bucket, the queues, and the groups."""
    fixed_pools: bool = False
    """A client cannot choose the pools and the settings of the manager."""
    pool_images: bool = False
    """The workers of a pool may run in the pool's own container image."""
    sets_spot_share: bool = False
    """A replay can set the share of Spot Instances in each group."""
    termination_hook: bool = False
    """A terminating instance waits until its worker completes a lifecycle hook."""
    billed: bool = False
    """AWS bills the instances and the requests."""
    simulated: bool = False
    """The grid runs in one process and in virtual time, and ends with the process."""

    @property
    def shares_gpus(self) -> bool:
        """Return whether all instances use the GPUs of one machine."""
        return self.one_machine or self.container_manager


NO_CAPABILITIES = Capabilities()


def check_pool_images(backend: str, capabilities: Capabilities, images: Mapping[str, str]) -> None:
    """Raise UsageError if a pool has an image that the backend cannot use. `images` maps names of pools to images."""
    if images and not capabilities.pool_images:
        others = [name for name in backend_names() if capabilities_of(name).pool_images]
        raise UsageError(
            f"The pool {next(iter(images))!r} has an image, which the backend {backend} does not support.",
            remedy=f"Leave out the image, or use one of the backends {', '.join(others)}.",
        )


def backend_names() -> list[str]:
    """Return the names of all backends."""
    return sorted(p.parent.name for p in installation.folder("backends").glob("*/backend.toml"))


def read_descriptor(name: str) -> dict[str, Any]:
    """Return the descriptor of an existing backend."""
    return tomllib.loads((installation.folder("backends") / name / "backend.toml").read_text())


def capabilities_in(descriptor: dict[str, Any]) -> Capabilities:
    """Return the capabilities that a backend's descriptor lists."""
    return Capabilities(**dict.fromkeys(descriptor["capabilities"], True))


def capabilities_of(name: str) -> Capabilities:
    """Return the capabilities of the backend with that name. An unknown backend does not have any capability."""
    return capabilities_in(read_descriptor(name)) if name in backend_names() else NO_CAPABILITIES
