"""Jobs whose first bundles are sent before the ledger contains the jobs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.errors import BackendError, NotFound, Unreachable
from batchlab.core.model import Bundle, Completion, JobId, JobState, LifecycleState, Pool, TaskSet
from batchlab.core.ports import AddJob, Outgoing
from batchlab.core.protocol import json_format, messages, object_keys
from batchlab.manager.collector import DELETE_DELAY_S, Collector
from batchlab.manager.manager import Manager
from batchlab.sim.world import MANAGER, World
from tests.support.sim.scenes import (
    A,
    around,
    around_change,
    ended,
    ended_well,
    in_world,
    job,
    kill_manager,
    leader,
    stage,
    takes,
)

WARM = (Pool("default", 2, 2, 1),)
SENT, WRITTEN = "sent", "written"


async def staffed(world: World) -> Manager:
    """Wait for a leader with instances in service, and return the leader."""
    manager = await leader(world)
    while not any(
        instance.state is LifecycleState.IN_SERVICE for g in manager.groups.values() for instance in g.instances
    ):
        await asyncio.sleep(1.0)
    return manager


@pytest.mark.parametrize(("token", "order"), [("", [SENT, WRITTEN]), ("t", [WRITTEN, SENT])])
def test_token_that_may_name_another_job_is_checked_first(
    monkeypatch: pytest.MonkeyPatch, token: str, order: list[str]
) -> None:
    async def act(world: World) -> None:
        done: list[str] = []

        async def send(real: Any, queue: str, *args: Any, **kwargs: Any) -> object:
            if queue == object_keys.tasks_queue("default"):
                done.append(SENT)
            return await real(queue, *args, **kwargs)

        async def add_job(real: Any, change: AddJob) -> object:
            done.append(WRITTEN)
            return await real(change)

        around(monkeypatch, world.queue, "send", send)
        around_change(monkeypatch, world.ledger, AddJob, add_job)
        await staffed(world)
        made = job(stage(A), items=1, token=token)
        await world.ask(lambda m: m.job_commands.submit(made, [0]), "submit")
        assert done == order
        await ended_well(world, made)

    in_world(act, script=takes(1.0), pools=WARM)


def test_job_is_restored_by_its_first_completion_after_the_managers_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client submits the job again, and the ledger does not contain the job."""

    async def act(world: World) -> None:
        async def add_job(*_: Any) -> object:
            kill_manager(world)
            await asyncio.sleep(1.0)
            raise AssertionError("the manager lives")

        around_change(monkeypatch, world.ledger, AddJob, add_job)
        manager = await staffed(world)
        made = job(stage(A), items=3, token="")
        assert world.leader
        world.leader.actor.spawn(manager.job_commands.submit(made, [0, 1, 2]), name="submit")
        await ended_well(world, made)

    in_world(act, script=takes(5.0), pools=WARM)


def test_results_without_a_watcher_are_stored_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without instances, the bundle would stay in a queue, and no manager would know of the job and launch
    instances."""

    async def act(world: World) -> None:
        async def add_job(*_: Any) -> object:
            depth = await world.queue.depth(object_keys.tasks_queue("default"))
            assert depth.visible == 0
            raise Unreachable("The ledger is away.")

        around_change(monkeypatch, world.ledger, AddJob, add_job)
        manager = await leader(world)
        with pytest.raises(Unreachable):
            await manager.job_commands.submit(job(stage(A), items=1, token=""), [0])
        assert (await world.queue.depth(object_keys.tasks_queue("default"))).visible == 0

    in_world(act, script=takes(1.0))


def test_a_completion_waits_for_the_row_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, the completion would be folded into a job that does not exist yet, and the job's conductor would miss
    it."""

    async def act(world: World) -> None:
        async def add_job(real: Any, change: AddJob) -> object:
            written = await real(change)
            await asyncio.sleep(10.0)
            return written

        around_change(monkeypatch, world.ledger, AddJob, add_job)
        await staffed(world)
        made = job(stage(A), items=1, token="")
        begun_s = world.clock.monotonic_s()
        await world.ask(lambda m: m.job_commands.submit(made, [0]), "submit")
        await ended_well(world, made)
        assert world.clock.monotonic_s() - begun_s < MANAGER.silence_s, "nothing was looked for"

    in_world(act, script=takes(0.1), pools=WARM)


