"""Tables of the ledger's current schema, and the statements that insert or update rows.

Invariants: `metadata` and the migrations up to HEAD describe the same schema. A test compares `metadata` with the
migrations, so a new database may be created from either. Each insert-or-update statement decides and returns its result
in one step, so a second writer cannot come between. Insert-or-update statements for SQLite and PostgreSQL differ only
in their spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    bindparam,
    column,
    func,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.sql.dml import ReturningInsert

HEAD = "0002"
"""Number of the newest migration.

Versions of the schema are numbered, so an older program recognizes a newer schema.
"""

metadata = MetaData()

# Texts sort by their bytes, as in SQLite and Python. If the order of texts depended on a server's locale, two ledgers
# of one bucket would differ.
_Name = Text().with_variant(Text(collation="C"), "postgresql")

jobs = Table(
    "jobs",
    metadata,
    Column("id", _Name, nullable=False),
    Column("token", Text),
    Column("submitted_s", Double, nullable=False),
    Column("spec", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("control", Text, nullable=False),
    Column("round", Integer, nullable=False),
    Column("ended_s", Double),
    PrimaryKeyConstraint("id", name="jobs_pk"),
    # The token is NULL for a job without a client token. Several jobs may have NULL as their token, because NULLs are
    # never equal.
    UniqueConstraint("token", name="jobs_token"),
)
Index("jobs_newest", jobs.c.submitted_s, jobs.c.id)

stages = Table(
    "stages",
    metadata,
    Column("job", _Name, ForeignKey("jobs.id", name="stages_job"), nullable=False),
    Column("stage", _Name, nullable=False),
    Column("position", Integer, nullable=False),
    Column("planned", BigInteger),
    Column("succeeded", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("cancelled", BigInteger, nullable=False),
    Column("retried", BigInteger, nullable=False),
    # The unit of run times is microseconds, because sums of floats would depend on the order of the outcomes.
    Column("run_us", BigInteger, nullable=False),
    Column("first_start_s", Double),
    Column("last_end_s", Double),
    Column("plan_round", Integer, nullable=False),
    Column("cut_seq", Integer, nullable=False),
    Column("uncut", Text, nullable=False),
    PrimaryKeyConstraint("job", "stage", name="stages_pk"),
)

# `body` is the bundle's JSON while `seq` is NULL (planned), and then its completion's JSON. `body` contains the grid's
# wire format instead of one column per field.
bundles = Table(
    "bundles",
    metadata,
    Column("job", _Name, nullable=False),
    Column("stage", _Name, nullable=False),
    Column("id", _Name, nullable=False),
    Column("seq", BigInteger),
    Column("failed", Integer, nullable=False),
    # `void` is 1 for a bundle of a plan that a retry has replaced. The row of a void bundle stays, so that a late event
    # is not counted, but listings omit the row.
    Column("void", Integer, nullable=False, server_default="0"),
    Column("body", Text, nullable=False),
    PrimaryKeyConstraint("job", "stage", "id", name="bundles_pk"),
    ForeignKeyConstraint(["job", "stage"], ["stages.job", "stages.stage"], name="bundles_stage"),
)
# The index `bundles_read` has the columns by which bundles are ordered and filtered. With the index, no query of the
# Ledger port sorts, and a search for failed bundles reads no other rows. The index covers all bundles, because an index
# of only the failed bundles would need the import of PostgreSQL's dialect.
Index("bundles_read", bundles.c.job, bundles.c.seq, bundles.c.stage, bundles.c.id, bundles.c.failed)

# The table contains the last reserved `seq`. After `forget`, max(seq) would start again, and a reader that continues
# after its last seq would miss all new bundles.
counters = Table(
    "counters",
    metadata,
    Column("name", Text, nullable=False),
    Column("value", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", name="counters_pk"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("beat", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", name="leases_pk"),
)

# This declaration of Alembic's own table lets the ledger read the schema version without importing Alembic.
versions = Table(
    "alembic_version",
    metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


BUNDLE = ("job", "stage", "id", "seq", "failed", "void", "body")
"""Columns of a bundle that are written together."""
BundleValues = tuple[str, str, str, int | None, int, int, str]
"""Values of the columns that BUNDLE names, for one row of a bundle."""
_KEY = ("job", "stage", "id")
KeyValues = tuple[str, str, str]
_ROWS_AT_ONCE = 100
"""Maximum number of rows in one statement. SQLite allows 32,766 parameters in one statement."""

NOBODY = ""
"""Owner of a released lease.

