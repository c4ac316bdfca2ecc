"""Conformance checks of Auto Scaling groups, their limits and capacity, pages of listings, activities, and deletion."""

from __future__ import annotations

import time
from datetime import datetime

from batchlab.conform.check import Table, expect
from batchlab.conform.site import QUIET_S, OwnGroup, Site

REFUSED = "ValidationError"

ASG_GROUPS = Table("autoscaling")


@ASG_GROUPS.needed(
    source="Auto Scaling API, CreateAutoScalingGroup, DescribeAutoScalingGroups",
    promise="Fleet.ensure: a pool is a group",
    otherwise="pools cannot be created",
)
def create(site: Site) -> None:
    """A group is created with the name of a launch template, and its description shows the requested values."""
    group = OwnGroup(site)
    settings = {
        "MinSize": 0,
        "MaxSize": 3,
        "DesiredCapacity": 0,
        "DefaultCooldown": 7,
        "TerminationPolicies": ["NewestInstance"],
    }
    tag = {"Key": "batchlab:pool", "Value": "a & b", "PropagateAtLaunch": True}
    group.create(**settings, Tags=[tag]).expect_accepted()
    description = group.now()
    for name, value in settings.items():
        expect(description.get(name) == value, f"{name} is {description.get(name)} instead of {value}")
    template = description.get("LaunchTemplate", {}).get("LaunchTemplateName")
    expect(template == site.target.template, f"the launch template is {template}")
    expect([{key: actual.get(key) for key in tag} for actual in description["Tags"]] == [tag], "the tag differs")


@ASG_GROUPS.needed(
    source="Auto Scaling API, CreateAutoScalingGroup",
    promise="Fleet.ensure adopts the group of an earlier manager",
    otherwise="a restarted manager replaces the group and loses its instances",
)
def create_taken(site: Site) -> None:
    """CreateAutoScalingGroup with the name of an existing group returns 400 AlreadyExists and does not change the
    group.
    """
    group, before = OwnGroup.create_grown_group(site, 1)
    group.create(MaxSize=2).expect_refused(400, "AlreadyExists")
    expect(group.now()["MaxSize"] == 3, "CreateAutoScalingGroup is refused, but changes the group")
    expect(group.ids() == before, "the group has another instance")


@ASG_GROUPS.noted(
    source="Auto Scaling API, CreateAutoScalingGroup, common errors",
    promise="none: the adapter reports every refusal",
    otherwise="a wrong template is noticed only at the first launch",
)
def create_template(site: Site) -> None:
    """CreateAutoScalingGroup with a missing launch template returns 400."""
    nowhere = {"LaunchTemplateName": f"{site.target.run}-nowhere"}
    OwnGroup(site).create(LaunchTemplate=nowhere).expect_refused(400)


@ASG_GROUPS.noted(
    source="Auto Scaling API, CreateAutoScalingGroup, common errors",
    promise="none: the adapter refuses a minimum above the maximum",
)
def create_limits(site: Site) -> None:
    """A MinSize above MaxSize returns 400 ValidationError."""
    OwnGroup(site).create(MinSize=3, MaxSize=2).expect_refused(400, REFUSED)


@ASG_GROUPS.needed(
    source="Auto Scaling API, DescribeAutoScalingGroups; the API reference does not state the rule",
    promise="Fleet.tick raises NotFound for a deleted group",
    otherwise="a deleted group looks like an outage, and the manager waits for the group",
)
def missing(site: Site) -> None:
    """DescribeAutoScalingGroups ignores the name of a group that does not exist."""
    expect(OwnGroup(site).describe() == [], "DescribeAutoScalingGroups returns a group")


@ASG_GROUPS.noted(
    source="Auto Scaling API, SetDesiredCapacity, DeleteAutoScalingGroup, common errors",
    promise="none: the next description of the groups shows that the group is missing",
    otherwise="the error message is less clear",
)
def missing_refused(site: Site) -> None:
    """SetDesiredCapacity and DeleteAutoScalingGroup of a missing group return 400 ValidationError."""
    nowhere = OwnGroup(site)
    nowhere.size(1).expect_refused(400, REFUSED)
    nowhere.call("DeleteAutoScalingGroup").expect_refused(400, REFUSED)


