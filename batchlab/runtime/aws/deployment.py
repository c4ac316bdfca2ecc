"""Where the parts of a grid on AWS are: what the outputs of its stack say.

Invariant: laptop and instances read one form of file, `aws/deployment.json` in their home, so a
name means the same everywhere. Nothing in it is secret: of secrets it has the ARNs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.runtime.home import Home

NAME = "aws"
"""The backend whose folder in the home this is kept in."""

MANAGER_PORT = 8080
"""On the manager's instance, where it listens on 127.0.0.1 alone."""


@dataclass(frozen=True, slots=True)
class Database:
    """A PostgreSQL server; `secret` is the ARN of the secret with the user's name and password.
    With `iam` a token is made in its place for each connection. `ca` is a file with the
    certificates that the server's must descend from; empty: those of the system."""

    host: str
    port: int
    name: str
    secret: str = ""
    user: str = ""
    iam: bool = False
    ca: str = ""


@dataclass(frozen=True, slots=True)
class AwsDeployment:
    """One stack. `prefix` begins the names of its queues and groups; `domain` is SimpleDB's.
    `python` is the version ("3.12") that its instances run on, and `egress` how they reach AWS:
    "endpoints", "nat", or by the user's "own" network; either is empty where nobody has said."""

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
        """What the names of the pools' Auto Scaling groups begin with."""
        return f"{self.prefix}pool-"

    def document(self) -> dict[str, Any]:
        """As `parse` takes it."""
        return asdict(self)


def folder(home: Home) -> Path:
    """What the backend keeps in a home."""
    return home.of(NAME)


def path_in(home: Home) -> Path:
    return folder(home) / "deployment.json"


def read(home: Home) -> AwsDeployment | None:
    """The deployment of this home, None where there is none; BackendError where its file cannot be
    read, or holds something else."""
    path = path_in(home)
    try:
        return parse(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BackendError(
            f"{path} is not a description of a stack: {error}.",
            remedy="`batchlab deploy status` writes it anew from the stack's outputs.",
        ) from error


def parse(fields: Mapping[str, Any]) -> AwsDeployment:
    """The deployment of a JSON object; ValueError, TypeError or KeyError where it is none."""
    from batchlab.core.pricing.hourly import LEDGERS

    database = fields.get("database")
    found = AwsDeployment(
        **{
            **fields,
            "pools": tuple(Pool(**{**one, "env": ()}) for one in fields["pools"]),
            "database": Database(**database) if database else None,
        }
    )
    if found.ledger not in LEDGERS:
        raise ValueError(f"ledger is {found.ledger!r}, not {', '.join(LEDGERS)}")
    if (found.ledger == "postgres") != (found.database is not None):
        raise ValueError("a postgres ledger, and no other, has a database")
    if (found.ledger == "simpledb") != bool(found.domain):
        raise ValueError("a simpledb ledger, and no other, has a domain")
    return found


def write(home: Home, deployment: AwsDeployment) -> None:
    """Keep it; whole or not at all."""
    home.make()
    path = path_in(home)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(deployment.document(), indent=1))


def forget(home: Home) -> None:
    """The stack is gone."""
    path_in(home).unlink(missing_ok=True)
