"""Random histories of requests, faults, and restarts. The limits hold at every moment, a restart changes nothing, and
the group converges after the last fault. The file also tests old and new formats of the saved state."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from batchlab.adapters.memory.launcher import MemoryState
from batchlab.core.errors import BackendError
from batchlab.core.model import LifecycleState, Pool
from batchlab.fleet.api_types import (
    ABANDON,
    CONTINUE,
    LAUNCHING,
    TERMINATING,
    Fault,
    InstancesDistribution,
    LaunchTemplate,
    MixedInstancesPolicy,
    Override,
    Process,
    RefreshPreferences,
    ScheduledAction,
    WarmPool,
)
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.fleet.group_state import FINAL
from tests.support.autoscaling_group import CONFIG, GROUP, ZONES, World, hook
from tests.support.fleet import CountedIds, ManualClock, TableLauncher, counted, in_service

MIXED = replace(
    CONFIG,
    max_size=6,
    capacity_rebalance=True,
    launch_template=None,
    mixed_instances_policy=MixedInstancesPolicy(
        LaunchTemplate("", "workers"),
        (Override("m.large"), Override("c.large")),
        InstancesDistribution(on_demand_base_capacity=1, on_demand_percentage_above_base_capacity=40),
    ),
)


def check_limits(w: World) -> None:
    """Check invariant I5 for an Auto Scaling group. Instances that are being replaced do not count, so a group may
    exceed its maximum for a while."""
    group = w.asg._groups[GROUP]
    staying = group.staying()
    config = w.view().config
    assert config.min_size <= group.desired <= config.max_size
    free = [member for member in staying if not member.instance.protected]
    held = group.suspended(Process.TERMINATE) or not free
    assert len(staying) <= config.max_size or held
    assert len(group.counted_members()) - len(staying) <= config.max_size + 6


def check_restart(w: World) -> None:
    before = w.view(), w.asg.describe_auto_scaling_instances(), w.asg.describe_warm_pool(GROUP)
    refreshes = w.asg.describe_instance_refreshes(GROUP)
    told = w.activities()
    w.restart()
    after = w.view(), w.asg.describe_auto_scaling_instances(), w.asg.describe_warm_pool(GROUP)
    assert after == before
    assert w.asg.describe_instance_refreshes(GROUP) == refreshes
    assert w.activities() == told


def _limits(w: World, rng: Random) -> None:
    low = rng.randint(0, 3)
    changes = {"min_size": low, "max_size": low + rng.randint(0, 5)}
    if rng.random() < 0.3:
        changes["availability_zones"] = ZONES[: rng.randint(1, 3)]  # type: ignore[assignment]
    w.asg.update_auto_scaling_group(GROUP, changes)


def _hooks(w: World, rng: Random, name: str) -> None:
    match rng.randrange(4):
        case 0:
            kind = rng.choice([LAUNCHING, TERMINATING])
            result = rng.choice([CONTINUE, ABANDON])
            w.asg.put_lifecycle_hook(hook(kind[-9:], kind, heartbeat_timeout=30, default_result=result))
        case 1:
            w.asg.delete_lifecycle_hook(GROUP, rng.choice([LAUNCHING, TERMINATING])[-9:])
        case _:
            for which in w.asg.describe_lifecycle_hooks(GROUP):
                w.asg.complete_lifecycle_action(
                    GROUP, which.lifecycle_hook_name, rng.choice([CONTINUE, CONTINUE, ABANDON]), instance_id=name
                )


def _standby(w: World, rng: Random, name: str) -> None:
    if rng.random() < 0.5:
        w.asg.enter_standby(GROUP, [name], should_decrement_desired_capacity=rng.random() < 0.5)
    else:
        w.asg.exit_standby(GROUP, w.ids_in(LifecycleState.STANDBY))


def _refresh(w: World, rng: Random) -> None:
    if rng.random() < 0.3:
        w.asg.cancel_instance_refresh(GROUP)
    else:
        preferences = RefreshPreferences(
            min_healthy_percentage=rng.choice([0, 50, 100]),
            max_healthy_percentage=rng.choice([100, 100, 120]) if rng.random() < 0.5 else 100,
            skip_matching=rng.random() < 0.3,
            standby_instances=rng.choice(["Wait", "Ignore", "Terminate"]),
        )
        w.asg.start_instance_refresh(GROUP, preferences=preferences)


def _warm_pool(w: World, rng: Random) -> None:
    if rng.random() < 0.5:
        reuse = rng.random() < 0.5
        w.asg.put_warm_pool(GROUP, WarmPool(rng.randint(0, 1), 3, "Running", reuse))
    else:
        w.asg.delete_warm_pool(GROUP, force_delete=rng.random() < 0.5)


def _spot(w: World, rng: Random, name: str) -> None:
    if rng.random() < 0.5:
        w.asg.rebalance(name)
    else:
        w.asg.interrupt(name, notice_s=rng.choice([0.0, 5.0]))


def _processes(w: World, rng: Random) -> None:
    some = rng.sample(list(Process), k=rng.randint(0, 2))
    if rng.random() < 0.4:
        w.asg.suspend_processes(GROUP, [*some, rng.choice(list(Process))])
    else:
        w.asg.resume_processes(GROUP, some)


def _launcher(w: World, rng: Random) -> None:
    w.launcher.refuse = rng.choice(["", "", "", "no capacity"])
    w.launcher.deaf = rng.random() < 0.2
    kinds = [(kind, zone) for kind in ("m.large", "c.large") for zone in ZONES]
    w.launcher.exhausted = set(rng.sample(kinds, k=rng.randint(0, 3)))


async def random_step(w: World, rng: Random) -> None:
    names = [one.instance_id for one in w.asg.describe_auto_scaling_instances()]
    name = rng.choice([*names, "nobody"])
    match rng.randrange(16):
        case 0:
            w.asg.set_desired_capacity(GROUP, rng.randint(-1, 9))
        case 1:
            w.asg.terminate_instance_in_auto_scaling_group(name, should_decrement_desired_capacity=rng.random() < 0.5)
        case 2:
            w.launcher.known[name] = w.launcher.known.get(name) or "exit -9"
        case 3:
            w.asg.set_instance_protection(GROUP, [name], protected_from_scale_in=rng.random() < 0.6)
        case 4:
            _limits(w, rng)
        case 5:
            check_restart(w)
        case 6:
            _launcher(w, rng)
        case 7:
            w.asg.set_instance_health(name, rng.choice(["Healthy", "Unhealthy"]))
        case 8:
            _hooks(w, rng, name)
        case 9:
            _standby(w, rng, name)
        case 10:
            _refresh(w, rng)
        case 11:
            _warm_pool(w, rng)
        case 12:
            _spot(w, rng, name)
        case 13:
            _processes(w, rng)
        case 14:
            at_s = w.clock.now_s() + rng.choice([1.0, 60.0])
            w.asg.put_scheduled_update_group_action(
                ScheduledAction(GROUP, "s", start_time=at_s, desired_capacity=rng.randint(0, 6))
            )
        case _:
            pass
    await w.tick(rng.choice([0.0, 0.5, 5.0, 70.0]), times=rng.randint(0, 2))


async def settle(w: World) -> None:
    """End all faults, hooks, and standby states, and wait until the group is stable."""
    w.launcher.refuse, w.launcher.deaf, w.launcher.exhausted = "", False, set()
    w.asg.resume_processes(GROUP)
    for one in w.asg.describe_lifecycle_hooks(GROUP):
        w.asg.delete_lifecycle_hook(GROUP, one.lifecycle_hook_name)
    with suppress(Fault):
        w.asg.delete_warm_pool(GROUP)
    for name in w.ids_in(LifecycleState.STANDBY, LifecycleState.ENTERING_STANDBY):
        w.asg.terminate_instance_in_auto_scaling_group(name, should_decrement_desired_capacity=False)
    for _ in range(100):
        asked = {name for name, _ in w.launcher.terminated}
        for name, how in w.launcher.known.items():
            # The launcher has killed the instances that ignored the request to end.
            w.launcher.known[name] = "exit -9" if how is None and name in asked else how
        serving = w.ids_in(LifecycleState.IN_SERVICE)
        w.asg.set_instance_protection(GROUP, serving, protected_from_scale_in=False)
        await w.tick(61.0)


@pytest.mark.parametrize("block", range(6))
def test_limits_hold_and_the_group_converges_in_any_history(block: int) -> None:
    async def history(seed: int) -> None:
        rng, w = Random(seed), World()

        async def amid_a_tick(_: str) -> None:
            check_limits(w)

        w.launcher.on_launch = w.launcher.on_terminate = amid_a_tick
        w.asg.create_auto_scaling_group(MIXED, desired_capacity=rng.randint(0, 4))
        for _ in range(60):
            with suppress(Fault):
                await random_step(w, rng)
            check_limits(w)
        await settle(w)
        check_limits(w)
        view = w.view()
        serving = w.ids_in(LifecycleState.IN_SERVICE)
        living = [name for name, how in w.launcher.known.items() if how is None]
        assert len(serving) == view.desired_capacity == len(view.instances)
        assert sorted(living) == sorted(serving), "nothing else runs"
        assert {a.status_code for a in w.activities()} <= FINAL
        zones = [w.zones().count(zone[-1]) for zone in view.config.availability_zones]
        assert max(zones) - min(zones) <= 1

    for seed in range(block * 25, block * 25 + 25):
        asyncio.run(history(seed))


# --- Formats --------------------------------------------------------------------------------------

FORMAT_1: dict[str, Any] = {
    "format": 1,
    "next_activity": 4,
    "groups": [
        {
            "pool": {"name": "p", "min_size": 0, "max_size": 4, "slots": 1, "boot_s": 0.0, "env": [["A", "b"]]},
            "desired": 2,
            "members": [
                ["w-1", "InService", 7.0, True, True, "", 2, 0, True],
                ["w-2", "Pending", 8.0, True, False, "", 3, 0, False],
            ],
        }
    ],
    "activities": [
        [1, "p", 5.0, "Creating group", "a user", "Successful"],
        [3, "p", 8.0, "Launching a new instance: w-2", "a difference", "InProgress"],
    ],
}


def _managed(state: object, *living: str) -> ManagedFleet:
    store, launcher = MemoryState(), TableLauncher(dict.fromkeys(living))
    store.save(json.dumps(state).encode())
    return ManagedFleet(launcher, ManualClock(), CountedIds(), store)


def test_state_of_the_first_format_is_read() -> None:
    async def main() -> None:
        fleet = _managed(FORMAT_1, "w-1", "w-2")
        (view,) = await fleet.describe()
        assert view.pool == Pool("p", 0, 4, env=(("A", "b"),))
        assert (in_service(view), counted(view)) == (["w-1"], ["w-1", "w-2"])
        launch, created = await fleet.activities()
        assert (created.ended_s, launch.ended_s) == (5.0, None)
        await fleet.ready("w-2")
        await fleet.tick()
        (view,) = await fleet.describe()
        assert in_service(view) == ["w-1", "w-2"]
        assert (await fleet.activities())[0].status == "Successful"

    asyncio.run(main())


@pytest.mark.parametrize("wrong", [{"groups": [{**FORMAT_1["groups"][0], "asg": 1}]}, {"format": 3}])
def test_inconsistent_state_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match="saved state cannot be read"):
        _managed({**FORMAT_1, **wrong})
