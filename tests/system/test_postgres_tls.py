"""The verification of a PostgreSQL server of another machine by its certificate."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from batchlab.adapters.sql import open_postgres
from batchlab.core.errors import Unreachable, UsageError
from tests.support.postgres.remote import Fixed, Remote, error_at, look, remote
from tests.support.postgres.server import PostgresServer

__all__ = ["remote"]


def test_a_server_of_our_authority_and_that_name_is_taken(remote: Remote) -> None:
    remote.role("keeper", "x1")
    asyncio.run(look(open_postgres(remote.url(), ca=remote.ca, logins=Fixed("keeper", "x1"))))
    used = "SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
    assert remote.server.execute(f"{used} WHERE client_port IS NOT NULL") == [(True,)]


@pytest.mark.parametrize(
    ("host", "ca", "why"),
    [("127.0.0.1", "ca", "does not match host name"), ("localhost", "strange_ca", "certificate verify failed")],
)
def test_wrong_name_or_authority_is_refused_for_good(host: str, ca: str, why: str, remote: Remote) -> None:
    """The error does not count as an outage, so the call is not retried."""
    logins = Fixed("keeper", "x1")
    error = error_at(remote.url(host), ca=getattr(remote, ca), logins=logins)
    assert not isinstance(error, Unreachable)
    assert why in str(error)
    assert "CA bundle" in error.remedy


def test_unencrypted_connections_are_refused(remote: Remote, frail_server: PostgresServer) -> None:
    """The server refuses an unencrypted client, and the client refuses an unencrypted server."""
    error = error_at(remote.url(sslmode="disable"), logins=Fixed("keeper", "x1"))
    assert not isinstance(error, Unreachable)
    assert "no encryption" in str(error)
    url = frail_server.url().replace("127.0.0.1", "localhost")
    error = error_at(url, ca=remote.ca)
    assert not isinstance(error, Unreachable)
    assert "server does not support SSL" in str(error)


def test_server_is_verified_for_dynamic_logins(remote: Remote) -> None:
    strange = {"sslrootcert": str(remote.strange_ca)}
    for url in (remote.url(), remote.url(**strange)):
        error = error_at(url, logins=Fixed("keeper", "x1"))
        assert not isinstance(error, Unreachable)
        assert "certificate verify failed" in str(error), "nobody whom we trust has signed it"


def test_option_that_contradicts_the_bundle_is_refused(remote: Remote, tmp_path: Path) -> None:
    for query in ({"sslmode": "require"}, {"sslrootcert": "x"}):
        with pytest.raises(UsageError, match="set different checks of the server"):
            open_postgres(remote.url(**query), ca=remote.ca)
    with pytest.raises(UsageError, match=r"The CA bundle .*nowhere\.pem does not exist"):
        open_postgres(remote.url(), ca=tmp_path / "nowhere.pem")
