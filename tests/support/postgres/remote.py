"""A PostgreSQL server that accepts only TLS connections, with a certificate of its own authority, like a server on
another machine."""

from __future__ import annotations

import asyncio
import os
import pwd
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.sql import Login, SqlLedger, open_postgres
from batchlab.core.errors import BackendError
from tests.support.certificates import Authority
from tests.support.postgres.server import DATABASE, PostgresServer, served

HBA = """
hostssl all by_token 127.0.0.1/32 password
hostssl all all 127.0.0.1/32 scram-sha-256
"""
"""The access rules of RDS with rds.force_ssl: no rule allows unencrypted connections. RDS also accepts tokens as plain
passwords within TLS."""


@dataclass
class Remote:
    """A server with a certificate for `localhost`, and the authority that signed the certificate."""

    server: PostgresServer
    ca: Path
    strange_ca: Path

    def url(self, host: str = "localhost", **query: str) -> str:
        options = "&".join(f"{name}={value}" for name, value in query.items())
        where = f"postgresql://{host}:{self.server.port}/{DATABASE}"
        return f"{where}?{options}" if options else where

    def role(self, name: str, password: str) -> None:
        self.server.execute(f"DO $$ BEGIN CREATE ROLE {name} LOGIN; EXCEPTION WHEN duplicate_object THEN END $$")
        self.password(name, password)
        self.server.execute(f"GRANT CREATE ON DATABASE {DATABASE} TO {name}")

    def password(self, name: str, password: str) -> None:
        self.server.execute(f"ALTER ROLE {name} PASSWORD '{password}'")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("authorities")
    authority = Authority(folder, "ours")
    for server in served():
        key, certificate = authority.sign(server.folder, "localhost")
        if os.geteuid() == 0:
            os.chown(key, pwd.getpwnam("postgres").pw_uid, 0)
        (server.folder / "data" / "pg_hba.conf").write_text(HBA)
        server.stop()
        server.start(ssl="on", ssl_key_file=str(key), ssl_cert_file=str(certificate))
        yield Remote(server, authority.bundle, Authority(folder, "strange").bundle)


def end_sessions_of(server: PostgresServer) -> None:
    """End batchlab's sessions, and wait until they are closed."""
    deadline_s = time.monotonic() + 30
    while server.end_sessions():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


class Fixed:
    """A login that never changes."""

    where = "the test"

    def __init__(self, user: str, password: str) -> None:
        self._login = Login(user, password)

    def login(self, *, refused: Login | None = None) -> Login:
        return self._login


async def look(ledger: SqlLedger) -> None:
    """Open the ledger with one call, and close it."""
    try:
        await ledger.jobs()
    finally:
        await ledger.close()


def error_at(url: str, **given: Any) -> BackendError:
    """Return the error of one call of a ledger at the URL."""
    with pytest.raises(BackendError) as caught:
        asyncio.run(look(open_postgres(url, **given)))
    return caught.value
