"""The whole grid in the simulator, in fixed scenes, and the repeatability of a seed.

test_fuzz.py tests the promises over many seeds.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from batchlab.core.errors import Unreachable
from batchlab.core.model import Failure, FailureKind, JobId, JobState, LifecycleState, Pool
from batchlab.core.ports import Outgoing
from batchlab.core.protocol import object_keys
from batchlab.core.retry_rule import RetryRule
from batchlab.manager import state
from batchlab.sim import invariants
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, value_of
from batchlab.sim.world import WORKER, World
from tests.support.sim.scenes import (
    UNHURRIED,
    A,
    B,
    around,
    ended,
    ends_well,
    in_world,
    job,
    kill_manager,
    leader,
    looked_for,
    run_to_end,
    stage,
    submitted,
    takes,
)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_event_log_byte_for_byte() -> None:
    program = "from batchlab.sim import trial;print([trial.run(seed, logged=True).digest for seed in (1, 2, 3)])"
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1", "12345")
    }
    assert len(answers) == 1


# --- Fixed scenes --------------------------------------------------------------------------------

SELDOM_S = 60.0
"""The interval of looks at the job, in seconds. Over fourteen virtual hours, a look per second would take most of the
time."""


@pytest.mark.slow
def test_a_task_longer_than_twelve_hours_runs_once_and_is_handed_over_in_time() -> None:
    """SQS hides a message for at most 12 hours."""

    async def act(world: World) -> None:
        made = job(stage(A), items=2)
        assert await run_to_end(world, made, look_s=SELDOM_S) is JobState.SUCCEEDED
        assert len(world.starts) == 2
        assert world.clock.monotonic_s() > 14 * 3600

    in_world(act, script=takes(14 * 3600.0), **UNHURRIED)


@pytest.mark.slow
def test_a_hand_over_that_a_queue_did_not_take_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the handover counted as done. The message returned after 12 hours, and the task ran twice."""

    async def act(world: World) -> None:
        refused: list[float] = []

        async def send(real: Any, queue: str, messages: Sequence[Outgoing]) -> object:
            now_s = world.clock.monotonic_s()
            if queue == object_keys.tasks_queue("default") and 10 * 3600 < now_s < 11 * 3600:
                refused.append(now_s)
                raise Unreachable("The queue is away.")
            return await real(queue, messages)

        around(monkeypatch, world.queue, "send", send)
        made = job(stage(A), items=1)
        assert await run_to_end(world, made, look_s=SELDOM_S) is JobState.SUCCEEDED
        assert refused
        assert len(world.starts) == 1

    in_world(act, script=takes(14 * 3600.0), **UNHURRIED)


@pytest.mark.slow
def test_a_watchdog_that_waits_longer_than_a_message_can_is_still_one() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), items=1)
        assert await run_to_end(world, made, look_s=SELDOM_S) is JobState.SUCCEEDED
        assert len(world.starts) == 1

    rare = replace(UNHURRIED["worker_settings"], watchdog_s=3600.0)
    in_world(act, script=takes(14 * 3600.0), **{**UNHURRIED, "worker_settings": rare})


@pytest.mark.slow
def test_a_worker_lost_after_the_hand_over_is_noticed_by_the_watchdog() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), items=1)
        await submitted(world, made)
        await asyncio.sleep(11.5 * 3600)
        (instance,) = [w for w in world.workers.values() if w.ended is None]
        instance.kill("exit -9")
        record = await looked_for(world, made, SELDOM_S)
        assert record.state is JobState.SUCCEEDED
        assert len(world.starts) == 2
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(14 * 3600.0), **UNHURRIED)


def test_backoff_beyond_fifteen_minutes_is_chained_through_the_queue() -> None:
    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.bundle.attempt == 1:
            return ScriptedAttempt(0.1, failure=Failure(scene.task, FailureKind.EXCEPTION, "no"))
        return ScriptedAttempt(0.1, 1)

    async def act(world: World) -> None:
        rule = RetryRule(attempts=2, backoff_s=3600.0, max_backoff_s=7200.0, jitter=0.0)
        made = job(stage(A, retry=rule), items=1)
        assert await run_to_end(world, made) is JobState.SUCCEEDED
        first, second = (start[0] for start in world.starts)
        assert 3590 < second - first < 3700

    in_world(act, script=script)


