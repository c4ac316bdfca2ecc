"""Opening a ledger on PostgreSQL. The tests cover URLs, passwords, TLS, rights, and old, new, and shared schemas."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pwd
import subprocess
import traceback
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine

from batchlab.adapters.sql import engines, open_postgres
from batchlab.adapters.sql.engines import transaction
from batchlab.adapters.sql.postgres import postgres_engine
from batchlab.adapters.sql.rows import select_bundles
from batchlab.adapters.sql.tables import HEAD, known_bundles_query, metadata, versions
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.core.model import JobId
from batchlab.core.ports import AddCut
from tests.support.aws.emulators import free_port
from tests.support.contract.ledger_suite import JOB, bundle, cut, done, fold, ledger_in, submit
from tests.support.postgres.server import DATABASE, PASSWORD, USER, Postgres, PostgresServer


def _look(url: str, schema: str = "batchlab") -> None:
    """Open the ledger with one call, and close it."""

    async def main() -> None:
        ledger = open_postgres(url, schema=schema)
        try:
            await ledger.jobs()
        finally:
            await ledger.close()

    asyncio.run(main())


def _error(url: str, schema: str = "batchlab") -> BackendError:
    """Return the error of one call of the ledger."""
    with pytest.raises(BackendError) as caught:
        _look(url, schema)
    return caught.value


# --- URLs and passwords --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ledger.sqlite",
        "sqlite:///ledger.sqlite",
        "mysql://grid:s3cret@host/ledgers",
        "postgresql//grid:s3cret@host/ledgers",
        "postgresql://grid:s3cret@host:port/ledgers",
        "postgresql+asyncpg://grid:s3cret@host/ledgers",
    ],
)
def test_invalid_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_postgres(url)
    assert "postgresql://USER:PASSWORD@HOST:PORT/DATABASE" in str(caught.value)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("schema", ["", "1", "pg_mine", 'a"; DROP', "A", "ä", "x" * 64, "a%s"])
def test_invalid_schema_name_is_refused(schema: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a schema"):
        open_postgres("postgresql://host/ledgers", schema=schema)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_password_is_in_no_text_and_in_no_log(
    scheme: str, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = postgres.server
    _look(server.url().replace("postgresql", scheme), postgres.schema)
    wrong = server.url(password="wr0ng/+ one").replace("postgresql", scheme)
    refused = _error(wrong)
    absent = _error(server.url(port=free_port()).replace("postgresql", scheme))
    told = caplog.text + "".join("".join(traceback.format_exception(error)) for error in (refused, absent))
    for secret in ("wr0ng", PASSWORD, PASSWORD.split("/")[0], "p%40ss"):
        assert secret not in told
    assert not isinstance(refused, Unreachable), "it does not pass by itself"
    assert str(refused).endswith(
        f'password authentication failed for user "{USER}". '
        "Check the user and the password in the ledger's URL, and the server's pg_hba.conf."
    )
    assert isinstance(absent, Unreachable)
    assert str(absent).startswith(f"The ledger {DATABASE} on 127.0.0.1:")


def test_missing_database_is_named(postgres: Postgres) -> None:
    error = _error(postgres.url.replace(f"/{DATABASE}", "/elsewhere"))
    assert not isinstance(error, Unreachable)
    assert 'database "elsewhere" does not exist' in str(error)
    assert "createdb" in str(error)


def test_unknown_option_is_reported(postgres: Postgres) -> None:
    error = _error(postgres.server.url(sslmodus="off"))
    assert not isinstance(error, Unreachable)
    assert "sslmodus" in str(error)
    assert "the options after the question mark" in str(error)


def test_options_of_the_url_override_the_defaults(postgres: Postgres) -> None:
    url = postgres.server.url(application_name="mine", connect_timeout="2")
    engine = postgres_engine(url, postgres.schema)
    with transaction(engine) as connection:
        names = connection.exec_driver_sql("SELECT application_name FROM pg_stat_activity").all()
    engine.dispose()
    assert ("mine",) in [tuple(name) for name in names]


def test_certificate_is_verified_if_the_url_requests_it(frail_server: PostgresServer) -> None:
    """RDS is used with sslmode=verify-full and its root certificates."""
    refused = _error(frail_server.url(sslmode="require"))
    assert not isinstance(refused, Unreachable)
    assert "server does not support SSL" in str(refused)
    folder = frail_server.folder
    key, certificate = folder / "server.key", folder / "server.crt"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=ledger",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            str(key),
            "-out",
            str(certificate),
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(key, pwd.getpwnam("postgres").pw_uid, 0)
    frail_server.stop()
    frail_server.start(ssl="on", ssl_key_file=str(key), ssl_cert_file=str(certificate))
    _look(frail_server.url(sslmode="verify-full", sslrootcert=str(certificate)))
    other = Path(pytest.__file__).parent / "nowhere.pem"
    missing = _error(frail_server.url(sslmode="verify-full", sslrootcert=str(other)))
    assert not isinstance(missing, Unreachable)
    assert "sslrootcert" in str(missing)


# --- Schemas -------------------------------------------------------------------------------------


def test_grids_with_schemas_of_their_own_share_a_database(postgres: Postgres) -> None:
    other = Postgres(postgres.server, f"{postgres.schema}.b")

    async def main() -> None:
        async with ledger_in(postgres) as one, ledger_in(other) as two:
            await submit(one)
            await fold(one, done(bundle(0, 5)))
            assert list(await two.jobs()) == []
            assert (await one.lease("leader", "a")).owner == "a"
            assert (await two.lease("leader", "b")).owner == "b"
            await submit(two)
            await two.forget()
            assert (await one.job(JOB.id)).job == JOB

    asyncio.run(main())
    postgres.server.execute(f'DROP SCHEMA "{other.schema}" CASCADE')


def test_nothing_is_put_anywhere_else(postgres: Postgres) -> None:
    query = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    before = postgres.server.execute(query)
    _look(postgres.url, postgres.schema)
    assert postgres.server.execute(query) == before


def test_missing_rights_are_reported_and_an_existing_schema_suffices(postgres: Postgres) -> None:
    server = postgres.server
    server.execute("CREATE USER poor PASSWORD 'x'")
    url = server.url(password="x").replace(f"//{USER}:", "//poor:")
    try:
        error = _error(url, postgres.schema)
        assert not isinstance(error, Unreachable)
        assert "must have the permission to CREATE a schema" in str(error)
        server.execute(f'CREATE SCHEMA "{postgres.schema}" AUTHORIZATION poor')
        _look(url, postgres.schema)
    finally:
        server.execute(f'DROP SCHEMA IF EXISTS "{postgres.schema}" CASCADE')
        server.execute("DROP USER poor")


def test_a_schema_of_a_newer_batchlab_is_refused_and_not_touched(postgres: Postgres) -> None:
    _look(postgres.url, postgres.schema)
    postgres.server.execute(f"UPDATE \"{postgres.schema}\".alembic_version SET version_num='0007'")
    postgres.server.execute(f'DROP TABLE "{postgres.schema}".bundles')
    error = _error(postgres.url, postgres.schema)
    assert str(error) == (
        f"{DATABASE} on 127.0.0.1:{postgres.server.port} was written by a newer batchlab "
        "(schema 0007). Install that version, or name another database."
    )
    tables = f"SELECT 1 FROM pg_tables WHERE schemaname = '{postgres.schema}'"
    assert len(postgres.server.execute(tables)) == 5


def test_missing_tables_are_reported(postgres: Postgres) -> None:
    async def main() -> None:
        async with ledger_in(postgres) as ledger:
            await submit(ledger)
            postgres.server.execute(f'DROP SCHEMA "{postgres.schema}" CASCADE')
            with pytest.raises(BackendError, match="The tables do not exist anymore") as caught:
                await fold(ledger, done(bundle(0, 1)))
            assert not isinstance(caught.value, Unreachable)
        async with ledger_in(postgres) as ledger:
            assert list(await ledger.jobs()) == []

    asyncio.run(main())


def _described(engine: Engine, schema: str) -> list[tuple[object, ...]]:
    """Return every column, constraint, and index of the schema."""
    queries = (
        "SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name "
        "FROM information_schema.columns WHERE table_schema = %(schema)s ORDER BY 1, 2",
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = %(schema)s::regnamespace ORDER BY 1",
        "SELECT indexname, replace(indexdef, %(schema)s, '') FROM pg_indexes WHERE schemaname = %(schema)s ORDER BY 1",
    )
    with transaction(engine) as connection:
        # The text is a literal that contains an identifier, for ::regnamespace.
        return [
            tuple(row)
            for query in queries
            for row in connection.exec_driver_sql(
                query.replace("%(schema)s::reg", "%(quoted)s::reg"), {"schema": schema, "quoted": f'"{schema}"'}
            )
        ]


def test_a_schema_that_is_behind_becomes_what_a_fresh_one_is(postgres: Postgres) -> None:
    other = f"{postgres.schema}-old"
    engine, old = (postgres_engine(postgres.url, name) for name in (postgres.schema, other))
    engines.ensure(engine)
    with transaction(old, writes=True) as connection:
        connection.exec_driver_sql(f'CREATE SCHEMA "{other}"')
        versions.create(connection)
    engines.ensure(old)
    found = _described(old, other)
    assert [tuple(str(f).replace(other, "") for f in row) for row in found] == [
        tuple(str(f).replace(postgres.schema, "") for f in row) for row in _described(engine, postgres.schema)
    ]
    assert len(found) > 40
    with transaction(old) as connection:
        assert connection.execute(versions.select()).scalars().all() == [HEAD]
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
    postgres.server.execute(f'DROP SCHEMA "{other}" CASCADE')
    engine.dispose()
    old.dispose()


def test_a_schema_is_made_whole_or_not_at_all(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    create = engines.create

    def create_and_fail(connection: Connection) -> None:
        create(connection)
        raise BackendError("the plug was pulled")

    with monkeypatch.context() as patch:
        patch.setattr(engines, "create", create_and_fail)
        assert "plug" in str(_error(postgres.url, postgres.schema))
    there = f"SELECT 1 FROM pg_namespace WHERE nspname = '{postgres.schema}'"
    assert postgres.server.execute(there) == []
    _look(postgres.url, postgres.schema)


def test_bundles_are_read_in_the_order_of_an_index(postgres: Postgres) -> None:
    """A job may have millions of bundles, so no query of the port may sort bundles or scan those of other jobs."""
    jobs = [replace(JOB, id=JobId(f"j-{i}")) for i in range(3)]

    async def fill() -> None:
        async with ledger_in(postgres) as ledger:
            for job in jobs:
                bundles = [replace(bundle(i, i + 1), job=job.id) for i in range(2_000)]
                await submit(ledger, job)
                await ledger.apply(AddCut(replace(cut(0, *bundles), job=job.id)))
                await fold(ledger, *(done(one, failed=one.tasks.first % 2) for one in bundles[::2]))

    asyncio.run(fill())
    postgres.server.execute(f'ANALYZE "{postgres.schema}".bundles')
    engine = postgres_engine(postgres.url, postgres.schema)
    with transaction(engine) as connection:
        for is_done, after_seq, failed in product((None, False, True), (None, 7), (False, True)):
            query = select_bundles([jobs[1].id], None, is_done, after_seq, failed).limit(10)
            sql = query.compile(engine, compile_kwargs={"literal_binds": True})
            plan = connection.exec_driver_sql(f"EXPLAIN {sql}").scalars().all()
            assert any("Index Scan using bundles_read" in line for line in plan), plan
            assert not any("Sort" in line for line in plan), plan
    engine.dispose()


def test_a_fold_reads_only_its_own_bundles(postgres: Postgres) -> None:
    """The server does not have statistics of a new table, but the planner must still use the primary key."""
    bundles = [bundle(i, i + 1) for i in range(2_000)]

    async def fill() -> None:
        async with ledger_in(postgres) as ledger:
            await submit(ledger)
            await ledger.apply(AddCut(cut(0, *bundles)))

    asyncio.run(fill())
    keys = [{"job": one.job, "stage": one.stage, "id": one.id} for one in bundles[:100]]
    query = known_bundles_query()
    engine = postgres_engine(postgres.url, postgres.schema)
    with transaction(engine) as connection:
        explain = f"EXPLAIN {query.compile(engine)}"
        plan = connection.exec_driver_sql(explain, {"rows": json.dumps(keys)}).scalars().all()
        assert any("Index Scan using bundles_pk" in line for line in plan), plan
        assert not any("Seq Scan" in line for line in plan), plan
        rows = connection.execute(query, {"rows": keys}).all()
        assert len(rows) == len(keys)
        assert not any(row.is_done for row in rows)
    engine.dispose()
