"""Bugs with a frozen leader, and with a leader whose clock is set back. Each docstring describes the behavior before
the fix."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from batchlab.core.errors import Unreachable
from batchlab.core.model import Failure, FailureKind, JobState
from batchlab.core.ports import Fold, Outgoing, Reopen
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import read_task_message
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.adoption import SET_BACK_S
from batchlab.manager.manager import LEASE
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, value_of
from batchlab.sim.world import EPOCH_S, World
from tests.support.sim.scenes import (
    A,
    B,
    around,
    around_change,
    ended,
    ended_well,
    ends_well,
    in_world,
    job,
    kill_manager,
    leader,
    stage,
    submitted,
    takes,
)

# --- A frozen leader while others lead -----------------------------------------------------------


async def _another_leads(world: World, *, until: asyncio.Event) -> None:
    """Freeze the leader, and let another manager lead until the event. Then stop the second manager, and thaw the first
    one, which finds that the lease is free."""
    first = world.manager_processes[0]
    stops = world.start_manager()
    first.actor.freeze()
    await until.wait()
    assert world.manager_processes[-1].manager.is_leader.is_set()
    stops.cancel()
    await asyncio.wait([stops])
    first.actor.thaw()


@pytest.mark.parametrize("asked_twice", [False, True])
def test_suspended_leader_adopts_jobs_again_after_another_led(
    monkeypatch: pytest.MonkeyPatch, asked_twice: bool
) -> None:
    """Before, the leader renewed the free lease without noticing the other leader (seed 6760 of the simulator). The
    leader did not wait for a bundle that the other leader had planned. The bundle's message was lost and never sent
    again (I7)."""

    async def act(world: World) -> None:
        planned, answers_lost = asyncio.Event(), list[object]()

        async def send(real: Any, queue: str, messages: Sequence[Outgoing]) -> object:
            tasks = queue == object_keys.tasks_queue("default") and not planned.is_set()
            if tasks and any(read_task_message(m.body).bundle.stage == B for m in messages):
                planned.set()
                return None  # the message is sent and lost
            return await real(queue, messages)

        async def lease(real: Any, name: str, owner: str, **how: Any) -> object:
            answer = await real(name, owner, **how)
            if asked_twice and planned.is_set() and not answers_lost:
                answers_lost.append(answer)
                raise Unreachable("the answer was lost")
            return answer

        around(monkeypatch, world.queue, "send", send)
        around(monkeypatch, world.ledger, "lease", lease)
        made = job(stage(A), stage(B, A, gather="*"), items=3)
        await submitted(world, made)
        first = await leader(world)
        await _another_leads(world, until=planned)
        await ended_well(world, made)
        assert world.manager is first, "that was no reason to end"
        assert world.managers == 2
        assert len(answers_lost) == asked_twice

    in_world(act, script=takes(30.0))


def test_suspended_leader_completes_the_retry_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a leader looked for retries only when it first led. A retry of which the other leader had written only
    the object waited until its user asked again."""

    async def act(world: World) -> None:
        stuck = asyncio.Event()

        async def reopen(real: Any, change: Reopen) -> object:
            if not stuck.is_set():
                stuck.set()
                await asyncio.sleep(3600)
            return await real(change)

        around_change(monkeypatch, world.ledger, Reopen, reopen)
        made = job(stage(A), items=3)
        await submitted(world, made)
        await world.ask(lambda m: m.job_commands.cancel(made.id), "cancel")
        assert (await ended(world, made)).state is JobState.CANCELLED
        await asyncio.sleep(300)  # the fleet shrinks, and the first leader has looked back
        led = asyncio.create_task(_another_leads(world, until=stuck))
        while len(world.manager_processes) == 1 or not world.manager_processes[-1].manager.is_leader.is_set():
            await asyncio.sleep(0.5)
        post = world.manager_processes[-1]
        post.actor.spawn(post.manager.job_commands.retry(made.id))
        await led
        async with asyncio.timeout(600):
            while (await world.ledger.job(made.id)).round == 0:
                await asyncio.sleep(1.0)
        await ended_well(world, made)

    in_world(act, script=takes(5.0))


def test_leader_without_a_successor_adopts_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        first = await leader(world)
        made = job(stage(A), items=3)
        await submitted(world, made)
        live = first.lives[made.id]
        world.manager_processes[0].actor.freeze()
        await asyncio.sleep(60)
        world.manager_processes[0].actor.thaw()
        await asyncio.sleep(30)
        assert first.lives[made.id] is live
        assert (await world.ledger.lease(LEASE, "nobody")).owner == first.owner
        await ended_well(world, made)

    in_world(act, script=takes(200.0))


# --- A clock that is set back --------------------------------------------------------------------

LATER_S = 600.0


def _later(**changes: Any) -> Any:
    return job(stage(A), items=3, start_at_s=EPOCH_S + LATER_S, **changes)


