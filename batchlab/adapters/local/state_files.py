"""Small files in which a grid stores its records, its access keys, and the state of its fleet.

Invariant: a state file always has a complete content, old or new, also after a crash or power loss. A file of access
keys has the mode 0600 from its creation.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from batchlab.core.atomic_write import PRIVATE_FOLDER, sync_folder, write_once, write_whole
from batchlab.core.errors import BackendError

T = TypeVar("T")


def read_record(path: Path, parse: Callable[[Any], T], what: str, *, remedy: str) -> T | None:
    """Return the parsed content of a JSON file, or None if the file does not exist.

    Raise BackendError if the file cannot be read. If the content of the file is not `what`, raise BackendError with
    `remedy`.
    """
    try:
        return parse(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BackendError(
            f"{path} cannot be read: {error.strerror}.", remedy="Only the user who created the grid can use it."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BackendError(f"{path} is not {what}: {error}.", remedy=remedy) from error


# --- Access keys ---------------------------------------------------------------------------------

KEYS_FILE = "keys.json"
"""Name of the file with the access keys of an emulator, in the emulator's folder."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


@dataclass(frozen=True, slots=True)
class Keys:
    """An access key and its secret key, which a grid creates for one of its own services."""

    access_key: str
    secret_key: str = field(repr=False)


def new_keys() -> Keys:
    """Return a new random pair of keys in the form of AWS's keys."""
    # MiniStack reads an access key that consists of digits as an account number.
    name = "AKIA" + "".join(secrets.choice(_LETTERS) for _ in range(16))
    return Keys(name, secrets.token_urlsafe(30))


def read_keys(path: Path) -> Keys | None:
    """Return the access keys in the file, or None if the file does not exist. Raise BackendError if reading fails."""
    remedy = "Delete the file while the grid is down. The next start creates new keys."
    return read_record(path, lambda keys: Keys(**keys), "a pair of access keys", remedy=remedy)


def provide_keys(path: Path) -> Keys:
    """Return the access keys in the file. If the file does not exist, create the file with new keys.

    Raise BackendError if the file cannot be read.
    """
    if keys := read_keys(path):
        return keys
    write_once(path, json.dumps(asdict(new_keys())))
    keys = read_keys(path)
    assert keys
    return keys


# --- Fleet state ---------------------------------------------------------------------------------


class StateFile:
    """Store of the fleet's state in the file `path`. The methods of the store raise BackendError if the disk fails."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> bytes | None:
        try:
            return self._path.read_bytes() if self._path.exists() else None
        except OSError as error:
            raise BackendError(f"{self._path} cannot be read: {error}") from error

    def save(self, data: bytes) -> None:
        try:
            if not self._path.parent.exists():
                # The folder of a deleted grid must not be created again, so its parent must exist.
                self._path.parent.mkdir(PRIVATE_FOLDER)
                sync_folder(self._path.parent.parent)
            write_whole(self._path, data)
        except OSError as error:
            raise BackendError(f"{self._path} cannot be written: {error}") from error
