"""Conformance checks of Auto Scaling for instances, lifecycle hooks, protection, health, and batchlab's own adapter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from batchlab.adapters.aws.fleet import Ec2Fleet
from batchlab.adapters.aws.group_descriptions import GroupParameters
from batchlab.conform.check import Differs, Table, expect
from batchlab.conform.site import LAUNCHING, QUIET_S, TERMINATING, OwnGroup, Site, hook
from batchlab.core.model import GroupView, LifecycleState, Pool

REFUSED = "ValidationError"
NO_ACTION = "No active Lifecycle Action"

ASG_INSTANCES = Table("autoscaling")


@ASG_INSTANCES.needed(
    source=(
        "Auto Scaling User Guide, lifecycle hooks, completing a lifecycle action; Auto Scaling "
        "API, CompleteLifecycleAction"
    ),
    promise="Fleet.ready: an instance counts when its worker has reported",
    otherwise="instances without a running worker count as capacity",
)
def launch_hook(site: Site) -> None:
    """A launch hook keeps a new instance in Pending:Wait. CompleteLifecycleAction with CONTINUE moves the instance to
    InService.
    """
    group = OwnGroup.create_group(site, DesiredCapacity=1, LifecycleHookSpecificationList=[hook("up", LAUNCHING)])
    instance = group.waits("Pending:Wait")
    group.complete("up", instance).expect_accepted()
    expect(group.has(1) == [instance], "another instance reaches InService")


@ASG_INSTANCES.needed(
    source=(
        "Auto Scaling User Guide, lifecycle hooks, completing a lifecycle action; Auto Scaling "
        "API, CompleteLifecycleAction"
    ),
    promise="a worker returns its work before its instance ends",
    otherwise="running work is lost, and another worker repeats the work only after the visibility timeout",
)
def drain_hook(site: Site) -> None:
    """A termination hook keeps an instance in Terminating:Wait. CompleteLifecycleAction with CONTINUE terminates the
    instance.
    """
    group, (instance,) = OwnGroup.create_grown_group(
        site, 1, LifecycleHookSpecificationList=[hook("down", TERMINATING)]
    )
    group.size(0).expect_accepted()
    expect(group.waits("Terminating:Wait") == instance, "another instance reaches Terminating:Wait")
    group.complete("down", instance).expect_accepted()
    group.has(0)


@ASG_INSTANCES.needed(
    source="Auto Scaling API, PutLifecycleHook",
    promise="Fleet.ensure of an existing group sets its hooks",
    otherwise="a restarted manager fails, or uses old timeouts",
)
def hook_put_again(site: Site) -> None:
    """PutLifecycleHook with the name of an existing hook changes this hook."""
    group = OwnGroup.create_group(site, LifecycleHookSpecificationList=[hook("up", LAUNCHING)])
    changed = {**hook("up", LAUNCHING), "HeartbeatTimeout": 90, "DefaultResult": "ABANDON"}
    group.call("PutLifecycleHook", **changed).expect_accepted()
    hooks = group.call("DescribeLifecycleHooks").expect_accepted().data["LifecycleHooks"]
    descriptions = [{name: description.get(name) for name in changed} for description in hooks]
    expect(descriptions == [changed], "DescribeLifecycleHooks returns another hook")


@ASG_INSTANCES.needed(
    source="Auto Scaling API, CompleteLifecycleAction, common errors; the API reference does not state the rule",
    promise="a late Fleet.ready is harmless",
    otherwise="a worker that reports when its hook times out causes an error",
)
def hook_gone(site: Site) -> None:
    """CompleteLifecycleAction for an instance that is not in a hook returns 400 ValidationError, "No active Lifecycle
    Action …".
    """
    group, (instance,) = OwnGroup.create_grown_group(site, 1)
    group.call("PutLifecycleHook", **hook("up", LAUNCHING)).expect_accepted()
    answer = group.complete("up", instance)
    answer.expect_refused(400, REFUSED)
    message = answer.data["Error"].get("Message", "")
    expect(NO_ACTION in message, f"the error message is {message!r}")


@ASG_INSTANCES.needed(
    source="Auto Scaling API, TerminateInstanceInAutoScalingGroup",
    promise="Fleet.terminate: a pool shrinks by its idle instance",
    otherwise="scaling in terminates busy instances, or is undone at once",
)
def terminate_decrement(site: Site) -> None:
    """TerminateInstanceInAutoScalingGroup with ShouldDecrementDesiredCapacity terminates the instance without a
    replacement.
    """
    group, (first, second) = OwnGroup.create_grown_group(site, 2)
    group.terminate(first, decrement=True).expect_accepted()
    group.until(lambda: first not in group.ids(), "the instance is not terminated")
    expect(group.desired == 1, f"the desired capacity is {group.desired}")
    time.sleep(QUIET_S)
    expect(group.ids() == [second], "the group has other instances afterwards")


@ASG_INSTANCES.needed(
    source="Auto Scaling API, TerminateInstanceInAutoScalingGroup",
    promise="Fleet.terminate: a faulty instance is replaced",
    otherwise="a pool becomes smaller than requested",
)
def terminate_replace(site: Site) -> None:
    """TerminateInstanceInAutoScalingGroup without ShouldDecrementDesiredCapacity terminates the instance, and the group
    launches a replacement.
    """
    group, (first, second) = OwnGroup.create_grown_group(site, 2)
    group.terminate(first, decrement=False).expect_accepted()
    _replaced(group, first, beside=second)


@ASG_INSTANCES.noted(
    source="Auto Scaling API, TerminateInstanceInAutoScalingGroup, SetInstanceHealth, common errors",
    promise="none: the adapter names only instances that it has seen",
    otherwise="the error message is less clear",
)
def terminate_unknown(site: Site) -> None:
    """TerminateInstanceInAutoScalingGroup for an instance outside of all groups returns 400 ValidationError.
    SetInstanceHealth of such an instance also returns 400 ValidationError.
    """
    group = OwnGroup(site)
    unknown = "i-00000000000000000"
    group.terminate(unknown, decrement=False).expect_refused(400, REFUSED)
    answer = group.ask("SetInstanceHealth", InstanceId=unknown, HealthStatus="Unhealthy")
    answer.expect_refused(400, REFUSED)


@ASG_INSTANCES.needed(
    source="Auto Scaling API, SetInstanceHealth; Auto Scaling User Guide, health checks",
    promise="Fleet.set_health: an instance whose worker is silent is replaced",
    otherwise="an idle instance stays and costs money",
)
def unhealthy(site: Site) -> None:
    """The group terminates and replaces an instance whose health is set to Unhealthy."""
    group, (first, second) = OwnGroup.create_grown_group(site, 2)
    group.ask(
        "SetInstanceHealth", InstanceId=first, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False
    ).expect_accepted()
    _replaced(group, first, beside=second)


def _replaced(group: OwnGroup, instance: str, *, beside: str) -> None:
    group.until(lambda: instance not in group.ids(), "the instance is not terminated")
    after = group.has(2)
    expect(beside in after, "another instance is terminated, too")
    expect(group.desired == 2, f"the desired capacity is {group.desired}")


@ASG_INSTANCES.needed(
    source="Auto Scaling User Guide, scale-in protection; Auto Scaling API, SetInstanceProtection",
    promise="Fleet.protect: scaling in does not terminate an instance with work",
    otherwise="a lower desired capacity stops running tasks",
)
def protect(site: Site) -> None:
    """Scaling in does not terminate protected instances, with any termination policy."""
    group, before = OwnGroup.create_grown_group(site, 2, TerminationPolicies=["OldestInstance"])
    group.size(3).expect_accepted()
    (newest,) = set(group.has(3)) - set(before)
    group.protect(*before).expect_accepted()
    group.size(2).expect_accepted()
    group.until(lambda: newest not in group.ids(), "the unprotected instance is not terminated")
    expect(sorted(group.has(2)) == sorted(before), "a protected instance is terminated")


@ASG_INSTANCES.needed(
    source="Auto Scaling User Guide, scale-in protection",
    promise="Fleet.protect: scaling in does not terminate an instance with work",
    otherwise="a lower desired capacity stops running tasks if all instances are busy",
)
def protect_all(site: Site) -> None:
    """If all instances are protected, a lower desired capacity terminates none of them."""
    group, before = OwnGroup.create_grown_group(site, 2)
    group.protect(*before).expect_accepted()
    group.size(1).expect_accepted()
    time.sleep(QUIET_S)
    expect(sorted(group.ids("InService")) == sorted(before), "a protected instance is terminated")


@ASG_INSTANCES.noted(
    source="Auto Scaling API, SetInstanceProtection, common errors; the API reference does not state the rule",
    promise="none: the adapter refuses to protect such an instance",
)
def protect_waiting(site: Site) -> None:
    """SetInstanceProtection of an instance that is not InService returns 400 ValidationError."""
    group = OwnGroup.create_group(site, DesiredCapacity=1, LifecycleHookSpecificationList=[hook("up", LAUNCHING)])
    group.protect(group.waits("Pending:Wait")).expect_refused(400, REFUSED)


@ASG_INSTANCES.noted(
    source="Auto Scaling API, SetInstanceProtection", promise="none: the adapter sends at most 50 instances in one call"
)
def protect_51(site: Site) -> None:
    """SetInstanceProtection of more than 50 instances returns 400 ValidationError."""
    group = OwnGroup.create_group(site)
    answer = group.protect(*(f"i-{number:017x}" for number in range(51)))
    answer.expect_refused(400, REFUSED)


@ASG_INSTANCES.needed(
    source="Auto Scaling User Guide, instance lifecycle",
    promise="Fleet",
    otherwise="a grid's pools cannot run on this endpoint",
)
async def port(site: Site) -> None:
    """A pool grows, an instance of the pool counts when its worker reports, a named instance ends, and a second manager
    sees the same pool.
    """
    target = site.target
    prefix = f"{site.new_name()}-"
    pool = Pool("a", 0, 3)
    form = GroupParameters(target.template, zones=(target.zone,), drain_s=0)
    fleets = [Ec2Fleet(target.endpoint, target.clock, form, prefix=prefix) for _ in range(2)]
    try:
        fleet, other = fleets
        with target.creating():
            target.record_group(prefix + pool.name)
            await fleet.ensure(pool)
        await fleet.set_desired("a", 2, cause="a check")
        first, second = await _until(site, fleet, lambda ids: len(ids) == 2)
        await fleet.terminate("a", [first], decrement=True, cause="a check")
        await _until(site, fleet, lambda ids: ids == {second})
        with target.creating():
            await other.ensure(pool)
        (view,) = await other.describe()
        expect(view.desired == 1, f"a second manager sees a desired capacity of {view.desired}")
        expect(_in_service(view) == {second}, "a second manager finds other instances")
    finally:
        for ec2_fleet in fleets:
            await ec2_fleet.close()


async def _until(site: Site, fleet: Ec2Fleet, members: Callable[[set[str]], bool]) -> list[str]:
    """Wait until `members` returns true for the ids of the fleet's instances, and all instances are InService.

    Return the ids of the instances. `_until` reports each instance as ready as soon as the instance appears in the
    fleet.
    """
    ends_s = time.monotonic() + site.target.appears_s
    while True:
        await fleet.tick()
        (view,) = await fleet.describe()
        for instance in view.instances:
            await fleet.ready(instance.id)
        ids = {instance.id for instance in view.instances if instance.state is not LifecycleState.TERMINATED}
        if members(ids) and ids == _in_service(view):
            return sorted(ids)
        if time.monotonic() > ends_s:
            states = sorted(instance.state.value for instance in view.instances)
            raise Differs(f"the pool stays at a desired capacity of {view.desired} and {states}")
        await asyncio.sleep(0.1)


def _in_service(view: GroupView) -> set[str]:
    return {instance.id for instance in view.instances if instance.state is LifecycleState.IN_SERVICE}
