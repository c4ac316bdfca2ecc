"""Schema version in which a lease counts its renewals instead of storing a time, so clocks need not agree."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # The migration deletes the leases of all holders. The ledger is migrated only while no manager runs.
    op.drop_table("leases")
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("beat", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="leases_pk"),
    )
