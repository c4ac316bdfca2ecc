"""The Auto Scaling rules of ManagedFleet, with a manual clock and a launcher in memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest

from batchlab.core.errors import BackendError, Refused
from batchlab.core.model import Instance, LifecycleState
from batchlab.fleet.group_state import COUNTED, MOVES, Member
from batchlab.fleet.termination import CRASH_LOOP
from tests.support.fleet import counted, in_service, names
from tests.support.managed_fleet import POOL, USER, Disk, World, in_a_world

# --- States ---------------------------------------------------------------------------------------


def test_the_table_of_moves_lets_every_state_but_the_last_be_left() -> None:
    assert set(MOVES) == set(LifecycleState)
    assert [state for state, after in MOVES.items() if not after] == [LifecycleState.TERMINATED]


@pytest.mark.parametrize("before", list(LifecycleState))
def test_member_changes_state_only_by_the_table(before: LifecycleState) -> None:
    for after in LifecycleState:
        member = Member(Instance("w", "p", before, 0.0), launch=1)
        if after in MOVES[before]:
            member.move(after, note="")
            assert member.state is after
        else:
            with pytest.raises(ValueError, match="cannot go from"):
                member.move(after, note="")


@in_a_world
async def test_an_instance_is_in_service_once_it_runs_and_its_worker_reported(w: World) -> None:
    first, second = await w.launch(2, ready=False)
    await w.tick()
    assert await w.states() == ["Pending", "Pending"]
    await w.fleet.ready(second)
    await w.fleet.ready(second)
    assert in_service(await w.view()) == [second]
    launches = [a for a in await w.fleet.activities("p") if a.description.startswith("Launching")]
    assert {a.description[-6:]: a.status for a in launches} == {first: "InProgress", second: "Successful"}


@in_a_world
async def test_a_beat_during_the_launch_is_not_lost(w: World) -> None:
    async def reports_before_launch_returns(instance: str) -> None:
        await w.fleet.ready(instance)
        assert await w.states() == ["Pending"]

    w.launcher.on_launch = reports_before_launch_returns
    await w.launch(1, ready=False)
    assert await w.states() == ["InService"]


@in_a_world
async def test_late_heartbeat_has_no_effect(w: World) -> None:
    (name,) = await w.launch(1)
    await w.fleet.set_desired("p", 0, cause=USER)
    await w.fleet.ready(name)
    await w.fleet.ready("w-unknown")
    assert await w.states() == ["Terminating"]


@in_a_world
async def test_a_terminated_instance_is_listed_for_a_minute(w: World) -> None:
    await w.launch(1)
    await w.fleet.set_desired("p", 0, cause=USER)
    await w.tick()
    (dead,) = await w.tick()
    assert dead.note == "terminated: scale-in (exit 0)"
    await w.tick(60.0)
    assert await w.states() == ["Terminated"]
    await w.tick(0.1)
    assert await w.states() == []


# --- Scale-in and termination ---------------------------------------------------------------------


@in_a_world
async def test_scale_in_ends_pending_instances_first_and_then_the_newest(w: World) -> None:
    old, new, pending, newest = await w.launch(4, ready=False)
    for name in (old, new, newest):
        await w.fleet.ready(name)
    left = []
    for desired in (3, 2, 1, 0):
        await w.fleet.set_desired("p", desired, cause=USER)
        left.append(counted(await w.view()))
    assert left == [[old, new, newest], [old, new], [old], []]
    cancelled = [a.description for a in await w.fleet.activities("p") if a.status == "Cancelled"]
    assert cancelled == [f"Launching a new instance: {pending}"]


@in_a_world
async def test_launcher_is_called_once_with_the_grace_period(w: World) -> None:
    (name,) = await w.launch(1)
    w.launcher.deaf = True
    await w.fleet.set_desired("p", 0, cause=USER)
    for _ in range(3):
        await w.tick(1.0)
    assert w.launcher.terminated == [(name, 30.0)]
    assert await w.states() == ["Terminating"]


@in_a_world
async def test_a_request_that_is_refused_leaves_no_trace(w: World) -> None:
    first, second = await w.launch(2, pool=replace(POOL, min_size=1))
    before = await w.view(), await w.causes()
    with pytest.raises(Refused, match="below its min of 1"):
        await w.fleet.terminate("p", [first, second], decrement=True, cause=USER)
    assert (await w.view(), await w.causes()) == before


@in_a_world
async def test_one_termination_that_fails_stops_no_other_and_is_tried_again(w: World) -> None:
    first, second = await w.launch(2)
    down = True

    async def fails_for_the_first(instance: str) -> None:
        if down and instance == first:
            raise BackendError("the engine does not answer")
        for _ in range(10):
            await asyncio.sleep(0)

    w.launcher.on_terminate = fails_for_the_first
    await w.fleet.set_desired("p", 0, cause=USER)
    with pytest.raises(BackendError, match="does not answer"):
        await w.tick()
    assert [name for name, _ in w.launcher.terminated] == [second]
    down = False
    assert names(await w.tick()) == [second]
    assert names(await w.tick()) == [first]


@in_a_world
async def test_an_instance_named_while_it_is_launched_is_ended_at_the_next_tick(w: World) -> None:
    async def scaled_in_meanwhile(_: str) -> None:
        await w.fleet.set_desired("p", 0, cause=USER)

    w.launcher.on_launch = scaled_in_meanwhile
    await w.launch(1, ready=False)
    assert await w.states() == ["Terminating"]
    await w.tick()
    assert len(await w.tick()) == 1
    assert w.launcher.launched == [name for name, _ in w.launcher.terminated]


@in_a_world
async def test_failed_launch_after_a_scale_in_is_not_a_failure(w: World) -> None:
    async def scaled_in_and_failed(_: str) -> None:
        await w.fleet.set_desired("p", 0, cause=USER)
        raise BackendError("no answer in time")

    w.launcher.on_launch = scaled_in_and_failed
    await w.launch(1, ready=False)
    (instance,) = (await w.view()).instances
    assert (str(instance.state), instance.note) == ("Terminated", "terminated: scale-in")


@in_a_world
async def test_protection_that_outlasts_lowered_limits_ends_with_its_release(w: World) -> None:
    """The excess instances end at once, not at the next tick (I5)."""
    chosen = await w.launch(4)
    await w.fleet.protect("p", chosen, on=True)
    await w.fleet.ensure(replace(POOL, max_size=1))
    assert counted(await w.view()) == chosen
    await w.fleet.protect("p", chosen[:2], on=False)
    assert counted(await w.view()) == chosen[2:]


# --- Health ---------------------------------------------------------------------------------------


@in_a_world
async def test_an_instance_that_never_reports_is_replaced_after_the_grace(w: World) -> None:
    """An instance that hangs at its start must not count forever."""
    (silent,) = await w.launch(1, ready=False)
    await w.tick(60.0)
    assert await w.states() == ["Pending"]
    await w.tick(0.1)
    assert await w.states() == ["Terminating", "Pending"]
    (dead,) = await w.tick()
    assert dead.id == silent
    assert dead.note == "terminated: no beat within 60 s of its launch (exit 0)"
    told = {a.description: (a.status, a.cause) for a in await w.fleet.activities("p")}
    assert told[f"Launching a new instance: {silent}"][0] == "Failed"
    assert told[f"Terminating instance: {silent}"] == (
        "Successful",
        "an instance was taken out of service in response to a health check: no beat within 60 s of its launch",
    )


@in_a_world
async def test_a_pool_that_boots_slowly_has_its_boot_time_on_top(w: World) -> None:
    await w.launch(1, ready=False, pool=replace(POOL, boot_s=90.0))
    await w.tick(150.0)
    assert await w.states() == ["Pending"]


@in_a_world
async def test_a_restarted_manager_gives_the_grace_anew(w: World) -> None:
    (name,) = await w.launch(1, ready=False)
    w.clock.time_s += 3_600
    w.restart()
    await w.tick()
    await w.fleet.ready(name)
    assert in_service(await w.view()) == [name]


@in_a_world
async def test_instance_unknown_to_the_launcher_is_replaced(w: World) -> None:
    (name,) = await w.launch(1)
    del w.launcher.known[name]
    (dead,) = await w.tick()
    assert (dead.id, dead.note) == (name, "its launcher does not know it")
    assert await w.states() == ["Terminated", "Pending"]


@in_a_world
async def test_an_unhealthy_instance_is_drained_while_its_successor_starts(w: World) -> None:
    (name,) = await w.launch(1)
    await w.fleet.set_health(name, healthy=False, cause="silent for 90 s")
    await w.fleet.set_health(name, healthy=True, cause="it came back")
    assert [i.healthy for i in (await w.view()).instances] == [False]
    await w.tick()
    assert await w.states() == ["Terminating", "Pending"]
    assert w.launcher.terminated == [(name, 30.0)]


# --- Crash loops ----------------------------------------------------------------------------------


async def _crash_all(w: World, how: str) -> None:
    for name in counted(await w.view()):
        w.launcher.crash(name, how)


@in_a_world
async def test_crash_loop_slows_down_and_gives_its_reason(w: World) -> None:
    """The fleet must not start workers in an endless loop, and must report the cause."""
    await w.launch(1, ready=False)
    launched_at_s = []
    for _ in range(2_400):
        before = len(w.launcher.launched)
        await _crash_all(w, "exit 1")
        await w.tick(0.1)
        if len(w.launcher.launched) > before:
            launched_at_s.append(w.clock.time_s)
        assert any("exit 1" in i.note for i in (await w.view()).instances), "always in sight"
    gaps = [round(b - a) for a, b in pairwise(launched_at_s)]
    assert gaps == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    await w.tick(60.0)
    (pending,) = [i for i in (await w.view()).instances if i.state in COUNTED]
    assert pending.note == "the last 11 ended before they were ready: exit 1"
    (newest, *_) = [a for a in await w.fleet.activities("p") if a.description.startswith("Wait")]
    assert newest.description == "Waiting 60 s before the next launch"
    assert newest.cause == "11 instances in a row ended before they were ready, the last: exit 1"
    assert newest.status == "Failed"


@in_a_world
async def test_an_instance_that_got_ready_ends_the_crash_loop(w: World) -> None:
    await w.launch(3, ready=False)
    await _crash_all(w, "exit 1")
    await w.tick()
    assert counted(await w.view()) == []
    await w.tick(1.1)
    (probe,) = counted(await w.view())
    await w.tick(20.0)
    assert counted(await w.view()) == [probe], "one probe at a time"
    await w.fleet.ready(probe)
    await w.tick()
    assert len(counted(await w.view())) == 3


@in_a_world
async def test_workers_that_die_at_work_make_no_crash_loop(w: World) -> None:
    """Capacity that is lost to faults is replaced at once."""
    await w.launch(2)
    for _ in range(2 * CRASH_LOOP):
        await _crash_all(w, "exit -9")
        await w.tick()
        assert len(counted(await w.view())) == 2
        for name in counted(await w.view()):
            await w.fleet.ready(name)


@in_a_world
async def test_failed_launch_is_retried_and_gives_its_reason(w: World) -> None:
    """The group reports the reason of a failed launch. In this test, AWS lacks capacity."""
    w.launcher.refuse = "no capacity in this zone"
    await w.launch(1, ready=False)
    (failed,) = (await w.view()).instances
    assert failed.state is LifecycleState.TERMINATED
    assert failed.note == "its launch failed: no capacity in this zone"
    (activity,) = [a for a in await w.fleet.activities("p") if a.status == "Failed"]
    assert activity.cause.endswith("; its launch failed: no capacity in this zone")
    w.launcher.refuse = ""
    await w.tick(0.1)
    assert await w.states() == ["Terminated", "Pending"]


@in_a_world
async def test_changed_pool_is_retried_at_once(w: World) -> None:
    await w.launch(3, ready=False)
    await _crash_all(w, "exit 1")
    await w.tick()
    assert counted(await w.view()) == []
    await w.fleet.ensure(replace(POOL, env=(("LEVEL", "2"),)))
    await w.tick()
    assert len(counted(await w.view())) == 3


# --- GPUs of one machine --------------------------------------------------------------------------


@in_a_world
async def test_an_instance_waits_for_the_gpus_of_the_ending_instance(w: World) -> None:
    w.options["one_machine"] = True
    w.restart()
    (first,) = await w.launch(1, pool=replace(POOL, max_size=1, gpus=1))
    w.launcher.deaf = True
    await w.fleet.terminate("p", [first], decrement=False, cause=USER)
    for _ in range(3):
        await w.tick(1.0)
    assert await w.states() == ["Terminating"]
    w.launcher.crash(first)
    await w.tick(1.0)
    assert await w.states() == ["Terminated", "Pending"]


@in_a_world
async def test_an_instance_waits_for_the_gpus_of_an_instance_that_the_fleet_has_lost(w: World) -> None:
    w.options["one_machine"] = True
    w.restart()
    pool = replace(POOL, max_size=1, gpus=1)
    (first,) = await w.launch(1, pool=pool)
    w.store, w.launcher.deaf = Disk(), True
    w.restart()
    assert await w.launch(1, pool=pool) == []
    w.launcher.crash(first)
    await w.tick(1.0)
    assert await w.states() == ["Pending"]
