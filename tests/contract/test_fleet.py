"""The contract of every Fleet adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchlab.core.errors import Refused
from batchlab.core.model import LifecycleState
from tests.support.fleet import FLEET_WORLDS, STEADY, STUBBORN, FleetRig, counted, everywhere, in_service, names

on_every_fleet = everywhere(FLEET_WORLDS)
POOL = STEADY.name
USER = "a user request"


@on_every_fleet
async def test_a_new_group_starts_at_its_minimum(rig: FleetRig) -> None:
    await rig.fleet.ensure(replace(STEADY, min_size=2))
    assert (await rig.view()).desired == 2
    await rig.until(lambda view: len(in_service(view)) == 2)


@on_every_fleet
async def test_a_group_with_minimum_zero_launches_nothing(rig: FleetRig) -> None:
    await rig.fleet.ensure(STEADY)
    await rig.fleet.tick()
    assert (await rig.view()).instances == ()


@on_every_fleet
async def test_ensuring_the_same_pool_again_changes_nothing(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 2)
    await rig.fleet.ensure(STEADY)
    await rig.fleet.tick()
    view = await rig.view()
    assert (view.desired, in_service(view)) == (2, before)


@on_every_fleet
async def test_invalid_limits_are_refused(rig: FleetRig) -> None:
    for low, high in ((3, 2), (-1, 2)):
        with pytest.raises(Refused):
            await rig.fleet.ensure(replace(STEADY, min_size=low, max_size=high))
    assert await rig.fleet.describe() == []


@on_every_fleet
async def test_raising_the_minimum_raises_desired_capacity(rig: FleetRig) -> None:
    await rig.grow(STEADY, 1)
    await rig.fleet.ensure(replace(STEADY, min_size=3))
    assert (await rig.view()).desired == 3
    await rig.until(lambda view: len(in_service(view)) == 3)


@on_every_fleet
async def test_lowering_the_maximum_takes_the_newest_out(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 4)
    await rig.fleet.ensure(replace(STEADY, max_size=2))
    view = await rig.until(lambda view: len(counted(view)) == 2)
    assert (view.desired, in_service(view)) == (2, before[:2])
    newest = (await rig.fleet.activities(POOL, limit=10))[::-1]
    assert any("desired capacity from 4 to 2" in activity.cause for activity in newest)


@on_every_fleet
async def test_more_desired_capacity_launches_instances(rig: FleetRig) -> None:
    assert len(set(await rig.grow(STEADY, 3))) == 3


@on_every_fleet
async def test_desired_capacity_outside_the_limits_is_refused(rig: FleetRig) -> None:
    await rig.fleet.ensure(replace(STEADY, min_size=1, max_size=3))
    for desired in (0, 4, -1):
        with pytest.raises(Refused):
            await rig.fleet.set_desired(POOL, desired, cause=USER)
    assert (await rig.view()).desired == 1


@on_every_fleet
async def test_a_pool_that_does_not_exist_is_refused(rig: FleetRig) -> None:
    await rig.fleet.ensure(STEADY)
    with pytest.raises(Refused):
        await rig.fleet.set_desired("nobody", 1, cause=USER)
    with pytest.raises(Refused):
        await rig.fleet.terminate("nobody", ["w"], decrement=False, cause=USER)
    with pytest.raises(Refused):
        await rig.fleet.protect("nobody", ["w"], on=True)


@on_every_fleet
async def test_less_desired_capacity_takes_the_newest_out(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 3)
    await rig.fleet.set_desired(POOL, 1, cause=USER)
    view = await rig.until(lambda view: len(counted(view)) == 1)
    assert in_service(view) == before[:1]


@on_every_fleet
async def test_a_group_scales_to_zero(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 3)
    await rig.fleet.set_desired(POOL, 0, cause=USER)
    view = await rig.until(lambda v: all(i.state == "Terminated" for i in v.instances))
    assert names(view.instances) == before


@on_every_fleet
async def test_protected_instances_are_not_scaled_in(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 3)
    await rig.fleet.protect(POOL, before[1:], on=True)
    await rig.fleet.set_desired(POOL, 2, cause=USER)
    view = await rig.until(lambda view: len(counted(view)) == 2)
    assert in_service(view) == before[1:]
    assert [i.protected for i in view.instances if i.id in before[1:]] == [True, True]


@on_every_fleet
async def test_protected_instances_stay_until_one_is_released(rig: FleetRig) -> None:
    """A user must be able to see and end a protection."""
    before = await rig.grow(STEADY, 2)
    await rig.fleet.protect(POOL, before, on=True)
    await rig.fleet.set_desired(POOL, 0, cause=USER)
    for _ in range(3):
        await rig.fleet.tick()
    view = await rig.view()
    assert (view.desired, in_service(view)) == (0, before)
    told = [a for a in await rig.fleet.activities(POOL) if "protected from scale" in a.description]
    assert len(told) == 1
    await rig.fleet.protect(POOL, before[:1], on=False)
    view = await rig.until(lambda view: len(counted(view)) == 1)
    assert in_service(view) == before[1:]


@on_every_fleet
async def test_only_instances_in_service_can_be_protected(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 2)
    await rig.fleet.terminate(POOL, before[:1], decrement=True, cause=USER)
    for wrong in (before[0], "nobody"):
        with pytest.raises(Refused):
            await rig.fleet.protect(POOL, [before[1], wrong], on=True)
    assert not any(i.protected for i in (await rig.view()).instances)


@on_every_fleet
async def test_named_instance_is_terminated_and_desired_capacity_drops(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 3)
    await rig.fleet.terminate(POOL, before[:2], decrement=True, cause=USER)
    view = await rig.until(lambda v: [i.state for i in v.instances][:2] == ["Terminated"] * 2)
    assert (view.desired, in_service(view)) == (1, before[2:])


@on_every_fleet
async def test_a_named_instance_is_replaced_unless_capacity_is_lowered(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 2)
    await rig.fleet.terminate(POOL, before[:1], decrement=False, cause=USER)
    view = await rig.until(lambda v: before[0] not in counted(v) and len(in_service(v)) == 2)
    assert view.desired == 2
    assert in_service(view)[0] == before[1]


@on_every_fleet
async def test_protection_does_not_save_a_named_instance(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 2)
    await rig.fleet.protect(POOL, before, on=True)
    await rig.fleet.terminate(POOL, before[:1], decrement=True, cause=USER)
    view = await rig.until(lambda view: len(counted(view)) == 1)
    assert in_service(view) == before[1:]


@on_every_fleet
async def test_capacity_is_not_lowered_below_the_minimum(rig: FleetRig) -> None:
    before = await rig.grow(replace(STEADY, min_size=1), 2)
    with pytest.raises(Refused):
        await rig.fleet.terminate(POOL, before, decrement=True, cause=USER)
    await rig.fleet.tick()
    view = await rig.view()
    assert (view.desired, in_service(view)) == (2, before)


@on_every_fleet
async def test_unknown_instance_fails_the_whole_request(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 2)
    with pytest.raises(Refused):
        await rig.fleet.terminate(POOL, [before[0], "nobody"], decrement=True, cause=USER)
    await rig.fleet.tick()
    view = await rig.view()
    assert (view.desired, in_service(view)) == (2, before)


@on_every_fleet
async def test_repeated_termination_lowers_capacity_once(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 3)
    for chosen in (before[:1] * 2, before[:1]):
        await rig.fleet.terminate(POOL, chosen, decrement=True, cause=USER)
    assert (await rig.view()).desired == 2
    await rig.until(lambda view: in_service(view) == before[1:])


@on_every_fleet
async def test_an_instance_that_dies_is_reported_once_and_replaced(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 2)
    rig.crash(before[0])
    await rig.until(lambda v: before[0] not in counted(v) and len(in_service(v)) == 2)
    await rig.fleet.tick()
    assert names(rig.dead) == [before[0]]
    assert rig.told in rig.dead[0].note
    assert not rig.dead[0].note.startswith("terminated")
    assert rig.dead[0].state is LifecycleState.TERMINATED
    causes = [activity.cause for activity in await rig.fleet.activities(POOL)]
    assert any("health check" in cause and rig.told in cause for cause in causes)


@on_every_fleet
async def test_all_instances_dying_at_once_are_all_replaced(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 4)
    for instance in before:
        rig.crash(instance)
    view = await rig.until(lambda v: len(in_service(v)) == 4 and in_service(v) != before)
    assert not set(before) & set(counted(view))
    assert sorted(names(rig.dead)) == sorted(before)


@on_every_fleet
async def test_termination_by_the_group_names_its_cause(rig: FleetRig) -> None:
    await rig.grow(STEADY, 1)
    await rig.fleet.set_desired(POOL, 0, cause=USER)
    await rig.until(lambda _: bool(rig.dead))
    assert [i.note.startswith("terminated") for i in rig.dead] == [True]


@on_every_fleet
async def test_an_unhealthy_instance_is_replaced(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 2)
    await rig.fleet.set_health(before[0], healthy=False, cause="silent for 90 s")
    view = await rig.until(lambda v: before[0] not in counted(v) and len(in_service(v)) == 2)
    assert view.desired == 2
    causes = [activity.cause for activity in await rig.fleet.activities(POOL)]
    assert any("health check: silent for 90 s" in cause for cause in causes)


@on_every_fleet
async def test_healthy_instance_set_healthy_stays(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 1)
    await rig.fleet.set_health(before[0], healthy=True, cause=USER)
    await rig.fleet.tick()
    assert in_service(await rig.view()) == before


@on_every_fleet
async def test_the_health_of_an_unknown_instance_is_refused(rig: FleetRig) -> None:
    await rig.fleet.ensure(STEADY)
    with pytest.raises(Refused):
        await rig.fleet.set_health("nobody", healthy=False, cause=USER)


@on_every_fleet
async def test_pools_do_not_touch_each_other(rig: FleetRig) -> None:
    other = replace(STEADY, name="other")
    ours, theirs = await rig.grow(STEADY, 2), await rig.grow(other, 2)
    assert not set(ours) & set(theirs)
    await rig.fleet.set_desired("other", 0, cause=USER)
    await rig.until(lambda view: not counted(view), "other")
    assert in_service(await rig.view()) == ours
    assert {activity.pool for activity in await rig.fleet.activities("other")} == {"other"}


@on_every_fleet
async def test_instance_of_another_pool_is_refused(rig: FleetRig) -> None:
    ours = await rig.grow(STEADY, 1)
    await rig.fleet.ensure(replace(STEADY, name="other"))
    with pytest.raises(Refused):
        await rig.fleet.terminate("other", ours, decrement=False, cause=USER)


@on_every_fleet
async def test_a_worker_that_still_drains_does_not_count(rig: FleetRig) -> None:
    """A draining instance must not count twice, and must not return to service."""
    before = await rig.grow(STUBBORN, 1)
    await rig.fleet.terminate(STUBBORN.name, before, decrement=False, cause=USER)
    view = await rig.until(lambda v: in_service(v) not in ([], before), STUBBORN.name)
    states = [instance.state for instance in view.instances]
    assert states in (["Terminating", "InService"], ["Terminated", "InService"])


@on_every_fleet
async def test_activities_are_limited_and_newest_first(rig: FleetRig) -> None:
    await rig.grow(STEADY, 2)
    everything = await rig.fleet.activities()
    assert [a.id for a in everything] == sorted((a.id for a in everything), reverse=True)
    assert await rig.fleet.activities(limit=2) == everything[:2]
    assert await rig.fleet.activities(POOL, limit=50) == everything


@on_every_fleet
async def test_change_of_capacity_names_its_requester_and_reason(rig: FleetRig) -> None:
    await rig.grow(STEADY, 2)
    await rig.fleet.set_desired(POOL, 1, cause="an idle pool")
    await rig.until(lambda view: len(counted(view)) == 1)
    told = " ".join(a.cause for a in (await rig.fleet.activities(POOL))[::-1])
    assert "a user request changed desired capacity from 0 to 2" in told
    assert "increasing the capacity from 1 to 2" in told
    assert "an idle pool changed desired capacity from 2 to 1" in told
    assert "shrinking the capacity from 2 to 1" in told


# --- The scheduled end ---------------------------------------------------------------------------


@on_every_fleet
async def test_the_scheduled_end_terminates_all_but_protected_instances(rig: FleetRig) -> None:
    before = await rig.grow(replace(STEADY, min_size=2), 3)
    await rig.fleet.protect(POOL, before[:1], on=True)
    assert not (await rig.fleet.schedule_end(POOL, 1.0)).existed
    view = await rig.until(lambda view: counted(view) == before[:1])
    assert (view.pool.min_size, view.pool.max_size, view.desired) == (0, 0, 0)
    assert not (await rig.fleet.schedule_end(POOL, None)).existed, "a performed action no longer exists"


@on_every_fleet
async def test_limits_are_restored_after_the_scheduled_end(rig: FleetRig) -> None:
    before = await rig.grow(replace(STEADY, min_size=1), 1)
    await rig.fleet.schedule_end(POOL, 1.0)
    await rig.until(lambda view: not view.pool.max_size and not counted(view))
    await rig.fleet.ensure(replace(STEADY, min_size=1))
    view = await rig.until(lambda view: len(in_service(view)) == 1)
    assert (view.pool.min_size, view.pool.max_size, view.desired) == (1, STEADY.max_size, 1)
    assert in_service(view) != before


@on_every_fleet
async def test_a_postponed_end_replaces_the_earlier_one(rig: FleetRig) -> None:
    before = await rig.grow(STEADY, 1)
    told = [(await rig.fleet.schedule_end(POOL, after_s)).existed for after_s in (2.0, 3600.0)]
    assert told == [False, True]
    for _ in range(30):
        await rig.fleet.tick()
        await rig.rest()
    assert in_service(await rig.view()) == before
    assert [(await rig.fleet.schedule_end(POOL, None)).existed for _ in range(2)] == [True, False]


@on_every_fleet
async def test_the_end_of_an_unknown_pool_is_refused(rig: FleetRig) -> None:
    await rig.fleet.ensure(STEADY)
    for after_s in (60.0, None):
        with pytest.raises(Refused):
            await rig.fleet.schedule_end("nobody", after_s)
