"""Access keys that a grid creates for its emulator and for its Auto Scaling endpoint.

Invariant: a file of keys has the mode 0600 from its creation, and is never partly written.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from batchlab.core.errors import BackendError

FILE = "keys.json"
"""Name of the file with the keys of an emulator, in the emulator's folder."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


@dataclass(frozen=True, slots=True)
class Keys:
    """An access key and its secret key."""

    access_key: str
    secret_key: str = field(repr=False)


def fresh() -> Keys:
    """Return a new random pair in the form of AWS's keys."""
    # MiniStack takes an access key that consists of digits as an account number.
    name = "AKIA" + "".join(secrets.choice(_LETTERS) for _ in range(16))
    return Keys(name, secrets.token_urlsafe(30))


def read(path: Path) -> Keys | None:
    """Return the keys in the file, or None if the file does not exist. Raise BackendError."""
    try:
        return Keys(**json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BackendError(
            f"The keys in {path} cannot be read: {error.strerror}.",
            remedy="Only the user who made the grid can use it.",
        ) from error
    except (ValueError, TypeError) as error:
        raise BackendError(
            f"The keys in {path} are damaged.",
            remedy="Delete the file while the grid is down. The next start makes new keys.",
        ) from error


def provide(path: Path) -> Keys:
    """Return the keys in the file. Create the file if it does not exist. Raise BackendError."""
    if keys := read(path):
        return keys
    staged = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(fresh()), file)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was faster, so its keys are used
            path.hardlink_to(staged)
    finally:
        staged.unlink()
    keys = read(path)
    assert keys
    return keys
