"""Checks of single jobs: damaged objects, accounts, and retries.

The checks use only the objects in the bucket and the users' requests, never the planner of the product.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from batchlab.core.commit import outcome_at
from batchlab.core.errors import BackendError
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import Control, FailureKind, JobId, JobState, Outcome, StageCounts, StageName, TaskSet
from batchlab.core.ports import JobRecord
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.mended_inputs import TaskInputs, mended_input
from batchlab.manager.ledger_rebuild import RebuildResult
from batchlab.manager.manager import LOST_OBJECTS
from batchlab.manager.retry_rounds import Retry, TaskSelection
from batchlab.manager.spending import JobUsage
from batchlab.sim.actors import RetryRequest, check
from batchlab.sim.faults import FaultKind
from batchlab.sim.storage_faults import group_of, job_of

if TYPE_CHECKING:
    from batchlab.sim.runtime_checks import Start
    from batchlab.sim.world import World

# --- Jobs with a damaged object ------------------------------------------------------------------

READ_BY_REBUILD = {"spec.json", "control.json", "cuts", "outcomes", "final"}
"""Groups of objects that a rebuild of the ledger reads.

After an unreadable definition, cut, or retry, a rebuild skips the rest of the job and continues with the next job.
"""


async def check_damaged(world: World, jobs: Sequence[JobId], rebuilt: RebuildResult) -> None:
    """Check the jobs that have a damaged object, once the world has come to rest.

    A job with a damaged object must end. The reason of a task's failure must name the damaged object that caused the
    failure. The reason of a job's end must name the damaged object if the job's counters do not explain the end. If an
    object of the job has a changed bit, the reasons need not name the damaged object. A rebuild of the ledger reports
    the torn objects that it reads.
    """
    _check_rebuild_reports(world, rebuilt)
    for job in jobs:
        if job not in world.damage.jobs:
            continue
        record = await world.find(job)
        if record is None:
            is_reported = any(job_of(key) == job for key in rebuilt.unreadable)
            is_removed = world.objects.content(object_keys.spec(job)) is None
            check(is_reported or is_removed, "I3", f"the ledger lacks {job}, and no bad key says why")
            continue
        check(record.state.ended or await is_lost(world, job), "I7", f"{job} is still {record.state}")
        if record.state.ended and not _has_changed_bit(world, job):
            await _check_damaged_end(world, record)
            await _check_outcomes(world, record.job)


async def is_lost(world: World, job: JobId) -> bool:
    """Return whether a job with a damaged object may wait forever.

    A job may wait forever if a rebuild restores the job after its user has left, because the job's end was lost. A
    restored job waits only if its control object is damaged: the job is paused, or a changed bit has made the control
    command unknown.
    """
    record = await world.find(job)
    if record is None or record.state.ended or object_keys.control(job) not in world.damage.hit:
        return False
    return record.control is Control.PAUSE or _has_changed_bit(world, job)


def _has_changed_bit(world: World, job: JobId) -> bool:
    return any(kind is FaultKind.ROTTED and job_of(key) == job for key, (kind, _) in world.damage.hit.items())


def _check_rebuild_reports(world: World, rebuilt: RebuildResult) -> None:
    skipped = {job_of(key) for key in rebuilt.unreadable if group_of(key) != "outcomes"}
    # If the object of a retry is unreadable, a rebuild does not read any object of the retry's round.
    skipped |= {job_of(key) for key in world.damage.hit if group_of(key) == "retries"}
    for key in world.damage.standing([FaultKind.TORN]):
        group = group_of(key)
        is_exempt = key in rebuilt.unreadable or job_of(key) in skipped or group not in READ_BY_REBUILD
        outcome_key = object_keys.outcome_key(key) if group == "outcomes" else None
        is_replaced = outcome_key is not None and any(
            object_keys.is_replacement(name) and outcome_key.bundle in name for name in world.objects.names()
        )
        is_undefined = world.objects.content(object_keys.spec(job_of(key))) is None
        check(is_exempt or is_replaced or is_undefined, "rebuild", f"a rebuild does not name {key}")


def exceeds_failure_limit(job: JobDef, counts: Sequence[StageCounts]) -> bool:
    """Return whether a job has more failures than allowed.

    A failure limit in percent applies to each stage separately.
    """
    if job.max_failures_percent:
        return any(c.failed * 100 > job.max_failures * (c.planned or 0) for c in counts)
    return sum(c.failed for c in counts) > job.max_failures


async def _check_damaged_end(world: World, record: JobRecord) -> None:
    """Check that the counters, the user, or a damaged object explain the end of the job."""
    job = record.job
    is_over = exceeds_failure_limit(job, [stage.counts for stage in (await world.rows(job.id)).stages])
    is_explained = {
        JobState.SUCCEEDED: not is_over,
        JobState.FAILED: is_over or _names_damage(world, job.id, record.reason),
        JobState.CANCELLED: world.watch.controls.was_cancelled(job.id),
    }
    check(is_explained[record.state], "ends", f"{job.id} is {record.state} ({record.reason})")


def _names_damage(world: World, job: JobId, reason: str) -> bool:
    if reason == LOST_OBJECTS:
        return world.objects.content(object_keys.spec(job)) is None
    return any(key in reason for key in world.damage.hit if job_of(key) == job)


async def _check_outcomes(world: World, job: JobDef) -> None:
    """Check that each undamaged outcome in the ledger can be read, and that its failures have a known cause."""
    try:
        key = await CommitKeys(world.objects).key_of(job)
    except BackendError:
        return
    for row in await world.ledger.bundles(job.id, done=True):
        name = object_keys.outcome(row.bundle, key)
        data = world.objects.content(name)
        if name in world.damage.hit:
            continue
        check(data is not None, "I1", f"{name} is counted, and not there")
        assert data is not None
        outcome = outcome_at(name, data, key)
        for failure in outcome.failed:
            if failure.kind in (FailureKind.EXCEPTION, FailureKind.LOST):
                continue  # `invariants` checks failures that the task's script or a lost worker caused.
            facts = f"{task_name(outcome.bundle.stage, failure.task)} failed: {failure.reason}"
            check(_names_damage(world, job.id, failure.reason), "causes", facts)


# --- Accounts ------------------------------------------------------------------------------------

MAX_TICKS = 120

TOLERANCE_S = 0.001
"""Maximum difference of two sums of seconds that count as equal."""


async def check_account(world: World, job: JobDef, outcomes: Sequence[Outcome], *, undisturbed: bool) -> None:
    """Compare the account that is stored at the end of a job with the job's outcomes.

    No outcome is counted twice, even if managers crash. A job counts as `undisturbed` if it succeeded without a retry,
    under a single manager, and without a rebuild. The account of an undisturbed job has each outcome and the slot
    seconds of each failed attempt. An account does not include outcomes that were committed after the end of the job.
    """
    if not outcomes:
        return  # A job without an account may have begun and ended between two ticks of the manager.
    for _ in range(MAX_TICKS):
        # The manager writes the account at its next tick after the end of the job.
        if not undisturbed or world.objects.content(object_keys.reference_key(job.id)):
            break
        await asyncio.sleep(1.0)
    data = world.objects.content(object_keys.reference_key(job.id))
    check(data is not None or not undisturbed, "accounts", f"{job.id} has no account")
    if data is None:
        return
    account = JobUsage.from_bytes(data).account
    failed_s = sum(
        max(0.0, outcome.ended_s - outcome.started_s - sum(outcome.run_s)) * job.stage(outcome.bundle.stage).slots
        for outcome in outcomes
        if outcome.failed
    )
    counted_s = sum(account.failed_s.values())
    counted = f"{account.bundles} outcomes and {counted_s:.3f} s of failed attempts"
    facts = f"{job.id} has {counted} in its account, and {len(outcomes)} and {failed_s:.3f} s happened"
    check(account.bundles <= len(outcomes) and counted_s <= failed_s + TOLERANCE_S, "accounts", facts)
    is_exact = account.bundles == len(outcomes) and counted_s >= failed_s - TOLERANCE_S
    check(is_exact or not undisturbed, "accounts", facts)
    used_s = [*account.billed_s.values(), *account.failed_s.values(), *account.lost_s.values()]
    check(all(seconds >= 0.0 for seconds in used_s), "accounts", f"the usage of {job.id} is negative")


# --- Retries -------------------------------------------------------------------------------------


def check_rounds(
    job: str, retries: Sequence[Retry], outcomes: Sequence[Outcome], requests: Sequence[RetryRequest]
) -> list[TaskInputs]:
    """Check that each retry runs the failures that one request chose, with the mended inputs of this request and of
    earlier retries. Return the mended inputs of each round, from round 0."""
    in_force: list[TaskInputs] = [{}]
    for round_, retry in enumerate(retries, start=1):
        standing = _standing_failures(retries[: round_ - 1], outcomes, round_)
        replanned = {reopening.stage for reopening in retry.reopened if reopening.replan}
        again = {
            stage: tasks if stage in replanned else tasks - (tasks - retry.rerun_tasks(stage))
            for stage, tasks in standing.items()
        }
        matching = [request for request in requests if _is_choice(request.chosen, standing, again, replanned)]
        check(bool(matching), "retries", f"round {round_} of {job} runs {again} again of {standing}, asked: {requests}")
        earlier = {task: data for task, data in in_force[-1].items() if task[0] not in replanned}
        rerun = {task: data for task, data in earlier.items() if task[1] in retry.rerun_tasks(task[0])}
        named = _named_inputs(retry)
        mended = next((r for r in matching if named == _digests({**rerun, **r.inputs})), None)
        facts = f"round {round_} of {job} has the inputs {named}, earlier {_digests(rerun)}, asked: {matching}"
        check(mended is not None, "mended", facts)
        in_force.append({**earlier, **(mended.inputs if mended else {})})
    for request in requests:
        is_used = any(request.inputs.items() <= items.items() for items in in_force)
        check(is_used or not request.is_accepted, "mended", f"{job} does not use the inputs of {request}")
    return in_force


def _named_inputs(retry: Retry) -> dict[tuple[StageName, int], str]:
    """Return the SHA-256 of the mended input of each task, according to the bundles in the retry."""
    bundles = [bundle for cut in retry.cuts for bundle in cut.bundles]
    return {(b.stage, b.tasks.first): found.sha256 for b in bundles if (found := mended_input(b))}


def _digests(items: TaskInputs) -> dict[tuple[StageName, int], str]:
    return {task: hashlib.sha256(data).hexdigest() for task, data in items.items()}


def check_mended(
    job: JobId, in_force: Sequence[TaskInputs], outcomes: Sequence[Outcome], starts: Sequence[Start]
) -> None:
    """Check that each start of a task has the mended input of the task's round, and that each outcome names it."""
    for start in starts:
        data = in_force[start.round].get((start.stage, start.task)) if start.round < len(in_force) else None
        if start.job == job and data is not None:
            facts = f"{task_name(start.stage, start.task)} of {job} runs with {start.item} in round {start.round}"
            check(start.item == json.loads(data), "mended", f"{facts}, not {data!r}")
    for outcome in outcomes:
        bundle, named = outcome.bundle, mended_input(outcome.bundle)
        for task in bundle.tasks:
            data = in_force[bundle.round].get((bundle.stage, task))
            sha256 = hashlib.sha256(data).hexdigest() if data is not None else None
            facts = f"the outcome of {bundle.id} of {job} names {bundle.source}, not the input {data!r}"
            check((named.sha256 if named else None) == sha256, "mended", facts)


def _standing_failures(earlier: Sequence[Retry], outcomes: Sequence[Outcome], round_: int) -> dict[StageName, TaskSet]:
    """Return the failed tasks of the rounds before `round_` that no earlier retry has run again."""
    standing: dict[StageName, TaskSet] = {}
    for outcome in outcomes:
        stage, failed_round = outcome.bundle.stage, outcome.bundle.round
        failed = TaskSet.from_indices(sorted(failure.task for failure in outcome.failed if failure.final))
        for retry in earlier[failed_round:]:
            is_replanned = any(reopening.stage == stage and reopening.replan for reopening in retry.reopened)
            failed = TaskSet() if is_replanned else failed - retry.rerun_tasks(stage)
        if failed and failed_round < round_:
            standing[stage] = TaskSet.union([standing.get(stage, TaskSet()), failed])
    return standing


def _is_choice(
    choice: TaskSelection | None,
    standing: Mapping[StageName, TaskSet],
    again: Mapping[StageName, TaskSet],
    replanned: set[StageName],
) -> bool:
    for stage, tasks in standing.items():
        chosen = tasks if choice is None else choice.get(stage, TaskSet())
        if chosen - again[stage] or (stage not in replanned and again[stage] - chosen):
            return False
    return True
