"""Writes of objects that a power cut may undo, since they may not be on the disk yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchlab.core.ports import Clock

SYNC_S = 0.1
"""Seconds after which a write has reached the disk, even if its writer lacks the answer."""


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
        """Record that a writer of the object has the answer that it is on the disk."""
        self._before.pop(key, None)

    def before(self) -> dict[str, bytes | None]:
        """Return the content before each write that a power cut may undo now, by key."""
        since_s = self.clock.monotonic_s() - SYNC_S
        self._before = {key: one for key, one in self._before.items() if one[1] > since_s}
        return {key: before for key, (before, _) in self._before.items()}
