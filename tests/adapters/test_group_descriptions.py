"""Descriptions of an EC2 Auto Scaling group, for instances that end or never start."""

from __future__ import annotations

from typing import Any

import pytest

from batchlab.adapters.aws.group_descriptions import LEFT_GROUP, NEVER_UP, GroupState
from batchlab.core.model import LifecycleState, Pool
from batchlab.core.ports import KEEP_TERMINATED_S

TOKEN = "Lifecycle Action with token 7b1f was abandoned: Heartbeat Timeout"
ABANDONED = f"Instance failed to complete user's Lifecycle Action: {TOKEN}"


def group(desired: int, **states: str) -> Any:
    return {
        "MinSize": 0,
        "MaxSize": 4,
        "DesiredCapacity": desired,
        "Instances": [
            {
                "InstanceId": name,
                "LifecycleState": state,
                "HealthStatus": "Healthy",
                "ProtectedFromScaleIn": False,
                "AvailabilityZone": "a",
            }
            for name, state in states.items()
        ],
    }


def told(description: str, cause: str = "it was asked for.", message: str = "") -> Any:
    return {"Description": description, "Cause": cause, "StatusMessage": message}


LAUNCHED = told("Launching a new EC2 instance: i1")
GIVEN_UP = [
    told("Terminating EC2 instance: i1", "an instance was taken out of service."),
    told("Launching a new EC2 instance: i1", message=ABANDONED),
]
GIVEN_UP_TOLD_AT_ONCE = [told(f"Launching a new EC2 instance: i1.  Status Reason: {ABANDONED}")]
STOPPED = [told("Terminating EC2 instance: i1", "in response to an EC2 health check: it has stopped."), LAUNCHED]
SHRUNK = [told("Terminating EC2 instance: i1", "shrinking the capacity from 1 to 0."), LAUNCHED]


@pytest.mark.parametrize("last", ["Terminating:Wait", "gone"])
@pytest.mark.parametrize(
    ("activities", "note"),
    [
        (GIVEN_UP, ABANDONED),
        (GIVEN_UP_TOLD_AT_ONCE, ABANDONED),
        (STOPPED, "in response to an EC2 health check: it has stopped"),
        (SHRUNK, "terminated: shrinking the capacity from 1 to 0"),
        ([LAUNCHED], NEVER_UP),
    ],
    ids=["abandoned", "abandoned-in-one", "stopped", "scaled-in", "nothing-is-said"],
)
def test_why_an_instance_never_came_up(activities: list[Any], note: str, last: str) -> None:
    seen = GroupState(Pool("default"))
    seen.update(group(1, i1="Pending:Wait"), 1000.0)
    there = {} if last == "gone" else {"i1": last}
    seen.update(group(1, **there), 1005.0)
    assert seen.unexplained == {"i1"}
    seen.explain(activities)
    assert seen.instances["i1"].note == note


def test_termination_reason_is_requested_again_after_the_instance_disappears() -> None:
    seen = GroupState(Pool("default"))
    seen.update(group(1, i1="Pending:Wait"), 1000.0)
    seen.update(group(1, i1="Terminating"), 1005.0)
    seen.explain([])
    seen.update(group(1), 1010.0)
    seen.explain(GIVEN_UP)
    assert seen.instances["i1"].note == ABANDONED


def test_scale_in_during_boot_is_not_a_failed_boot() -> None:
    seen = GroupState(Pool("default"))
    seen.update(group(1, i1="Pending:Wait"), 1000.0)
    seen.update(group(0, i1="Pending:Wait"), 1005.0)
    seen.update(group(0, i1="Terminating"), 1020.0)
    seen.explain([])
    assert seen.instances["i1"].note == "terminated: scale-in"


def test_instance_that_was_in_service_is_recorded_as_gone() -> None:
    seen = GroupState(Pool("default"))
    seen.update(group(1, i1="InService"), 1000.0)
    seen.update(group(1), 1005.0)
    seen.explain([])
    found = seen.instances["i1"]
    assert (found.state, found.note) == (LifecycleState.TERMINATED, LEFT_GROUP)


@pytest.mark.parametrize("state", ["InService", "Terminating:Wait"])
def test_instance_missing_from_one_answer_stays_alive_and_its_later_end_is_reported(state: str) -> None:
    """Before, the second death of the instance was not reported for a minute, and the instance was shown as in
    service."""
    seen = GroupState(Pool("default"))
    seen.update(group(1, i1="InService"), 1000.0)
    assert [one.id for one in seen.update(group(1), 1005.0)] == ["i1"]
    assert seen.update(group(1, i1=state), 1010.0) == []
    assert seen.instances["i1"].note == ("" if state == "InService" else "terminated: scale-in")
    (again,) = seen.update(group(1), 1015.0)
    assert (again.id, again.state) == ("i1", LifecycleState.TERMINATED)
    assert seen.view().instances == (again,)
    assert seen.update(group(1), 1015.0 + KEEP_TERMINATED_S + 1) == []
    assert seen.view().instances == ()


def test_one_that_a_look_had_missed_is_not_forgotten_a_minute_later() -> None:
    seen = GroupState(Pool("default"))
    seen.update(group(1, i1="InService"), 1000.0)
    seen.update(group(1), 1005.0)
    for at_s in (1010.0, 1005.0 + KEEP_TERMINATED_S + 1, 1080.0):
        assert seen.update(group(1, i1="InService"), at_s) == []
        (found,) = seen.view().instances
        assert (found.id, found.state, found.launched_s) == ("i1", LifecycleState.IN_SERVICE, 1000.0)


def test_terminated_instance_is_reported_once() -> None:
    seen = GroupState(Pool("default"))
    seen.update(group(1, i1="InService"), 1000.0)
    told_of = [seen.update(group(1, i1="Terminated"), at_s) for at_s in (1005.0, 1010.0)]
    assert [[one.id for one in gone] for gone in told_of] == [["i1"], []]
