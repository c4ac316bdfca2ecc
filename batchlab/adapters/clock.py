"""Real time and random ids, for every backend except the simulator.

Invariant: the core gets wall time and randomness of a real backend only from this module.
"""

from __future__ import annotations

import secrets
import time

from batchlab.worker.shared_memory import boot_s


class WallClock:
    """The clocks of the machine."""

    def now_s(self) -> float:
        """Return epoch seconds. The system may set this clock back."""
        return time.time()

    def monotonic_s(self) -> float:
        """Return seconds since an arbitrary start, which never go back.

        Where the system supports it, the time of a suspended machine counts. So a lease expires
        while a laptop is closed.
        """
        return boot_s()


class RandomIds:
    """Random ids from the operating system, which processes draw without coordination."""

    def fresh(self, kind: str) -> str:
        """Return a new id with the prefix `kind`. With 64 bits, ten million ids do not collide."""
        return f"{kind}-{secrets.token_hex(8)}"
