"""`ledger rebuild`: an equal ledger from the bucket alone (I3).

Invariant: each job is restored in one transaction, and only where nobody has changed what the
ledger has of it since the bucket was asked. So users, and a manager that does not know yet that
another one leads, may do anything meanwhile: they see a job whole, as it was or as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from batchlab.commit import outcome_at
from batchlab.control import word_of
from batchlab.errors import BackendError, NotFound, Unreachable
from batchlab.jobdef import JobDef
from batchlab.manager import addresses
from batchlab.manager.live import Ports
from batchlab.manager.retries import Retry
from batchlab.model import Completion, Control, JobId, JobState, StageName
from batchlab.ports import Cut, Ending, Past, Round
from batchlab.protocol import definition, naming, settle, wire

log = logging.getLogger(__name__)

_PAGE = 1000
_TRIES = 10


async def rebuild(ports: Ports) -> int:
    """Read every job from the bucket again, and forget those that are not there; answers how many
    there are. Unreachable where somebody changes one of them all the time."""
    known = await _in_ledger(ports)  # first: a job that comes meanwhile must not be forgotten
    found = await _in_bucket(ports)
    gone = sorted(known - found)
    if gone:
        await ports.ledger.forget(gone)
    for job in sorted(found):
        await restore(ports, job)
    return len(found)


async def _in_ledger(ports: Ports) -> set[JobId]:
    known: set[JobId] = set()
    last: JobId | None = None
    while page := await ports.ledger.jobs(limit=_PAGE, before=last):
        known.update(record.job.id for record in page)
        last = page[-1].job.id
    return known


async def _in_bucket(ports: Ports) -> set[JobId]:
    found: set[JobId] = set()
    async for page in ports.objects.list(naming.JOBS):
        for info in page:
            job = JobId(info.key.split("/", 2)[1])
            if info.key == naming.spec(job):
                found.add(job)
    return found


async def restore(ports: Ports, job: JobId) -> None:
    """Read one job from the bucket again. NotFound where it is not there, Unreachable where
    somebody changes it all the time."""
    for _ in range(_TRIES):
        before = await ports.ledger.version(job)
        if await ports.ledger.restore(await _past(ports, job), over=before):
            return
    raise Unreachable(
        f"Job {job} changes faster than it is read from the bucket.",
        remedy="Ask for the rebuild again.",
    )


@dataclass(slots=True)
class _Found:
    """What there is of one job, of any round. Of outcomes only what they come to: a job's values
    may be more than memory holds."""

    cuts: list[Cut] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)


async def _past(ports: Ports, job: JobId) -> Past:
    found = _Found()
    doc = await _doc(ports, naming.spec(job))
    spec, opening = wire.job_from_json(doc), definition.opening_in(doc)
    if spec.id != job:
        raise BackendError(f"The definition of job {job} is one of another job.")
    spec = await addresses.restored(ports, spec)
    if opening and opening.cut:
        found.cuts.append(opening.cut)
    key = await ports.keys.of(spec)
    async for page in ports.objects.list(naming.committed(job)):
        for info in page:
            if naming.is_cut(info.key):
                found.cuts.append(wire.cut_from_json(await _doc(ports, info.key)))
            elif naming.is_genuine(info.key, key):
                get = partial(ports.objects.get, info.key)
                outcome = outcome_at(info.key, await ports.patience(get), key)
                found.completions.append(settle.completion(outcome))
            elif naming.is_outcome(info.key):
                log.error("an outcome with a wrong seal is ignored", extra={"job": job})
    # What has been cut has started, though the clock may have been set back since.
    later = not found.cuts and (spec.start_at_s or 0.0) > ports.clock.now_s()
    state = JobState.SCHEDULED if later else JobState.SUBMITTED
    return Past(spec, state, await _rounds(ports, spec, found), await _control(ports, job))


async def _rounds(ports: Ports, job: JobDef, found: _Found) -> Sequence[Round]:
    rounds: list[Round] = []
    retry = Retry((), ())
    while True:
        rounds.append(await _round(ports, job, len(rounds), retry, found))
        get = partial(ports.objects.get, naming.retry(job.id, len(rounds)))
        try:
            retry = Retry.from_bytes(await ports.patience(get))
        except NotFound:
            return rounds


async def _round(ports: Ports, job: JobDef, number: int, retry: Retry, found: _Found) -> Round:
    cuts = sorted(
        (cut for cut in found.cuts if cut.round == number), key=lambda cut: (cut.stage, cut.seq)
    )
    planned: dict[StageName, int] = {}
    for cut in cuts:
        if cut.planned is not None:
            planned |= {stage.name: cut.planned for stage in job.fed_by(cut.stage)}
    completions = [one for one in found.completions if one.bundle.round == number]
    return Round(
        retry.reopened,
        (*retry.cuts, *cuts),
        planned,
        completions,
        [settle.casualties(job, one) for one in completions],
        await _ending(ports, job.id, number),
    )


async def _ending(ports: Ports, job: JobId, round_: int) -> Ending | None:
    try:
        return wire.ending_from_json(await _doc(ports, naming.final(job, round_)))
    except NotFound:
        return None


async def _control(ports: Ports, job: JobId) -> Control:
    try:
        return (await word_of(ports.objects, job, ports.patience)).control
    except NotFound:
        return Control.RUN


async def _doc(ports: Ports, key: str) -> dict[str, Any]:
    return wire.loads(await ports.patience(partial(ports.objects.get, key)))
