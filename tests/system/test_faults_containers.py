"""The faults that a grid in containers supports, each with a job whose results are correct.

All faults share one grid, because a start of a grid takes longer than a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchlab.core.model import Pool
from batchlab.runtime import compose_deployment
from batchlab.runtime.compose_deployment import ZONES
from batchlab.scenarios.faults.aws_stack import with_spot_shares
from batchlab.scenarios.faults.fault_injection import TABLE
from batchlab.scenarios.model.values import FaultName
from tests.support.aws.autoscaling_api import aws
from tests.support.docker.chaos import Containers, docker
from tests.support.docker.grid import need_containers
from tests.support.grid.local_grid import LocalGrid
from tests.support.scenarios.fault_injection import Bench, Work, number
from tests.support.waiting import until

POOLS = (Pool("default", 0, 3, 1, boot_s=1.0, instance_type="t3.small"),)
SMALL = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("harm")
    need_containers(folder)
    home = folder / "home"
    grid = LocalGrid(home, POOLS, backend="localstack")
    project = Containers(grid).at.project
    try:
        with with_spot_shares(grid.backend, grid.home, {"default": 1.0}):
            grid.client.scale("default", min=3, desired=3)
            yield Bench(grid, folder)
        (group,) = groups(grid)
        assert "MixedInstancesPolicy" not in group
        assert group["LaunchTemplate"]["LaunchTemplateName"] == "worker-default"
    finally:
        grid.stop()
    assert not docker("ps", "-aq", "--filter", f"label=batchlab.grid={project}").split()


def groups(grid: LocalGrid) -> list[Any]:
    """Return the groups as Auto Scaling describes them."""
    at = Containers(grid).at
    scaling = aws(compose_deployment.autoscaling(grid.home, at), "autoscaling")
    found: list[Any] = scaling.describe_auto_scaling_groups()["AutoScalingGroups"]
    return found


def test_killed_instances_are_replaced(bench: Bench) -> None:
    with bench.work(SMALL, 0.3) as work:
        seen = work.hurt(FaultName.KILL, count=1)
        (target,) = seen.targets
        assert seen.evidence in (f"{target}: exited with 137", f"{target}: removed")
        assert target not in Containers(bench.grid).instances()


def test_paused_instances_freeze_and_resume(bench: Bench) -> None:
    with bench.work(SMALL, 0.3) as work:
        seen = work.hurt(FaultName.PAUSE, count=2, for_s=1.5)
        assert seen.evidence.startswith("2 of 2 containers were paused for 1.5 s; 2 run again")


def test_partitioned_instances_reach_no_service_and_recover(bench: Bench) -> None:
    with bench.work(SMALL, 0.3) as work:
        seen = work.hurt(FaultName.PARTITION, count=1, for_s=1.5)
        assert seen.evidence.startswith("1 of 1 instances could not reach the grid's services")
        assert "and 1 reach them again" in seen.evidence


def test_a_spot_wave_takes_spot_instances(bench: Bench) -> None:
    with bench.work(SMALL, 0.3) as work:
        seen = work.hurt(FaultName.SPOT_WAVE, count=1, notice_s=4.0)
        assert seen.evidence.startswith("1 of 1 instances received a notice of 4 s, and 1 ended within")
        (target,) = seen.targets
        until(lambda: target not in Containers(bench.grid).instances(), 20)


def test_lost_zone_gets_no_launches(bench: Bench) -> None:
    until(lambda: len(bench.in_service()) == 3, 60, pause_s=0.2)
    with bench.work(SMALL, 0.1) as work:
        there = Containers(bench.grid)
        target, container = next(iter(there.instances().items()))
        label = '{{index .Config.Labels "batchlab.zone"}}'
        zone = docker("inspect", "--format", label, container).strip()
        others = [one for one in ZONES if one != zone]
        seen = work.hurt(FaultName.ZONE_LOSS, zone=zone[-1], for_s=3.0)
        assert target in seen.targets
        assert seen.evidence.startswith(f"{len(seen.targets)} instances of {zone} died")
        assert f"launched in {', '.join(others)} only" in seen.evidence
        (group,) = groups(bench.grid)
        assert group["AvailabilityZones"] == list(ZONES)
        assert not group["SuspendedProcesses"]


def test_s3_answers_503_and_is_itself_again(bench: Bench) -> None:
    # A client without an answer during the move of the address waits longer before each retry. On a busy machine, this
    # may take the whole first try.
    for tasks, for_s in ((300, 12.0), (900, 40.0)):
        with bench.work(tasks, 0.1) as work:  # still running when the proxy is active
            before = docker("inspect", Containers(bench.grid).service("localstack"))
            seen = work.hurt(FaultName.S3_ERRORS, rate=0.4, for_s=for_s)
        if not seen.impossible:
            break
    else:
        raise AssertionError(seen.impossible)
    assert 0 < number(r"^(\d+) of", seen) < number(r"of (\d+) requests", seen)
    assert f'"IPAddress": "{Containers(bench.grid).at.subnet}.10"' in before
    after = docker("inspect", Containers(bench.grid).service("localstack"))
    assert f'"IPAddress": "{Containers(bench.grid).at.subnet}.10"' in after
    assert "harm.interposed" not in docker("ps", "-a", "--no-trunc")


def test_messages_are_duplicated(bench: Bench) -> None:
    with bench.work(80, 0.2) as work:
        seen = work.hurt(FaultName.SQS_DUPLICATES, rate=1.0, for_s=3.0)
        assert number(r"and (\d+) of the originals", seen) > 0


def test_messages_are_delayed(bench: Bench) -> None:
    with bench.work(80, 0.2) as work:
        seen = work.hurt(FaultName.SQS_DELAYS, rate=0.5, for_s=3.0)
        assert number(r"were hidden, and (\d+) of them", seen) > 0
        assert number(r"to ([\d.]+) s each", seen) > 1.0


def test_crashed_manager_is_succeeded(bench: Bench) -> None:
    with bench.work(SMALL, 0.3) as work:
        owner = bench.grid.client.grid()["owner"]
        seen = work.hurt(FaultName.MANAGER_CRASH)
        assert seen.targets == (owner,)
        assert bench.grid.client.grid()["owner"] != owner
        assert "was killed, and runs again" in seen.evidence


def test_lost_database_is_restored_and_rebuilt(bench: Bench) -> None:
    with bench.work(SMALL, 0.3, up=0) as work:  # a new manager resets its limits
        jobs = len(bench.grid.client.jobs())
        seen = work.hurt(FaultName.DATABASE_LOSS, for_s=1.0)
        assert seen.evidence.startswith("postgres (pid ")
        assert "was killed, and runs again" in seen.evidence
        assert f"it had {jobs} jobs, " in seen.evidence
        assert number(r"jobs, (\d+) after the loss", seen) < jobs
        assert f"and {jobs} after the rebuild" in seen.evidence
        assert len(bench.grid.client.jobs()) == jobs


def test_an_instance_has_no_disk(bench: Bench) -> None:
    seen = Work(bench.grid, None, "").hurt(FaultName.SLOW_DISK)
    assert seen.impossible + "." == TABLE[FaultName.SLOW_DISK]["localstack"].why_not
