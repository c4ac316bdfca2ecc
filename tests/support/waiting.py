"""A function that waits for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.04
"""The share of the waited time that is added to the pause between two checks."""
SELDOM_S = 0.25


def until(holds: Callable[[], T], within_s: float = 20.0, *, pause_s: float = 0.02) -> T:
    """Wait until `holds` returns a true value, and return this value. Fail after `within_s`. The pause between checks
    is at first `pause_s`, and grows with the waited time up to SELDOM_S. Frequent checks would take CPU time from the
    tested process."""
    begun_s = time.monotonic()
    while not (found := holds()):
        waited_s = time.monotonic() - begun_s
        assert waited_s < within_s, "it has not come to be"
        time.sleep(max(pause_s, min(waited_s * SHARE, SELDOM_S)))
    return found
