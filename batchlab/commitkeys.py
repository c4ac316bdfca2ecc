"""The commit keys of a grid's jobs, derived from the secret in its bucket.

Invariant: the secret is created once, by a conditional PUT. Whoever may read `grid/` of the bucket
can derive every commit key; workers may not, and get the keys with their messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from batchlab.errors import AlreadyExists, BackendError, NotFound
from batchlab.jobdef import JobDef
from batchlab.model import JobId
from batchlab.patience import Patience
from batchlab.ports import Ids, Objects
from batchlab.protocol import naming, wire
from batchlab.protocol.sealing import UNSEALED, CommitKey, commit_key, digest, opens

KEPT = 4096
"""Keys in memory."""


T = TypeVar("T")


class _Tries(Protocol):
    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T: ...


async def _once(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


class CommitKeys:
    """The commit keys of one grid; the secret is read at the first use."""

    def __init__(
        self, objects: Objects, patience: Patience | None = None, ids: Ids | None = None
    ) -> None:
        """Without `patience` nothing is tried again. With `ids`, of a manager, the secret is
        created if the bucket has none."""
        self._objects = objects
        self._patience: _Tries = patience or _once
        self._ids = ids
        self._secret: bytes | None = None
        self._keys: dict[JobId, CommitKey] = {}

    async def ensure(self) -> None:
        """Read the secret, or create it. A bucket that has lost it gets back the one in memory."""
        try:
            secret = await self._read()
        except NotFound:
            if self._ids is None:
                raise
            secret = await self._create(self._ids)
        if secret != self._secret:
            self._secret = secret
            self._keys.clear()

    async def _create(self, ids: Ids) -> bytes:
        drawn = "".join(ids.fresh("secret") for _ in range(8))
        secret = self._secret or hashlib.sha256(drawn.encode()).digest()
        doc = wire.to_bytes({"v": wire.VERSION, "secret": secret.hex()})
        put = partial(self._objects.put, naming.COMMIT_SECRET, doc, if_absent=True)
        try:
            await self._patience(put)
        except AlreadyExists:
            return await self._read()
        return secret

    async def of(self, job: JobDef) -> CommitKey:
        """Return the commit key of a job, UNSEALED for a job without one.

        BackendError if the bucket has lost the secret under which the job was submitted.
        """
        if not job.commit_hash:
            return UNSEALED
        key = await self.new(job.id)
        if not opens(key, job):
            raise BackendError(
                f"The commit secret of this grid is not the one of job {job.id}.",
                remedy="Restore grid/commit-secret.json in the bucket, or submit the job again.",
            )
        return key

    async def stored(self, job: JobId) -> CommitKey:
        """Return the commit key of a job that the bucket has; NotFound."""
        data = await self._patience(partial(self._objects.get, naming.spec(job)))
        return await self.of(wire.job_from_json(wire.loads(data)))

    async def new(self, job: JobId) -> CommitKey:
        """Return the commit key that a job of this id gets, or has."""
        if self._secret is None:
            await self.ensure()
        assert self._secret is not None
        key = self._keys.get(job)
        if key is None:
            key = self._keys[job] = commit_key(self._secret, job)
            while len(self._keys) > KEPT:
                del self._keys[next(iter(self._keys))]
        return key

    async def sealed(self, job: JobDef) -> JobDef:
        """Return the job with the hash of its commit key, as the manager accepts it."""
        return replace(job, commit_hash=digest(await self.new(job.id)))

    async def _read(self) -> bytes:
        get = partial(self._objects.get, naming.COMMIT_SECRET)
        try:
            return bytes.fromhex(wire.loads(await self._patience(get))["secret"])
        except NotFound as error:
            raise NotFound(
                "The bucket has no commit secret, so the outcomes of its jobs cannot be named.",
                remedy="Start the grid's manager, or restore grid/commit-secret.json.",
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(
                "The commit secret in the bucket cannot be read.",
                remedy="Restore grid/commit-secret.json from a backup.",
            ) from error
