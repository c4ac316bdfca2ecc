"""Alembic's environment, run by migrate.py."""
