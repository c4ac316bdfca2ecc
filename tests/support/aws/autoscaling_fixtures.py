"""Fixtures of the suites over Auto Scaling's wire protocol."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.aws.autoscaling_api import Thread, Wire, autoscaling, aws, launch_template


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Thread]:
    with Thread(tmp_path_factory.mktemp("asg")) as thread:
        yield thread


@pytest.fixture(params=["ours", pytest.param("moto", marks=pytest.mark.slow)])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    world = request.getfixturevalue(request.param)
    if isinstance(world, Thread):
        wire = Wire(autoscaling(world.endpoint), world.crash)
        wire.check_answers()
    else:
        if why := request.module.MOTO_LACKS.get(request.function.__name__):
            request.applymarker(pytest.mark.xfail(reason=why, strict=True))
        ec2 = aws(world, "ec2")
        launch_template(ec2)
        wire = Wire(
            autoscaling(world),
            lambda instance: ec2.terminate_instances(InstanceIds=[instance]),
            # Every supported operation of this endpoint finishes at once.
            limit_s=1.5,
        )
    try:
        yield wire
    finally:
        wire.close()


@pytest.fixture
def our(ours: Thread) -> Iterator[Wire]:
    """Return a client of batchlab's endpoint, for requests that moto does not support."""
    wire = Wire(autoscaling(ours.endpoint), ours.crash)
    wire.check_answers()
    try:
        yield wire
    finally:
        wire.close()