@ASG_GROUPS.needed(
    source="Auto Scaling API, DescribeAutoScalingGroups",
    promise="Fleet.tick sees the groups of all pools",
    otherwise="the manager treats pools after the first page as deleted",
)
def pages(site: Site) -> None:
    """DescribeAutoScalingGroups returns at most MaxRecords groups and a NextToken. All pages of the description
    together contain each group once.
    """
    groups = [OwnGroup(site) for _ in range(5)]
    for group in groups:
        group.create().expect_accepted()
    names = [group.name for group in groups]
    request = {"AutoScalingGroupNames": names, "MaxRecords": 2}
    names_by_page: list[list[str]] = []
    token: dict[str, str] = {}
    while len(names_by_page) <= len(names):
        page = groups[0].ask("DescribeAutoScalingGroups", **request, **token).expect_accepted().data
        names_by_page.append([description["AutoScalingGroupName"] for description in page["AutoScalingGroups"]])
        if not page.get("NextToken"):
            break
        token = {"NextToken": page["NextToken"]}
    expect(sorted(name for page in names_by_page for name in page) == names, "the pages contain other groups")
    expect(max(map(len, names_by_page)) == 2, f"pages have {[len(page) for page in names_by_page]} groups")


@ASG_GROUPS.noted(
    name="token",
    source="Auto Scaling API, DescribeAutoScalingGroups",
    promise="none: the adapter sends tokens back unchanged",
)
def token_nonsense(site: Site) -> None:
    """An invalid NextToken returns 400 InvalidNextToken."""
    answer = OwnGroup(site).ask("DescribeAutoScalingGroups", NextToken="nonsense")
    answer.expect_refused(400, "InvalidNextToken")


@ASG_GROUPS.needed(
    source="Auto Scaling API, SetDesiredCapacity; Auto Scaling User Guide, instance lifecycle",
    promise="Fleet.set_desired: a pool grows and shrinks",
    otherwise="pools do not scale",
)
def desired(site: Site) -> None:
    """After SetDesiredCapacity, the group launches or terminates instances until this number is InService."""
    group = OwnGroup.create_group(site)
    for size in (2, 1, 0):
        group.size(size).expect_accepted()
        group.has(size)


@ASG_GROUPS.noted(
    source="Auto Scaling API, SetDesiredCapacity, common errors; Auto Scaling User Guide, scaling limits",
    promise="none: the adapter refuses a desired capacity outside of the limits",
)
def desired_outside(site: Site) -> None:
    """A desired capacity below MinSize or above MaxSize returns 400 ValidationError."""
    group, _ = OwnGroup.create_grown_group(site, 1, MinSize=1)
    for size in (4, 0):
        group.size(size).expect_refused(400, REFUSED)
        expect(group.desired == 1, "SetDesiredCapacity is refused, but sets the capacity")


@ASG_GROUPS.needed(
    source="Auto Scaling API, UpdateAutoScalingGroup",
    promise="Fleet.ensure: a pool's new limits take effect at once",
    otherwise="a pool keeps more or fewer instances than its limits allow",
)
def limits_move_desired(site: Site) -> None:
    """A desired capacity outside of new limits is set to the nearer limit."""
    group = OwnGroup.create_group(site)
    for limits, size in (({"MinSize": 2}, 2), ({"MinSize": 0, "MaxSize": 1}, 1)):
        group.call("UpdateAutoScalingGroup", **limits).expect_accepted()
        expect(group.desired == size, f"the desired capacity stays at {group.desired} with {limits}")
    group.has(1)


@ASG_GROUPS.needed(
    source="Auto Scaling API, SetDesiredCapacity; Auto Scaling User Guide, scaling cooldowns",
    promise="Fleet.set_desired: the grid's own policy decides when to scale",
    otherwise="a burst waits for an unwanted cooldown",
)
def cooldown_ignored(site: Site) -> None:
    """SetDesiredCapacity without HonorCooldown is accepted during a cooldown."""
    group = OwnGroup.create_group(site, DefaultCooldown=600)
    for size in (1, 2):
        group.size(size).expect_accepted()
        group.has(size)


