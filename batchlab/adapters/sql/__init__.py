"""The ledger as SQL: SQLite now, any database that SQLAlchemy speaks to and that locks as asked."""

from batchlab.adapters.sql.ledger import SqlLedger, open_memory, open_sqlite

__all__ = ["SqlLedger", "open_memory", "open_sqlite"]
