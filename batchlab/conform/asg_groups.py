"""Auto Scaling checks: groups, limits, capacity, pages, activities, and deletion."""

from __future__ import annotations

import time
from datetime import datetime

from batchlab.conform.check import Severity, Table, expect
from batchlab.conform.site import QUIET_S, OwnGroup, Site

NEEDED, NOTED = Severity.NEEDED, Severity.NOTED

REFUSED = "ValidationError"

ASG_GROUPS = Table()


@ASG_GROUPS.check(
    "autoscaling-create",
    NEEDED,
    rule="A group is created with the name of a launch template, and its description shows the requested values.",
    source="Auto Scaling API, CreateAutoScalingGroup, DescribeAutoScalingGroups",
    promise="Fleet.ensure: a pool is a group",
    otherwise="pools cannot be created",
)
def create(site: Site) -> None:
    group = OwnGroup(site)
    asked = {
        "MinSize": 0,
        "MaxSize": 3,
        "DesiredCapacity": 0,
        "DefaultCooldown": 7,
        "TerminationPolicies": ["NewestInstance"],
    }
    tag = {"Key": "batchlab:pool", "Value": "a & b", "PropagateAtLaunch": True}
    group.create(**asked, Tags=[tag]).accepted()
    seen = group.now()
    for name, value in asked.items():
        expect(seen.get(name) == value, f"{name} is {seen.get(name)} where {value} was asked for")
    told = seen.get("LaunchTemplate", {}).get("LaunchTemplateName")
    expect(told == site.target.template, f"its launch template is {told}")
    expect([{key: one.get(key) for key in tag} for one in seen["Tags"]] == [tag], "its tag differs")


@ASG_GROUPS.check(
    "autoscaling-create-taken",
    NEEDED,
    rule="CreateAutoScalingGroup with the name of an existing group returns 400 "
    "AlreadyExists and does not change the group.",
    source="Auto Scaling API, CreateAutoScalingGroup",
    promise="Fleet.ensure adopts the group of an earlier manager",
    otherwise="a restarted manager replaces the group and loses its instances",
)
def create_taken(site: Site) -> None:
    group = OwnGroup(site)
    before = group.grown(1)
    group.create(MaxSize=2).refused(400, "AlreadyExists")
    expect(group.now()["MaxSize"] == 3, "the group is changed all the same")
    expect(group.ids() == before, "its instance is another one")


@ASG_GROUPS.check(
    "autoscaling-create-template",
    NOTED,
    rule="CreateAutoScalingGroup with a missing launch template returns 400.",
    source="Auto Scaling API, CreateAutoScalingGroup, common errors",
    promise="none: the adapter reports every refusal",
    otherwise="a wrong template is noticed only at the first launch",
)
def create_template(site: Site) -> None:
    nowhere = {"LaunchTemplateName": f"{site.target.run}-nowhere"}
    OwnGroup(site).create(LaunchTemplate=nowhere).refused(400)


@ASG_GROUPS.check(
    "autoscaling-create-limits",
    NOTED,
    rule=f"A MinSize above MaxSize returns 400 {REFUSED}.",
    source="Auto Scaling API, CreateAutoScalingGroup, common errors",
    promise="none: the adapter refuses it",
    otherwise="nothing",
)
def create_limits(site: Site) -> None:
    OwnGroup(site).create(MinSize=3, MaxSize=2).refused(400, REFUSED)


@ASG_GROUPS.check(
    "autoscaling-missing",
    NEEDED,
    rule="DescribeAutoScalingGroups ignores a name without a group.",
    source="Auto Scaling API, DescribeAutoScalingGroups; the reference does not say",
    promise="Fleet.tick raises NotFound for a deleted group",
    otherwise="a deleted group looks like an outage, and the manager waits for it",
)
def missing(site: Site) -> None:
    expect(OwnGroup(site).described() == [], "a group is described")


@ASG_GROUPS.check(
    "autoscaling-missing-refused",
    NOTED,
    rule=f"SetDesiredCapacity and DeleteAutoScalingGroup of a missing group return 400 {REFUSED}.",
    source="Auto Scaling API, SetDesiredCapacity, DeleteAutoScalingGroup, common errors",
    promise="none: the next description of the groups shows it",
    otherwise="the error message is less clear",
)
def missing_refused(site: Site) -> None:
    nowhere = OwnGroup(site)
    nowhere.size(1).refused(400, REFUSED)
    nowhere.call("DeleteAutoScalingGroup").refused(400, REFUSED)


