"""The definitions of the jobs that a worker has to do with."""

from __future__ import annotations

import asyncio
from functools import partial

from batchlab.errors import BackendError
from batchlab.jobdef import JobDef
from batchlab.model import JobId
from batchlab.patience import Patience
from batchlab.ports import Objects
from batchlab.protocol import naming, wire
from batchlab.protocol.sealing import UNSEALED, CommitKey, opens

KEPT = 64
KEYS_KEPT = 4096


class WrongKeyError(BackendError):
    """A message has another commit key than the definition of its job asks for."""


class Jobs:
    """Each is read once. What a message says of its job counts only if its commit key is the job's:
    whoever may send to the queue could name any job."""

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._jobs: dict[JobId, JobDef] = {}
        self._keys: dict[JobId, CommitKey] = {}
        self._reading: dict[JobId, asyncio.Lock] = {}
        """Messages of one job that come together read its definition once."""

    def knows(self, job: JobId) -> bool:
        """Whether the definition of the job has been read."""
        return job in self._jobs

    def key_of(self, job: JobId) -> CommitKey:
        """Return the commit key of a job whose messages have been received."""
        return self._keys.get(job, UNSEALED)

    async def of(self, job: JobId, key: CommitKey) -> JobDef:
        """Return the job of a message with that commit key.

        NotFound if the job has been removed, WrongKeyError if the key is not the job's.
        """
        if known := self._known(job, key):
            return known
        lock = self._reading.setdefault(job, asyncio.Lock())
        try:
            async with lock:
                return self._known(job, key) or await self._read(job, key)
        finally:
            if not lock.locked():
                self._reading.pop(job, None)

    def _known(self, job: JobId, key: CommitKey) -> JobDef | None:
        """Return the job unless it is to be read: for another commit key it is read again, since it
        may have been removed and submitted anew."""
        known = self._jobs.get(job)
        return known if known and (key == self.key_of(job) or not known.commit_hash) else None

    async def _read(self, job: JobId, key: CommitKey) -> JobDef:
        data = await self._patience(partial(self._objects.get, naming.spec(job)))
        known = wire.job_from_json(wire.loads(data))
        if known.id != job or not opens(key, known):
            raise WrongKeyError(f"A message of job {job} does not have its commit key.")
        self._jobs[job] = known
        while len(self._jobs) > KEPT:
            del self._jobs[next(iter(self._jobs))]
        if known.commit_hash:
            self._keys[job] = key
            while len(self._keys) > KEYS_KEPT:
                del self._keys[next(iter(self._keys))]
        return known
