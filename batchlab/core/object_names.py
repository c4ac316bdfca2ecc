"""What no object's key may hold, on whichever backend.

Every child process imports it at start-up, with task.py, so it needs the standard library only.
Invariant: what one place takes for the end of a key, every other one does too.
"""

from __future__ import annotations

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f]")

STAGED = re.compile(r"#\d+$")
"""What the local store calls a file that is still being written ends so."""

NEVER_EMPTY = ("code/", "grid/", "jobs/", "logs/.workers/", "reports/")
"""Prefixes of documents and archives. An empty file there is the remains of a power cut."""

VOLATILE = re.compile(r"^(logs/(\.workers|[^/]+/\.tails)/|jobs/[^/]+/[^/]+/(running|starts)/)")
"""Keys of what is known of living workers, which need not outlive the machine: markers, their
environment, and live logs."""


def check_key(key: str) -> None:
    """ValueError for a key that some backend cannot hold."""
    if CONTROL.search(key):
        raise ValueError(f"object key {key!r} holds a control character")
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise ValueError(f"object key {key!r} has an empty, '.' or '..' segment")
    if STAGED.search(key):
        raise ValueError(f"object key {key!r} ends like a file that is still being written")


def check_prefix(prefix: str) -> None:
    """ValueError for a prefix that no key can have."""
    check_key(f"{prefix}x")
