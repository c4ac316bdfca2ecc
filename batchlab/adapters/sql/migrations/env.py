"""Runs inside Alembic: takes the connection that migrate.py handed in.

Invariant: the caller's transaction is the migration's, so a half-made schema is never seen.
"""

from __future__ import annotations

from alembic import context

from batchlab.adapters.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