The row of a released lease stays, so the lease's renewal counter `beat` never restarts.
"""


@dataclass(frozen=True, slots=True)
class Upserts:
    """Insert-or-update statements and queries for one kind of database.

    If an insert-or-update statement returns rows, the statement returns only the rows that it has changed.
    """

    add_job: ReturningInsert[Any]
    """Statement that inserts a job unless its id or its token exists."""
    known: Callable[[Connection, Sequence[KeyValues]], Iterable[Sequence[Any]]]
    """Function that returns (job, stage, id, whether the bundle is done) for each existing bundle with a given key."""
    store_bundles: Callable[[Connection, Sequence[BundleValues]], object]
    """Function that inserts bundles. A done bundle replaces a planned bundle. Other existing rows do not change."""
    take_seqs: ReturningInsert[Any]
    """Statement that reserves `count` sequence numbers. The statement returns the last reserved number."""
    take_lease: ReturningInsert[Any]
    """Statement that takes a lease and returns its new state.

    The lease must be free, belong to the owner, or still have the owner `over_owner` and the renewal counter
    `over_beat`.
    """

    @classmethod
    def of(cls, dialect: str) -> Upserts:
        """Return the statements for the dialect "sqlite" or "postgresql"."""
        insert = _insert(dialect)
        store = insert(bundles)
        is_postgresql = dialect == "postgresql"
        if is_postgresql:
            # On PostgreSQL, the statement has the same text for any number of rows.
            store = store.from_select(BUNDLE, _unpack(BUNDLE))
        store = store.on_conflict_do_update(
            index_elements=[*bundles.primary_key],
            set_={name: store.excluded[name] for name in ("seq", "failed", "body")},
            where=and_(bundles.c.seq.is_(None), store.excluded.seq.is_not(None)),
        )
        take_seqs = insert(counters).values(name="seq", value=bindparam("count"))
        lease = insert(leases)
        return cls(
            insert(jobs).on_conflict_do_nothing().returning(jobs.c.id),
            _postgresql_known_rows() if is_postgresql else _sqlite_known_rows,
            _store_on_postgresql(store) if is_postgresql else _store_on_sqlite(store),
            take_seqs.on_conflict_do_update(
                index_elements=[*counters.primary_key], set_={"value": counters.c.value + take_seqs.excluded.value}
            ).returning(counters.c.value),
            lease.values({"name": bindparam("name"), "owner": bindparam("owner"), "beat": 1})
            .on_conflict_do_update(
                index_elements=[*leases.primary_key],
                set_={"owner": lease.excluded.owner, "beat": leases.c.beat + 1},
                where=or_(
                    leases.c.owner == lease.excluded.owner,
                    leases.c.owner == NOBODY,
                    and_(leases.c.owner == bindparam("over_owner"), leases.c.beat == bindparam("over_beat")),
                ),
            )
            .returning(leases.c.owner, leases.c.beat),
        )


def _insert(dialect: str) -> Callable[..., Any]:
    # Only the dialect in use is imported. The two dialects have the same methods, but not a common type.
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert
    from sqlalchemy.dialects import sqlite

    return sqlite.insert


def _unpack(names: Sequence[str]) -> Select[Any]:
    """Select the rows of the parameter `rows`, a JSON text.

    The driver writes one JSON text faster than an array for each column.
    """
    columns = (column(name, bundles.c[name].type.as_generic()) for name in names)
    rows = func.json_to_recordset(bindparam("rows", type_=JSON)).table_valued(*columns)
    return select(rows.render_derived(with_types=True))


def _as_objects(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    return {"rows": [dict(zip(names, row, strict=True)) for row in rows]}


def known_bundles_query() -> Select[Any]:
    """Select which bundles of the parameter `rows` exist, and whether each bundle is done.

    The lateral query reads each bundle by the primary key. A join would read all bundles of the schema while the server
    lacks statistics of the table.
    """
    keys = _unpack(_KEY).subquery()
    is_done = bundles.c.seq.is_not(None).label("is_done")
    same = (bundles.c[name] == keys.c[name] for name in _KEY)
    matches = select(is_done).where(*same).limit(literal_column("1")).lateral()
    return select(*(keys.c[name] for name in _KEY), matches.c.is_done).join_from(keys, matches, true())


def _postgresql_known_rows() -> Callable[[Connection, Sequence[KeyValues]], Iterable[Sequence[Any]]]:
    known = known_bundles_query()
    return lambda connection, keys: connection.execute(known, _as_objects(_KEY, keys))


def _store_on_postgresql(store: Any) -> Callable[[Connection, Sequence[BundleValues]], object]:
    return lambda connection, rows: connection.execute(store, _as_objects(BUNDLE, rows))


# SQLAlchemy would take a third of the time of a fold to convert the parameters of each row. On SQLite, the driver
# executes the statements as texts, without SQLAlchemy.


def _sqlite_known_rows(connection: Connection, keys: Sequence[KeyValues]) -> list[Any]:
    text = "SELECT job, stage, id, seq IS NOT NULL FROM bundles WHERE (job, stage, id) IN (VALUES "
    return _in_parts(connection, text, "(?, ?, ?)", ")", keys)


def _store_on_sqlite(store: Any) -> Callable[[Connection, Sequence[BundleValues]], object]:
    from sqlalchemy.dialects import sqlite

    text = str(store.compile(dialect=sqlite.dialect(), column_keys=BUNDLE))
    row = f"({', '.join('?' * len(BUNDLE))})"
    before, after = text.split(row)
    return lambda connection, rows: _in_parts(connection, before, row, after, rows)


def _in_parts(connection: Connection, before: str, row: str, after: str, rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Execute the statement for a limited number of rows at a time. In the statement, each row is written as `row`."""
    returned: list[Any] = []
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows[at : at + _ROWS_AT_ONCE]
        statement = f"{before}{', '.join([row] * len(batch))}{after}"
        result = connection.exec_driver_sql(statement, tuple(chain.from_iterable(batch)))
        if result.returns_rows:
            returned += result
    return returned
