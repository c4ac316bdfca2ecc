"""Checks of the promises to jobs with a damaged object.

Such a job ends. The reason of each task that fails because of the damage names the object, and so
does the reason of each end that the job's counters do not explain. A job with a changed bit is
exempt from both. A rebuild of the ledger names the torn objects that it reads.

Check of each job's account against the outcomes in its world.

Invariant: no outcome is counted twice, whatever happens to managers. In a world with a single
manager and no rebuild, the account of a job that succeeded without a retry has each outcome, and
the slot seconds of each failed attempt. No account has outcomes that are committed after the end of
the job.

Checks of retries: each runs again the failures that a user chose, and no others.

Invariant: this module uses only the objects in the bucket and the users' requests, not the planner
of the product.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from batchlab.core.commit import outcome_at
from batchlab.core.errors import BackendError
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import Control, FailureKind, JobId, JobState, Outcome, StageName, TaskSet
from batchlab.core.ports import JobRecord
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.manager.ledger_rebuild import RebuildResult
from batchlab.manager.manager import LOST_OBJECTS
from batchlab.manager.retry_rounds import Retry, TaskSelection
from batchlab.manager.spending import JobUsage
from batchlab.sim.faults import FaultKind
from batchlab.sim.runtime_checks import Violated
from batchlab.sim.storage_faults import group_of, job_of

if TYPE_CHECKING:
    from batchlab.sim.world import World

READ_BY_REBUILD = {"spec.json", "control.json", "cuts", "outcomes", "final"}
"""Groups of objects that a rebuild reads. It ends with a job at an unreadable definition, cut, or
retry, and goes on with the next job."""


def _require(holds: bool, name: str, facts: str) -> None:
    if not holds:
        raise Violated(f"{name} is violated: {facts}")


async def check_damaged(world: World, jobs: Sequence[JobId], rebuilt: RebuildResult) -> None:
    """Check the jobs that have a damaged object, once the world has come to rest."""
    _check_named(world, rebuilt)
    for job in jobs:
        if job not in world.damage.jobs:
            continue
        record = await world.find(job)
        if record is None:
            named = any(job_of(key) == job for key in rebuilt.unreadable)
            lost = world.objects.content(object_keys.spec(job)) is None
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
    if record is None or record.state.ended or object_keys.control(job) not in world.damage.hit:
        return False
    return record.control is Control.PAUSE or _is_rotted(world, job)


def _is_rotted(world: World, job: JobId) -> bool:
    hit = world.damage.hit.items()
    return any(kind is FaultKind.ROTTED and job_of(key) == job for key, (kind, _) in hit)


def _check_named(world: World, rebuilt: RebuildResult) -> None:
    lost = {job_of(key) for key in rebuilt.unreadable if group_of(key) != "outcomes"}
    # If a retry is unreadable, a rebuild reads no object of its round.
    lost |= {job_of(key) for key in world.damage.hit if group_of(key) == "retries"}
    for key in world.damage.standing([FaultKind.TORN]):
        group = group_of(key)
        told = key in rebuilt.unreadable or job_of(key) in lost or group not in READ_BY_REBUILD
        replaced = group == "outcomes" and _is_replaced(world, key)
        undefined = world.objects.content(object_keys.spec(job_of(key))) is None
        _require(told or replaced or undefined, "rebuild", f"a rebuild does not name {key}")


def _is_replaced(world: World, key: str) -> bool:
    outcome_key = object_keys.outcome_key(key)
    return outcome_key is not None and any(
        object_keys.is_replacement(name) and outcome_key.bundle in name for name in world.objects.names()
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
    if reason == LOST_OBJECTS:
        return world.objects.content(object_keys.spec(job)) is None
    return any(key in reason for key in world.damage.hit if job_of(key) == job)


async def _check_outcomes(world: World, job: JobDef) -> None:
    """Check that each undamaged outcome in the ledger can be read, and names causes of failure."""
    try:
        key = await CommitKeys(world.objects).key_of(job)
    except BackendError:
        return
    for row in await world.ledger.bundles(job.id, done=True):
        name = object_keys.outcome(row.bundle, key)
        data = world.objects.content(name)
        if name in world.damage.hit:
            continue
        _require(data is not None, "I1", f"{name} is counted, and not there")
        assert data is not None
        _check_failures(world, job, outcome_at(name, data, key))


def _check_failures(world: World, job: JobDef, outcome: Outcome) -> None:
    for failure in outcome.failed:
        if failure.kind in (FailureKind.EXCEPTION, FailureKind.LOST):
            continue  # See invariants.
        told = f"{task_name(outcome.bundle.stage, failure.task)} failed: {failure.reason}"
        _require(_names_damage(world, job.id, failure.reason), "causes", told)


MAX_TICKS = 120

CLOSE_S = 0.001
"""Sums of seconds are equal if they differ by less."""


async def check_account(world: World, job: JobDef, outcomes: Sequence[Outcome], *, undisturbed: bool) -> None:
    """Compare the account that is stored at the end of a job with the job's outcomes."""
    if not outcomes:
        return  # the job may have begun and ended between two ticks
    for _ in range(MAX_TICKS):
        # The manager writes the account at its next tick after the end of the job.
        if not undisturbed or world.objects.content(object_keys.used(job.id)):
            break
        await asyncio.sleep(1.0)
    data = world.objects.content(object_keys.used(job.id))
    _require(data is not None or not undisturbed, "accounts", f"{job.id} has no account")
    if data is None:
        return
    account = JobUsage.from_bytes(data).account
    failed_s = sum(
        max(0.0, outcome.ended_s - outcome.started_s - sum(outcome.run_s)) * job.stage(outcome.bundle.stage).slots
        for outcome in outcomes
        if outcome.failed
    )
    told_s = sum(account.failed_s.values())
    told = f"{account.bundles} outcomes and {told_s:.3f} s of failed attempts"
    facts = f"{job.id} has {told} in its account, and {len(outcomes)} and {failed_s:.3f} s happened"
    _require(account.bundles <= len(outcomes) and told_s <= failed_s + CLOSE_S, "accounts", facts)
    exact = account.bundles == len(outcomes) and told_s >= failed_s - CLOSE_S
    _require(exact or not undisturbed, "accounts", facts)
    used_s = [*account.billed_s.values(), *account.failed_s.values(), *account.lost_s.values()]
    _require(all(seconds >= 0.0 for seconds in used_s), "accounts", f"the usage of {job.id} is negative")


