"""Types of the functions for other processes."""

from __future__ import annotations

import signal
from typing import NamedTuple, Protocol


class Process(NamedTuple):
    """A process of the machine and the process's resident memory."""

    pid: int
    parent: int
    group: int
    resident_bytes: int


class ProcessWatch(Protocol):
    """Watch of one process. The watch never signals another process that reuses the pid."""

    def fileno(self) -> int:
        """Return a descriptor that stays readable after the end of the process. Its content must not be read."""

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal. Raise ProcessLookupError if the process has ended and its parent has reaped it."""

    def close(self) -> None:
        """Release the descriptor. `close` may be called more than once."""
