"""Directory of the grid's users in the bucket.

Invariants: the object with the users contains no secret, and has a seal that needs the grid's token. A program that can
write the bucket but does not have the grid's token can neither add a user nor change a role. If the users cannot be
read, only the grid's token is valid. A manager reads the users again after REREAD_S, so a revocation by another manager
takes effect within REREAD_S. A change replaces only the version of the object that this manager has read.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

from batchlab.core.errors import BackendError, Malformed, NotFound, Refused, UsageError
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, decode, figure, list_items, text
from batchlab.core.text import show_value
from batchlab.core.users import (
    GRID_OWNER,
    NAME_FORM,
    OWNER,
    SERIAL_CHARS,
    Caller,
    Role,
    User,
    is_key_name,
    is_user_name,
    key_name,
)
from batchlab.manager.state import Ports
from batchlab.manager.versioned_document import VersionedDocument

log = logging.getLogger(__name__)

REREAD_S = 2.0
"""Maximum age of the users in memory. A request with the token of a user reads older users again."""
MAX_USERS = 1000

_Users = dict[str, User]


class UserDirectory:
    """Users of the grid by name. A name has at most one token at a time."""

    def __init__(self, ports: Ports, token: str) -> None:
        """`token` is the grid's token."""
        self._clock = ports.clock
        self._token = token
        self._document = VersionedDocument(ports, object_keys.USERS, self._merge)
        self._users: _Users = {}
        self._problem: BackendError | None = None
        """Error of the last read, or None if the users were read."""
        self._is_sealed = True
        """Whether the object with the users has the seal of the grid's token."""
        self._read_s: float | None = None
        self._lock = asyncio.Lock()

    async def find(self, key: str) -> User | None:
        """Return the user whose token has the key with the name `key`, or None if the user does not exist.

        Raise BackendError if the bucket does not respond.
        """
        user = (await self._current()).get(key.partition(".")[0])
        return user if user and hmac.compare_digest(key_name(user.name, user.serial), key) else None

    async def caller(self, key: str) -> Caller | None:
        """Return the active user whose token has the key with the name `key`, or None. The key of the grid's token is
        "".
        """
        if not key:
            return GRID_OWNER
        user = await self.find(key)
        is_active = user is not None and user.state(self._clock.now_s()) == "active"
        return Caller(user.name, user.role, key) if user and is_active else None

    async def all(self) -> list[User]:
        """Return all users by name. Raise BackendError if the users cannot be read."""
        users = await self._current(fresh=True)
        if self._problem:
            raise self._problem
        return [users[name] for name in sorted(users)]

    async def add(
        self, name: str, role: Role, *, by: str, expires_s: float | None = None, replacing: bool = False
    ) -> tuple[User, str]:
        """Add a user, and return the user and the name of the key of the user's token.

        Raise Refused if a user has or had the name, unless `replacing`, because the jobs of the name belong to the new
        user. The earlier token of the name becomes invalid.
        """
        if not is_user_name(name):
            raise UsageError(f"{show_value(name)} is not the name of a user.", remedy=f"Use {NAME_FORM}, except owner.")
        now_s = self._clock.now_s()
        if expires_s is not None and expires_s <= now_s:
            raise UsageError("The token would already be expired.", remedy="Give an expiry in the future.")
        user = User(name, role, secrets.token_hex(SERIAL_CHARS // 2), now_s, by, expires_s)

        def change(users: _Users) -> _Users:
            before = users.get(name)
            if before and before.serial != user.serial and not replacing:
                raise Refused(
                    f"The user {name} exists already, with the role {before.role}. The token is {before.state(now_s)}.",
                    remedy="Use --replace for a new token or another role of the same person, or choose another name.",
                )
            others = {other: one for other, one in users.items() if other != name}
            if len(others) >= MAX_USERS:
                ended = [one for one in others.values() if one.state(now_s) != "active"]
                if not ended:
                    raise Refused(f"The grid has {MAX_USERS} users.", remedy="Revoke users that are not needed.")
                del others[min(ended, key=lambda one: one.created_s).name]
            return {**others, name: user}

        await self._change(change)
        return user, key_name(name, user.serial)

    async def revoke(self, name: str) -> User:
        """Revoke the token of a user. Raise NotFound if the user does not exist. A second call changes nothing."""
        now_s = self._clock.now_s()

        def change(users: _Users) -> _Users:
            if name == OWNER:
                raise UsageError(
                    f"The user {OWNER} has the grid's token, which cannot be revoked.",
                    remedy="Replace the grid's token. The documentation of security describes how.",
                )
            user = _existing(users, name)
            return users if user.revoked_s is not None else {**users, name: replace(user, revoked_s=now_s)}

        await self._change(change)
        return self._users[name]

    async def set_role(self, name: str, role: Role) -> User:
        """Change the role of a user, whose token stays valid.

        Raise NotFound if the user does not exist, and Refused if the user's token is expired or revoked.
        """
        now_s = self._clock.now_s()

        def change(users: _Users) -> _Users:
            if name == OWNER:
                raise UsageError(
                    f"The user {OWNER} has the grid's token and always has the role {Role.ADMINISTER}.",
                    remedy="`batchlab user add` adds a user with another role.",
                )
            user = _existing(users, name)
            if (state := user.state(now_s)) != "active":
                raise Refused(
                    f"The token of the user {name} is {state}.",
                    remedy=f"`batchlab user add {name} --role {role} --replace` makes a new token.",
                )
            return {**users, name: replace(user, role=role)}

        await self._change(change)
        return self._users[name]

    async def _current(self, *, fresh: bool = False) -> _Users:
        async with self._lock:
            now_s = self._clock.monotonic_s()
            if fresh or self._read_s is None or now_s - self._read_s > REREAD_S:
                await self._read()
                self._read_s = now_s
            return self._users

    async def _read(self) -> None:
        problem = None
        try:
            content = await self._document.read()
        except Malformed as error:
            content, problem = None, error
        self._users, self._problem, self._is_sealed = {}, problem, True
        if content is not None:
            with suppress(BackendError):
                self._merge(content)
        if self._problem:
            log.error("the users cannot be read, so only the grid's token is valid: %s", self._problem)

    def _merge(self, content: bytes) -> None:
        """Replace the users in memory by the users in the object."""
        self._users, self._problem, self._is_sealed = {}, None, True
        try:
            doc = json_format.loads(content)
            self._is_sealed = hmac.compare_digest(text(doc["seal"]), self._seal(doc))
            if not self._is_sealed:
                raise ValueError("the seal does not belong to the grid's token")
            users = [_user_of(one) for one in list_items(doc["users"])]
            self._users = {user.name: user for user in users}
        except BackendError as error:
            self._problem = error
            raise
        except UNREADABLE as error:
            self._problem = Malformed(
                f"The users in the bucket cannot be read: {json_format.brief(error)}.",
                remedy="If the grid's token has changed, `batchlab user add` begins a new list of users.",
            )
            raise self._problem from error

    async def _change(self, change: Callable[[_Users], _Users]) -> None:
        async with self._lock:
            await self._read()

            def encode() -> bytes:
                # Users with the seal of an earlier token of the grid are invalid for good. Other unreadable users stay,
                # because a later release may have written them.
                if self._problem and self._is_sealed:
                    raise self._problem
                self._users, self._problem, self._is_sealed = change(self._users), None, True
                doc = {"v": json_format.VERSION, "users": [json_format.fields(one) for one in self._users.values()]}
                return json_format.to_bytes({**doc, "seal": self._seal(doc)})

            self._read_s = None  # If the write fails, the next request reads the users again.
            await self._document.write(encode)
            self._read_s = self._clock.monotonic_s()

    def _seal(self, doc: dict[str, Any]) -> str:
        content = json_format.dumps({name: value for name, value in sorted(doc.items()) if name != "seal"})
        return hmac.new(self._token.encode(), f"batchlab users {content}".encode(), sha256).hexdigest()


def _existing(users: _Users, name: str) -> User:
    if name not in users:
        raise NotFound(f"The user {show_value(name)} does not exist.", remedy="`batchlab user list` lists them.")
    return users[name]


def _user_of(doc: Any) -> User:
    user = decode(User, doc)
    if not is_user_name(user.name) or not is_key_name(key_name(user.name, user.serial)):
        raise ValueError("the name or the serial of a user is expected")
    for time_s in (user.created_s, user.expires_s, user.revoked_s):
        if time_s is not None:
            figure(time_s)
    return user