def test_a_task_that_kills_its_workers_fails_alone_and_its_neighbours_succeed() -> None:
    """The poison task's bundle is halved until the task is alone, and then the task is FAILED with a reason (I7)."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(0.05, 1, kills_worker=scene.task == 37)

    async def act(world: World) -> None:
        made = job(stage(A, bundle=20), items=60)
        assert await run_to_end(world, made) is JobState.FAILED
        (counts,) = [s.counts for s in (await world.ledger.rows(made.id)).stages]
        assert (counts.succeeded, counts.failed) == (59, 1)
        record = await world.ledger.job(made.id)
        assert "task a/37" in record.reason
        assert "killed its worker 3 times" in record.reason

    in_world(act, script=script)


def test_a_scale_in_gives_work_back_at_once() -> None:
    """No worker waits for a visibility timeout (I6)."""

    async def act(world: World) -> None:
        made = job(stage(A, bundle=50), items=50)
        await submitted(world, made)
        await asyncio.sleep(20)
        groups = await world.groups()
        victim = next(i.id for i in groups[0].instances if i.state is LifecycleState.IN_SERVICE and i.protected)
        started_s = world.clock.monotonic_s()
        assert world.manager is not None
        fleet = world.manager.ports.fleet
        await fleet.terminate("default", [victim], decrement=False, cause="test")
        await world.ended(made.id)
        later = [s[0] for s in world.starts if s[0] > started_s]
        assert max(b - a for a, b in pairwise(later)) < 25
        await invariants.check_all(world, [made.id])

    long_visibility = replace(WORKER, visibility_s=3600.0)
    in_world(act, script=takes(1.0), worker_settings=long_visibility)


def test_fleet_scales_from_zero_and_back() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), items=200)
        await submitted(world, made)
        await world.ended(made.id)
        await asyncio.sleep(120)
        invariants.check_at_rest(await world.groups())
        assert world.manager is not None
        activities = await world.manager.ports.fleet.activities()
        assert any("backlog" in a.cause for a in activities)
        assert any("empty backlog" in a.cause for a in activities)

    in_world(act, script=takes(1.0), pools=(Pool("default", 0, 4, 2, boot_s=20.0),))


def test_two_pools_work_at_once() -> None:
    async def act(world: World) -> None:
        made = job(stage(A, pool="small"), stage(B, A, pool="large"), items=40)
        assert await run_to_end(world, made) is JobState.SUCCEEDED
        assert len({i.split("-")[0] for i in world.workers}) >= 1
        pools = {w.worker.who.pool for w in world.workers.values()}
        assert pools == {"small", "large"}

    pools = (Pool("small", 0, 2, 1), Pool("large", 0, 2, 4))
    in_world(act, script=takes(0.5), pools=pools)


def test_a_purged_queue_only_costs_time() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A, gather="*"), items=100)
        await submitted(world, made)
        await asyncio.sleep(30)
        await world.queue.purge("tasks-default")
        await world.queue.purge("events")
        record = await world.ended(made.id)
        assert record.state is JobState.SUCCEEDED
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(2.0))


def test_a_lost_ledger_is_rebuilt_equal_while_the_job_runs() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A), items=60)
        await submitted(world, made)
        await asyncio.sleep(20)
        assert world.manager is not None
        assert (await world.manager.rebuild_ledger()).jobs == 1
        record = await world.ended(made.id)
        assert record.state is JobState.SUCCEEDED
        await invariants.check_all(world, [made.id])

    in_world(act, script=takes(1.0))


def test_a_job_of_higher_priority_overtakes() -> None:
    async def act(world: World) -> None:
        low = job(stage(A), items=300)
        high = replace(job(stage(A), items=60), id=JobId("high"), token="h", priority=5)
        await submitted(world, low)
        await asyncio.sleep(30)
        await submitted(world, high)
        submitted_s = world.clock.monotonic_s()
        await world.ended(high.id)
        # When the whole job is in the queue, other jobs have room again. The queue does not keep an order.
        last_s = sorted(s[0] for s in world.starts if s[1] == high.id)[50]
        starts = [s for s in world.starts if submitted_s + 15 < s[0] < last_s]
        late = [s for s in starts if s[1] == low.id]
        assert len(starts) > 20
        assert len(late) <= 5  # only bundles that were already in the queue
        await world.ended(low.id)
        await invariants.check_all(world, [low.id, high.id])

    in_world(act, script=takes(1.0), pools=(Pool("default", 0, 2, 1),))


def test_jobs_of_equal_priority_share() -> None:
    """A small job does not wait for the end of a large one."""

    async def act(world: World) -> None:
        large = job(stage(A), items=600)
        small = replace(job(stage(A), items=20), id=JobId("small"), token="s")
        await submitted(world, large)
        await asyncio.sleep(60)
        await submitted(world, small)
        before_s = world.clock.monotonic_s()
        await world.ended(small.id)
        assert world.clock.monotonic_s() - before_s < 60
        counts = (await world.ledger.rows(large.id)).stages[0].counts
        assert counts.succeeded < 400

    in_world(act, script=takes(1.0), pools=(Pool("default", 0, 2, 1),))


def test_gather_by_field_keeps_task_order_after_retries() -> None:
    """Task 0 succeeds last, in its own bundle, but is still the first of its group."""
    made = job(stage(A, bundle=6, retry=RetryRule(2, 0.5)), stage(B, A, gather="key"), items=6)

    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.stage.name == A and scene.task in (0, 3) and scene.bundle.attempt == 1:
            return ScriptedAttempt(0.1, failure=Failure(scene.task, FailureKind.EXCEPTION, "no luck"))
        return ScriptedAttempt(0.1, value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await ends_well(world, made)
        # A group in another order would have another sum.
        await invariants.check_results(world, made)
        rows = await world.ledger.bundles(made.id, stage=A, done=True)
        tasks = [list(row.completion.succeeded) for row in rows if row.completion]
        assert tasks == [[1, 2, 4, 5], [0, 3]]

    in_world(act, script=script)


def test_a_new_leader_adopts_jobs_of_every_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a new leader read only one page of the list of jobs, so older jobs waited until newer ones had ended."""
    monkeypatch.setattr(state, "PAGE", 2)
    several = [job(stage(A), id=JobId(f"job-{n}"), token=f"{n}", items=1) for n in range(5)]

    async def act(world: World) -> None:
        for one in several:
            await submitted(world, one)
        kill_manager(world)
        manager = await leader(world)
        assert {*manager.lives} == {one.id for one in several}
        for one in several:
            assert (await ended(world, one)).state is JobState.SUCCEEDED
        await invariants.check_all(world, [one.id for one in several])

    in_world(act, script=takes(100.0))
