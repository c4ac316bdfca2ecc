"""The ledger's schema. The migrations and the table definitions create the same schema, and files of other versions are
handled."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_mock_engine, make_url

from batchlab.adapters.sql import engines, open_sqlite
from batchlab.adapters.sql.engines import sqlite_engine, transaction
from batchlab.adapters.sql.rows import select_bundles
from batchlab.adapters.sql.tables import HEAD, metadata, versions
from batchlab.core.errors import BackendError
from batchlab.core.model import JobId


def _schema(engine: Engine) -> list[tuple[str, ...]]:
    """Return every table and index with its SQL in SQLite's catalog."""
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
    with transaction(engine) as connection:
        rows = connection.exec_driver_sql(query).all()
    return [tuple(re.sub(r"\s+", " ", str(field)) for field in row) for row in rows]


def _migrated() -> Engine:
    engine = sqlite_engine(None)
    with transaction(engine, writes=True) as connection:
        engines.upgrade(connection)
    return engine


def _created() -> Engine:
    engine = sqlite_engine(None)
    with transaction(engine, writes=True) as connection:
        engines.create(connection)
    return engine


def test_a_fresh_database_has_the_schema_that_the_migrations_make() -> None:
    created, migrated = _created(), _migrated()
    assert _schema(created) == _schema(migrated)
    assert len(_schema(created)) > 6
    for engine in (created, migrated):
        with transaction(engine) as connection:
            assert connection.execute(versions.select()).scalars().all() == [HEAD]
        engine.dispose()


def test_alembic_finds_nothing_that_a_migration_forgot() -> None:
    engine = _migrated()
    with transaction(engine) as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def _statements(text: str) -> list[str]:
    """Return the statements of a script, sorted, without temporary tables."""
    kept: list[str] = []
    for one in (re.sub(r"\s+", " ", part).strip() for part in text.split(";")):
        if dropped := re.fullmatch(r"DROP TABLE (\w+)", one):
            kept = [made for made in kept if not made.startswith(f"CREATE TABLE {dropped[1]} ")]
        elif one:
            kept.append(one)
    return sorted(kept)


def test_migrations_and_metadata_create_the_same_postgresql_tables() -> None:
    created: list[str] = []
    dialect = make_url("postgresql+psycopg://").get_dialect()()
    engine = create_mock_engine(
        "postgresql+psycopg://", lambda sql, *_, **__: created.append(str(sql.compile(dialect=dialect)))
    )
    metadata.create_all(engine, checkfirst=False)
    output = io.StringIO()
    context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True, "output_buffer": output})
    with Operations.context(context):
        for script in reversed(list(_scripts().walk_revisions())):
            script.module.upgrade()
    ours = [one for one in created if "alembic_version" not in one]
    assert _statements(";".join(ours)) == _statements(output.getvalue())
    assert len(ours) == len(created) - 1


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(engines.MIGRATIONS))


def test_migrations_are_numbered_in_one_line_up_to_the_head() -> None:
    revisions = [script.revision for script in reversed(list(_scripts().walk_revisions()))]
    assert revisions == [f"{i:04d}" for i in range(1, len(revisions) + 1)]
    assert revisions[-1] == HEAD


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("after_seq", [None, 7])
@pytest.mark.parametrize("done", [None, False, True])
def test_bundles_are_read_in_the_order_of_an_index(done: bool | None, after_seq: int | None, failed: bool) -> None:
    """A job may have millions of bundles, so no query of the port may sort bundles or scan those of other jobs."""
    engine = _created()
    query = select_bundles([JobId("j")], None, done, after_seq, failed).limit(10)
    with transaction(engine) as connection:
        sql = str(query.compile(connection, compile_kwargs={"literal_binds": True}))
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}")]
    engine.dispose()
    assert len(plan) == 1
    assert plan[0].startswith("SEARCH bundles USING INDEX bundles_read (job=?")


def test_a_database_that_is_behind_is_migrated_at_the_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The migration also works if the path of batchlab's folder contains text that Alembic would interpolate."""
    installed = tmp_path / "100%" / "migrations"
    shutil.copytree(engines.MIGRATIONS, installed)
    monkeypatch.setattr(engines, "MIGRATIONS", installed)
    path = tmp_path / "ledger.sqlite"
    engine = sqlite_engine(path)
    with transaction(engine, writes=True) as connection:
        versions.create(connection)
    engine.dispose()
    _open(path)
    engine, created = sqlite_engine(path), _created()
    assert _schema(engine) == _schema(created)
    engine.dispose()
    created.dispose()


def test_a_database_of_a_newer_batchlab_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    _open(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0007'")
        connection.execute("DROP TABLE bundles")
    with pytest.raises(BackendError) as caught:
        _open(path)
    assert str(caught.value) == (
        f"{path} was written by a newer batchlab (schema 0007). "
        "Install that version, or name another folder with --home."
    )
    with closing(sqlite3.connect(path)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "bundles" not in tables


def test_a_schema_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = engines.create

    def create_and_fail(connection: Connection) -> None:
        create(connection)
        raise BackendError("the plug was pulled")

    path = tmp_path / "ledger.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(engines, "create", create_and_fail)
        with pytest.raises(BackendError, match="plug"):
            _open(path)
    engine = sqlite_engine(path)
    assert _schema(engine) == []
    engine.dispose()
    _open(path)


def test_alembic_is_not_imported_without_a_pending_migration(tmp_path: Path) -> None:
    """The command line opens the ledger often, and the import of Alembic takes longer than all the rest."""
    program = """if True:
        import asyncio, pathlib, sys
        from batchlab.adapters.sql import open_sqlite
        async def main():
            ledger = open_sqlite(pathlib.Path(sys.argv[1]))
            await ledger.jobs()
            await ledger.close()
        asyncio.run(main())
        asyncio.run(main())
        heavy = ("alembic", "mako", "sqlalchemy.orm", "sqlalchemy.dialects.postgresql")
        print([name for name in heavy if name in sys.modules])
        """
    argv = [sys.executable, "-c", program, str(tmp_path / "ledger.sqlite")]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout == "[]\n"


def _open(path: Path) -> None:
    """Make one call on the ledger in this file."""

    async def main() -> None:
        ledger = open_sqlite(path)
        try:
            await ledger.jobs()
        finally:
            await ledger.close()

    asyncio.run(main())
