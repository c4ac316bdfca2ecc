"""The requests of the Fleet adapter for Auto Scaling, their number, and their errors."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from botocore.exceptions import ClientError

from batchlab.adapters.aws import endpoint
from batchlab.adapters.aws.fleet import Ec2Fleet
from batchlab.adapters.aws.group_descriptions import DRAIN_HOOK, READY_HOOK, GroupParameters
from batchlab.adapters.clock import WallClock
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Refused, Throttled, Unreachable
from batchlab.core.model import LifecycleState
from tests.support.aws.autoscaling_api import TEMPLATE, ZONE, Behaving, Served, autoscaling, served
from tests.support.fleet import STEADY, FleetRig, TableLauncher, in_service, names

POOL = STEADY.name


class Counted:
    """A fleet at batchlab's endpoint that records every request."""

    def __init__(self, up: Served, launcher: Behaving, form: GroupParameters, prefix: str) -> None:
        self.up = up
        self.prefix = prefix
        self.launcher = launcher
        self.fleet = Ec2Fleet(up.endpoint, WallClock(), form, prefix=prefix)
        self.made: Counter[str] = Counter()
        client: Any = self.fleet._asg
        client.meta.events.register("before-call.*", self._count)
        rest = lambda: asyncio.sleep(0.02)  # noqa: E731
        self.rig = FleetRig(self.fleet, launcher.crash, self.fleet.ready, rest)
        self.asg: Any = autoscaling(up.endpoint)

    def _count(self, *, model: Any, **_: Any) -> None:
        self.made[model.name] += 1

    async def during(self, do: Awaitable[Any]) -> dict[str, int]:
        """Return the requests that `do` makes, by action."""
        self.made.clear()
        await do
        return dict(self.made)

    async def ask(self, action: str, **asked: Any) -> Any:
        """Send a request of another client."""
        return await asyncio.to_thread(getattr(self.asg, action), **asked)


def run(check: Callable[[Counted], Awaitable[None]], folder: Path, form: GroupParameters | None = None) -> None:
    form = form or GroupParameters(TEMPLATE, zones=(ZONE,), drain_s=0)

    async def main() -> None:
        launcher = Behaving(TableLauncher())
        async with served(launcher, launcher.changed, folder) as up:
            counted = Counted(up, launcher, form, f"{uuid4().hex}.")
            try:
                await check(counted)
            finally:
                await counted.fleet.close()
                counted.asg.close()

    asyncio.run(main())


