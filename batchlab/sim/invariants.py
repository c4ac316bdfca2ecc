"""The seven promises as checks on a world that has come to rest (design, section "protocol").

Each check reads the bucket, the ledger or what the world saw, and raises Violated with the facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from batchlab.adapters.sql.ledger import SqlLedger, open_memory
from batchlab.manager.live import Ports
from batchlab.manager.rebuild import rebuild
from batchlab.model import GroupView, JobId, Json, LifecycleState, Outcome
from batchlab.patience import Patience
from batchlab.ports import Objects
from batchlab.protocol import naming, wire
from batchlab.sim.actors import SimulationError
from batchlab.sim.world import World


class Violated(SimulationError):
    """An invariant does not hold."""


def _require(holds: bool, name: str, facts: str) -> None:
    if not holds:
        raise Violated(f"{name} is violated: {facts}")


async def check_all(world: World, jobs: Sequence[JobId]) -> None:
    """I1, I2, I3 and I7 for these jobs, which must have ended."""
    for job in jobs:
        await check_ended(world.ledger, job)
        await check_terminal_states(world.objects, world.ledger, job)
        await check_counts(world.ledger, job)
    await check_rebuild(world)


async def check_ended(ledger: SqlLedger, job: JobId) -> None:
    """I7: a job always ends."""
    record = await ledger.job(job)
    _require(record.state.ended, "I7", f"{job} is still {record.state}")


async def outcomes_of(objects: Objects, job: JobId) -> list[Outcome]:
    """Every committed outcome of a job, in key order."""
    found = []
    async for page in objects.list(f"jobs/{job}/"):
        for info in page:
            if "/outcomes/" in info.key:
                data = await objects.get(info.key)
                found.append(wire.outcome_from_json(wire.loads(data)))
    return found


async def check_terminal_states(objects: Objects, ledger: SqlLedger, job: JobId) -> None:
    """I1: exactly one terminal state and one committed result per task and round."""
    counted: Counter[tuple[str, int, int]] = Counter()
    for outcome in await outcomes_of(objects, job):
        key = (outcome.bundle.stage, outcome.bundle.round)
        for task in outcome.succeeded:
            counted[(*key, task)] += 1
        for failure in outcome.failed:
            counted[(*key, failure.task)] += failure.final
        for task in outcome.cancelled:
            counted[(*key, task)] += 1
    twice = [key for key, times in sorted(counted.items()) if times > 1]
    _require(not twice, "I1", f"{job}: more than one terminal state: {twice[:5]}")
    # A later round takes the place of an earlier one; tasks whose upstream failed have no outcome.
    for stage in await ledger.stages(job):
        name, c = stage.counts.stage, stage.counts
        rows = await ledger.bundles(job, stage=name, done=True)
        listed = {(r.bundle.round, t) for r in rows if r.completion for t in r.completion.succeeded}
        _require(
            len({t for _, t in listed}) == len(listed) == c.succeeded,
            "I1",
            f"{job}/{name}: {c.succeeded} succeeded, but {len(listed)} results are committed",
        )


async def check_counts(ledger: SqlLedger, job: JobId) -> None:
    """I2: planned = succeeded + failed + cancelled."""
    for stage in await ledger.stages(job):
        c = stage.counts
        _require(
            c.planned == c.succeeded + c.failed + c.cancelled,
            "I2",
            f"{job}/{c.stage}: {c.planned} planned, {c.succeeded}+{c.failed}+{c.cancelled} ended",
        )


async def check_rebuild(world: World) -> None:
    """I3: a ledger rebuilt from the bucket equals the one that grew."""
    again = open_memory()
    rng = world.rng("rebuild")
    assert world.manager is not None
    ports = Ports(
        world.objects,
        world.queue,
        world.manager.ports.fleet,
        again,
        world.clock,
        world.manager.ports.ids,
        Patience(rng),
    )
    await rebuild(ports)
    grown, rebuilt = await world.ledger.dump(), await again.dump()
    for table in grown:
        _require(
            grown[table] == rebuilt.get(table),
            "I3",
            f"table {table} (grown, rebuilt): {_differences(grown[table], rebuilt[table])}",
        )
    await again.close()


def _differences(grown: Sequence[dict[str, Json]], rebuilt: Sequence[dict[str, Json]]) -> Json:
    if len(grown) != len(rebuilt):
        return [len(grown), len(rebuilt)]
    return [
        {name: (a[name], b[name]) for name in a if a[name] != b[name]}
        for a, b in zip(grown, rebuilt, strict=True)
        if a != b
    ][:3]


def check_no_start_after(world: World, job: JobId, acknowledged_s: float) -> None:
    """I4: no task starts after its job's cancellation has been acknowledged (monotonic time)."""
    late = [s for s in world.starts if s[1] == job and s[0] > acknowledged_s]
    _require(not late, "I4", f"{job}: acknowledged at {acknowledged_s}, started {late[:3]}")


def check_bounds(groups: Sequence[GroupView]) -> None:
    """I5, first part, at any time: never outside [min, max]."""
    for view in groups:
        alive = sum(
            i.state in (LifecycleState.PENDING, LifecycleState.IN_SERVICE) for i in view.instances
        )
        pool = view.pool
        _require(
            pool.min_size <= view.desired <= pool.max_size and alive <= pool.max_size,
            "I5",
            f"{pool.name}: {alive} alive, desired {view.desired}",
        )


def check_at_rest(groups: Sequence[GroupView]) -> None:
    """I5, last part: the fleet reaches min after the work ends."""
    for view in groups:
        alive = [
            i.id
            for i in view.instances
            if i.state in (LifecycleState.PENDING, LifecycleState.IN_SERVICE)
        ]
        _require(
            len(alive) == view.desired == view.pool.min_size,
            "I5",
            f"{view.pool.name}: {len(alive)} alive and desired {view.desired} long after the work",
        )


async def results_of(
    objects: Objects, ledger: SqlLedger, job: JobId, stage: str
) -> Mapping[int, Json]:
    """Encoded result by task, as a user would fetch them: by the ledger's list of bundles."""
    values: dict[int, Json] = {}
    for row in await ledger.bundles(job, done=True):
        if row.bundle.stage != stage:
            continue
        data = await objects.get(naming.outcome(row.bundle))
        outcome = wire.outcome_from_json(wire.loads(data))
        values.update(zip(outcome.succeeded, outcome.values, strict=True))
    return values
