"""The promises (docs/architecture.md) as checks on a world that has come to rest.

Each check reads the bucket, the ledger, or the record of the world, and raises Violated with the
facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from batchlab.adapters.sql.ledger import open_memory
from batchlab.core.commit import outcome_at
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import FailureKind, GroupView, Instance, JobId, JobState, Json, Outcome, StageCounts
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Fleet, JobRecord, Ledger, Objects
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.fleet.group_state import COUNTED
from batchlab.manager.ledger_rebuild import RebuildResult, rebuild
from batchlab.manager.retry_rounds import Retry
from batchlab.manager.state import Ports
from batchlab.sim.actors import SimIds
from batchlab.sim.job_checks import check_account, check_damaged, check_rounds, is_lost
from batchlab.sim.runtime_checks import Violated
from batchlab.sim.tasks import Fates, inputs_of, value_of

if TYPE_CHECKING:
    from batchlab.sim.plans import Plan
    from batchlab.sim.world import World

__all__ = ["Violated"]


def _require(holds: bool, name: str, facts: str) -> None:
    if not holds:
        raise Violated(f"{name} is violated: {facts}")


async def check_all(world: World, jobs: Sequence[JobId]) -> None:
    """Check I1, I2, I3, and I7 for these jobs, which must have ended. For a job that a lying worker
    has touched, only its end is checked."""
    trust = world.watch.trust
    for job in jobs:
        if job in world.damage.jobs:
            continue  # See job_checks.
        await check_ended(world.ledger, job)
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
    check_queues(world)
    await check_jobs(world, plan.jobs)
    await check_all(world, [job.id for job in plan.jobs])
    fates = Fates(world.seed, plan.run_s)
    trust = world.watch.trust
    for job in plan.jobs:
        if job.id not in trust.touched:
            await check_results(world, job)
            await check_end(world, job)
            outcomes = await outcomes_of(world.objects, job.id, trust.forged)
            check_failures(world, fates, job, outcomes)
            choices = world.watch.controls.choices.get(job.id, [])
            check_rounds(job.id, await _retries_of(world, job.id), outcomes, choices)
            if world.accounting:
                record = await world.ledger.job(job.id)
                at_once = record.state is JobState.SUCCEEDED and not record.round
                undisturbed = at_once and world.managers == 1 and not world.rebuilds
                await check_account(world, job, outcomes, undisturbed=undisturbed)


async def _retries_of(world: World, job: JobId) -> list[Retry]:
    """Return the retries of a job, in the order of their rounds."""
    rounds = range(1, (await world.ledger.job(job)).round + 1)
    return [Retry.from_bytes(await world.objects.get(object_keys.retry(job, n))) for n in rounds]


async def check_end(world: World, job: JobDef) -> None:
    """Check that a job's end follows from its counters and its user's requests alone.

    The check computes the end itself: a number of failures is allowed per job, a percentage per
    stage.
    """
    record = await world.ledger.job(job.id)
    counts = [stage.counts for stage in (await world.ledger.rows(job.id)).stages]
    _check_cancelled(world, job, record, {c.stage: c for c in counts})
    if job.max_failures_percent:
        over = any(c.failed * 100 > job.max_failures * (c.planned or 0) for c in counts)
    else:
        over = sum(c.failed for c in counts) > job.max_failures
    right = {
        JobState.SUCCEEDED: not over,
        JobState.FAILED: over,
        JobState.CANCELLED: world.watch.controls.was_cancelled(job.id),
    }
    facts = ", ".join(f"{c.stage}: {c.failed} of {c.planned} failed" for c in counts)
    _require(right[record.state], "ends", f"{job.id} is {record.state} ({record.reason}; {facts})")


def _check_cancelled(world: World, job: JobDef, record: JobRecord, counts: Mapping[str, StageCounts]) -> None:
    """Check that, without a cancellation in the last round, tasks are CANCELLED only if an input is
    missing."""
    if world.watch.controls.was_cancelled(job.id, record.round):
        return
    for stage in job.stages:
        before = counts[stage.after[0]] if stage.chained else None
        lost = before.failed + before.cancelled if before else 0
        told = f"{job.id}/{stage.name}: {counts[stage.name].cancelled} tasks are CANCELLED, and"
        facts = f"{told} {lost} lack their input"
        _require(counts[stage.name].cancelled == lost, "ends", facts)


async def check_jobs(world: World, jobs: Sequence[JobDef]) -> None:
    """I8: the ledger has exactly the jobs that users submitted, as they submitted them."""
    submitted = {job.id: job for job in jobs}
    for row in (await world.ledger.dump())["jobs"] if world.watch.trust.lies else ():
        job = submitted.get(JobId(row["id"]))
        _require(job is not None, "I8", f"the ledger has the job {row['id']!r}, which no user has")


async def check_ended(ledger: Ledger, job: JobId) -> None:
    """I7: a job always ends."""
    record = await ledger.job(job)
    _require(record.state.ended, "I7", f"{job} is still {record.state}")


async def outcomes_of(objects: Objects, job: JobId, forged: Collection[str] = ()) -> list[Outcome]:
    """Return every committed outcome of a job, in key order, without the `forged` keys."""
    key = await CommitKeys(objects).stored(job)
    pages = objects.list(object_keys.committed(job))
    names = [
        object_info.key async for page in pages for object_info in page if object_keys.is_genuine(object_info.key, key)
    ]
    return [outcome_at(name, await objects.get(name), key) for name in names if name not in forged]


def check_terminal_states(job: JobId, outcomes: Sequence[Outcome]) -> None:
    """I1: each task has exactly one terminal state per round."""
    counted: Counter[tuple[str, int, int]] = Counter()
    for outcome in outcomes:
        key = (outcome.bundle.stage, outcome.bundle.round)
        for task in outcome.succeeded:
            counted[(*key, task)] += 1
        for failure in outcome.failed:
            counted[(*key, failure.task)] += failure.final
        for task in outcome.cancelled:
            counted[(*key, task)] += 1
    twice = [key for key, times in sorted(counted.items()) if times > 1]
    _require(not twice, "I1", f"{job}: more than one terminal state: {twice[:5]}")


async def check_listed(ledger: Ledger, job: JobId) -> None:
    """I1: each task that succeeded has exactly one committed result.

    A later round replaces an earlier one. Tasks whose upstream failed have no outcome.
    """
    for stage in (await ledger.rows(job)).stages:
        name, c = stage.counts.stage, stage.counts
        rows = await ledger.bundles(job, stage=name, done=True)
        listed = {(r.bundle.round, t) for r in rows if r.completion for t in r.completion.succeeded}
        _require(
            len({t for _, t in listed}) == len(listed) == c.succeeded,
            "I1",
            f"{job}/{name}: {c.succeeded} succeeded, but {len(listed)} results are committed",
        )


def check_attempts(job: JobId, outcomes: Sequence[Outcome]) -> None:
    """Check that worker loss, Spot interruption, and throttling never count as attempts: before
    attempt n, a task has n - 1 committed failures of its own."""
    failed = {
        (o.bundle.stage, o.bundle.round, f.task, o.bundle.attempt) for o in outcomes for f in o.failed if not f.final
    }
    for bundle in (o.bundle for o in outcomes if o.bundle.attempt > 1):
        before = {
            (bundle.stage, bundle.round, task, attempt) for task in bundle.tasks for attempt in range(1, bundle.attempt)
        }
        _require(before <= failed, "Attempts", f"{job}: {bundle.id} counts what was no failure")


async def check_counts(ledger: Ledger, job: JobId) -> None:
    """I2: planned = succeeded + failed + cancelled."""
    for stage in (await ledger.rows(job)).stages:
        c = stage.counts
        _require(
            c.planned == c.succeeded + c.failed + c.cancelled,
            "I2",
            f"{job}/{c.stage}: {c.planned} planned, {c.succeeded}+{c.failed}+{c.cancelled} ended",
        )


async def check_rebuild(world: World) -> RebuildResult:
    """I3: a ledger rebuilt from the bucket equals the one that the managers wrote."""
    again = open_memory()
    rng = world.rng("rebuild")
    # The rebuild uses no manager, because it may have just died. It reads the bucket and no fleet.
    no_fleet = cast(Fleet, None)
    ids, patience = SimIds(rng), Patience(rng)
    ports = Ports(world.objects, world.queue, no_fleet, again, world.clock, ids, patience)
    rebuilt_jobs = await rebuild(ports)
    touched = world.watch.trust.touched
    grown = _untouched(await world.ledger.dump(), touched)
    rebuilt = _untouched(await again.dump(), touched)
    for table in grown:
        _require(
            grown[table] == rebuilt.get(table),
            "I3",
            f"table {table} (grown, rebuilt): {_differences(grown[table], rebuilt[table])}",
        )
    await again.close()
    return rebuilt_jobs


def _untouched(dump: Mapping[str, Json], touched: Collection[str]) -> dict[str, list[dict[str, Json]]]:
    """Return the rows of jobs that no lying worker has touched."""
    return {
        table: [row for row in rows if row["id" if table == "jobs" else "job"] not in touched]
        for table, rows in dump.items()
    }


def _differences(grown: Sequence[dict[str, Json]], rebuilt: Sequence[dict[str, Json]]) -> Json:
    if len(grown) != len(rebuilt):
        return [len(grown), len(rebuilt)]
    return [
        {name: (a[name], b[name]) for name in a if a[name] != b[name]}
        for a, b in zip(grown, rebuilt, strict=True)
        if a != b
    ][:3]


def counted(view: GroupView) -> list[Instance]:
    """Return the instances of the pool that count against its capacity."""
    return [instance for instance in view.instances if instance.state in COUNTED]


def check_bounds(groups: Sequence[GroupView]) -> None:
    """I5, first part: capacity is always within [min, max]. Busy workers above a maximum that a
    person has lowered are allowed, because scale-in protection keeps them."""
    for view in groups:
        alive, pool = counted(view), view.pool
        fits = len(alive) <= pool.max_size or all(i.protected for i in alive)
        _require(
            pool.min_size <= view.desired <= pool.max_size and fits,
            "I5",
            f"{pool.name}: {len(alive)} alive, desired {view.desired}",
        )


def check_at_rest(groups: Sequence[GroupView]) -> None:
    """I5, last part: the fleet returns to min after the work ends."""
    for view in groups:
        alive = len(counted(view))
        _require(
            alive == view.desired == view.pool.min_size,
            "I5",
            f"{view.pool.name}: {alive} alive and desired {view.desired} long after the work",
        )


def missing_queues(world: World) -> list[str]:
    """Return the queues that the grid needs and that do not exist."""
    pools = [pool.name for pool in world.pools]
    needed = {object_keys.EVENTS, *map(object_keys.tasks_queue, pools), *map(object_keys.dead_letters, pools)}
    return sorted(needed.difference(world.queue.names()))


def check_queues(world: World) -> None:
    """Check that every removed queue has been created again. Jobs may end without one, only
    later."""
    missing = missing_queues(world)
    _require(not missing, "queues", f"{', '.join(missing)} not there long after the work")


async def check_results(world: World, job: JobDef) -> None:
    """Check that every result follows from its input, and that every gather received all its
    inputs.

    A stage after a doomed one may have run fewer tasks, but no others. A job that succeeded has run
    all tasks.
    """
    record = await world.ledger.job(job.id)
    ended = {
        stage_record.counts.stage: stage_record.counts for stage_record in (await world.ledger.rows(job.id)).stages
    }
    found: dict[str, Mapping[int, Json]] = {}
    for stage in job.stages:
        inputs = inputs_of(job, stage, found)
        got = await results_of(world.objects, world.ledger, job.id, stage.name)
        found[stage.name] = got
        extra = sorted(set(got) - set(inputs))
        _require(not extra, "I1", f"{job.id}/{stage.name}: tasks {extra[:5]} had nothing to run on")
        right = {task: value_of(stage.name, inputs[task]) for task in got}
        wrong = [(task, got[task], right[task]) for task in sorted(got) if got[task] != right[task]]
        _require(not wrong, "I1", f"{job.id}/{stage.name}: (task, result, right) {wrong[:3]}")
        lost = sorted(set(inputs) - set(got))
        counts = ended[stage.name]
        _require(
            record.state is not JobState.SUCCEEDED or len(lost) <= counts.failed + counts.cancelled,
            "I1",
            f"{job.id}/{stage.name}: the job succeeded without tasks {lost[:5]}",
        )


def check_failures(world: World, fates: Fates, job: JobDef, outcomes: Sequence[Outcome]) -> None:
    """Check that a task fails only because of its own script or because it lost its workers."""
    for outcome in outcomes:
        for failure in outcome.failed:
            bundle = outcome.bundle
            fate = fates.of(job.id, bundle.stage, failure.task)
            name = f"task {task_name(bundle.stage, failure.task)} of {job.id}"
            if failure.kind is FailureKind.LOST:
                lost = world.watch.lost_starts(bundle, failure.task)
                _require(
                    lost >= settlement.LOSS_LIMIT,
                    "I7",
                    f"{name} was condemned ({failure.reason}), but lost {lost} workers",
                )
                continue
            meant = failure.kind is FailureKind.EXCEPTION and bundle.attempt <= fate.unlucky
            _require(meant, "I7", f"{name} failed: {failure.reason}")
            attempts = job.stage(bundle.stage).retry.attempts_after(failure)
            told = f"{name} had attempt {bundle.attempt} of {attempts}"
            _require(bundle.attempt <= attempts, "Attempts", told)
            spent = bundle.attempt >= attempts or world.watch.controls.was_cancelled(job.id)
            told = f"{name} is FAILED after {bundle.attempt} of {attempts} attempts"
            _require(spent or not failure.final, "Attempts", told)


async def results_of(objects: Objects, ledger: Ledger, job: JobId, stage: str) -> Mapping[int, Json]:
    """Return the encoded result by task, read as a user would: by the ledger's list of bundles."""
    values: dict[int, Json] = {}
    key = await CommitKeys(objects).stored(job)
    for row in await ledger.bundles(job, done=True):
        if row.bundle.stage != stage:
            continue
        name = object_keys.outcome(row.bundle, key)
        outcome = outcome_at(name, await objects.get(name), key)
        values.update(zip(outcome.succeeded, outcome.values, strict=True))
    return values
