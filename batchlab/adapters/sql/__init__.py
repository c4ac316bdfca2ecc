"""The ledger as SQL: SQLite, PostgreSQL."""

from batchlab.adapters.sql.ledger import SqlLedger, open_memory, open_postgres, open_sqlite

__all__ = ["SqlLedger", "open_memory", "open_postgres", "open_sqlite"]
