"""A fleet's state in one file.

Invariant: whenever the process or the machine stops, the file holds a whole state, old or new.
"""

from __future__ import annotations

from pathlib import Path

from batchlab.core.atomic_write import make_folder, write_whole
from batchlab.core.errors import BackendError


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
        try:
            make_folder(self._path.parent)
            write_whole(self._path, data)
        except OSError as error:
            raise BackendError(f"{self._path} cannot be written: {error}") from error
