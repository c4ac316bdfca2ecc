"""Migration of a database to the schema that this version expects.

Invariant: one transaction of one writer changes the schema. So two processes that open a new
database create one schema, and after SIGKILL the schema is the old or the new one. Alembic is
imported only for a migration, because its import dominates the start-up time.
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
    """Create or migrate the tables. Raise BackendError if a newer batchlab has migrated them."""
    with transaction(engine) as connection:
        if _version(connection) == HEAD:
            return
    with transaction(engine, writes=True, lasts=True) as connection:
        # The version is read again, because from now on no other process can change it.
        found = _version(connection)
        if found is None:
            _make_room(connection)
            create(connection)
        elif found != HEAD:
            upgrade(connection)


def _make_room(connection: Connection) -> None:
    """Create the schema, if the database has schemas and lacks this one."""
    schema = connection.get_execution_options().get(SCHEMA)
    # CREATE SCHEMA IF NOT EXISTS would need the permission to create even if the schema exists.
    if schema and not inspect(connection).has_schema(schema):
        connection.execute(CreateSchema(schema))


def create(connection: Connection) -> None:
    """Create the newest schema in an empty database."""
    metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(versions).values(version_num=HEAD))


def upgrade(connection: Connection) -> None:
    """Run the missing migrations in the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    command.upgrade(config, "head")


def _version(connection: Connection) -> str | None:
    """Return None for a new database, and "" if Alembic has begun without a migration."""
    if not inspect(connection).has_table(versions.name):
        return None
    found = connection.execute(select(versions.c.version_num)).scalar() or ""
    if found > HEAD:
        raise BackendError(
            f"{name_of(connection.engine)} was written by a newer batchlab (schema {found}).",
            remedy=f"Install that version, or {instead(connection.engine)}.",
        )
    return found
