"""A fleet's state in one file.

Invariant: whenever the process or the machine stops, the file holds a whole state, old or new.
"""

from __future__ import annotations

import os
from pathlib import Path

from batchlab.errors import BackendError


class StateFile:
    """The fleet's Store over `path`, whose folder is made; BackendError where the disk fails."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> bytes | None:
        try:
            return self._path.read_bytes() if self._path.exists() else None
        except OSError as error:
            raise BackendError(f"{self._path} cannot be read: {error}") from error

    def save(self, data: bytes) -> None:
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            fresh.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                # Without it a power failure can leave the new name on an empty file.
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            raise BackendError(f"{self._path} cannot be written: {error}") from error
