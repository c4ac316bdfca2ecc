"""Rebuild of the ledger from the bucket alone (command `grid rebuild-ledger`, promise I3).

Invariant: each job is restored in one transaction, and only if the job's rows have not changed since the bucket was
read. Users, and a manager that has just lost the lease, may therefore change jobs during a rebuild. A reader of the
ledger sees each job either as before the rebuild or as after the rebuild.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from batchlab.core.commit import read_command, read_outcome
from batchlab.core.errors import BackendError, Deleted, Malformed, NotFound, Throttled, TooNew, Unreachable
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Completion, Control, JobId, JobState, Outcome, StageName
from batchlab.core.ports import Cut, Ending, JobHistory, JobRows, ObjectInfo, Round
from batchlab.core.protocol import commit_keys, json_format, object_keys, settlement
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.manager import admission
from batchlab.manager.quarantine import UnreadableObject, read_cut, read_stored
from batchlab.manager.retry_rounds import Retry, read_retry
from batchlab.manager.state import Ports

log = logging.getLogger(__name__)


T = TypeVar("T")

LOST_JOBS = (
    "The ledger is new and lacks jobs of the bucket: `batchlab grid rebuild-ledger` restores the list of all jobs."
)
MAX_SEARCHED = 100
"""Maximum number of jobs that `has_lost_jobs` reads."""
_PAGE = 1000
_MAX_ATTEMPTS = 10


@dataclass(slots=True)
class RebuildResult:
    jobs: int
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reason for each unreadable object, by key. A job with an unreadable outcome or end is restored without the
    unreadable object. A job with an unreadable control object is restored as paused. A job with any other unreadable
    object keeps its rows in the ledger."""


async def rebuild(ports: Ports) -> RebuildResult:
    """Restore every job from the bucket, and remove jobs that a user has deleted or that the bucket does not have.
    Raise Unreachable if a job changes faster than the bucket can be read."""
    # The ledger is read before the bucket, because the rebuild must not remove a job submitted between the two reads.
    ids = await _in_ledger(ports)
    job_ids = await _in_bucket(ports)
    removed = ids - job_ids
    rebuilt = RebuildResult(0)
    for job in sorted(job_ids):
        try:
            rebuilt.unreadable |= await restore(ports, job)
            rebuilt.jobs += 1
        except (Throttled, Unreachable):
            raise
        except Deleted:
            removed |= ids & {job}
        except BackendError as error:
            # A job that cannot be restored must not block the restore of other jobs.
            key = error.key if isinstance(error, UnreadableObject) else object_keys.committed(job)
            rebuilt.unreadable[key] = error.message
    if removed:
        await ports.ledger.forget(sorted(removed))
    for key, why in rebuilt.unreadable.items():
        log.error("the rebuild continued without %s: %s", key, why)
    return rebuilt


async def _in_ledger(ports: Ports) -> set[JobId]:
    job_ids: set[JobId] = set()
    last: JobId | None = None
    while page := await ports.ledger.jobs(limit=_PAGE, before=last):
        job_ids.update(rows.id for rows in page)
        last = page[-1].id
    return job_ids


async def _in_bucket(ports: Ports) -> set[JobId]:
    return {_job_of(info) async for info in _definitions(ports)}


async def has_lost_jobs(ports: Ports, before_s: float) -> bool:
    """Return whether the ledger lacks a job of the bucket that was submitted before the wall time `before_s`. Ignore
    jobs that a user has deleted.
    """
    searched = 0
    async for info in _definitions(ports):
        if _is_note(info):
            continue
        if searched == MAX_SEARCHED:
            return False
        searched += 1
        try:
            spec, _ = await _read(ports, info.key, commit_keys.from_json)
        except NotFound:
            continue
        except UnreadableObject:
            return True  # The rebuild reports the object.
        if spec.submitted_s < before_s and await _rows(ports, _job_of(info)) is None:
            return True
    return False


