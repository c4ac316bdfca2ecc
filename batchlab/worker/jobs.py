"""The definitions of the jobs that a worker has to do with."""

from __future__ import annotations

from functools import partial

from batchlab.jobdef import JobDef
from batchlab.model import JobId
from batchlab.patience import Patience
from batchlab.ports import Objects
from batchlab.protocol import naming, wire

KEPT = 64


class Jobs:
    """Each is read once, or not at all where a message has told it."""

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._jobs: dict[JobId, JobDef] = {}

    async def of(self, job: JobId, told: JobDef | None = None) -> JobDef:
        """The job; NotFound where it has been removed."""
        if job not in self._jobs:
            if told is None:
                data = await self._patience(partial(self._objects.get, naming.spec(job)))
                told = wire.job_from_json(wire.loads(data))
            self._jobs[job] = told
            while len(self._jobs) > KEPT:
                del self._jobs[next(iter(self._jobs))]
        return self._jobs[job]
