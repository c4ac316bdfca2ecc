"""Ledger port on SQL databases: SQLite and PostgreSQL."""

from __future__ import annotations

from batchlab.adapters.sql.ledger import SqlLedger, open_memory, open_postgres, open_sqlite, read_sqlite
from batchlab.adapters.sql.logins import IamLogins, Login, Logins, SecretLogins

__all__ = [
    "IamLogins",
    "Login",
    "Logins",
    "SecretLogins",
    "SqlLedger",
    "open_memory",
    "open_postgres",
    "open_sqlite",
    "read_sqlite",
]
