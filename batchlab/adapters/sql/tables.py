"""The tables of the ledger, as the code of this version expects them.

Invariant: `metadata` and the migrations up to HEAD describe the identical schema (a test compares
what both make), so a fresh database may be made from either.

The statements that insert or else: the one place where SQLite and PostgreSQL differ in spelling.

Invariant: each decides and answers within one statement, so no second writer comes in between.
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
    or_,
    select,
)
from sqlalchemy.sql.dml import ReturningInsert

HEAD = "0002"
"""The newest migration. Versions are numbered, so that an older program can tell a newer schema."""

metadata = MetaData()

# Bytewise, as SQLite and Python sort: an order that depends on a server's locale would make two
# ledgers of one bucket differ.
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
    # NULL where the job came without one: NULLs are never equal.
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
    # Microseconds: sums of floats would depend on the order in which outcomes arrive.
    Column("run_us", BigInteger, nullable=False),
    Column("first_start_s", Double),
    Column("last_end_s", Double),
    Column("plan_round", Integer, nullable=False),
    Column("cut_seq", Integer, nullable=False),
    Column("uncut", Text, nullable=False),
    PrimaryKeyConstraint("job", "stage", name="stages_pk"),
)

# `body` is the bundle's JSON while `seq` is NULL (planned), its completion's JSON afterwards: the
# one wire format, which the rest of the grid reads too, instead of a column for each field.
bundles = Table(
    "bundles",
    metadata,
    Column("job", _Name, nullable=False),
    Column("stage", _Name, nullable=False),
    Column("id", _Name, nullable=False),
    Column("seq", BigInteger),
    Column("failed", Integer, nullable=False),
    # 1 for bundles of a plan that a retry has made anew: still known, so that a late event is not
    # counted, but in no listing.
    Column("void", Integer, nullable=False, server_default="0"),
    Column("body", Text, nullable=False),
    PrimaryKeyConstraint("job", "stage", "id", name="bundles_pk"),
    ForeignKeyConstraint(["job", "stage"], ["stages.job", "stages.stage"], name="bundles_stage"),
)
# The order in which bundles are read, and what they are filtered by, all in one: so none of the
# port's queries sorts, and a search for the failed ones reads no row of the others. (An index of
# the failed ones only would cost the import of PostgreSQL's dialect just to be declared.)
Index(
    "bundles_read",
    bundles.c.job,
    bundles.c.seq,
    bundles.c.stage,
    bundles.c.id,
    bundles.c.failed,
)

# The last `seq` given. Not max(seq), which would start again after `forget` and hide everything
# from a reader that goes on after the last seq it saw.
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

# Alembic's own table, spelt as Alembic makes it, so that reading it needs no Alembic.
versions = Table(
    "alembic_version",
    metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


BUNDLE = ("job", "stage", "id", "seq", "failed", "body")
"""The columns of a bundle that are written together."""
BundleRow = tuple[str, str, str, int | None, int, str]
"""Values of these columns."""
_ROWS_AT_ONCE = 100
"""SQLite allows 32,766 parameters in a statement."""

NOBODY = ""
"""Owner of a lease that was given back: its row stays, so that its beat never starts again."""


@dataclass(frozen=True, slots=True)
class Upserts:
    """One database's statements. Those that return rows do so for what took effect."""

    add_job: ReturningInsert[Any]
    """Unless the id or the token is taken."""
    plan: Callable[[Connection, Sequence[BundleRow]], object]
    """Insert bundles, unless they exist."""
    complete: Callable[[Connection, Sequence[BundleRow]], Iterable[Sequence[Any]]]
    """Make bundles done that are absent or planned; returns the keys of these."""
    take_seqs: ReturningInsert[Any]
    """Reserve `count` sequence numbers; returns the last."""
    take_lease: ReturningInsert[Any]
    """If it is free or the owner's already, or stands at `over_owner` and `over_beat`; returns how
    it stands then."""

    @classmethod
    def of(cls, dialect: str) -> Upserts:
        """For the dialect of that name: "sqlite" or "postgresql"."""
        insert = _insert(dialect)
        plan, complete, executing = insert(bundles), insert(bundles), _executing
        if dialect == "postgresql":
            # One statement, whose text is always the same, whatever the number of rows.
            plan, complete = (one.from_select(BUNDLE, _unpacked()) for one in (plan, complete))
            executing = _executing_as_one
        take_seqs = insert(counters).values(name="seq", value=bindparam("count"))
        lease = insert(leases)
        return cls(
            insert(jobs).on_conflict_do_nothing().returning(jobs.c.id),
            executing(plan.on_conflict_do_nothing()),
            executing(
                complete.on_conflict_do_update(
                    index_elements=[*bundles.primary_key],
                    set_={name: complete.excluded[name] for name in ("seq", "failed", "body")},
                    where=bundles.c.seq.is_(None),
                ).returning(*bundles.primary_key)
            ),
            take_seqs.on_conflict_do_update(
                index_elements=[*counters.primary_key],
                set_={"value": counters.c.value + take_seqs.excluded.value},
            ).returning(counters.c.value),
            lease.values({"name": bindparam("name"), "owner": bindparam("owner"), "beat": 1})
            .on_conflict_do_update(
                index_elements=[*leases.primary_key],
                set_={"owner": lease.excluded.owner, "beat": leases.c.beat + 1},
                where=or_(
                    leases.c.owner == lease.excluded.owner,
                    leases.c.owner == NOBODY,
                    and_(
                        leases.c.owner == bindparam("over_owner"),
                        leases.c.beat == bindparam("over_beat"),
                    ),
                ),
            )
            .returning(leases.c.owner, leases.c.beat),
        )


def _insert(dialect: str) -> Callable[..., Any]:
    # Only the one in use is imported. Both have the same methods, but no type in common.
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert
    from sqlalchemy.dialects import sqlite

    return sqlite.insert


def _unpacked() -> Select[Any]:
    """The rows of one parameter, `rows`, which is a text of all of them: the driver writes it
    faster than an array for each column."""
    columns = (column(name, bundles.c[name].type.as_generic()) for name in BUNDLE)
    rows = func.json_to_recordset(bindparam("rows", type_=JSON)).table_valued(*columns)
    return select(rows.render_derived(with_types=True))


def _executing(insert: Any) -> Callable[[Connection, Sequence[BundleRow]], Iterable[Any]]:
    """Return a function that executes the insert of many rows on SQLite. SQLAlchemy would take a
    third of the time for the parameters of each row."""
    from sqlalchemy.dialects import sqlite

    text = str(insert.compile(dialect=sqlite.dialect(), column_keys=BUNDLE))
    one = f"({', '.join('?' * len(BUNDLE))})"
    before, after = text.split(one)

    def execute(connection: Connection, rows: Sequence[BundleRow]) -> list[Any]:
        returned: list[Any] = []
        for at in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[at : at + _ROWS_AT_ONCE]
            statement = f"{before}{', '.join([one] * len(some))}{after}"
            result = connection.exec_driver_sql(statement, tuple(chain.from_iterable(some)))
            if result.returns_rows:
                returned += result
        return returned

    return execute


def _executing_as_one(insert: Any) -> Callable[[Connection, Sequence[BundleRow]], Iterable[Any]]:
    """Return a function that executes the insert of many rows on PostgreSQL."""
    return lambda connection, rows: connection.execute(
        insert, {"rows": [dict(zip(BUNDLE, row, strict=True)) for row in rows]}
    )
