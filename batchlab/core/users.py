"""Users of a grid, their roles, and their tokens.

Invariants: the token of a user is derived from the grid's token, and the bucket does not store it. A token contains the
name and the serial of its user, so a request can name the key of its signature. The grid's token is the token of the
administrator OWNER. The module needs only the standard library, because every command imports it at its start.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from enum import StrEnum

OWNER = "owner"
"""Name of the administrator with the grid's token. Jobs without an owner in their definition belong to OWNER."""
NAME_FORM = "up to 40 lower case letters, digits, - and _, beginning with a letter or a digit"
SERIAL_CHARS = 16
"""Length of a serial in hexadecimal digits."""

_SCHEME = "bl1"
_NAME = r"[a-z0-9][a-z0-9_-]{0,39}"
_KEY_NAME = rf"{_NAME}\.[0-9a-f]{{{SERIAL_CHARS}}}"
_TOKEN = rf"{_SCHEME}\.({_KEY_NAME})\.[0-9a-f]{{64}}"


class Role(StrEnum):
    """Roles of users. Each role also has the permissions of the roles before it."""

    VIEW = "view"
    SUBMIT = "submit"
    OPERATE = "operate"
    ADMINISTER = "administer"

    def includes(self, other: Role) -> bool:
        """Return whether a user with the role `self` has the permissions of the role `other`."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class User:
    """A user of the grid. All times are in epoch seconds.

    `serial` distinguishes the tokens of users with the same name. A user without `expires_s` does not expire.
    """

    name: str
    role: Role
    serial: str
    created_s: float
    created_by: str
    expires_s: float | None = None
    revoked_s: float | None = None

    def state(self, now_s: float) -> str:
        """Return "active", "expired", or "revoked"."""
        if self.revoked_s is not None:
            return "revoked"
        return "expired" if self.expires_s is not None and self.expires_s <= now_s else "active"


@dataclass(frozen=True, slots=True)
class Caller:
    """Authenticated sender of a request. `key` names the key of the sender's token, and is "" for the grid's token."""

    name: str
    role: Role
    key: str = ""

    @property
    def as_owner(self) -> str:
        """Owner in the definitions of the caller's jobs, which is "" for the grid's token."""
        return self.name if self.key else ""


GRID_OWNER = Caller(OWNER, Role.ADMINISTER)
"""Sender of a request with the grid's token."""


def owner_name(owner: str) -> str:
    """Return the name of the owner of a job, given the owner in the job's definition."""
    return owner or OWNER


def is_user_name(text: str) -> bool:
    """Return whether a user may have the name `text`."""
    return re.fullmatch(_NAME, text) is not None and text != OWNER


def key_name(name: str, serial: str) -> str:
    """Return the name of the key of a user's token."""
    return f"{name}.{serial}"


def is_key_name(text: str) -> bool:
    """Return whether `text` is the name of a key, which consists of the user's name and the serial."""
    return re.fullmatch(_KEY_NAME, text) is not None


def key_name_in(token: str) -> str:
    """Return the name of the key in a user's token, or "" if `token` is not the token of a user."""
    match = re.fullmatch(_TOKEN, token)
    return match[1] if match else ""


def user_token(grid_token: str, key: str) -> str:
    """Return the token of the user whose key has the name `key`."""
    secret = hmac.new(grid_token.encode(), f"batchlab user {key}".encode(), hashlib.sha256).hexdigest()
    return f"{_SCHEME}.{key}.{secret}"