def test_tick_is_one_request_for_any_number_of_pools(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        for name in ("a", "b", "c"):
            await at.rig.grow(replace(STEADY, name=name), 2)
        assert await at.during(at.fleet.tick()) == {"DescribeAutoScalingGroups": 1}
        assert await at.during(at.fleet.describe()) == {}

    run(check, tmp_path)


def test_a_change_is_followed_by_one_look(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        await at.rig.grow(STEADY, 1)
        asked = await at.during(at.fleet.set_desired(POOL, 2, cause="a test"))
        assert asked == {"SetDesiredCapacity": 1}
        assert await at.during(at.fleet.describe()) == {"DescribeAutoScalingGroups": 1}
        assert await at.during(at.fleet.describe()) == {}
        same = at.fleet.set_desired(POOL, 2, cause="a test")
        assert await at.during(same) == {}

    run(check, tmp_path)


def test_heartbeats_of_a_known_worker_cost_no_request(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        (instance,) = await at.rig.grow(STEADY, 1)
        assert await at.during(at.fleet.ready(instance)) == {}
        assert await at.during(at.fleet.ready("i-0000000000000000")) == {}

    run(check, tmp_path)


def test_protection_is_set_fifty_at_a_time(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        instances = await at.rig.grow(replace(STEADY, max_size=120), 120)
        asked = await at.during(at.fleet.protect(POOL, instances, on=True))
        assert asked["SetInstanceProtection"] == 3
        assert all(instance.protected for instance in (await at.rig.view()).instances)

    run(check, tmp_path)


def test_a_worker_that_reports_before_its_instance_waits_is_remembered(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        await at.fleet.ensure(STEADY)
        await at.fleet.set_desired(POOL, 1, cause="a test")
        while not at.launcher.table.known:
            await asyncio.sleep(0.01)
        (instance,) = at.launcher.table.known
        await at.fleet.ready(instance)
        for _ in range(100):
            await at.fleet.tick()
            if in_service(await at.rig.view()) == [instance]:
                return
            await at.rig.rest()
        pytest.fail("it never came into service")

    run(check, tmp_path)


def test_an_instance_drains_in_its_hook(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        (instance,) = await at.rig.grow(STEADY, 1)
        await at.fleet.set_desired(POOL, 0, cause="a test")
        view = await at.rig.until(lambda view: view.instances[0].state is LifecycleState.TERMINATING)
        assert view.instances[0].note == "terminated: scale-in"
        # The worker of the instance reads the termination from the metadata service, returns its work, and ends.
        at.launcher.crash(instance, "exit 0")
        await at.rig.until(lambda _: bool(at.rig.dead))
        assert names(at.rig.dead) == [instance]

    run(check, tmp_path, GroupParameters(TEMPLATE, zones=(ZONE,), drain_s=60))


def test_existing_group_is_adopted_with_its_instances(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        before = await at.rig.grow(STEADY, 2)
        group = at.prefix + POOL
        await at.ask("delete_lifecycle_hook", AutoScalingGroupName=group, LifecycleHookName=READY_HOOK)
        form = GroupParameters(TEMPLATE, zones=(ZONE,))
        later = Ec2Fleet(at.up.endpoint, WallClock(), form, prefix=at.prefix)
        try:
            await later.ensure(replace(STEADY, max_size=7))
            (view,) = await later.describe()
        finally:
            await later.close()
        assert (view.desired, view.pool.max_size, in_service(view)) == (2, 7, before)
        hooks = await at.ask("describe_lifecycle_hooks", AutoScalingGroupName=group)
        told = {hook["LifecycleHookName"] for hook in hooks["LifecycleHooks"]}
        assert told == {READY_HOOK, DRAIN_HOOK}

    run(check, tmp_path)


def test_deleted_group_is_reported(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        await at.fleet.ensure(STEADY)
        group = at.prefix + POOL
        await at.ask("delete_auto_scaling_group", AutoScalingGroupName=group, ForceDelete=True)
        with pytest.raises(NotFound, match="'steady' does not exist anymore"):
            await at.fleet.tick()
        await at.fleet.ensure(STEADY)
        await at.fleet.tick()
        (view,) = await at.fleet.describe()
        assert (view.pool.name, view.pool.max_size) == (POOL, STEADY.max_size)

    run(check, tmp_path)


def test_unexplained_death_is_reported(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        first, _ = await at.rig.grow(STEADY, 2)
        client: Any = at.fleet._asg
        told = client.describe_scaling_activities

        def away(**_: Any) -> Any:
            raise ClientError({"Error": {"Code": "Throttling", "Message": "later"}}, "Describe")

        client.describe_scaling_activities = away
        at.launcher.crash(first)
        for _ in range(100):
            try:
                await at.fleet.tick()
            except Throttled:
                break
            await at.rig.rest()
        else:
            pytest.fail("nobody asked why")
        client.describe_scaling_activities = told
        at.rig.dead += await at.fleet.tick()
        assert names(at.rig.dead) == [first]
        assert "health check" in at.rig.dead[0].note
        await at.rig.until(lambda view: len(in_service(view)) == 2)
        assert names(at.rig.dead) == [first]

    run(check, tmp_path)


def test_missing_group_does_not_hide_the_others(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        await at.fleet.ensure(replace(STEADY, name="a"))
        (instance,) = await at.rig.grow(STEADY, 1)
        group = f"{at.prefix}a"
        await at.ask("delete_auto_scaling_group", AutoScalingGroupName=group, ForceDelete=True)
        await at.ask("set_desired_capacity", AutoScalingGroupName=at.prefix + POOL, DesiredCapacity=0)
        for _ in range(100):
            with pytest.raises(NotFound):
                await at.fleet.tick()
            if at.fleet._ended:
                break
            await at.rig.rest()
        assert names(at.fleet._ended) == [instance]

    run(check, tmp_path)


def test_a_group_is_removed_with_its_instances(tmp_path: Path) -> None:
    async def check(at: Counted) -> None:
        await at.rig.grow(STEADY, 2)
        await at.fleet.remove(POOL)
        assert await at.fleet.describe() == []
        with pytest.raises(Refused):
            await at.fleet.remove(POOL)
        while await at.ask("describe_auto_scaling_groups") != {}:
            if not any(how is None for how in at.launcher.table.known.values()):
                return
            await at.rig.rest()

    run(check, tmp_path)


MEANT = {
    "Throttling": Throttled,
    "ResourceContention": Throttled,
    "ScalingActivityInProgress": Throttled,
    "ValidationError": Refused,
    "AlreadyExists": AlreadyExists,
    "LimitExceeded": BackendError,
    "InternalFailure": Unreachable,
}


@pytest.mark.parametrize("code", MEANT)
def test_service_error_becomes_an_error_of_batchlab(code: str) -> None:
    status = 500 if code in ("InternalFailure", "ResourceContention") else 400
    answer: Any = {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(MEANT[code]) as told, endpoint.translate_errors("Pool 'p'"):
        raise ClientError(answer, "SetDesiredCapacity")
    assert str(told.value).startswith(f"Pool 'p': why ({code}).")
