"""Checks of the promises in docs/contributing/architecture.md on a world that has come to rest.

Each check reads the bucket, the ledger, or the record of the world, and raises Violated with the facts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from batchlab.core.commit import outcome_at
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import FailureKind, GroupView, Instance, JobId, JobState, Json, Outcome, StageCounts
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Fleet, JobRecord, Ledger, Objects
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.mended_inputs import TaskInputs
from batchlab.fleet.group_state import COUNTED
from batchlab.manager.ledger_rebuild import RebuildResult, rebuild
from batchlab.manager.retry_rounds import Retry
from batchlab.manager.state import Ports
from batchlab.sim.actors import SimIds, check
from batchlab.sim.job_checks import (
    check_account,
    check_damaged,
    check_mended,
    check_rounds,
    exceeds_failure_limit,
    is_lost,
)
from batchlab.sim.tasks import TaskPlans, inputs_of, value_of

if TYPE_CHECKING:
    from batchlab.sim.plans import Plan
    from batchlab.sim.world import World


async def check_all(world: World, jobs: Sequence[JobId]) -> None:
    """Check I1, I2, I3, and I7 for the given ended jobs.

    Only the end of a job is checked if a lying worker has touched the job.
    """
    trust = world.watch.trust
    for job in jobs:
        if job in world.damage.jobs:
            continue  # `job_checks` checks jobs with damaged objects.
        record = await world.ledger.job(job)
        check(record.state.ended, "I7", f"{job} is still {record.state}")
        if job in trust.touched:
            continue
        outcomes = await outcomes_of(world.objects, job, trust.forged)
        check_terminal_states(job, outcomes)
        check_attempts(job, outcomes)
        await check_listed(world.ledger, job)
        await check_counts(world.ledger, job)
    await check_damaged(world, jobs, await check_rebuild(world))


async def check_trial(world: World, plan: Plan) -> None:
    """Check every promise on a world that has come to rest."""
    if not any([await is_lost(world, job.id) for job in plan.jobs]):
        check_at_rest(await world.groups())
    # Every removed queue has been created again by the time of rest. A missing queue only delays the end of a job.
    missing = missing_queues(world)
    check(not missing, "queues", f"{', '.join(missing)} not there long after the work")
    await _check_submitted(world, plan.jobs)
    await check_all(world, [job.id for job in plan.jobs])
    task_plans = TaskPlans(world.seed, plan.run_s, mended=plan.mended)
    trust = world.watch.trust
    for job in plan.jobs:
        if job.id in trust.touched:
            continue
        await check_end(world, job)
        outcomes = await outcomes_of(world.objects, job.id, trust.forged)
        check_failures(world, task_plans, job, outcomes)
        record = await world.ledger.job(job.id)
        rounds = range(1, record.round + 1)
        retries = [Retry.from_bytes(await world.objects.get(object_keys.retry(job.id, n))) for n in rounds]
        in_force = check_rounds(job.id, retries, outcomes, world.watch.controls.choices.get(job.id, []))
        check_mended(job.id, in_force, outcomes, world.watch.starts)
        await check_results(world, job, in_force[-1])
        if world.accounting:
            at_once = record.state is JobState.SUCCEEDED and not record.round
            undisturbed = at_once and world.managers == 1 and not world.rebuilds
            await check_account(world, job, outcomes, undisturbed=undisturbed)
    await world.watch.audits.check_log(world)


async def check_end(world: World, job: JobDef) -> None:
    """Check that the end of a job follows from the job's counters and its user's requests alone."""
    record = await world.ledger.job(job.id)
    counts = [stage.counts for stage in (await world.ledger.rows(job.id)).stages]
    _check_cancelled(world, job, record, {c.stage: c for c in counts})
    is_over = exceeds_failure_limit(job, counts)
    is_right = {
        JobState.SUCCEEDED: not is_over,
        JobState.FAILED: is_over or ("is a dependency" in record.reason and world.watch.dependencies.may_fail(job)),
        JobState.CANCELLED: world.watch.controls.was_cancelled(job.id),
    }
    facts = ", ".join(f"{c.stage}: {c.failed} of {c.planned} failed" for c in counts)
    check(is_right[record.state], "ends", f"{job.id} is {record.state} ({record.reason}; {facts})")


def _check_cancelled(world: World, job: JobDef, record: JobRecord, counts: Mapping[str, StageCounts]) -> None:
    """Check that tasks are CANCELLED only after a cancellation in the last round, or if an input is missing."""
    if world.watch.controls.was_cancelled(job.id, record.round):
        return
    for stage in job.stages:
        before = counts[stage.after[0]] if stage.chained else None
        lost, cancelled = before.failed + before.cancelled if before else 0, counts[stage.name].cancelled
        facts = f"{job.id}/{stage.name}: {cancelled} tasks are CANCELLED, and {lost} lack their input"
        check(cancelled == lost, "ends", facts)


async def _check_submitted(world: World, jobs: Sequence[JobDef]) -> None:
    """Check I8: the ledger has exactly the jobs that users submitted, as the users submitted them."""
    submitted = {job.id for job in jobs}
    for row in (await world.ledger.dump())["jobs"] if world.watch.trust.lies else ():
        check(JobId(row["id"]) in submitted, "I8", f"the ledger has the job {row['id']!r}, which no user has")


async def outcomes_of(objects: Objects, job: JobId, forged: Collection[str] = ()) -> list[Outcome]:
    """Return every committed outcome of a job, in key order, without the `forged` keys."""
    key = await CommitKeys(objects).stored(job)
    pages = objects.list(object_keys.committed(job))
    names = [info.key async for page in pages for info in page if object_keys.is_genuine(info.key, key)]
    return [outcome_at(name, await objects.get(name), key) for name in names if name not in forged]


def check_terminal_states(job: JobId, outcomes: Sequence[Outcome]) -> None:
    """Check I1: each task has exactly one terminal state per round."""
    counted: Counter[tuple[str, int, int]] = Counter()
    for outcome in outcomes:
        key = (outcome.bundle.stage, outcome.bundle.round)
        for task in (*outcome.succeeded, *outcome.cancelled):
            counted[(*key, task)] += 1
        for failure in outcome.failed:
            counted[(*key, failure.task)] += failure.final
    twice = [key for key, times in sorted(counted.items()) if times > 1]
    check(not twice, "I1", f"{job}: more than one terminal state: {twice[:5]}")


async def check_listed(ledger: Ledger, job: JobId) -> None:
    """Check I1: each task that succeeded has exactly one committed result.

    A result of a later round replaces a result of an earlier round. A task whose upstream failed lacks an outcome.
    """
    for stage in (await ledger.rows(job)).stages:
        name, c = stage.counts.stage, stage.counts
        rows = await ledger.bundles(job, stage=name, done=True)
        listed = {(r.bundle.round, t) for r in rows if r.completion for t in r.completion.succeeded}
        facts = f"{job}/{name}: {c.succeeded} succeeded, but {len(listed)} results are committed"
        check(len({t for _, t in listed}) == len(listed) == c.succeeded, "I1", facts)


def check_attempts(job: JobId, outcomes: Sequence[Outcome]) -> None:
    """Check that worker loss, Spot interruption, and throttling never count as attempts.

    A task with attempt n has n - 1 earlier committed failures.
    """
    failed = {
        (o.bundle.stage, o.bundle.round, f.task, o.bundle.attempt) for o in outcomes for f in o.failed if not f.final
    }
    for bundle in (o.bundle for o in outcomes if o.bundle.attempt > 1):
        before = {
            (bundle.stage, bundle.round, task, attempt) for task in bundle.tasks for attempt in range(1, bundle.attempt)
        }
        check(before <= failed, "Attempts", f"{job}: {bundle.id} counts what was no failure")


async def check_counts(ledger: Ledger, job: JobId) -> None:
    """Check I2: planned = succeeded + failed + canceled."""
    for stage in (await ledger.rows(job)).stages:
        c = stage.counts
        facts = f"{job}/{c.stage}: {c.planned} planned, {c.succeeded}+{c.failed}+{c.cancelled} ended"
        check(c.planned == c.succeeded + c.failed + c.cancelled, "I2", facts)


async def check_rebuild(world: World) -> RebuildResult:
    """Check I3: a ledger rebuilt from the bucket equals the ledger that the managers wrote."""
    # SQLAlchemy is imported late, because forecasts do not use SQL.
    from batchlab.adapters.sql.ledger import open_memory

    again = open_memory()
    rng = world.rng("rebuild")
    # The rebuild does not use a manager, because the manager may have just died. A rebuild of the ledger does not need
    # a fleet.
    no_fleet = cast(Fleet, None)
    ids, patience = SimIds(rng), Patience(rng)
    result = await rebuild(Ports(world.objects, world.queue, no_fleet, again, world.clock, ids, patience))
    touched = world.watch.trust.touched
    grown = _untouched_rows(await world.ledger.dump(), touched)
    rebuilt = _untouched_rows(await again.dump(), touched)
    for table, rows in grown.items():
        if rows != rebuilt.get(table):
            check(False, "I3", f"table {table} (grown, rebuilt): {_differences(rows, rebuilt[table])}")
    await again.close()
    return result


def _untouched_rows(dump: Mapping[str, Json], touched: Collection[str]) -> dict[str, list[dict[str, Json]]]:
    """Return the rows of jobs that no lying worker has touched."""
    return {
        table: [row for row in rows if row["id" if table == "jobs" else "job"] not in touched]
        for table, rows in dump.items()
    }


def _differences(grown: Sequence[dict[str, Json]], rebuilt: Sequence[dict[str, Json]]) -> Json:
    if len(grown) != len(rebuilt):
        return [len(grown), len(rebuilt)]
    pairs = [(a, b) for a, b in zip(grown, rebuilt, strict=True) if a != b]
    return [{name: (a[name], b[name]) for name in a if a[name] != b[name]} for a, b in pairs[:3]]


def counted_instances(view: GroupView) -> list[Instance]:
    """Return the instances of the pool that count against its capacity."""
    return [instance for instance in view.instances if instance.state in COUNTED]


def check_bounds(groups: Sequence[GroupView]) -> None:
    """Check I5 at any time: capacity is always within [min, max].

    Busy workers may exceed a maximum that a person has lowered, because scale-in protection keeps busy workers.
    """
    for view in groups:
        alive, pool = counted_instances(view), view.pool
        fits = len(alive) <= pool.max_size or all(i.protected for i in alive)
        facts = f"{pool.name}: {len(alive)} alive, desired {view.desired}"
        check(pool.min_size <= view.desired <= pool.max_size and fits, "I5", facts)


def check_at_rest(groups: Sequence[GroupView]) -> None:
    """Check I5 at rest: the fleet returns to min after the work ends."""
    for view in groups:
        alive = len(counted_instances(view))
        facts = f"{view.pool.name}: {alive} alive and desired {view.desired} long after the work"
        check(alive == view.desired == view.pool.min_size, "I5", facts)


def missing_queues(world: World) -> list[str]:
    """Return the queues that the grid needs but that do not exist."""
    pools = [pool.name for pool in world.pools]
    needed = {object_keys.EVENTS, *map(object_keys.tasks_queue, pools), *map(object_keys.dead_letters, pools)}
    return sorted(needed.difference(world.queue.names()))


async def check_results(world: World, job: JobDef, mended: TaskInputs | None = None) -> None:
    """Check that every result follows from its input, and that every gather received all its inputs. `mended` has the
    mended inputs of the job's last round.

    A stage after a failed stage may have run fewer tasks than planned, but not more. A job that succeeded has run all
    tasks.
    """
    record = await world.ledger.job(job.id)
    counts = {stage.counts.stage: stage.counts for stage in (await world.ledger.rows(job.id)).stages}
    results: dict[str, Mapping[int, Json]] = {}
    for stage in job.stages:
        name = f"{job.id}/{stage.name}"
        inputs = inputs_of(job, stage, results)
        for (mended_stage, task), data in (mended or {}).items():
            if mended_stage == stage.name and task in inputs:
                inputs[task] = json.loads(data)
        actual = results[stage.name] = await results_of(world.objects, world.ledger, job.id, stage.name)
        extra = sorted(set(actual) - set(inputs))
        check(not extra, "I1", f"{name}: tasks {extra[:5]} had nothing to run on")
        right = {task: value_of(stage.name, inputs[task]) for task in actual}
        wrong = [(task, actual[task], right[task]) for task in sorted(actual) if actual[task] != right[task]]
        check(not wrong, "I1", f"{name}: (task, result, right) {wrong[:3]}")
        lost = sorted(set(inputs) - set(actual))
        is_allowed = len(lost) <= counts[stage.name].failed + counts[stage.name].cancelled
        facts = f"{name}: the job succeeded without tasks {lost[:5]}"
        check(record.state is not JobState.SUCCEEDED or is_allowed, "I1", facts)


def check_failures(world: World, task_plans: TaskPlans, job: JobDef, outcomes: Sequence[Outcome]) -> None:
    """Check that a task fails only because of its own script or because the task lost its workers."""
    for outcome in outcomes:
        bundle = outcome.bundle
        attempts = job.stage(bundle.stage).retry.attempts
        for failure in outcome.failed:
            task_plan = task_plans.plan_of(job.id, bundle.stage, failure.task)
            name = f"task {task_name(bundle.stage, failure.task)} of {job.id}"
            if failure.kind is FailureKind.LOST:
                lost = world.watch.lost_starts(bundle, failure.task)
                facts = f"{name} was condemned ({failure.reason}), but lost {lost} workers"
                check(lost >= settlement.LOSS_LIMIT, "I7", facts)
                continue
            is_planned = failure.kind is FailureKind.EXCEPTION and bundle.attempt <= task_plan.failing_attempts
            check(is_planned, "I7", f"{name} failed: {failure.reason}")
            facts = f"{name} had attempt {bundle.attempt} of {attempts}"
            check(bundle.attempt <= attempts, "Attempts", facts)
            is_last = bundle.attempt >= attempts or world.watch.controls.was_cancelled(job.id)
            facts = f"{name} is FAILED after {bundle.attempt} of {attempts} attempts"
            check(is_last or not failure.final, "Attempts", facts)


async def results_of(objects: Objects, ledger: Ledger, job: JobId, stage: str) -> Mapping[int, Json]:
    """Return the encoded result of each task, based on the list of bundles that the ledger shows to users."""
    values: dict[int, Json] = {}
    key = await CommitKeys(objects).stored(job)
    for row in await ledger.bundles(job, done=True):
        if row.bundle.stage != stage:
            continue
        name = object_keys.outcome(row.bundle, key)
        outcome = outcome_at(name, await objects.get(name), key)
        values.update(zip(outcome.succeeded, outcome.values, strict=True))
    return values
