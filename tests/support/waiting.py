"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.02
"""How much longer a pause is for each second that has been waited."""
SELDOM_S = 0.1


def until(holds: Callable[[], T], within_s: float = 20.0, *, pause_s: float = 0.02) -> T:
    """What `holds` gives as soon as that is true; fails after `within_s`. It is asked again after
    `pause_s`, and where it takes seconds less often, up to SELDOM_S: who asks all the time takes
    the CPU from what is waited for."""
    begun_s = time.monotonic()
    while not (found := holds()):
        waited_s = time.monotonic() - begun_s
        assert waited_s < within_s, "it has not come to be"
        time.sleep(max(pause_s, min(waited_s * SHARE, SELDOM_S)))
    return found
