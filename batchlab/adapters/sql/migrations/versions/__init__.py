"""Numbered versions of the ledger's schema. Each file of a version declares its own tables and never changes."""