async def lost_jobs(ports: Ports) -> list[JobDef]:
    """Return the jobs that the ledger lacks. Leave out deleted jobs, and jobs whose definition cannot be read."""
    ids = await _in_ledger(ports)
    lost: list[JobDef] = []
    async for info in _definitions(ports):
        if _job_of(info) in ids or _is_note(info):
            continue
        with suppress(NotFound, UnreadableObject):
            lost.append((await _read(ports, info.key, commit_keys.from_json))[0])
    return lost


async def _definitions(ports: Ports) -> AsyncIterator[ObjectInfo]:
    """Yield the objects at the keys of definitions, and skip most of the other objects of jobs with many objects."""
    after = ""
    while page := await anext(ports.objects.list(object_keys.JOBS, after=after), None):
        for info in page:
            if info.key == object_keys.spec(_job_of(info)):
                yield info
        after, job = page[-1].key, _job_of(page[-1])
        if job == _job_of(page[0]):
            spec = object_keys.spec(job)
            # The character 0 follows the slash, so the next key belongs to another job.
            after = max(after, spec[:-1]) if after < spec else f"{object_keys.JOBS}{job}0"


def _is_note(info: ObjectInfo) -> bool:
    """Return whether the object is the note of a deletion in place of a definition. Notes are smaller than definitions,
    and a bucket may have many notes."""
    return info.size <= len(json_format.deleted_job(_job_of(info)))


def _job_of(info: ObjectInfo) -> JobId:
    return JobId(info.key.split("/", 2)[1])


async def restore(ports: Ports, job: JobId) -> dict[str, str]:
    """Restore one job from the bucket, and return the error of each unreadable object that was left out, by key. Raise
    NotFound if the bucket does not have the job. Raise UnreadableObject for an object that cannot be left out, or
    Unreachable if the job changes faster than the bucket can be read."""
    for _ in range(_MAX_ATTEMPTS):
        before = await _rows(ports, job)
        past, unreadable = await _read_history(ports, job)
        if await ports.ledger.restore(past, over=before):
            return unreadable
    raise Unreachable(f"Job {job} changes faster than the bucket can be read.", remedy="Start the rebuild again.")


async def _rows(ports: Ports, job: JobId) -> JobRows | None:
    try:
        return await ports.ledger.rows(job)
    except NotFound:
        return None


@dataclass(slots=True)
class _JobObjects:
    """Objects of all rounds of one job. Outcomes are stored as completions without values, because a job's values may
    exceed the memory."""

    cuts: list[Cut] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    async def read(self, ports: Ports, info: ObjectInfo, key: CommitKey) -> None:
        """Read one object of the job, if the object is a cut or an outcome."""
        name = info.key
        if object_keys.is_cut(name):
            self.cuts.append(await read_cut(ports, name))
        elif object_keys.is_genuine(name, key):
            try:
                outcome = await read_outcome(ports.objects, name, ports.patience)
            except Malformed as error:
                self.unreadable[name] = error.message
            else:
                self.completions.append(settlement.completion(outcome))
        elif object_keys.is_outcome(name):
            log.error("an outcome with a wrong seal is ignored: %s", name)

    async def read_replacement(self, ports: Ports, name: str, key: CommitKey) -> None:
        outcome = await _read_replacement(ports, name)
        if self.unreadable.pop(object_keys.outcome(outcome.bundle, key), None) is not None:
            self.completions.append(settlement.completion(outcome))

    def drop_strangers(self, job: JobDef, key: CommitKey) -> None:
        """Drop completions that do not fit the stages of the job."""
        fits = partial(settlement.fits, job)
        strangers = [completion for completion in self.completions if not fits(completion.bundle, completion.follows)]
        for stranger in strangers:
            self.completions.remove(stranger)
            name = object_keys.outcome(stranger.bundle, key)
            self.unreadable[name] = "It does not fit the stages of its job."


