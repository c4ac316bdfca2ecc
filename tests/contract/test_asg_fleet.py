"""The Fleet's suite with EC2 Auto Scaling's API, on batchlab's endpoint and on moto as a second implementation.

A list names the tests that moto cannot pass. A listed test that passes at moto fails the suite.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from tests.contract import test_fleet as suite
from tests.support.aws.autoscaling_api import checks_of, endpoint_world, moto_world, processes_world

CHECKS = dict(checks_of(suite))
_OLDEST = "moto does not know termination policies: the oldest goes first"
_SILENT = "moto keeps no scaling activities"
_UNSCHEDULED = "moto stores scheduled actions and does not perform them"
MOTO_LACKS = {
    "test_lowering_the_maximum_takes_the_newest_out": _OLDEST,
    "test_less_desired_capacity_takes_the_newest_out": _OLDEST,
    "test_protected_instances_stay_until_one_is_released": _SILENT,
    "test_an_instance_that_dies_is_reported_once_and_replaced": _SILENT,
    "test_change_of_capacity_names_its_requester_and_reason": _SILENT,
    "test_termination_by_the_group_names_its_cause": (
        "moto's instances are gone at once, never Terminating, and no activity says why"
    ),
    "test_an_unhealthy_instance_is_replaced": "moto notes an instance's health, and leaves it",
    "test_the_scheduled_end_terminates_all_but_protected_instances": _UNSCHEDULED,
    "test_limits_are_restored_after_the_scheduled_end": _UNSCHEDULED,
}


@pytest.mark.parametrize("name", CHECKS)
def test_endpoint(name: str, tmp_path: Path) -> None:
    endpoint_world(CHECKS[name], tmp_path)


@pytest.mark.parametrize("name", CHECKS)
def test_endpoint_over_processes(name: str, tmp_path: Path) -> None:
    processes_world(CHECKS[name], tmp_path)


@pytest.mark.parametrize("name", CHECKS)
def test_moto(name: str, moto: Endpoint, request: pytest.FixtureRequest) -> None:
    if why := MOTO_LACKS.get(name):
        request.applymarker(pytest.mark.xfail(reason=why, strict=True))
    moto_world(moto, CHECKS[name])
