"""The runs of one job file: which there were, and how they ended, read from the bucket.

Invariant: a run's client token is the source digest, of all that decides what it does, and for
later ones #2, #3 after it. So the same command finds its run again, whatever became of the process
that began it, and without a manager.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from batchlab.core.errors import NotFound
from batchlab.core.model import JobId, JobState
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.retry import Patience


@dataclass(frozen=True, slots=True)
class Run:
    """One run that was submitted; `ended` is how, None while it has not."""

    number: int
    job: JobId
    ended: JobState | None


def token(source_digest: str, number: int) -> str:
    """The client token of a job file's `number`-th run, from 1."""
    return source_digest if number == 1 else f"{source_digest}#{number}"


async def latest(objects: Objects, name: str, source_digest: str, patience: Patience) -> Run | None:
    """The last run with this source digest, None where there was none."""
    number = 0
    job: JobId | None = None
    while True:
        candidate = object_keys.job_id(name, token(source_digest, number + 1))
        if await patience(partial(objects.head, object_keys.spec(candidate))) is None:
            break
        number, job = number + 1, candidate
    if job is None:
        return None
    return Run(number, job, await _ended(objects, job, patience))


async def _ended(objects: Objects, job: JobId, patience: Patience) -> JobState | None:
    round_ = 0
    while await patience(partial(objects.head, object_keys.retry(job, round_ + 1))):
        round_ += 1
    try:
        data = await patience(lambda: objects.get(object_keys.final(job, round_)))
    except NotFound:
        return None
    return JobState(json_format.loads(data)["state"])
