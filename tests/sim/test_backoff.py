"""The backoff of a retry that is sent by its worker, the next leader, a resume, or the reconciler."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Failure, FailureKind, TaskSet
from batchlab.core.protocol import settlement
from batchlab.core.retry_rule import RetryRule
from batchlab.sim.tasks import Script, ScriptedAttempt, value_of
from batchlab.sim.world import World
from tests.support.sim.scenes import A, ended_well, in_world, job, kill_manager, stage, submitted

BACKOFF_S = 600.0
MADE = job(stage(A, retry=RetryRule(attempts=2, backoff_s=BACKOFF_S, jitter=0.0)), items=1)


def unlucky_once(run_s: float = 1.0) -> Script:
    def play(scene: Any) -> ScriptedAttempt:
        if scene.bundle.attempt == 1:
            failure = Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck")
            return ScriptedAttempt(run_s, failure=failure)
        return ScriptedAttempt(run_s, value_of(scene.stage.name, scene.item))

    return play


async def failed(world: World, made: JobDef) -> None:
    """Wait until the first attempt has failed and the ledger contains the retry."""
    await submitted(world, made)
    while (await world.rows(made.id)).stages[0].counts.retried == 0:
        await asyncio.sleep(1.0)


async def ends_with_one_retry(world: World, made: JobDef) -> None:
    await ended_well(world, made)
    await asyncio.sleep(2 * BACKOFF_S)
    first, *others = [start.at_s for start in world.watch.starts]
    assert len(others) == 1, "user code ran again after the job's end"
    assert BACKOFF_S <= others[0] - first <= BACKOFF_S + 30.0


async def killed(world: World, made: JobDef) -> None:
    kill_manager(world)


async def paused(world: World, made: JobDef) -> None:
    await world.ask(lambda m: m.job_commands.pause(made.id), "pause")
    await asyncio.sleep(30.0)
    await world.ask(lambda m: m.job_commands.resume(made.id), "resume")


async def rebuilt(world: World, made: JobDef) -> None:
    await world.ask(lambda m: m.rebuild_ledger(), "rebuild")


@pytest.mark.parametrize("happens", [killed, paused, rebuilt])
def test_retry_keeps_its_backoff(happens: Any) -> None:
    """Before, the next leader considered a waiting retry as a silent bundle and sent it again, so 600 s became 45 s to
    55 s. A resume sent the retry at once. Later, the delayed original message ran the user's code again."""

    async def act(world: World) -> None:
        await failed(world, MADE)
        await happens(world, MADE)
        await ends_with_one_retry(world, MADE)

    in_world(act, script=unlucky_once())


def test_retry_with_a_lost_message_is_sent_again_after_its_backoff() -> None:
    async def act(world: World) -> None:
        await failed(world, MADE)
        await world.queue.purge("tasks-default")
        kill_manager(world)
        await ended_well(world, MADE)
        first, second = [start.at_s for start in world.watch.starts]
        assert BACKOFF_S <= second - first <= BACKOFF_S + 150.0

    in_world(act, script=unlucky_once())


@pytest.mark.parametrize("off_s", [-86_400.0, 0.0, 86_400.0])
def test_a_clock_that_is_wrong_makes_no_wait_longer_than_the_backoff(off_s: float) -> None:
    at_s = 1_000.0
    retried = Bundle(MADE.id, A, TaskSet.from_indices([0]), attempt=2, due_s=at_s + BACKOFF_S)
    assert settlement.wait_s(MADE, retried, at_s + off_s) == (0.0 if off_s > 0 else BACKOFF_S)