async def _began(world: World) -> float:
    """Return the virtual time of the first task's start. Fail if no task starts soon."""
    async with asyncio.timeout(LATER_S + 300):
        while not world.starts:
            await asyncio.sleep(0.5)
    return world.starts[0][0]


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_scheduled_job_starts_although_the_clock_was_set_back_by_a_day(rebuilt: bool) -> None:
    """Before, the job waited for the day that the clock had lost (I7, seed 8817 of the simulator)."""

    async def act(world: World) -> None:
        made = _later()
        await submitted(world, made)
        await asyncio.sleep(10)
        world.manager_processes[0].clock.off_s -= 86_400
        if rebuilt:
            await world.ask(lambda m: m.rebuild_ledger(), "rebuild")
        assert LATER_S + SET_BACK_S <= await _began(world) <= LATER_S + SET_BACK_S + 60
        await ended_well(world, made)

    in_world(act, script=takes(5.0))


def test_ledger_rebuilt_with_an_earlier_clock_lets_a_job_continue() -> None:
    """Before, the rebuild made the running job SCHEDULED again, and the job waited for as long as the clock was set
    back."""

    async def act(world: World) -> None:
        made = _later()
        await submitted(world, made)
        await _began(world)
        world.manager_processes[0].task.cancel()  # the next manager has not seen any of this
        await asyncio.wait([world.manager_processes[0].task])
        world.clock.jump(-86_400)
        await world.ask(lambda m: m.rebuild_ledger(), "rebuild")
        await ended_well(world, made)

    in_world(act, script=takes(60.0))


@pytest.mark.parametrize("off_s", [-SET_BACK_S / 2, -1.0, 30.0, 400.0, 86_400.0])
def test_corrected_clock_decides_when_a_job_starts(off_s: float) -> None:
    """The clock may be set forward by any time and back by a little. Midnight must not come before midnight."""

    async def act(world: World) -> None:
        made = _later()
        await submitted(world, made)
        await asyncio.sleep(10)
        world.manager_processes[0].clock.off_s += off_s
        due_s = max(10.0, LATER_S - off_s)
        assert due_s <= await _began(world) <= due_s + 60
        await ended_well(world, made)

    in_world(act, script=takes(5.0))


# --- Bundles that end after all of their tasks ---------------------------------------------------


def _fails_once(scene: AttemptInput) -> ScriptedAttempt:
    if scene.bundle.attempt == 1:
        return ScriptedAttempt(1.0, failure=Failure(0, FailureKind.EXCEPTION, "the first attempt fails"))
    return ScriptedAttempt(1.0, value_of(scene.stage.name, scene.item))


def test_next_leader_counts_the_failed_attempt_whose_event_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a leader did not read the outstanding bundles of a job if each task of the job had ended or was not cut.
    The bundle of a failed attempt does not end a task. So if the event of the failed attempt was lost, no later leader
    counted the bundle (I3)."""

    async def act(world: World) -> None:
        lost: list[str] = []

        async def send(real: Any, queue: str, messages: Sequence[Outgoing]) -> object:
            if queue != object_keys.EVENTS:
                return await real(queue, messages)
            failed = [message.body for message in messages if '"the first attempt fails"' in message.body]
            lost.extend(failed)
            return await real(queue, [message for message in messages if message.body not in failed])

        async def fold(real: Any, change: Fold) -> object:
            answer = await real(change)
            if world.managers == 1:
                kill_manager(world)
                await asyncio.sleep(1.0)
            return answer

        around(monkeypatch, world.queue, "send", send)
        around_change(monkeypatch, world.ledger, Fold, fold)
        made = job(stage(A, retry=RetryRule(attempts=2, backoff_s=0.0)), items=1)
        await ends_well(world, made)
        assert len(lost) == 1
        assert world.managers == 2

    in_world(act, script=_fails_once)


def test_manager_with_a_late_lease_renews_the_lease_before_it_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a manager whose lease was granted in a late response began to lead although the lease had expired
    (seed 5094 of the weather `storm`)."""

    async def act(world: World) -> None:
        ttl_s = world.manager_settings.lease_ttl_s
        answers: list[str] = []

        async def lease(real: Any, name: str, owner: str, **how: Any) -> object:
            answer = await real(name, owner, **how)
            if owner == "manager-1":
                answers.append(answer.owner)
                if len(answers) == 1:
                    await asyncio.sleep(3 * ttl_s)
            return answer

        around(monkeypatch, world.ledger, "lease", lease)
        while not world.manager_processes:
            await asyncio.sleep(0.01)
        world.start_manager()
        await asyncio.sleep(4 * ttl_s)
        assert answers[:2] == ["manager-1", "manager-2"]
        standby, other = (process.manager for process in world.manager_processes)
        assert standby.owner == "manager-1", "a manager that began to lead without the lease has ended"
        assert other.is_leader.is_set()

    in_world(act, script=takes(1.0))
