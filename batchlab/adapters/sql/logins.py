"""Who the ledger is at a remote PostgreSQL, where that changes while it runs: a secret that is
rotated, or a token that lasts for minutes.

Invariant: a password is in no text that anything here makes, and in the `repr` of nothing.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from batchlab.core.errors import BackendError

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint


_here = threading.local()


class _Hush(logging.Filter):
    """Lets nothing through that a thread says while it is told a secret."""

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        return not getattr(_here, "is_told_a_secret", False)


_hush = _Hush()


@contextmanager
def in_secret() -> Iterator[None]:
    """What boto3 says in this thread meanwhile goes to no log: at level DEBUG botocore logs every
    answer, and every signature."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("boto", "urllib3")):
            logging.getLogger(name).addFilter(_hush)
    _here.is_told_a_secret = True
    try:
        yield
    finally:
        _here.is_told_a_secret = False


@dataclass(frozen=True, slots=True)
class Login:
    """A database user and its password."""

    user: str
    password: str = field(repr=False)


class Logins(Protocol):
    """Where logins come from; asked for each new connection, from any thread."""

    @property
    def where(self) -> str:
        """What people know it by, as in "the password of ..."."""

    def login(self, *, refused: Login | None = None) -> Login:
        """The login for a new connection; where the database has `refused` one, that which may
        have come in its place. Raises as the AWS adapters do."""


class SecretLogins:
    """A secret in Secrets Manager: JSON with `username` and `password`, as RDS makes and rotates
    it. Fetched once, and again when what was fetched is refused."""

    def __init__(self, endpoint: Endpoint, secret: str) -> None:
        """`secret` is its name or ARN. Fetches nothing yet."""
        self._endpoint = endpoint
        self._secret = secret
        self._found: Login | None = None
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        return f"the secret {self._secret}"

    def login(self, *, refused: Login | None = None) -> Login:
        with self._lock:
            # Somebody else may have fetched it since the refused one was handed out.
            if self._found is None or self._found == refused:
                self._found = self._fetch()
            return self._found

    def _fetch(self) -> Login:
        from batchlab.adapters.aws.endpoint import client, translated

        manager = client(self._endpoint, "secretsmanager", connections=1)
        try:
            with translated(f"The secret {self._secret}"), in_secret():
                answer = manager.get_secret_value(SecretId=self._secret)
        finally:
            manager.close()
        return self._read(answer)

    def _read(self, answer: dict[str, Any]) -> Login:
        try:
            doc = json.loads(answer.get("SecretString", ""))
            user, password = doc["username"], doc["password"]
        except (ValueError, KeyError, TypeError):
            doc = None
        if doc is None or not isinstance(user, str) or not isinstance(password, str):
            # Without a cause, whose text may be the secret's.
            raise BackendError(
                f"The secret {self._secret} holds no login.",
                remedy='It must be JSON: {"username": ..., "password": ...}.',
            )
        return Login(user, password)


class IamLogins:
    """Tokens of IAM database authentication, signed here for each connection. RDS takes one for 15
    minutes, and looks at it only when a connection is made."""

    def __init__(self, endpoint: Endpoint, *, host: str, port: int, user: str) -> None:
        """`host` and `port` as the client connects to: the token holds for no other."""
        self._endpoint = endpoint
        self._host, self._port, self._user = host, port, user
        self._rds: Any = None
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        return f"IAM for the user {self._user}"

    def login(self, *, refused: Login | None = None) -> Login:  # noqa: ARG002
        from batchlab.adapters.aws.endpoint import client, translated

        with self._lock, translated("A token for the database"):
            if self._rds is None:
                self._rds = client(self._endpoint, "rds", connections=1)
            with in_secret():
                token: str = self._rds.generate_db_auth_token(
                    DBHostname=self._host,
                    Port=self._port,
                    DBUsername=self._user,
                    Region=self._endpoint.region,
                )
        return Login(self._user, token)
