"""A PostgreSQL ledger of an earlier schema, whose migrated schema equals SQLite's."""

from __future__ import annotations

import asyncio
import tarfile
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, insert, select

from batchlab.adapters.sql import SqlLedger, engines, open_postgres, open_sqlite
from batchlab.adapters.sql.engines import sqlite_engine, transaction
from batchlab.adapters.sql.postgres import postgres_engine
from batchlab.adapters.sql.tables import HEAD, leases, metadata, versions
from tests.support.postgres.server import Postgres
from tests.upgrade.make import HOME
from tests.upgrade.test_upgrade import KEPT


def test_upgraded_postgresql_ledger_equals_the_sqlite_one(postgres: Postgres, tmp_path: Path) -> None:
    file = tmp_path / HOME / "ledger.sqlite"
    for path in KEPT:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, filter="data")
        if (found := revision(file)) != HEAD:
            break
    else:
        pytest.fail("tests/upgrade has none of an earlier schema")
    copy(file, postgres, found)

    async def jobs(ledger: SqlLedger) -> object:
        try:
            assert [rows.job.job.name for rows in await ledger.jobs()]
            return await ledger.dump()
        finally:
            await ledger.close()

    moved = asyncio.run(jobs(open_postgres(postgres.url, schema=postgres.schema)))
    assert moved == asyncio.run(jobs(open_sqlite(file)))


def revision(file: Path) -> str:
    engine = sqlite_engine(file)
    try:
        with transaction(engine) as connection:
            return str(connection.execute(select(versions.c.version_num)).scalar_one())
    finally:
        engine.dispose()


def copy(file: Path, postgres: Postgres, found: str) -> None:
    """Copy the ledger of that file to PostgreSQL, in that schema."""
    source: Engine = sqlite_engine(file)
    target = postgres_engine(postgres.url, postgres.schema)
    try:
        with transaction(source) as old, transaction(target, writes=True, lasts=True) as new:
            engines._make_room(new)
            config = Config(attributes={"connection": new})
            config.set_main_option("script_location", str(engines.MIGRATIONS))
            command.upgrade(config, found)
            for table in metadata.sorted_tables:
                # The lease is not copied, because no manager leads and its format has changed.
                if table not in (versions, leases):
                    rows = [dict(row._mapping) for row in old.execute(select(table))]
                    if rows:
                        new.execute(insert(table), rows)
    finally:
        source.dispose()
        target.dispose()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name.partition(".")[0])
def test_stored_data_is_of_a_released_schema(path: Path, tmp_path: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    assert "0001" <= revision(tmp_path / HOME / "ledger.sqlite") <= HEAD
