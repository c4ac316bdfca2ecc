"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(holds: Callable[[], T], within_s: float = 20.0, *, pause_s: float = 0.02) -> T:
    """What `holds` gives as soon as that is true; fails after `within_s`. It is asked again after
    `pause_s`, longer where asking takes long."""
    deadline_s = time.monotonic() + within_s
    while not (found := holds()):
        assert time.monotonic() < deadline_s, "it has not come to be"
        time.sleep(pause_s)
    return found
