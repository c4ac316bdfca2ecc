"""PostgreSQL engine with the transactions that `SqlLedger` needs (see `engines`).

Invariant: a writing transaction first takes the one lock of the schema. Each statement of a writing transaction sees
everything committed before that statement. A reading transaction sees one state of the database. Every wait has a
limit: for the server's answer, for the lock, and for a suspended client that holds the lock.
"""

from __future__ import annotations

import hashlib
import re
import select
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DisconnectionError

from batchlab.adapters.clock import ReadWriteThreads
from batchlab.adapters.sql.engines import BEGIN, SCHEMA, is_refusal, name_of, one_line
from batchlab.adapters.sql.logins import Login, Logins
from batchlab.core.errors import BackendError, Unreachable, UsageError

LOCK_S = 10.0
"""Maximum wait for the schema's lock in seconds."""
IDLE_CLIENT_S = 5.0
"""Time in seconds after which the server ends the transaction of a silent client.

The end of the transaction frees the lock, so a suspended manager cannot keep another manager from leading.
"""
STATEMENT_S = 20.0
LONG_S = 600.0
"""Maximum duration of a statement in seconds: STATEMENT_S normally, and LONG_S for statements that may take minutes."""
GRACE_S = 5.0
"""Extra time in seconds after a statement's limit before the client closes the connection.

The server should have ended a statement itself before the client's extra time is over.
"""

_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,62}")
_DEFAULTS = {
    "application_name": "batchlab",
    "connect_timeout": "5",
    # With the keepalive settings, the client notices within 15 s that its peer has disappeared.
    "keepalives_idle": "5",
    "keepalives_interval": "3",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    # After a failover, the old address may still belong to a server that is now a standby.
    "target_session_attrs": "read-write",
}


def postgres_engine(url: str, schema: str, *, ca: Path | None = None, logins: Logins | None = None) -> Engine:
    """Return an engine for the schema `schema` of the PostgreSQL database. See `open_postgres`.

    Raise UsageError if the URL or the schema name is invalid.
    """
    if not _SCHEMA_NAME.fullmatch(schema) or schema.startswith("pg_"):
        raise UsageError(
            f"{schema!r} cannot be the name of a schema.",
            remedy="Use up to 63 small letters, digits, `_`, `-`, and `.`, and begin with a letter.",
        )
    parsed = _parse_url(url)
    defaults = _DEFAULTS | _tls(parsed, ca, is_remote=logins is not None)
    engine = create_engine(
        parsed,
        # Connection options in the URL take precedence over the defaults.
        connect_args={k: v for k, v in defaults.items() if k not in parsed.query},
        use_native_hstore=False,
        pool_size=1 + ReadWriteThreads.READERS,
        max_overflow=0,
        execution_options={SCHEMA: schema, BEGIN: _begin},
    )
    connect = Connect(logins, name_of(engine)) if logins else _connect
    event.listen(engine, "do_connect", connect)
    event.listen(engine, "checkout", _look)
    return engine


def _parse_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        # The error omits its cause and the URL, which may contain a password.
        raise UsageError(
            "The ledger's URL is not the URL of a PostgreSQL database.",
            remedy="Write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with special characters "
            "of the password as %XX.",
        )
    return parsed.set(drivername="postgresql+psycopg")


def _tls(parsed: URL, ca: Path | None, *, is_remote: bool) -> dict[str, str]:
    """Return the options that check the server's certificate and name."""
    if ca is None:
        if "sslmode" in parsed.query or not is_remote:
            return {}
        # An sslrootcert in the URL takes precedence over the system's roots.
        return {"sslmode": "verify-full", "sslrootcert": "system"}
    if parsed.query.get("sslmode", "verify-full") != "verify-full" or "sslrootcert" in parsed.query:
        raise UsageError(
            "The ledger's URL and the CA bundle set different checks of the server.",
            remedy="Remove sslmode and sslrootcert from the URL, or do not name a CA bundle.",
        )
    if not ca.is_file():
        raise UsageError(
            f"The CA bundle {ca} does not exist.",
            remedy="For RDS, download https://truststore.pki.rds.amazonaws.com/global/global-bundle.pem.",
        )
    return {"sslmode": "verify-full", "sslrootcert": str(ca)}


# --- Connections ---------------------------------------------------------------------------------