def test_unsendable_bundle_is_sent_once_the_ledger_has_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        written = asyncio.Event()

        async def send(real: Any, queue: str, *args: Any, **kwargs: Any) -> object:
            if queue == object_keys.tasks_queue("default") and not written.is_set():
                raise Unreachable("The queue is away.")
            return await real(queue, *args, **kwargs)

        async def add_job(real: Any, change: AddJob) -> object:
            written.set()
            return await real(change)

        around(monkeypatch, world.queue, "send", send)
        around_change(monkeypatch, world.ledger, AddJob, add_job)
        manager = await staffed(world)
        made = job(stage(A), items=1, token="")
        accepted = await manager.job_commands.submit(made, [0])
        assert accepted.is_new
        assert accepted.rows.job.state is JobState.RUNNABLE
        await ended_well(world, made)

    in_world(act, script=takes(0.1), pools=WARM)


def test_repeated_submission_runs_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundles are sent again as copies, because the manager does not know whether they were sent. A copy first
    looks for an outcome."""

    async def act(world: World) -> None:
        is_first = True

        async def add_job(real: Any, change: AddJob) -> object:
            nonlocal is_first
            if is_first:
                is_first = False
                kill_manager(world)
                await asyncio.sleep(1.0)
            return await real(change)

        around_change(monkeypatch, world.ledger, AddJob, add_job)
        await staffed(world)
        # The first completion must not restore the job before the second submission.
        monkeypatch.setattr(Collector, "_collect_once", lambda _: asyncio.sleep(1.0))
        made = job(stage(A), items=1, token="")
        await world.ask(lambda m: m.job_commands.submit(made, [0]), "submit")
        monkeypatch.undo()
        await ended_well(world, made)
        assert len(world.starts) == 1

    in_world(act, script=takes(0.1), pools=WARM)


def test_client_can_cancel_after_a_submission_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        async def add_job(*_: Any) -> object:
            raise BackendError("The ledger refuses.")

        around_change(monkeypatch, world.ledger, AddJob, add_job)
        manager = await staffed(world)
        made = job(stage(A), items=1, token="")
        with pytest.raises(BackendError):
            await manager.job_commands.submit(made, [0])
        assert await world.find(made.id) is None
        assert (await manager.job_record(made.id)).job.id == made.id
        await manager.job_commands.cancel(made.id)
        assert (await ended(world, made)).state is JobState.CANCELLED
        with pytest.raises(NotFound):
            await manager.job_record(JobId("nobody"))

    in_world(act, script=takes(300.0), pools=WARM)


def test_unrestorable_job_does_not_block_the_count_of_others() -> None:
    """Before, its completion ended each manager that led."""

    async def act(world: World) -> None:
        manager = await leader(world)
        ghost, tasks = JobId("ghost"), TaskSet.span(0, 1)
        spec = json_format.dumps(json_format.job_to_json(job(stage(A), items=1, id=ghost))).encode()
        await world.objects.put(object_keys.spec(ghost), spec, if_absent=True)
        world.objects.damage(object_keys.spec(ghost), b'{"v":1,"id":"ghost"}')
        nothing = TaskSet()
        told = Completion(Bundle(ghost, A, tasks), "w", 1.0, 2.0, tasks, nothing, nothing, 1.0)
        body = messages.events_message(messages.Events((told,)))
        await world.queue.send(object_keys.EVENTS, [Outgoing(body)])
        made = job(stage(A), items=3)
        await world.ask(lambda m: m.job_commands.submit(made, [0, 1, 2]), "submit")
        assert (await ended(world, made)).state is JobState.SUCCEEDED
        assert world.manager is manager
        await asyncio.sleep(DELETE_DELAY_S + 1.0)
        assert (await world.queue.depth(object_keys.EVENTS)).in_flight == 0

    in_world(act, script=takes(0.1), pools=WARM)
