"""A fleet at the Auto Scaling endpoint whose manager is killed for good: its group ends without a manager."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.group_descriptions import END_ACTION
from batchlab.core.model import Pool
from batchlab.runtime import compose_deployment
from tests.support.aws.account import POOL, Account, account
from tests.support.aws.autoscaling_api import aws
from tests.support.docker.chaos import Containers, docker, wait_for
from tests.support.docker.grid import need_containers
from tests.support.grid.local_grid import LocalGrid
from tests.support.scenarios.fault_injection import Bench
from tests.support.waiting import until
from tests.system.test_aws_backend import batchlab, job_of, total

ORPHAN_S = 12
GATED = """\
import pathlib, time

def square(item):
    while not pathlib.Path('{gate}').exists():
        time.sleep(0.1)
    return item * item

def total(values):
    return sum(values)
"""


def pool_group(there: Account) -> Any:
    return there.group(f"{there.at.groups_prefix}{POOL.name}")


def sizes(there: Account) -> tuple[int, int, int]:
    group = pool_group(there)
    return group["MinSize"], group["MaxSize"], group["DesiredCapacity"]


def actions(there: Account) -> list[Any]:
    name = f"{there.at.groups_prefix}{POOL.name}"
    answer = there.aws("autoscaling").describe_scheduled_actions(AutoScalingGroupName=name)
    found: list[Any] = answer["ScheduledUpdateGroupActions"]
    return found


def test_a_fleet_without_a_manager_ends_after_its_bundles(ministack: Endpoint, moto: Endpoint, tmp_path: Path) -> None:
    settings = f"[manager]\ntick_s = 0.5\norphan_s = {ORPHAN_S}\n"
    with account(ministack, moto, tmp_path / "account", settings=settings) as there:
        until(there.manager_pid, 60)
        home, gate, out = there.home(), tmp_path / "gate", tmp_path / "out"
        job = job_of(tmp_path / "job", 2)
        job.with_name("work.py").write_text(GATED.format(gate=gate))
        batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path)
        batchlab(there, "grid", "scale", POOL.name, "--min", 2, "--home", home.path)
        until(lambda: len(there.worker_pids()) == 2, 60)
        batchlab(there, "job", "submit", job, "--home", home.path)
        until(lambda: any(one["ProtectedFromScaleIn"] for one in pool_group(there)["Instances"]), 60, pause_s=0.2)
        (action,) = actions(there)
        assert action["ScheduledActionName"] == END_ACTION
        shown, _ = batchlab(there, "grid", "status", "--json", "--home", home.path)
        (pool,) = json.loads(shown)["pools"]
        assert 0 < pool["ends_in_s"] <= ORPHAN_S
        assert not pool["end_trouble"]
        until(lambda: actions(there)[0]["StartTime"] > action["StartTime"], 30)

        scaling = there.aws("autoscaling")
        scaling.suspend_processes(AutoScalingGroupName=there.at.manager_group, ScalingProcesses=["Launch"])
        os.kill(there.manager_pid(), signal.SIGKILL)
        until(lambda: sizes(there) == (0, 0, 0), 60, pause_s=0.5)
        assert not actions(there), "a performed action no longer exists"
        busy = [one["InstanceId"] for one in pool_group(there)["Instances"] if one["ProtectedFromScaleIn"]]
        assert busy, "scale-in does not end a protected instance"
        gate.touch()
        until(lambda: not pool_group(there)["Instances"], 90, pause_s=0.5)
        assert not there.worker_pids()

        # The next manager restores the limits of the stack, and the job ends.
        scaling.resume_processes(AutoScalingGroupName=there.at.manager_group, ScalingProcesses=["Launch"])
        until(lambda: sizes(there)[:2] == (POOL.min_size, POOL.max_size), 60, pause_s=0.5)
        batchlab(there, "job", "watch", "last", "--home", home.path)
        batchlab(there, "job", "results", "last", "--out", out, "--home", home.path)
        assert total(out) == sum(i * i for i in range(2))
        batchlab(there, "grid", "down", "--home", home.path)


def test_a_suspended_process_of_the_group_is_reported(ministack: Endpoint, moto: Endpoint, tmp_path: Path) -> None:
    settings = "[manager]\ntick_s = 0.5\norphan_s = 18\n"
    with account(ministack, moto, tmp_path / "account", settings=settings) as there:
        until(there.manager_pid, 60)
        home = there.home()
        batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path)
        name, scaling = f"{there.at.groups_prefix}{POOL.name}", there.aws("autoscaling")
        scaling.suspend_processes(AutoScalingGroupName=name, ScalingProcesses=["ScheduledActions"])
        words = "its process ScheduledActions is suspended"
        until(lambda: words in batchlab(there, "grid", "status", "--home", home.path)[0], 60, pause_s=1.0)
        scaling.resume_processes(AutoScalingGroupName=name, ScalingProcesses=["ScheduledActions"])
        until(lambda: words not in batchlab(there, "grid", "status", "--home", home.path)[0], 60, pause_s=1.0)
        batchlab(there, "grid", "down", "--home", home.path)


CONTAINERS = (Pool("default", 0, 2, 1, boot_s=1.0, instance_type="t3.small"),)
BUSY_S = 40.0


def test_containers_without_a_manager_end_after_their_bundles(tmp_path: Path) -> None:
    """The Auto Scaling endpoint has its own container, so it performs the action after the end of the manager."""
    need_containers(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    (home / "settings.toml").write_text(f"[manager]\ntick_s = 0.5\norphan_s = {ORPHAN_S}\n")
    grid = LocalGrid(home, CONTAINERS, backend="localstack")
    containers = Containers(grid)
    scaling = aws(compose_deployment.autoscaling(grid.home, containers.at), "autoscaling")

    def group() -> Any:
        (found,) = scaling.describe_auto_scaling_groups()["AutoScalingGroups"]
        return found

    def limits() -> tuple[int, int, int]:
        found = group()
        return found["MinSize"], found["MaxSize"], found["DesiredCapacity"]

    def ends() -> list[Any]:
        answer = scaling.describe_scheduled_actions(ScheduledActionNames=[END_ACTION])
        found: list[Any] = answer["ScheduledUpdateGroupActions"]
        return found

    try:
        grid.client.scale("default", min=2)
        with Bench(grid, tmp_path).work(1, BUSY_S, is_begun=False, within_s=240.0):
            wait_for(lambda: any(one["ProtectedFromScaleIn"] for one in group()["Instances"]))
            (before,) = ends()
            wait_for(lambda: ends()[0]["StartTime"] > before["StartTime"])
            manager, asg = (containers.service(name) for name in ("manager", "asg"))
            # Docker does not restart a container that `docker kill` has ended.
            docker("kill", manager)
            wait_for(lambda: limits() == (0, 0, 0))
            assert not ends(), "a performed action no longer exists"
            assert len([one for one in group()["Instances"] if one["ProtectedFromScaleIn"]]) == 1
            wait_for(lambda: not group()["Instances"])
            wait_for(lambda: not containers.instances())
            assert containers.is_gone(manager)
            assert not containers.is_gone(asg)
            # The next manager restores the limits, and the job ends.
            grid.client.close()
            grid.start()
            wait_for(lambda: limits()[1] == CONTAINERS[0].max_size)
    finally:
        grid.stop()
