"""Brings a database to the schema this code expects, whatever it finds.

Invariant: the schema changes in one transaction of one writer, so two processes that open a fresh
database at once make one schema, and after SIGKILL there is the old one or the new one. Alembic is
imported only when there is something to migrate: it costs more start-up time than all else here.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, insert, inspect, select
from sqlalchemy.schema import CreateSchema

from batchlab.adapters.sql.db_errors import instead, name_of
from batchlab.adapters.sql.engines import SCHEMA, transaction
from batchlab.adapters.sql.tables import HEAD, metadata, versions
from batchlab.core.errors import BackendError

MIGRATIONS = Path(__file__).parent / "migrations"


def ensure(engine: Engine) -> None:
    """Create or migrate the tables; BackendError where a newer batchlab has been here."""
    with transaction(engine) as connection:
        if _version(connection) == HEAD:
            return
    with transaction(engine, writes=True, lasts=True) as connection:
        # Looked at again: from here on nobody else can change it.
        found = _version(connection)
        if found is None:
            _make_room(connection)
            create(connection)
        elif found != HEAD:
            upgrade(connection)


def _make_room(connection: Connection) -> None:
    """The database's part that is ours, where it has such parts."""
    schema = connection.get_execution_options().get(SCHEMA)
    # "If not exists" would ask for the right to make one even where it is there.
    if schema and not inspect(connection).has_schema(schema):
        connection.execute(CreateSchema(schema))


def create(connection: Connection) -> None:
    """Make the newest schema in an empty database."""
    metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(versions).values(version_num=HEAD))


def upgrade(connection: Connection) -> None:
    """Run the migrations that are missing, within the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    command.upgrade(config, "head")


def _version(connection: Connection) -> str | None:
    """None in a fresh database, "" where Alembic has begun but migrated nothing."""
    if not inspect(connection).has_table(versions.name):
        return None
    found = connection.execute(select(versions.c.version_num)).scalar() or ""
    if found > HEAD:
        raise BackendError(
            f"{name_of(connection.engine)} was written by a newer batchlab (schema {found}).",
            remedy=f"Install that version, or {instead(connection.engine)}.",
        )
    return found