class _Bounded(psycopg.Connection[Any]):
    """A PostgreSQL connection that limits its wait for a server that does not answer."""

    limit_s = STATEMENT_S + GRACE_S

    def __del__(self, *_: Any) -> None:
        # If the set-up of a connection fails, SQLAlchemy drops the connection without closing the connection. The
        # server must learn of the connection's end before the garbage collector finds the connection.
        if hasattr(self, "pgconn") and not self.closed:
            self.close()

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(self._bounded(gen), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run `gen`, and close the connection if the server does not answer within `limit_s` seconds.

        `gen` regularly receives 0 while `gen` waits for the server.
        """
        until_s = time.monotonic() + self.limit_s
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > until_s:
                    self.close()
                    raise psycopg.OperationalError(f"no answer within {self.limit_s:.0f} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


def _connect(_dialect: object, _record: object, args: Any, options: Any) -> _Bounded:
    # Without autocommit, the driver would begin transactions itself, with an extra round trip.
    return _Bounded.connect(*args, autocommit=True, **options)


class Connect:
    """Factory of database connections with the login of `logins`.

    If the database refuses the login, the factory makes one more attempt with the login that `logins` then returns.
    """

    def __init__(self, logins: Logins, ledger: str) -> None:
        """Set the source of logins, and the name of the database for error messages."""
        self._logins = logins
        self._ledger = ledger
        self._has_worked: Login | None = None

    def __call__(self, _dialect: object, _record: object, args: Any, options: Any) -> _Bounded:
        login = self._logins.login()
        try:
            return self._open_connection(login, args, options)
        except psycopg.OperationalError as error:
            if not is_refusal(error):
                raise
        return self._again(login, args, options)

    def _again(self, refused: Login, args: Any, options: Any) -> _Bounded:
        login = self._logins.login(refused=refused)
        try:
            return self._open_connection(login, args, options)
        except psycopg.OperationalError as error:
            if not is_refusal(error):
                raise
            text = f"The ledger {self._ledger} refuses the password of {self._logins.where}"
            if self._has_worked == login:
                # The database already has the new password, but the secret still contains the old password.
                raise Unreachable(f"{text}. The password is being changed.") from error
            raise BackendError(
                f"{text}: {one_line(error)}.", remedy="Check the content of the secret and the permissions of the user."
            ) from error

    def _open_connection(self, login: Login, args: Any, options: Any) -> _Bounded:
        with_login = {**options, "user": login.user, "password": login.password}
        connection = _Bounded.connect(*args, autocommit=True, **with_login)
        self._has_worked = login
        return connection


def _look(connection: _Bounded, _record: object, _proxy: object) -> None:
    """Discard a connection that the server has closed.

    The server's closing message is readable on the socket, so the check needs no round trip. A connection that was lost
    without a message from the server fails at its first use.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        raise DisconnectionError


def _begin(connection: Connection, *, writes: bool, lasts: bool) -> None:
    schema = connection.get_execution_options()[SCHEMA]
    limit_s = LONG_S if lasts else STATEMENT_S
    driver = connection.connection.driver_connection
    assert isinstance(driver, _Bounded)
    driver.limit_s = limit_s + GRACE_S
    # With READ COMMITTED, each statement of the transaction takes its snapshot after the lock. Higher isolation levels
    # would take the snapshot before the lock, and show an older state.
    kind = "READ COMMITTED, READ WRITE" if writes else "REPEATABLE READ, READ ONLY"
    statements = [
        f"BEGIN ISOLATION LEVEL {kind}",
        # The settings apply to the transaction and not to the connection, because a pooler may give the connection to
        # another client.
        f'SET LOCAL search_path TO "{schema}"',
        f"SET LOCAL statement_timeout TO {limit_s * 1000:.0f}",
        f"SET LOCAL lock_timeout TO {LOCK_S * 1000:.0f}",
        f"SET LOCAL idle_in_transaction_session_timeout TO {IDLE_CLIENT_S * 1000:.0f}",
    ]
    if writes:
        statements.append(f"SELECT pg_advisory_xact_lock({key(schema)})")
    # All statements are sent in one message, which takes one round trip.
    connection.exec_driver_sql("; ".join(statements))


def key(schema: str) -> int:
    """Return the number of the schema's advisory lock in its database, as a signed 64-bit integer."""
    digest = hashlib.blake2b(f"batchlab {schema}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
