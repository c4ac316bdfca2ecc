"""Locations of a grid's parts on AWS, from the outputs of its stack.

Invariants: clients and instances read the file `aws/deployment.json` in their home, which has one format. The file
`aws/deployment.json` contains the ARNs of secrets, but never a secret.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from batchlab.adapters.local.state_files import read_record
from batchlab.core.atomic_write import write_whole
from batchlab.core.model import Pool
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook
from batchlab.runtime.home import Home

NAME = "aws"
"""Name of the backend, and of the folder in the home that contains `deployment.json`."""

MANAGER_PORT = 8080
"""Port of the manager's API. The manager listens only on 127.0.0.1 of its own instance."""


@dataclass(frozen=True, slots=True)
class Database:
    """Connection parameters of the PostgreSQL server.

    `secret` is the ARN of the secret with the database user's name and password. With `iam`, the client creates a token
    for each connection and does not use the secret. `ca` is a file with the certificates of trusted certificate
    authorities. If `ca` is empty, the system's certificates apply.
    """

    host: str
    port: int
    name: str
    secret: str = ""
    user: str = ""
    iam: bool = False
    ca: str = ""


@dataclass(frozen=True, slots=True)
class AwsDeployment:
    """A stack on AWS and the locations of its parts.

    The names of queues and groups start with `prefix`. `domain` is the SimpleDB domain. `python` is the Python version
    of the instances, such as "3.12". `egress` is the route from the instances to AWS: "endpoints", "nat", or "own" for
    the user's own network. `python` and `egress` are empty if their value is unknown.
    """

    stack: str
    region: str
    bucket: str
    prefix: str
    manager_group: str
    token_secret: str
    pools: tuple[Pool, ...]
    ledger: str = "sqlite"
    database: Database | None = None
    domain: str = ""
    log_group: str = ""
    python: str = ""
    egress: str = ""

    @property
    def groups_prefix(self) -> str:
        """Prefix of the names of the pools' Auto Scaling groups."""
        return f"{self.prefix}pool-"

    def document(self) -> dict[str, Any]:
        """Return the deployment as a JSON object that `parse` accepts."""
        return asdict(self)


def folder(home: Home) -> Path:
    """Return the backend's folder in a home."""
    return home.backend_folder(NAME)


def path_in(home: Home) -> Path:
    return folder(home) / "deployment.json"


def read(home: Home) -> AwsDeployment | None:
    """Return the deployment that the home records, or None if the home does not record a deployment.

    Raise BackendError if the deployment's file is unreadable or invalid.
    """
    remedy = "`batchlab deploy status` writes it again from the stack's outputs."
    return read_record(path_in(home), parse, "a description of a stack", remedy=remedy)


def prices_of(home: Home) -> PriceBook:
    """Return the price book of the home, with the region of the stack if the home records a deployment."""
    book = price_book.load(home.path)
    deployment = read(home)
    return replace(book, grid_region=deployment.region) if deployment else book


def parse(fields: Mapping[str, Any]) -> AwsDeployment:
    """Return the deployment that a JSON object describes.

    Raise ValueError, TypeError, or KeyError if the JSON object does not describe a deployment.
    """
    from batchlab.core.pricing.hourly import LEDGERS

    database = fields.get("database")
    pools = tuple(Pool(**{**pool, "env": ()}) for pool in fields["pools"])
    at = AwsDeployment(**{**fields, "pools": pools, "database": Database(**database) if database else None})
    if at.ledger not in LEDGERS:
        raise ValueError(f"ledger is {at.ledger!r}, not {', '.join(LEDGERS)}")
    if (at.ledger == "postgres") != (at.database is not None):
        raise ValueError("a database is required for a postgres ledger, and not allowed for others")
    if (at.ledger == "simpledb") != bool(at.domain):
        raise ValueError("a domain is required for a simpledb ledger, and not allowed for others")
    return at


def write(home: Home, deployment: AwsDeployment) -> None:
    """Write the file of the deployment atomically."""
    home.make()
    path = path_in(home)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(deployment.document(), indent=1))


def forget(home: Home) -> None:
    """Delete the home's record of a stack that no longer exists."""
    path_in(home).unlink(missing_ok=True)
