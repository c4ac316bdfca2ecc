"""Locations of a grid's parts in containers (compose/compose.yaml): one private network, and one address per part.

Invariant: the address of a part is the same on the host and in every container, so the URL of a queue works everywhere.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.local import state_files
from batchlab.core.atomic_write import PRIVATE_FOLDER, write_whole
from batchlab.core.errors import UsageError
from batchlab.runtime.home import Home

NAME = "localstack"
"""Name of the backend, and of the folder in the home that contains `deployment.json`."""

MANAGER_PORT = 8080
AUTOSCALING_PORT = 8000
METADATA_PORT = 8001
METADATA_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
POSTGRES_PORT = 5432

TEMPLATE = "worker-{pool}"
"""Name of a pool's launch template."""
ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")

STATE = "asg"
"""Folder next to `deployment.json` in which the Auto Scaling endpoint stores its groups."""

HOME = "/var/lib/batchlab"
"""Path of the home in the containers of the manager and the Auto Scaling endpoint."""

_BLOCK = [f"10.213.{n}" for n in range(64, 256)]


@dataclass(frozen=True, slots=True)
class Deployment:
    """Description of a grid in containers: its name, its network, and its image.

    `subnet` contains the first three numbers of the network's IP addresses. The manager and the workers run as `user`
    ("uid:gid") on the Python version `python` ("3.12"). `pools` are the pools that the user chose, in the form of the
    manager's option --pool. `pool_images` maps the name of a pool with an image to the image's reference and to the
    name of the image that the workers run, which also contains batchlab.
    """

    project: str
    subnet: str
    image: str
    user: str
    python: str
    pools: tuple[str, ...] = ()
    pool_images: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def manager_host(self) -> str:
        return f"{self.subnet}.13"

    @property
    def autoscaling_url(self) -> str:
        return f"http://{self.subnet}.12:{AUTOSCALING_PORT}"

    @property
    def metadata_url(self) -> str:
        """Value of `METADATA_VARIABLE` in an instance."""
        return f"http://{self.subnet}.12:{METADATA_PORT}"

    def storage_url(self, port: int) -> str:
        """Return the URL of the grid's own LocalStack."""
        return f"http://{self.subnet}.10:{port}"

    def postgres_url(self, password: str) -> str:
        """Return the URL of the grid's PostgreSQL database, which stores the ledger.

        The URL contains the database's password, so the URL must not be shown.
        """
        return f"postgresql://batchlab:{password}@{self.subnet}.11:{POSTGRES_PORT}/batchlab"


def folder(home: Home) -> Path:
    """Return the backend's folder in a home."""
    return home.backend_folder(NAME)


def password_file(home: Home) -> Path:
    """Return the path of the file with PostgreSQL's password.

    Only the owner can open the folder of the password file. All users can read the password file itself, because it is
    mounted into a container whose service runs as another user.
    """
    return folder(home) / "secrets" / "postgres"


def keys_file(home: Home) -> Path:
    """Return the path of the file with the keys that sign requests to the Auto Scaling endpoint.

    Only the host's commands, the manager, and the Auto Scaling endpoint can read the file of keys. Instances cannot
    read the keys of the Auto Scaling endpoint.
    """
    return folder(home) / "secrets" / "autoscaling.json"


def autoscaling(home: Home, at: Deployment) -> Endpoint:
    """Return the address and the keys of the Auto Scaling endpoint. An endpoint of release 0.1.0 does not have keys."""
    own = state_files.read_keys(keys_file(home))
    if own is None:
        return Endpoint(at.autoscaling_url)
    return Endpoint(at.autoscaling_url, access_key=own.access_key, secret_key=own.secret_key)


