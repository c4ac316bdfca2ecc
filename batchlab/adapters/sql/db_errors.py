"""Translation of database errors into batchlab's errors.

Invariant: a temporary failure (an outage, a lock, a failover) is Unreachable, so the caller retries
it. A failure that a person must fix is BackendError at once. No message contains a password.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)

from batchlab.adapters.threads import Busy
from batchlab.core.errors import BackendError, NotFound, Unreachable

_LOCKED = "55P03"
_FOREIGN_KEY = "23503"
# First characters of a SQLSTATE. 25006 means that the server has become a standby.
_PASSING = ("08", "25006", "40", "53", "57", "58")
# A refused connection has only a text, from the server or from libpq.
_REMEDIES = (
    (
        ("authentication failed", "no password supplied", "no pg_hba.conf entry"),
        "Look at user and password in the ledger's URL, and at the server's pg_hba.conf.",
    ),
    (
        ("certificate", "does not support SSL", "sslmode"),
        "Look at sslmode and sslrootcert in the ledger's URL, or at the CA bundle that was named.",
    ),
    (
        ('relation "',),
        "Its tables are gone. Start the manager again; `batchlab ledger rebuild` then makes them "
        "anew from the bucket.",
    ),
    (("does not exist",), "Make it with `createdb` and `createuser`, or name another one."),
    (
        ("invalid connection option",),
        "Look at what follows the question mark in the ledger's URL.",
    ),
    (
        ("permission denied",),
        "The ledger's user must own its schema, or may CREATE one in the database.",
    ),
)


def name_of(engine: Engine) -> str:
    """Return the name of the database for messages."""
    url = engine.url
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    host = url.host or url.query.get("host") or "localhost"
    return f"{url.database or url.username} on {host}" + (f":{url.port}" if url.port else "")


def instead(engine: Engine) -> str:
    """Return advice for the use of another database."""
    if engine.dialect.name == "sqlite":
        return "name another folder with --home"
    return "name another database"


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Raise batchlab's errors instead of the database's."""
    try:
        yield
    except SQLAlchemyError as error:
        said = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(said, sqlite3.Error):
            raise _from_sqlite(engine, error, said) from error
        raise _from_postgresql(engine, error, said) from error


def _from_sqlite(engine: Engine, error: SQLAlchemyError, said: sqlite3.Error) -> BackendError:
    code = getattr(said, "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, IntegrityError):
        return _nothing_there()
    if isinstance(error, (OperationalError, InterfaceError)):
        kind = Busy if code == sqlite3.SQLITE_BUSY else Unreachable
        return kind(f"The ledger {name_of(engine)} does not answer: {said}.")
    damaged = code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
    return BackendError(
        f"The ledger {name_of(engine)} cannot be used: {said}.",
        remedy="Move it away and start the grid again; `batchlab ledger rebuild` then makes it "
        "anew from the bucket."
        if damaged
        else "",
    )


def _from_postgresql(
    engine: Engine, error: SQLAlchemyError, said: BaseException | None
) -> BackendError:
    state = getattr(said, "sqlstate", None) or ""
    text = plain(said)
    remedy = next((what for signs, what in _REMEDIES if any(s in text for s in signs)), "")
    if state == _FOREIGN_KEY:
        return _nothing_there()
    if state == _LOCKED:
        return Busy(f"Somebody else has been writing to the ledger {name_of(engine)} for long.")
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    refused = isinstance(error, OperationalError) and not state and not remedy
    if lost or refused or state.startswith(_PASSING):
        return Unreachable(f"The ledger {name_of(engine)} does not answer: {text}.")
    return BackendError(f"The ledger {name_of(engine)} cannot be used: {text}.", remedy=remedy)


def plain(said: BaseException | None) -> str:
    """Return the text of a database error in one line."""
    return " ".join(str(said).split()).rstrip(".")


def is_refusal(error: BaseException) -> bool:
    """Return whether PostgreSQL or RDS's PAM has refused a password."""
    return "authentication failed" in str(error)


def _nothing_there() -> NotFound:
    # Rows that may exist are inserted conditionally, so this error is a missing foreign key.
    return NotFound("The ledger has no such job or stage.")
