"""PostgreSQL, so that SqlLedger may rely on it as on SQLite (see engines).

Invariant: a transaction that writes takes one lock of the schema before it looks at anything, and
each of its statements sees all that was committed before; one that reads sees one state. No wait
is without end: for the server's answer, for the lock, for a client that holds it and sleeps.
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

from batchlab.adapters.sql.db_errors import is_refusal, name_of, plain
from batchlab.adapters.sql.engines import BEGIN, SCHEMA
from batchlab.adapters.sql.logins import Login, Logins
from batchlab.adapters.threads import Threads
from batchlab.core.errors import BackendError, Unreachable, UsageError

LOCK_S = 10.0
"""So long the lock is waited for."""
SLEEP_S = 5.0
"""A client that says nothing for so long within a transaction loses it, and with it the lock: a
manager that is paused must not keep another from leading."""
STATEMENT_S = 20.0
LONG_S = 600.0
"""A statement's longest time, and that of one that may take minutes."""
GRACE_S = 5.0
"""So much later the client hangs up on a server that should have given up by itself."""

_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,62}")
_DEFAULTS = {
    "application_name": "batchlab",
    "connect_timeout": "5",
    # A peer that is gone without a word is noticed within 15 s.
    "keepalives_idle": "5",
    "keepalives_interval": "3",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    # After a failover the old address may still lead to what is a standby now.
    "target_session_attrs": "read-write",
}


def postgres_engine(
    url: str, schema: str, *, ca: Path | None = None, logins: Logins | None = None
) -> Engine:
    """An engine for this schema of this database; UsageError for what can be neither. See
    `open_postgres`."""
    if not _SCHEMA_NAME.fullmatch(schema) or schema.startswith("pg_"):
        raise UsageError(
            f"{schema!r} cannot be the name of a schema.",
            remedy="Take up to 63 small letters, digits, `_`, `-` and `.`, a letter first.",
        )
    parsed = _parsed(url)
    defaults = _DEFAULTS | _tls(parsed, ca, is_remote=logins is not None)
    engine = create_engine(
        parsed,
        # What the URL says goes first.
        connect_args={k: v for k, v in defaults.items() if k not in parsed.query},
        use_native_hstore=False,
        pool_size=1 + Threads.READERS,
        max_overflow=0,
        execution_options={SCHEMA: schema, BEGIN: _begin},
    )
    connect = Connect(logins, name_of(engine)) if logins else _connect
    event.listen(engine, "do_connect", connect)
    event.listen(engine, "checkout", _look)
    return engine


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        # Says nothing of what it is: there may be a password in it. For the same reason no cause.
        raise UsageError(
            "The ledger's URL is none of a PostgreSQL database.",
            remedy="Write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with special characters "
            "of the password as %XX.",
        )
    return parsed.set(drivername="postgresql+psycopg")


def _tls(parsed: URL, ca: Path | None, *, is_remote: bool) -> dict[str, str]:
    """Options that check the server's certificate and name."""
    if ca is None:
        if "sslmode" in parsed.query or not is_remote:
            return {}
        # Put before by a sslrootcert in the URL.
        return {"sslmode": "verify-full", "sslrootcert": "system"}
    if parsed.query.get("sslmode", "verify-full") != "verify-full" or "sslrootcert" in parsed.query:
        raise UsageError(
            "The ledger's URL and the CA bundle disagree on how its server is checked.",
            remedy="Leave sslmode and sslrootcert out of the URL, or name no CA bundle.",
        )
    if not ca.is_file():
        raise UsageError(
            f"There is no CA bundle {ca}.",
            remedy="For RDS download https://truststore.pki.rds.amazonaws.com/global/"
            "global-bundle.pem.",
        )
    return {"sslmode": "verify-full", "sslrootcert": str(ca)}


# --- Connections ---------------------------------------------------------------------------------


class _Bounded(psycopg.Connection[Any]):
    """A connection that does not wait for ever for a server that is frozen."""

    limit_s = STATEMENT_S + GRACE_S

    def __del__(self, *_: Any) -> None:
        # SQLAlchemy lets a connection go, open as it is, whose set-up fails half-way; the server
        # must not wait for whoever collects the garbage to tell it.
        if hasattr(self, "pgconn") and not self.closed:
            self.close()

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(self._bounded(gen), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """As `gen`, which is sent 0 now and then while there is nothing to read or to write."""
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
    # The driver would begin by itself, with a round trip of its own.
    return _Bounded.connect(*args, autocommit=True, **options)


class Connect:
    """Makes connections with what `logins` says; where the database refuses that, with what it
    says then."""

    def __init__(self, logins: Logins, ledger: str) -> None:
        """`ledger` is what people know the database by."""
        self._logins = logins
        self._ledger = ledger
        self._has_worked: Login | None = None

    def __call__(self, _dialect: object, _record: object, args: Any, options: Any) -> _Bounded:
        login = self._logins.login()
        try:
            return self._connected(login, args, options)
        except psycopg.OperationalError as error:
            if not is_refusal(error):
                raise
        return self._again(login, args, options)

    def _again(self, refused: Login, args: Any, options: Any) -> _Bounded:
        login = self._logins.login(refused=refused)
        try:
            return self._connected(login, args, options)
        except psycopg.OperationalError as error:
            if not is_refusal(error):
                raise
            text = f"The ledger {self._ledger} does not take the password of {self._logins.where}"
            if self._has_worked == login:
                # The database has the new one, and the secret still the old.
                raise Unreachable(f"{text}; it is being changed.") from error
            raise BackendError(
                f"{text}: {plain(error)}.",
                remedy="Look at what it holds, and at whether that user may log in.",
            ) from error

    def _connected(self, login: Login, args: Any, options: Any) -> _Bounded:
        given = {**options, "user": login.user, "password": login.password}
        connection = _Bounded.connect(*args, autocommit=True, **given)
        self._has_worked = login
        return connection


def _look(connection: _Bounded, _record: object, _proxy: object) -> None:
    """Put away a connection that the server has ended: it has said so where nobody asked. Takes no
    round trip; one that is gone without a word shows at its first use."""
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
    # READ COMMITTED: a snapshot would be taken before the lock is had, and show what was then.
    kind = "READ COMMITTED, READ WRITE" if writes else "REPEATABLE READ, READ ONLY"
    statements = [
        f"BEGIN ISOLATION LEVEL {kind}",
        # For this transaction, not the connection: a pooler gives that to somebody else next.
        f'SET LOCAL search_path TO "{schema}"',
        f"SET LOCAL statement_timeout TO {limit_s * 1000:.0f}",
        f"SET LOCAL lock_timeout TO {LOCK_S * 1000:.0f}",
        f"SET LOCAL idle_in_transaction_session_timeout TO {SLEEP_S * 1000:.0f}",
    ]
    if writes:
        statements.append(f"SELECT pg_advisory_xact_lock({key(schema)})")
    # One message, thus one round trip.
    connection.exec_driver_sql("; ".join(statements))


def key(schema: str) -> int:
    """The schema's lock among those of its database, a signed number of 64 bits."""
    digest = hashlib.blake2b(f"batchlab {schema}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