@ASG_GROUPS.noted(
    source="Auto Scaling API, SetDesiredCapacity; Auto Scaling User Guide, scaling cooldowns",
    promise="none: the adapter never uses HonorCooldown",
)
def cooldown_honoured(site: Site) -> None:
    """SetDesiredCapacity with HonorCooldown during a cooldown returns 400 ScalingActivityInProgress."""
    group = OwnGroup.create_group(site, DefaultCooldown=600)
    group.size(1).expect_accepted()
    group.has(1)
    group.size(2, cooldown=True).expect_refused(400, "ScalingActivityInProgress")


@ASG_GROUPS.noted(
    source="Auto Scaling API, SuspendProcesses; Auto Scaling User Guide, suspending processes",
    promise="none: only an operator suspends processes",
    otherwise="an operator cannot stop the scaling of a pool",
)
def suspend(site: Site) -> None:
    """While Launch is suspended, the group launches no instances. After ResumeProcesses, the group launches the missing
    instances.
    """
    group = OwnGroup.create_group(site)
    group.call("SuspendProcesses", ScalingProcesses=["Launch"]).expect_accepted()
    group.size(1).expect_accepted()
    time.sleep(QUIET_S)
    expect(not group.ids(), "the group launches an instance while Launch is suspended")
    group.call("ResumeProcesses", ScalingProcesses=["Launch"]).expect_accepted()
    group.has(1)


@ASG_GROUPS.needed(
    source=(
        "Auto Scaling API, DescribeScalingActivities, Activity; Auto Scaling User Guide, verifying a scaling activity"
    ),
    promise="Fleet.activities, and the reason of an instance's end",
    otherwise="users cannot see why instances start and end",
)
def activities(site: Site) -> None:
    """DescribeScalingActivities lists each launch and termination, newest first. The Description of an activity
    contains the instance, and the Cause contains the reason of the activity.
    """
    group, (instance,) = OwnGroup.create_grown_group(site, 1)
    group.size(0).expect_accepted()
    group.has(0)

    def launch_and_termination() -> list[dict[str, object]]:
        entries = [activity for activity in group.activities() if instance in activity["Description"]]
        return entries if len(entries) >= 2 else []

    newest, oldest = group.until(
        launch_and_termination, "DescribeScalingActivities does not list both launch and termination"
    )[:2]
    expect(str(newest["Description"]).startswith("Terminating"), "the newest activity is not the first")
    expect(str(oldest["Description"]).startswith("Launching"), "the activities do not contain the launch")
    expect(bool(newest.get("Cause") and oldest.get("Cause")), "an activity has no Cause")
    times = newest["StartTime"], oldest["StartTime"]
    expect(all(isinstance(time, datetime) for time in times), "an activity has no StartTime")


@ASG_GROUPS.noted(
    source="Auto Scaling API, DeleteAutoScalingGroup",
    promise="none: the grid uses ForceDelete",
    otherwise="a mistaken call deletes a pool that is in use",
)
def delete_in_use(site: Site) -> None:
    """DeleteAutoScalingGroup of a group with instances returns 400 ResourceInUse."""
    group, before = OwnGroup.create_grown_group(site, 1)
    group.call("DeleteAutoScalingGroup").expect_refused(400, "ResourceInUse")
    expect(group.ids() == before, "DeleteAutoScalingGroup is refused, but terminates the instance")


@ASG_GROUPS.needed(
    source="Auto Scaling API, DeleteAutoScalingGroup",
    promise="`grid down` leaves no instances behind",
    otherwise="instances outlive their grid and cost money",
)
def delete_force(site: Site) -> None:
    """DeleteAutoScalingGroup with ForceDelete deletes a group and its instances."""
    group, before = OwnGroup.create_grown_group(site, 2)
    group.call("DeleteAutoScalingGroup", ForceDelete=True).expect_accepted()
    group.until(lambda: not group.describe(), "the group still exists")
    response = group.ask("DescribeAutoScalingInstances", InstanceIds=before).expect_accepted().data
    expect(not response["AutoScalingInstances"], "the instances of the group still exist")
