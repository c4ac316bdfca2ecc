"""Fleet state in one file.

Invariant: the file always contains a complete state, old or new, also after a crash or power loss.
"""

from __future__ import annotations

from pathlib import Path

from batchlab.core.atomic_write import make_folder, write_whole
from batchlab.core.errors import BackendError


class StateFile:
    """Store of the fleet in the file `path`. Its methods raise BackendError if the disk fails."""

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