def check_rounds(
    job: str, retries: Sequence[Retry], outcomes: Sequence[Outcome], choices: Sequence[TaskSelection | None]
) -> None:
    """Check that each retry runs the choice of one request. A choice of None is all failures."""
    for round_, retry in enumerate(retries, start=1):
        standing = _standing(retries[: round_ - 1], outcomes, round_)
        replanned = {reopening.stage for reopening in retry.reopened if reopening.replan}
        again = {
            stage: tasks if stage in replanned else tasks - (tasks - retry.rerun_tasks(stage))
            for stage, tasks in standing.items()
        }
        if not any(_is_choice(choice, standing, again, replanned) for choice in choices):
            facts = f"round {round_} of {job} runs {again} again of {standing}, asked: {choices}"
            raise Violated(f"retries is violated: {facts}")


def _standing(earlier: Sequence[Retry], outcomes: Sequence[Outcome], round_: int) -> dict[StageName, TaskSet]:
    """Return the failures of the rounds before `round_` that no earlier retry has taken back."""
    found: dict[StageName, TaskSet] = {}
    for outcome in outcomes:
        stage, made = outcome.bundle.stage, outcome.bundle.round
        failed = TaskSet.from_indices(sorted(one.task for one in outcome.failed if one.final))
        for retry in earlier[made:]:
            is_void = any(one.stage == stage and one.replan for one in retry.reopened)
            failed = TaskSet() if is_void else failed - retry.rerun_tasks(stage)
        if failed and made < round_:
            found[stage] = TaskSet.union([found.get(stage, TaskSet()), failed])
    return found


def _is_choice(
    choice: TaskSelection | None,
    standing: Mapping[StageName, TaskSet],
    again: Mapping[StageName, TaskSet],
    replanned: set[StageName],
) -> bool:
    for stage, tasks in standing.items():
        task_set = tasks if choice is None else choice.get(stage, TaskSet())
        if task_set - again[stage] or (stage not in replanned and again[stage] - task_set):
            return False
    return True
