"""Logins at a remote PostgreSQL that change at run time: a rotated secret or a short-lived token.

Invariant: no message and no `repr` contains a password.
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


_thread = threading.local()


class _SecretFilter(logging.Filter):
    """Log filter that drops all records of a thread while the thread receives a secret."""

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        return not getattr(_thread, "receives_secret", False)


_filter = _SecretFilter()


@contextmanager
def in_secret() -> Iterator[None]:
    """Suppress boto3's log records of this thread. At level DEBUG, botocore logs answers and signatures."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("boto", "urllib3")):
            logging.getLogger(name).addFilter(_filter)
    _thread.receives_secret = True
    try:
        yield
    finally:
        _thread.receives_secret = False


@dataclass(frozen=True, slots=True)
class Login:
    """A database user and its password."""

    user: str
    password: str = field(repr=False)


class Logins(Protocol):
    """Source of the logins of a database. Each new connection asks the source for a login, from any thread."""

    @property
    def where(self) -> str:
        """Return the name of the source of logins, for messages such as "the password of ..."."""

    def login(self, *, refused: Login | None = None) -> Login:
        """Return the login for a new database connection. Raise the same errors as the AWS adapters.

        `refused` is an earlier login of the source that the database has refused.
        """


class SecretLogins:
    """Database login in a secret of AWS Secrets Manager.

    The secret is a JSON document with `username` and `password`, in the form in which RDS creates and rotates secrets.

    The secret is fetched once, and again when the database refuses the fetched login.
    """

    def __init__(self, endpoint: Endpoint, secret: str) -> None:
        """Set the name or ARN of the secret, without fetching the secret."""
        self._endpoint = endpoint
        self._secret = secret
        self._login: Login | None = None
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        return f"the secret {self._secret}"

    def login(self, *, refused: Login | None = None) -> Login:
        with self._lock:
            # Another thread may have fetched the secret since `login` returned the refused login.
            if self._login is None or self._login == refused:
                self._login = self._fetch()
            return self._login

    def _fetch(self) -> Login:
        from batchlab.adapters.aws.endpoint import client, translate_errors

        manager = client(self._endpoint, "secretsmanager", connections=1)
        try:
            with translate_errors(f"The secret {self._secret}"), in_secret():
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
            # The error omits its cause, because the text of the cause might contain the secret.
            raise BackendError(
                f"The secret {self._secret} does not contain a login.",
                remedy='It must be JSON: {"username": ..., "password": ...}.',
            )
        return Login(user, password)


class IamLogins:
    """Tokens of IAM database authentication, signed for each connection.

    RDS accepts a token for 15 minutes, and checks the token only when a connection is opened.
    """

    def __init__(self, endpoint: Endpoint, *, host: str, port: int, user: str) -> None:
        """Set the host and port to which the client connects. A token is valid only for its host and port."""
        self._endpoint = endpoint
        self._host, self._port, self._user = host, port, user
        self._rds: Any = None
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        return f"IAM for the user {self._user}"

    def login(self, *, refused: Login | None = None) -> Login:  # noqa: ARG002
        from batchlab.adapters.aws.endpoint import client, translate_errors

        with self._lock, translate_errors("A token for the database"):
            if self._rds is None:
                self._rds = client(self._endpoint, "rds", connections=1)
            with in_secret():
                token: str = self._rds.generate_db_auth_token(
                    DBHostname=self._host, Port=self._port, DBUsername=self._user, Region=self._endpoint.region
                )
        return Login(self._user, token)
