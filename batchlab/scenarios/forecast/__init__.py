"""A scenario lived through in virtual time, and what can be told from that."""
