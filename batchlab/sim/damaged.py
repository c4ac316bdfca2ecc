"""Checks of the promises to jobs with a damaged object.

Such a job ends. The reason of each task that fails because of the damage names the object, and so
does the reason of each end that the job's counters do not explain. A job with a changed bit is
exempt from both. A rebuild of the ledger names the torn objects that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from batchlab.commit import outcome_at
from batchlab.commitkeys import CommitKeys
from batchlab.errors import BackendError
from batchlab.jobdef import JobDef
from batchlab.manager.manager import LOST
from batchlab.manager.rebuild import Rebuilt
from batchlab.model import Control, FailureKind, JobId, JobState, Outcome
from batchlab.ports import JobRecord
from batchlab.protocol import naming
from batchlab.sim.damage import group_of, job_of
from batchlab.sim.faults import FaultKind
from batchlab.sim.watch import Violated
from batchlab.tasknames import task_name

if TYPE_CHECKING:
    from batchlab.sim.world import World

READ_BY_REBUILD = {"spec.json", "control.json", "cuts", "outcomes", "final"}
"""Groups of objects that a rebuild reads. It ends with a job at an unreadable definition, cut, or
retry, and goes on with the next job."""


def _require(holds: bool, name: str, facts: str) -> None:
    if not holds:
        raise Violated(f"{name} is violated: {facts}")


async def check_damaged(world: World, jobs: Sequence[JobId], rebuilt: Rebuilt) -> None:
    """Check the jobs that have a damaged object, once the world has come to rest."""
    _check_named(world, rebuilt)
    for job in jobs:
        if job not in world.damage.jobs:
            continue
        record = await world.find(job)
        if record is None:
            named = any(job_of(key) == job for key in rebuilt.unreadable)
            lost = world.objects.content(naming.spec(job)) is None
            _require(named or lost, "I3", f"the ledger lacks {job}, and no bad key says why")
            continue
        lost = await is_lost(world, job)
        _require(record.state.ended or lost, "I7", f"{job} is still {record.state}")
        if record.state.ended and not _is_rotted(world, job):
            await _check_end(world, record)
            await _check_outcomes(world, record.job)


async def is_lost(world: World, job: JobId) -> bool:
    """Return whether the job may wait for ever.

    Its end was lost, so a rebuild restores it after its user has left. Its control object is
    damaged too: the job is restored as paused, or a changed bit has made its word unknown."""
    record = await world.find(job)
    if record is None or record.state.ended or naming.control(job) not in world.damage.hit:
        return False
    return record.control is Control.PAUSE or _is_rotted(world, job)


def _is_rotted(world: World, job: JobId) -> bool:
    hit = world.damage.hit.items()
    return any(kind is FaultKind.ROTTED and job_of(key) == job for key, (kind, _) in hit)


def _check_named(world: World, rebuilt: Rebuilt) -> None:
    lost = {job_of(key) for key in rebuilt.unreadable if group_of(key) != "outcomes"}
    # If a retry is unreadable, a rebuild reads no object of its round.
    lost |= {job_of(key) for key in world.damage.hit if group_of(key) == "retries"}
    for key in world.damage.standing([FaultKind.TORN]):
        group = group_of(key)
        told = key in rebuilt.unreadable or job_of(key) in lost or group not in READ_BY_REBUILD
        replaced = group == "outcomes" and _is_replaced(world, key)
        undefined = world.objects.content(naming.spec(job_of(key))) is None
        _require(told or replaced or undefined, "rebuild", f"a rebuild does not name {key}")


def _is_replaced(world: World, key: str) -> bool:
    found = naming.outcome_key(key)
    return found is not None and any(
        naming.is_replacement(name) and found.bundle in name for name in world.objects.names()
    )


async def _check_end(world: World, record: JobRecord) -> None:
    """Check that the counters, the user, or a damaged object explain the end of the job."""
    job = record.job
    counts = [stage.counts for stage in (await world.rows(job.id)).stages]
    if job.max_failures_percent:
        over = any(c.failed * 100 > job.max_failures * (c.planned or 0) for c in counts)
    else:
        over = sum(c.failed for c in counts) > job.max_failures
    explained = {
        JobState.SUCCEEDED: not over,
        JobState.FAILED: over or _names_damage(world, job.id, record.reason),
        JobState.CANCELLED: world.watch.controls.was_cancelled(job.id),
    }
    told = f"{job.id} is {record.state} ({record.reason})"
    _require(explained[record.state], "ends", told)


def _names_damage(world: World, job: JobId, reason: str) -> bool:
    if reason == LOST:
        return world.objects.content(naming.spec(job)) is None
    return any(key in reason for key in world.damage.hit if job_of(key) == job)


async def _check_outcomes(world: World, job: JobDef) -> None:
    """Check that each undamaged outcome in the ledger can be read, and names causes of failure."""
    try:
        key = await CommitKeys(world.objects).of(job)
    except BackendError:
        return
    for row in await world.ledger.bundles(job.id, done=True):
        name = naming.outcome(row.bundle, key)
        data = world.objects.content(name)
        if name in world.damage.hit:
            continue
        _require(data is not None, "I1", f"{name} is counted, and not there")
        assert data is not None
        _check_failures(world, job, outcome_at(name, data, key))


def _check_failures(world: World, job: JobDef, outcome: Outcome) -> None:
    for failure in outcome.failed:
        if failure.kind in (FailureKind.EXCEPTION, FailureKind.LOST):
            continue  # see invariants.check_failures
        told = f"{task_name(outcome.bundle.stage, failure.task)} failed: {failure.reason}"
        _require(_names_damage(world, job.id, failure.reason), "causes", told)