async def _read_history(ports: Ports, job: JobId) -> tuple[JobHistory, dict[str, str]]:
    job_objects = _JobObjects()
    spec, opening = await _read(ports, object_keys.spec(job), commit_keys.from_json)
    if spec.id != job:
        raise UnreadableObject(object_keys.spec(job), f"It defines the job {spec.id}.")
    spec = await admission.restore_addresses(ports, spec)
    if opening and opening.cut:
        job_objects.cuts.append(opening.cut)
    key = await _key_of(ports, spec)
    replacements: list[str] = []
    async for page in ports.objects.list(object_keys.committed(job)):
        for info in page:
            if object_keys.is_replacement(info.key):
                replacements.append(info.key)
            else:
                await job_objects.read(ports, info, key)
    job_objects.drop_strangers(spec, key)
    for name in replacements:
        await job_objects.read_replacement(ports, name, key)
    # A job with a cut has started, even if the clock was set back after the start.
    later = not job_objects.cuts and (spec.start_at_s or 0.0) > ports.clock.now_s()
    state = JobState.SCHEDULED if later else JobState.SUBMITTED
    past = JobHistory(spec, state, await _rounds(ports, spec, job_objects), await _control(ports, job, job_objects))
    return past, job_objects.unreadable


async def _key_of(ports: Ports, job: JobDef) -> CommitKey:
    """Return the job's commit key. Raise UnreadableObject if a damaged definition has the hash of another key."""
    try:
        return await ports.keys.key_of(job)
    except (Throttled, Unreachable, NotFound):
        raise
    except BackendError as error:
        raise UnreadableObject(object_keys.spec(job.id), error.message) from error


async def _rounds(ports: Ports, job: JobDef, job_objects: _JobObjects) -> Sequence[Round]:
    rounds: list[Round] = []
    retry = Retry((), ())
    while True:
        rounds.append(await _round(ports, job, len(rounds), retry, job_objects))
        try:
            retry = await read_retry(ports, job, len(rounds))
        except NotFound:
            return rounds
        if rounds[-1].ending is None:
            final = object_keys.final(job.id, len(rounds) - 1)
            why = job_objects.unreadable.get(final, "It does not exist, and a retry follows it.")
            raise UnreadableObject(final, why)


async def _round(ports: Ports, job: JobDef, number: int, retry: Retry, job_objects: _JobObjects) -> Round:
    cuts = sorted((cut for cut in job_objects.cuts if cut.round == number), key=lambda cut: (cut.stage, cut.seq))
    planned: dict[StageName, int] = {}
    for cut in cuts:
        if cut.planned is not None:
            planned |= {stage.name: cut.planned for stage in job.fed_by(cut.stage)}
    stages = {stage.name for stage in job.stages}
    for cut in cuts:
        if cut.stage not in stages:
            key = object_keys.cut(job.id, cut.stage, cut.round, cut.seq)
            raise UnreadableObject(key, "It is a cut of a stage that the job does not have.")
    completions = [completion for completion in job_objects.completions if completion.bundle.round == number]
    return Round(
        retry.reopened,
        (*retry.cuts, *cuts),
        planned,
        completions,
        [settlement.casualties(job, completion) for completion in completions],
        await _ending(ports, job.id, number, job_objects),
    )


async def _ending(ports: Ports, job: JobId, round_: int, job_objects: _JobObjects) -> Ending | None:
    try:
        return await _read(ports, object_keys.final(job, round_), json_format.ending_from_json)
    except NotFound:
        return None
    except UnreadableObject as error:
        # If the stored end of a job is unreadable, the manager computes the end again from the counters.
        job_objects.unreadable[error.key] = error.message
        return None


async def _control(ports: Ports, job: JobId, job_objects: _JobObjects) -> Control:
    try:
        return (await read_command(ports.objects, job, ports.patience)).control
    except NotFound:
        return Control.RUN
    except Malformed as error:
        # A job with an unreadable control object is restored as paused. The control object may have contained a
        # cancellation, and the user can resume a paused job.
        job_objects.unreadable[object_keys.control(job)] = error.message
        return Control.PAUSE
    except TooNew as error:
        raise UnreadableObject(object_keys.control(job), error.message) from error


async def _read(ports: Ports, key: str, read: Callable[[dict[str, Any]], T]) -> T:
    return await read_stored(ports, key, lambda data: read(json_format.loads(data)))


async def _read_replacement(ports: Ports, key: str) -> Outcome:
    try:
        return await read_outcome(ports.objects, key, ports.patience)
    except Malformed as error:
        raise UnreadableObject(key, error.message) from error
