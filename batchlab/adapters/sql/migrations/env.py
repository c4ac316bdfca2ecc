"""Alembic's entry point, which uses the connection that `migrate` passes in.

Invariant: the migration runs in the caller's transaction, so other connections never see a partial schema.
"""

from __future__ import annotations

from alembic import context

from batchlab.adapters.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, transaction_per_migration=False
)
with context.begin_transaction():
    context.run_migrations()