@ASG_GROUPS.check(
    "autoscaling-pages",
    NEEDED,
    rule="DescribeAutoScalingGroups returns at most MaxRecords groups and a NextToken. All "
    "pages together contain each group once.",
    source="Auto Scaling API, DescribeAutoScalingGroups",
    promise="Fleet.tick sees the groups of all pools",
    otherwise="the manager treats pools after the first page as deleted",
)
def pages(site: Site) -> None:
    groups = [OwnGroup(site) for _ in range(5)]
    for group in groups:
        group.create().accepted()
    names = [group.name for group in groups]
    asked = {"AutoScalingGroupNames": names, "MaxRecords": 2}
    found: list[list[str]] = []
    token: dict[str, str] = {}
    while len(found) <= len(names):
        page = groups[0].ask("DescribeAutoScalingGroups", **asked, **token).accepted().data
        found.append([one["AutoScalingGroupName"] for one in page["AutoScalingGroups"]])
        if not page.get("NextToken"):
            break
        token = {"NextToken": page["NextToken"]}
    expect(sorted(name for page in found for name in page) == names, "it gives other groups")
    expect(max(map(len, found)) == 2, f"pages have {[len(page) for page in found]} groups")


@ASG_GROUPS.check(
    "autoscaling-token",
    NOTED,
    rule="An invalid NextToken returns 400 InvalidNextToken.",
    source="Auto Scaling API, DescribeAutoScalingGroups",
    promise="none: the adapter sends tokens back unchanged",
    otherwise="nothing",
)
def token_nonsense(site: Site) -> None:
    answer = OwnGroup(site).ask("DescribeAutoScalingGroups", NextToken="nonsense")
    answer.refused(400, "InvalidNextToken")


# --- Capacity -------------------------------------------------------------------------------------


@ASG_GROUPS.check(
    "autoscaling-desired",
    NEEDED,
    rule="After SetDesiredCapacity, the group launches or terminates instances until this number is InService.",
    source="Auto Scaling API, SetDesiredCapacity; Auto Scaling User Guide, instance lifecycle",
    promise="Fleet.set_desired: a pool grows and shrinks",
    otherwise="pools do not scale",
)
def desired(site: Site) -> None:
    group = OwnGroup(site)
    group.create().accepted()
    for size in (2, 1, 0):
        group.size(size).accepted()
        group.has(size)


@ASG_GROUPS.check(
    "autoscaling-desired-outside",
    NOTED,
    rule=f"A desired capacity below MinSize or above MaxSize returns 400 {REFUSED}.",
    source="Auto Scaling API, SetDesiredCapacity, common errors; Auto Scaling User Guide, scaling limits",
    promise="none: the adapter refuses it",
    otherwise="nothing",
)
def desired_outside(site: Site) -> None:
    group = OwnGroup(site)
    group.grown(1, MinSize=1)
    for size in (4, 0):
        group.size(size).refused(400, REFUSED)
        expect(group.desired == 1, "it is refused, and set all the same")


@ASG_GROUPS.check(
    "autoscaling-limits-move-desired",
    NEEDED,
    rule="A desired capacity outside of new limits is set to the nearer limit.",
    source="Auto Scaling API, UpdateAutoScalingGroup",
    promise="Fleet.ensure: a pool's new limits take effect at once",
    otherwise="a pool keeps more or fewer instances than its limits allow",
)
def limits_move_desired(site: Site) -> None:
    group = OwnGroup(site)
    group.create().accepted()
    for limits, size in (({"MinSize": 2}, 2), ({"MinSize": 0, "MaxSize": 1}, 1)):
        group.call("UpdateAutoScalingGroup", **limits).accepted()
        expect(group.desired == size, f"{limits} leave it at {group.desired}")
    group.has(1)


@ASG_GROUPS.check(
    "autoscaling-cooldown-ignored",
    NEEDED,
    rule="SetDesiredCapacity without HonorCooldown is accepted during a cooldown.",
    source="Auto Scaling API, SetDesiredCapacity; Auto Scaling User Guide, scaling cooldowns",
    promise="Fleet.set_desired: the grid's own policy decides when to scale",
    otherwise="a burst waits for an unwanted cooldown",
)
def cooldown_ignored(site: Site) -> None:
    group = OwnGroup(site)
    group.create(DefaultCooldown=600).accepted()
    for size in (1, 2):
        group.size(size).accepted()
        group.has(size)


