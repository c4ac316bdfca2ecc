"""Alembic environment that `migrate` runs."""
