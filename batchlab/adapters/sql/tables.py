"""The tables of the ledger, as the code of this version expects them.

Invariant: `metadata` and the migrations up to HEAD describe the identical schema (a test compares
what both make), so a fresh database may be made from either.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

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
