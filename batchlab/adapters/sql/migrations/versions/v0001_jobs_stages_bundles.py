"""First version of the schema: jobs, stages with counters, bundles, and leases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    # This file repeats the table definitions of the module `tables`, because `tables` may change and this version must
    # not change.
    name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "jobs",
        sa.Column("id", name, nullable=False),
        sa.Column("token", sa.Text()),
        sa.Column("submitted_s", sa.Double(), nullable=False),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("control", sa.Text(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("ended_s", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="jobs_pk"),
        sa.UniqueConstraint("token", name="jobs_token"),
    )
    op.create_index("jobs_newest", "jobs", ["submitted_s", "id"])
    op.create_table(
        "stages",
        sa.Column("job", name, sa.ForeignKey("jobs.id", name="stages_job"), nullable=False),
        sa.Column("stage", name, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("planned", sa.BigInteger()),
        sa.Column("succeeded", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.Column("cancelled", sa.BigInteger(), nullable=False),
        sa.Column("retried", sa.BigInteger(), nullable=False),
        sa.Column("run_us", sa.BigInteger(), nullable=False),
        sa.Column("first_start_s", sa.Double()),
        sa.Column("last_end_s", sa.Double()),
        sa.Column("plan_round", sa.Integer(), nullable=False),
        sa.Column("cut_seq", sa.Integer(), nullable=False),
        sa.Column("uncut", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job", "stage", name="stages_pk"),
    )
    op.create_table(
        "bundles",
        sa.Column("job", name, nullable=False),
        sa.Column("stage", name, nullable=False),
        sa.Column("id", name, nullable=False),
        sa.Column("seq", sa.BigInteger()),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("void", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job", "stage", "id", name="bundles_pk"),
        sa.ForeignKeyConstraint(["job", "stage"], ["stages.job", "stages.stage"], name="bundles_stage"),
    )
    op.create_index("bundles_read", "bundles", ["job", "seq", "stage", "id", "failed"])
    op.create_table(
        "counters",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="counters_pk"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("until_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="leases_pk"),
    )
