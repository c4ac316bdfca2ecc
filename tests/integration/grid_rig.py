"""What the tests of the Python API share."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(holds: Callable[[], bool], within_s: float = 20.0) -> None:
    """Wait until `holds`; fails after `within_s`."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, "it has not come to be"
        time.sleep(0.02)