@ASG_GROUPS.check(
    "autoscaling-cooldown-honoured",
    NOTED,
    rule="SetDesiredCapacity with HonorCooldown during a cooldown returns 400 ScalingActivityInProgress.",
    source="Auto Scaling API, SetDesiredCapacity; Auto Scaling User Guide, scaling cooldowns",
    promise="none: the adapter never uses HonorCooldown",
    otherwise="nothing",
)
def cooldown_honoured(site: Site) -> None:
    group = OwnGroup(site)
    group.create(DefaultCooldown=600).accepted()
    group.size(1).accepted()
    group.has(1)
    group.size(2, cooldown=True).refused(400, "ScalingActivityInProgress")


@ASG_GROUPS.check(
    "autoscaling-suspend",
    NOTED,
    rule="While Launch is suspended, the group launches no instances. After ResumeProcesses,"
    " it launches the missing ones.",
    source="Auto Scaling API, SuspendProcesses; Auto Scaling User Guide, suspending processes",
    promise="none: only an operator suspends processes",
    otherwise="an operator cannot stop the scaling of a pool",
)
def suspend(site: Site) -> None:
    group = OwnGroup(site)
    group.create().accepted()
    group.call("SuspendProcesses", ScalingProcesses=["Launch"]).accepted()
    group.size(1).accepted()
    time.sleep(QUIET_S)
    expect(not group.ids(), "it still launches an instance")
    group.call("ResumeProcesses", ScalingProcesses=["Launch"]).accepted()
    group.has(1)


@ASG_GROUPS.check(
    "autoscaling-activities",
    NEEDED,
    rule="DescribeScalingActivities lists each launch and termination, newest first. The "
    "Description contains the instance, and the Cause contains the reason.",
    source="Auto Scaling API, DescribeScalingActivities, Activity;"
    " Auto Scaling User Guide, verifying a scaling activity",
    promise="Fleet.activities, and the reason of an instance's end",
    otherwise="users cannot see why instances start and end",
)
def activities(site: Site) -> None:
    group = OwnGroup(site)
    (only,) = group.grown(1)
    group.size(0).accepted()
    group.has(0)

    def both() -> list[dict[str, object]]:
        found = [activity for activity in group.activities() if only in activity["Description"]]
        return found if len(found) >= 2 else []

    newest, oldest = group.until(both, "it does not list both launch and termination")[:2]
    expect(str(newest["Description"]).startswith("Terminating"), "the newest is not the first")
    expect(str(oldest["Description"]).startswith("Launching"), "the launch is not told")
    expect(bool(newest.get("Cause") and oldest.get("Cause")), "there is no cause")
    times = newest["StartTime"], oldest["StartTime"]
    expect(all(isinstance(time, datetime) for time in times), "there is no time")


# --- Deletion -------------------------------------------------------------------------------------


@ASG_GROUPS.check(
    "autoscaling-delete-in-use",
    NOTED,
    rule="DeleteAutoScalingGroup of a group with instances returns 400 ResourceInUse.",
    source="Auto Scaling API, DeleteAutoScalingGroup",
    promise="none: the grid uses ForceDelete",
    otherwise="a mistake deletes a pool in use",
)
def delete_in_use(site: Site) -> None:
    group = OwnGroup(site)
    before = group.grown(1)
    group.call("DeleteAutoScalingGroup").refused(400, "ResourceInUse")
    expect(group.ids() == before, "it is refused, and its instance ends all the same")


@ASG_GROUPS.check(
    "autoscaling-delete-force",
    NEEDED,
    rule="DeleteAutoScalingGroup with ForceDelete deletes a group and its instances.",
    source="Auto Scaling API, DeleteAutoScalingGroup",
    promise="`grid down` leaves no instances behind",
    otherwise="instances outlive their grid and cost money",
)
def delete_force(site: Site) -> None:
    group = OwnGroup(site)
    before = group.grown(2)
    group.call("DeleteAutoScalingGroup", ForceDelete=True).accepted()
    group.until(lambda: not group.described(), "the group is still there")
    found = group.ask("DescribeAutoScalingInstances", InstanceIds=before).accepted().data
    expect(not found["AutoScalingInstances"], "its instances are still there")