def read(home: Home) -> Deployment | None:
    """Return the deployment that the home records, or None if the home does not record a deployment.

    Raise BackendError if the deployment's file is unreadable or invalid.
    """
    return state_files.read_record(
        folder(home) / "deployment.json",
        _deployment,
        "a description of a grid in containers",
        # `batchlab gc` skips containers that a home still records, so the user must delete `deployment.json` first.
        remedy="Delete the file, then remove the remaining containers with `batchlab gc`.",
    )


def _deployment(fields: dict[str, Any]) -> Deployment:
    images = {name: (str(reference), str(image)) for name, (reference, image) in fields.get("pool_images", {}).items()}
    return Deployment(**{**fields, "pools": tuple(fields.get("pools", ())), "pool_images": images})


def broadcast_address(home: Home) -> str | None:
    """Return the broadcast address of the grid's network, or None if this process does not belong to a grid.

    The home of an instance does not record the deployment, so an instance uses its address of the metadata service.
    """
    if at := read(home):
        return f"{at.subnet}.255"
    host = urlsplit(os.environ.get(METADATA_VARIABLE, "")).hostname
    return f"{host.rpartition('.')[0]}.255" if host else None


_CREATED_HERE: set[Path] = set()
"""Paths of the homes whose deployment this process created."""


def is_created_here(home: Home) -> bool:
    """Return whether this process created the deployment of the home."""
    return home.path in _CREATED_HERE


def write(home: Home, deployment: Deployment) -> None:
    """Write the file of the deployment atomically. Create the grid's password and keys if the password and the keys do
    not exist.
    """
    path = folder(home) / "deployment.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Set the mode of the folder now, because the manager's container mounts the folder read-only and cannot set the
    # mode.
    path.parent.chmod(PRIVATE_FOLDER)
    password = password_file(home)
    password.parent.mkdir(mode=0o700, exist_ok=True)
    if not password.exists():
        # Write the password atomically, because a full disk could otherwise leave an empty password file.
        write_whole(password, secrets.token_urlsafe(24), mode=0o444)
    state_files.provide_keys(keys_file(home))
    (path.parent / STATE).mkdir(exist_ok=True)
    if not path.exists():
        _CREATED_HERE.add(home.path)
    write_whole(path, json.dumps(asdict(deployment), indent=1))


def lock(home: Home) -> AbstractContextManager[None]:
    """Lock the home's deployment, so that only one command changes its containers."""
    from batchlab.adapters.local import objects

    return objects.lock(folder(home) / "deployment.json")


def forget(home: Home) -> None:
    """Delete the files of a deployment whose containers were removed."""
    # Delete `deployment.json` last, because `deployment.json` records that containers must be removed.
    password_file(home).unlink(missing_ok=True)
    keys_file(home).unlink(missing_ok=True)
    # The next grid in the home has the project name of the old grid. If the groups of the old grid remained, the next
    # grid's Auto Scaling endpoint would launch instances for them.
    (folder(home) / STATE / "groups.json").unlink(missing_ok=True)
    (folder(home) / "deployment.json").unlink(missing_ok=True)
    _CREATED_HERE.discard(home.path)


def free_subnet(used: Iterable[str], project: str = "") -> str:
    """Return the first three numbers of the first of batchlab's /24 networks that does not overlap a network in `used`.

    `used` contains networks such as "10.0.0.0/8". Each project starts the search at a different network, because two
    projects that start at the same time cannot see each other's network. Raise UsageError if all of batchlab's networks
    are in use.
    """
    networks = [ipaddress.ip_network(address, strict=False) for address in used]
    begin = zlib.crc32(project.encode()) % len(_BLOCK)
    for block in _BLOCK[begin:] + _BLOCK[:begin]:
        wanted = ipaddress.ip_network(f"{block}.0/24")
        if not any(wanted.overlaps(network) for network in networks if network.version == wanted.version):
            return block
    raise UsageError(
        "All networks from 10.213.64.0/24 to 10.213.255.0/24 are in use.",
        remedy="`batchlab gc` removes the containers and networks of grids that no longer exist.",
    )
