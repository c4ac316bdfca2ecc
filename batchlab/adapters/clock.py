"""Time and ids of the real world, for every backend but the simulator.

Invariant: this is the one place where a real backend's core gets wall time and randomness from.
"""

from __future__ import annotations

import secrets
import time

from batchlab.worker.shared_memory import boot_s


class WallClock:
    """The machine's clocks."""

    def now_s(self) -> float:
        """Epoch seconds; the system may set them back."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start; never goes back. Where the system can tell, the time in
        which the machine was suspended counts: a lease must not outlast a closed lid."""
        return boot_s()


class RandomIds:
    """Ids from the operating system's randomness: many processes draw without asking each other."""

    def fresh(self, kind: str) -> str:
        """A new id with the prefix `kind`; 64 bits, so ten million of them do not collide."""
        return f"{kind}-{secrets.token_hex(8)}"
