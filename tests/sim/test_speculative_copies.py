"""Speculative copies in virtual time: stragglers on slow and frozen workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from batchlab.core import commit
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobState, Json, Pool
from batchlab.core.pricing.usage import Accounting
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.sim import invariants
from batchlab.sim.actors import CURRENT, Actor
from batchlab.sim.tasks import AttemptInput, Script, ScriptedAttempt, value_of
from batchlab.sim.world import MANAGER, WORKER, World
from batchlab.worker.loop import MAX_COPY_AGE_S
from tests.support.sim.scenes import A, B, ended, ends_well, in_world, job, kill_manager, stage, submitted

SLOW_S = 600.0
POOLS = (Pool("default", 3, 3, 1),)
STRAGGLER = 19
COPIED = stage(A, speculative_copies=True, bundle=1)


class Straggling:
    """Script in which the first run of a task, or each of its runs, is slow. All other runs take a second."""

    def __init__(
        self, slow_s: float = SLOW_S, on_start: Callable[[Actor], object] = lambda _: None, *, always: bool = False
    ) -> None:
        self.runs: list[Actor] = []
        self._slow_s, self._always = slow_s, always
        self._on_start = on_start

    def __call__(self, scene: AttemptInput) -> ScriptedAttempt:
        attempt = ScriptedAttempt(1.0, value_of(scene.stage.name, scene.item))
        if scene.task != STRAGGLER or scene.stage.name != A:
            return attempt
        actor = CURRENT.get()
        assert actor is not None
        self.runs.append(actor)
        if len(self.runs) > 1 and not self._always:
            return attempt
        self._on_start(actor)
        return replace(attempt, run_s=self._slow_s)


def took_s(made: JobDef, script: Script) -> float:
    async def act(world: World) -> float:
        await ends_well(world, made)
        return world.clock.monotonic_s()

    return in_world(act, script=script, pools=POOLS)


def test_a_straggler_ends_with_its_copy() -> None:
    script = Straggling()
    assert took_s(job(COPIED, items=20), script) < 60.0
    assert len(set(script.runs)) == 2


def test_a_stage_without_copies_waits_for_its_straggler() -> None:
    script = Straggling()
    assert took_s(job(replace(COPIED, speculative_copies=False), items=20), script) > SLOW_S
    assert len(script.runs) == 1


def test_a_stage_with_side_effects_waits_for_its_straggler() -> None:
    script = Straggling()
    assert took_s(job(replace(COPIED, side_effects=True), items=20), script) > SLOW_S
    assert len(script.runs) == 1


def test_a_bundle_of_several_tasks_is_copied_as_a_whole() -> None:
    script = Straggling()
    assert took_s(job(replace(COPIED, bundle=4), items=20), script) < 60.0
    assert len(set(script.runs)) == 2


def test_a_job_with_a_cost_cap_has_no_copies() -> None:
    script = Straggling()
    assert took_s(job(COPIED, items=20, max_cost_usd=100.0), script) > SLOW_S


@pytest.mark.parametrize("hand_over_s", [WORKER.hand_over_s, 1.0])
def test_the_loser_is_stopped(hand_over_s: float) -> None:
    """The worker of the original run is free for other work soon after the commit of the copy, even if a watchdog
    message has replaced the message of the original run."""
    script = Straggling()

    async def act(world: World) -> None:
        await ends_well(world, job(COPIED, items=20))
        slow = next(worker for worker in world.workers.values() if worker.actor is script.runs[0])
        async with asyncio.timeout(world.worker_settings.visibility_s):
            while slow.worker.context.inflight:
                await asyncio.sleep(0.5)
        assert slow.actor.alive
        assert world.clock.monotonic_s() < SLOW_S

    in_world(act, script=script, pools=POOLS, worker_settings=replace(WORKER, hand_over_s=hand_over_s))


def test_a_frozen_worker_does_no_harm_after_its_thaw() -> None:
    def freeze(actor: Actor) -> None:
        asyncio.get_running_loop().call_later(0.2, actor.freeze)

    script = Straggling(on_start=freeze)

    async def act(world: World) -> None:
        made = job(COPIED, stage(B, A), items=20)
        await submitted(world, made)
        async with asyncio.timeout(world.worker_settings.visibility_s - 5.0):
            assert (await world.ended(made.id)).state is JobState.SUCCEEDED
        frozen = script.runs[0]
        world.watch.on_fault(frozen)
        frozen.thaw()
        await asyncio.sleep(2 * SLOW_S)
        assert frozen.alive
        await invariants.check_all(world, [made.id])

    in_world(act, script=script, pools=POOLS)


def chained_runs(script: Straggling, run_s: float) -> tuple[Script, list[Actor]]:
    """Return a script whose chained task of the straggler runs for `run_s`, and the list of the workers that run it."""
    runs: list[Actor] = []

    def run(scene: AttemptInput) -> ScriptedAttempt:
        attempt = script(scene)
        if scene.stage.name != B or scene.task != STRAGGLER:
            return attempt
        actor = CURRENT.get()
        assert actor is not None
        runs.append(actor)
        return replace(attempt, run_s=run_s)

    return run, runs


@pytest.mark.parametrize("slow_s", [SLOW_S, 15.0])
def test_the_loser_does_not_start_the_follow_ups_of_the_winner_again(slow_s: float) -> None:
    """The loser is stopped, or ends by itself, while the chained task of the winner runs."""
    script, runs = chained_runs(Straggling(slow_s), 300.0)
    assert took_s(job(COPIED, stage(B, A, side_effects=True), items=20), script) > 300.0
    assert len(runs) == 1


def test_a_copy_without_an_input_is_left_to_the_original_run(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Straggling(60.0)
    missing: list[Actor] = []
    real = Inputs.resolve

    async def resolve(inputs: Inputs, definition: JobDef, bundle: Bundle, key: CommitKey) -> Sequence[Json]:
        actor = CURRENT.get()
        if script.runs and actor not in script.runs and bundle.tasks.first == STRAGGLER:
            assert actor is not None
            missing.append(actor)
            raise NotFound("The input does not exist.")
        return await real(inputs, definition, bundle, key)

    monkeypatch.setattr(Inputs, "resolve", resolve)
    monkeypatch.setattr(commit, "INLINE_BYTES", 0)
    assert 60.0 < took_s(job(COPIED, items=20), script) < 120.0
    assert missing
    assert len(script.runs) == 1


def test_a_failure_of_a_copy_is_left_to_the_original_run() -> None:
    """The task has one attempt, so a failure that counted would fail the job."""
    made = job(COPIED, items=20)

    class Failing(Straggling):
        def __call__(self, scene: AttemptInput) -> ScriptedAttempt:
            attempt = super().__call__(scene)
            if scene.task == STRAGGLER and len(self.runs) > 1:
                failure = Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck")
                return replace(attempt, failure=failure)
            return attempt

    script = Failing(60.0)
    assert 60.0 < took_s(made, script) < 120.0
    assert len(script.runs) == 2


def test_a_task_whose_input_takes_long_costs_little_more() -> None:
    """The copy of a long task may run only as long as the original run had run at that time."""
    script = Straggling(always=True)

    async def act(world: World) -> float:
        made = job(COPIED, items=20)
        await submitted(world, made)
        await asyncio.sleep(60.0)
        first, second = script.runs
        copier = next(worker for worker in world.workers.values() if worker.actor is second)
        assert first is not second
        assert not copier.worker.context.inflight
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        return world.clock.monotonic_s()

    assert in_world(act, script=script, pools=POOLS) > SLOW_S


def test_a_new_leader_sends_at_most_one_more_copy() -> None:
    script = Straggling(always=True)

    async def act(world: World) -> None:
        made = job(COPIED, items=20)
        await submitted(world, made)
        await asyncio.sleep(60.0)
        assert len(script.runs) == 2
        kill_manager(world)
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        assert len(script.runs) <= 3

    in_world(act, script=script, pools=POOLS)


def test_a_copy_waits_while_only_the_worker_of_its_bundle_receives_it() -> None:
    script = Straggling()

    async def act(world: World) -> None:
        made = job(COPIED, items=20)
        await submitted(world, made)
        while not script.runs:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)
        (other,) = (worker.actor for worker in world.workers.values() if worker.actor is not script.runs[0])
        # The last receive of the other worker ends before the manager sends the copy.
        other.freeze()
        await asyncio.sleep(25.0)
        other.thaw()
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        assert script.runs[1:] == [other]
        assert world.clock.monotonic_s() < MAX_COPY_AGE_S

    pools = (Pool("default", 2, 2, 2),)
    in_world(act, script=script, pools=pools, worker_settings=replace(WORKER, wait_s=3.0))


def test_a_copy_never_launches_an_instance() -> None:
    script = Straggling()

    async def act(world: World) -> float:
        await ends_well(world, job(COPIED, items=20))
        assert len(world.workers) == 1
        return world.clock.monotonic_s()

    pools = (Pool("default", 1, 1, 1),)
    settings = replace(MANAGER, idle_s=1.0)
    assert in_world(act, script=script, pools=pools, manager_settings=settings) > SLOW_S
    assert len(script.runs) == 1


def test_the_run_of_the_loser_is_in_the_account_of_the_job() -> None:
    script = Straggling()

    async def act(world: World) -> None:
        made = job(COPIED, items=20)
        await ends_well(world, made)
        await asyncio.sleep(10.0)
        assert world.manager
        assert world.manager.spending
        account = await world.manager.spending.account(made.id)
        assert account
        assert 5.0 < sum(account.repeated_s.values()) < 30.0
        assert account.failed_s == {}

    in_world(act, script=script, pools=POOLS, accounting=Accounting())
