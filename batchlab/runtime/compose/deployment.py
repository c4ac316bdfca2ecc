"""Where the parts of a grid in containers are: one private network, one address per part.

Invariant: an address means the same from the host and from every container, so a queue's URL that
works on one side works on the other.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.local import access_keys, local_files
from batchlab.core.atomic_write import PRIVATE_FOLDER, write_whole
from batchlab.core.errors import BackendError, UsageError
from batchlab.runtime.home import Home

NAME = "localstack"
"""The backend whose folder in the home this is kept in."""

MANAGER_PORT = 8080
AUTOSCALING_PORT = 8000
METADATA_PORT = 8001
POSTGRES_PORT = 5432

TEMPLATE = "worker-{pool}"
"""A pool's launch template."""
ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")

STATE = "asg"
"""The folder, beside the deployment's own file, in which the Auto Scaling endpoint keeps groups."""

HOME = "/var/lib/batchlab"
"""The home, as the manager and the Auto Scaling endpoint see it."""

_BLOCK = [f"10.213.{n}" for n in range(64, 256)]


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a grid in containers is called, and where it is.

    `subnet` is the first three numbers of its network's addresses. `user` is the "uid:gid" that
    the manager and the workers run as, `python` the version ("3.12") that they run on. `pools` are
    the user's own, as options of the manager.
    """

    project: str
    subnet: str
    image: str
    user: str
    python: str
    pools: tuple[str, ...] = ()

    @property
    def manager_host(self) -> str:
        return f"{self.subnet}.13"

    @property
    def autoscaling_url(self) -> str:
        return f"http://{self.subnet}.12:{AUTOSCALING_PORT}"

    @property
    def metadata_url(self) -> str:
        """What AWS_EC2_METADATA_SERVICE_ENDPOINT is in an instance."""
        return f"http://{self.subnet}.12:{METADATA_PORT}"

    def storage_url(self, port: int) -> str:
        """Of this grid's own LocalStack."""
        return f"http://{self.subnet}.10:{port}"

    def postgres_url(self, password: str) -> str:
        """Of the ledger; never to be shown."""
        return f"postgresql://batchlab:{password}@{self.subnet}.11:{POSTGRES_PORT}/batchlab"


def folder(home: Home) -> Path:
    """What the backend keeps in a home."""
    return home.of(NAME)


def password_file(home: Home) -> Path:
    """PostgreSQL's password. Its folder is the owner's alone, the file itself is not: a service
    that runs as another user reads it where it is mounted."""
    return folder(home) / "secrets" / "postgres"


def keys_file(home: Home) -> Path:
    """The keys that requests to the Auto Scaling endpoint must be signed with. Only the host's
    commands, the manager, and the endpoint itself can read the file: instances have no keys."""
    return folder(home) / "secrets" / "autoscaling.json"


def autoscaling(home: Home, at: Deployment) -> Endpoint:
    """The Auto Scaling endpoint, with its keys. One that release 0.1.0 started has none."""
    own = access_keys.read(keys_file(home))
    if own is None:
        return Endpoint(at.autoscaling_url)
    return Endpoint(at.autoscaling_url, access_key=own.access_key, secret_key=own.secret_key)


def read(home: Home) -> Deployment | None:
    """The deployment of this home, None where there is none; BackendError where its file cannot be
    read, or holds something else."""
    path = folder(home) / "deployment.json"
    try:
        fields = json.loads(path.read_text())
        return Deployment(**{**fields, "pools": tuple(fields.get("pools", ()))})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise BackendError(
            f"{path} cannot be read: {error}.",
            # In this order: what the folder seems to know of is not swept.
            remedy="Delete the file, then sweep what is left with `batchlab gc`.",
        ) from error


_MADE_HERE: set[Path] = set()
"""Homes whose deployment this process made."""


def is_made_here(home: Home) -> bool:
    """Return whether this process made the deployment of this home."""
    return home.path in _MADE_HERE


def write(home: Home, deployment: Deployment) -> None:
    """Keep it, with a password of its own where there is none yet; whole or not at all."""
    here = folder(home)
    here.mkdir(parents=True, exist_ok=True)
    here.chmod(PRIVATE_FOLDER)  # the manager cannot: in its container the folder is read-only
    password = password_file(home)
    password.parent.mkdir(mode=0o700, exist_ok=True)
    if not password.exists():
        # A full disk would else leave an empty one, and that would be kept.
        write_whole(password, secrets.token_urlsafe(24), mode=0o444)
    access_keys.provide(keys_file(home))
    (here / STATE).mkdir(exist_ok=True)
    path = here / "deployment.json"
    if not path.exists():
        _MADE_HERE.add(home.path)
    write_whole(path, json.dumps(asdict(deployment), indent=1))


def locked(home: Home) -> AbstractContextManager[None]:
    """Wait until nobody else brings this home's containers up or down, and be the one who does."""
    return local_files.locked(folder(home) / "deployment.json")


def forget(home: Home) -> None:
    """After everything of it is gone."""
    # Last the file that says that there is something to take down.
    password_file(home).unlink(missing_ok=True)
    keys_file(home).unlink(missing_ok=True)
    # The next grid here has the same name: it would launch for groups that ended with this one.
    (folder(home) / STATE / "groups.json").unlink(missing_ok=True)
    (folder(home) / "deployment.json").unlink(missing_ok=True)
    _MADE_HERE.discard(home.path)


def free_subnet(taken: Iterable[str], project: str = "") -> str:
    """The first of our blocks that overlaps none of the networks `taken` ("10.0.0.0/8");
    UsageError where there is none. Each project begins elsewhere: two that come up at the same
    time do not know of each other's network yet."""
    networks = [ipaddress.ip_network(one, strict=False) for one in taken]
    begin = zlib.crc32(project.encode()) % len(_BLOCK)
    for block in _BLOCK[begin:] + _BLOCK[:begin]:
        wanted = ipaddress.ip_network(f"{block}.0/24")
        if not any(wanted.overlaps(one) for one in networks if one.version == wanted.version):
            return block
    raise UsageError(
        "All networks from 10.213.64.0/24 to 10.213.255.0/24 are taken.",
        remedy="`batchlab gc` sweeps what grids have left behind.",
    )
