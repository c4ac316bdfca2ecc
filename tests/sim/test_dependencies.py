"""Jobs that wait for other jobs, in simulated worlds without random faults, and some worlds with all faults."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import Refused
from batchlab.core.job_definition import Condition, Dependency, JobDef
from batchlab.core.model import Failure, FailureKind, JobId, JobState, Pool
from batchlab.core.protocol import object_keys
from batchlab.manager.manager import Manager
from batchlab.sim import trial
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, value_of
from batchlab.sim.world import EPOCH_S, World
from tests.sim.mutants.kit import check_worlds
from tests.support.sim.scenes import A, around, ended, ended_well, in_world, job, kill_manager, leader, stage, submitted

FIRST = job(stage(A), id=JobId("first"), token="first", items=2)
NEXT = job(stage(A), id=JobId("next"), token="next", items=2, after=(Dependency(FIRST.id),))
ANYWAY = replace(NEXT, after=(Dependency(FIRST.id, Condition.ENDED),))
RUN_S = 50.0


class Tasks:
    """Script whose tasks of the first job fail in their first `failures` rounds."""

    def __init__(self, failures: int = 0) -> None:
        self._failures = failures

    def __call__(self, scene: AttemptInput) -> ScriptedAttempt:
        if scene.job.id == FIRST.id and scene.bundle.round < self._failures:
            return ScriptedAttempt(RUN_S, failure=Failure(scene.task, FailureKind.EXCEPTION, "it fails"))
        return ScriptedAttempt(RUN_S, value_of(scene.stage.name, scene.item))


async def _state(world: World, made: JobDef, state: JobState) -> None:
    while (await world.ledger.job(made.id)).state is not state:
        await asyncio.sleep(0.5)


async def _refusal(world: World, call: Any) -> str:
    answer = await world.ask(call, "a request")
    assert isinstance(answer, Refused)
    return str(answer)


def _first_start_s(world: World, made: JobDef) -> float:
    return min(at_s for at_s, name, _, _ in world.starts if name == made.id)


def _ended_s(world: World, made: JobDef) -> float:
    return max(start.ended_s or 0.0 for start in world.watch.starts if start.job == made.id)


def test_a_job_begins_when_its_dependency_has_succeeded() -> None:
    """The waiting job is PENDING, and its pool does not launch an instance before the dependency has ended."""
    pools = (Pool("default", 0, 2, 1), Pool("second", 0, 2, 1))
    waiting = replace(NEXT, stages=(stage(A, pool="second"),))

    async def act(world: World) -> None:
        await submitted(world, FIRST)
        await submitted(world, waiting)
        await _state(world, waiting, JobState.PENDING)
        manager = await leader(world)
        while not (await world.ledger.job(FIRST.id)).state.ended:
            assert not any(view.instances for view in await world.groups() if view.pool.name == "second")
            assert not manager.lives.pool("second").working
            await asyncio.sleep(1.0)
        await ended_well(world, waiting)
        assert 0.0 < _first_start_s(world, waiting) - _ended_s(world, FIRST) < 10.0

    in_world(act, script=Tasks(), pools=pools)


def test_waiting_takes_no_reads_of_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    async def read(real: Any, name: JobId) -> object:
        reads.append(name)
        return await real(name)

    async def act(world: World) -> None:
        around(monkeypatch, world.ledger, "job", read)
        await submitted(world, FIRST)
        await submitted(world, NEXT)
        await asyncio.sleep(10.0)
        reads.clear()
        await asyncio.sleep(30.0)
        assert reads == []
        await ended_well(world, NEXT)

    in_world(act, script=Tasks())


def test_an_ended_dependency_is_met_at_once() -> None:
    async def act(world: World) -> None:
        await submitted(world, FIRST)
        await ended_well(world, FIRST)
        await submitted(world, NEXT)
        await ended_well(world, NEXT)

    in_world(act, script=Tasks())


def test_a_job_fails_with_its_dependency_and_can_be_retried_after_it() -> None:
    async def act(world: World) -> None:
        await submitted(world, FIRST)
        await submitted(world, NEXT)
        record = await ended(world, NEXT)
        assert record.state is JobState.FAILED
        assert record.reason == "job first is a dependency that must succeed, and ended FAILED"
        assert not any(name == NEXT.id for _, name, _, _ in world.starts)
        assert "dependency that must succeed" in await _refusal(world, lambda m: m.job_commands.retry(NEXT.id))
        await world.ask(lambda m: m.job_commands.retry(FIRST.id), "retry")
        # The retried job waits again, because its dependency has not ended yet.
        await world.ask(lambda m: m.job_commands.retry(NEXT.id), "retry")
        assert not (await world.ledger.job(FIRST.id)).state.ended
        await ended_well(world, NEXT)
        assert _first_start_s(world, NEXT) > _ended_s(world, FIRST)

    in_world(act, script=Tasks(failures=1))


def test_a_job_after_the_end_runs_whatever_the_end() -> None:
    async def act(world: World) -> None:
        await submitted(world, FIRST)
        await submitted(world, ANYWAY)
        assert (await ended(world, FIRST)).state is JobState.FAILED
        await ended_well(world, ANYWAY)

    in_world(act, script=Tasks(failures=1))


def test_submission_is_refused_if_the_condition_cannot_hold() -> None:
    unknown = replace(NEXT, id=JobId("unknown"), token="unknown", after=(Dependency(JobId("nobody")),))

    async def act(world: World) -> None:
        await submitted(world, FIRST)
        await submitted(world, NEXT)
        assert "nobody is a dependency and does not exist" in await _refusal(world, _submits(unknown))
        await ended(world, NEXT)
        later = replace(NEXT, id=JobId("later"), token="later")
        assert "must succeed, and ended FAILED" in await _refusal(world, _submits(later))
        assert world.objects.content(object_keys.spec(later.id)) is None
        # A client that repeats a request gets the job that it has submitted.
        assert not isinstance(await world.ask(_submits(NEXT), "again"), Refused)

    in_world(act, script=Tasks(failures=1))


def _submits(made: JobDef) -> Any:
    return lambda manager: manager.job_commands.submit(made)


def test_a_dependency_cannot_be_deleted_before_its_dependents_have_ended() -> None:
    async def delete(manager: Manager) -> object:
        return await manager.job_deletion.delete(FIRST.id)

    async def act(world: World) -> None:
        await submitted(world, FIRST)
        await ended_well(world, FIRST)
        await submitted(world, NEXT)
        assert "Job next depends on job first" in await _refusal(world, delete)
        await ended_well(world, NEXT)
        assert not isinstance(await world.ask(delete, "delete"), Refused)
        again = replace(NEXT, id=JobId("again"), token="again")
        assert "first is a dependency and does not exist" in await _refusal(world, _submits(again))

    in_world(act, script=Tasks())


def test_both_the_start_time_and_the_dependency_must_hold() -> None:
    async def act(world: World) -> None:
        late = replace(NEXT, start_at_s=world.clock.now_s() + 300.0)
        soon = replace(NEXT, id=JobId("soon"), token="soon", start_at_s=world.clock.now_s() + 5.0)
        for made in (FIRST, late, soon):
            await submitted(world, made)
        assert (await world.ledger.job(late.id)).state is JobState.SCHEDULED
        await _state(world, soon, JobState.PENDING)
        await ended_well(world, soon)
        assert _first_start_s(world, soon) > _ended_s(world, FIRST)
        assert (await world.ledger.job(late.id)).state is JobState.SCHEDULED
        await ended_well(world, late)
        assert _first_start_s(world, late) + EPOCH_S >= (late.start_at_s or 0.0)

    in_world(act, script=Tasks())


def test_a_waiting_job_is_paused_resumed_and_cancelled() -> None:
    async def act(world: World) -> None:
        await submitted(world, FIRST)
        await submitted(world, NEXT)
        await world.ask(lambda m: m.job_commands.pause(NEXT.id), "pause")
        await ended_well(world, FIRST)
        await asyncio.sleep(20.0)
        assert not any(name == NEXT.id for _, name, _, _ in world.starts)
        await world.ask(lambda m: m.job_commands.resume(NEXT.id), "resume")
        await ended_well(world, NEXT)

    async def cancel(world: World) -> None:
        await submitted(world, FIRST)
        await submitted(world, NEXT)
        await _state(world, NEXT, JobState.PENDING)
        await world.ask(lambda m: m.job_commands.cancel(NEXT.id), "cancel")
        assert (await ended(world, NEXT)).state is JobState.CANCELLED
        await ended_well(world, FIRST)

    in_world(act, script=Tasks())
    in_world(cancel, script=Tasks())


@pytest.mark.parametrize("loses", [False, True])
def test_a_new_leader_begins_the_job(loses: bool) -> None:
    """The manager is killed while a job waits, and after the end of its dependency. With `loses`, the ledger loses all
    jobs, too."""

    async def act(world: World) -> None:
        await submitted(world, FIRST)
        await submitted(world, NEXT)
        await _state(world, NEXT, JobState.PENDING)
        kill_manager(world)
        if loses:
            await world.ledger.forget([FIRST.id, NEXT.id])
            await world.ask(lambda m: m.rebuild_ledger(), "rebuild")
        while not (await world.ledger.job(FIRST.id)).state.ended:
            await asyncio.sleep(0.02)
        assert (await world.ledger.job(NEXT.id)).state is JobState.PENDING
        kill_manager(world)
        await ended_well(world, NEXT)
        await ended_well(world, FIRST)
        assert _first_start_s(world, NEXT) > _ended_s(world, FIRST)

    in_world(act, script=Tasks())


@pytest.mark.parametrize("seed", [5, 8, 14])
def test_dependent_jobs_keep_every_promise_under_any_faults(seed: int) -> None:
    check_worlds([seed], "dependent")


def test_worlds_of_other_weathers_have_no_dependent_jobs() -> None:
    assert not any(made.after for seed in range(20) for made in trial.plan_of(seed, trial.ALL).jobs)
    assert all(made.after for made in trial.plan_of(3, trial.DEPENDENT).jobs[1:])
