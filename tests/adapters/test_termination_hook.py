"""A drained worker completes the lifecycle hook of its instance if the group waits for that."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.fleet import DrainHook
from batchlab.adapters.aws.group_descriptions import DRAIN_HOOK
from batchlab.adapters.aws.instance_metadata import Imds
from batchlab.adapters.aws.metadata_server import Signals
from batchlab.core.port_retries import Patience
from tests.support.aws.autoscaling_api import Thread, Wire, autoscaling
from tests.support.aws.metadata_service import HERE, SPOT, Service

HOOK = {
    "LifecycleHookName": DRAIN_HOOK,
    "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
    "HeartbeatTimeout": 120,
    "DefaultResult": "CONTINUE",
}


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        yield made


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[tuple[Wire, Endpoint]]:
    with Thread(tmp_path) as served:
        made = Wire(autoscaling(served.endpoint), served.crash)
        yield made, served.endpoint
        made.close()


def hook(service: Service, endpoint: Endpoint, group: str, instance: str, state: str) -> bool:
    """Complete the hook as a drained worker of that instance does."""
    service.source.known[HERE] = replace(SPOT, instance=instance, signals=Signals(state))
    drained = DrainHook(endpoint, group, Imds(service.url))
    return asyncio.run(drained.complete(Patience(random.Random(1), limit_s=0.1)))


def test_an_instance_that_has_drained_does_not_wait_for_its_hook(service: Service, wire: tuple[Wire, Endpoint]) -> None:
    group, endpoint = wire
    (instance,) = group.grow(1, LifecycleHookSpecificationList=[HOOK])
    group.asg.set_desired_capacity(AutoScalingGroupName=group.name, DesiredCapacity=0)
    group.until(lambda: group.instances("Terminating:Wait") == [instance])
    assert hook(service, endpoint, group.name, instance, "Terminated")
    group.until(lambda: not group.group()["Instances"])


def test_instance_that_its_group_keeps_stays(
    service: Service, wire: tuple[Wire, Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    group, endpoint = wire
    (instance,) = group.grow(1, LifecycleHookSpecificationList=[HOOK])
    assert not hook(service, endpoint, group.name, instance, "InService")
    # The group has already ended the instance or does not have a hook, so the worker must not log a warning.
    with caplog.at_level(logging.WARNING):
        assert not hook(service, endpoint, group.name, instance, "Terminated")
    assert not caplog.messages
    assert group.instances() == [instance]


def test_failed_notification_is_logged_and_ends_no_instance(
    service: Service, wire: tuple[Wire, Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    group, endpoint = wire
    assert not hook(service, endpoint, "no-such-group", "i-none", "Terminated")
    assert not hook(service, Endpoint("http://127.0.0.1:9"), group.name, "i-1", "Terminated")
    service.stop()
    drained = DrainHook(endpoint, group.name, Imds(service.url))
    assert not asyncio.run(drained.complete(Patience(random.Random(1), limit_s=0.1)))
    service.start()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([one for one in said if "waits until its hook times out" in one]) == 2, said
