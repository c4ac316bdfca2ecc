"""Ledger port on Amazon SimpleDB, over boto3."""

from __future__ import annotations

from batchlab.adapters.simpledb.ledger import SimpleDbLedger, open_simpledb

__all__ = ["SimpleDbLedger", "open_simpledb"]
