"""Writes of objects that a power cut may take back, since they may not be on the disk yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchlab.ports import Clock

SYNC_S = 0.1
"""A write has reached the disk after so long, although its writer may not know that yet."""


@dataclass(slots=True)
class Unsynced:
    """The unacknowledged writes of one world."""

    clock: Clock
    _before: dict[str, tuple[bytes | None, float]] = field(default_factory=dict)
    """The content before the first unacknowledged write, and its time, by key."""

    def written(self, key: str, before: bytes | None) -> None:
        """Record a write of the object that is not acknowledged yet."""
        self._before.setdefault(key, (before, self.clock.monotonic_s()))

    def acknowledged(self, key: str) -> None:
        """A writer of the object knows that it has reached the disk."""
        self._before.pop(key, None)

    def before(self) -> dict[str, bytes | None]:
        """Return the content before each write that a power cut may take back now, by key."""
        since_s = self.clock.monotonic_s() - SYNC_S
        self._before = {key: one for key, one in self._before.items() if one[1] > since_s}
        return {key: before for key, (before, _) in self._before.items()}
