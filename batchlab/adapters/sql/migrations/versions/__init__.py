"""Numbered schema versions. Each file declares its own tables and never changes."""
