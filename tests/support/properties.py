"""Settings of property tests: the same examples on every machine, without a deadline."""

from __future__ import annotations

from hypothesis import settings

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=150)
SLOW = settings(PROPERTY, max_examples=40)
"""The settings for slow examples."""
