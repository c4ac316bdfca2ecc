"""One file per schema version, numbered; each spells out its own tables and never changes."""
