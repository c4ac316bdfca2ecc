"""The fleet on EC2 Auto Scaling during problems of AWS, without orphans or launch loops, and with clear activities."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from tests.support.aws.account import POOL, STACK, Account, account
from tests.support.aws.faulty_proxy import FaultyFront
from tests.support.waiting import until
from tests.system.test_aws_backend import batchlab, job_of, total

GROUP = f"{STACK}-pool-default"


def activities(there: Account) -> Sequence[Any]:
    """Return the pool's scaling activities, newest first."""
    answer = there.aws("autoscaling").describe_scaling_activities(AutoScalingGroupName=GROUP)
    return answer["Activities"]  # type: ignore[no-any-return]


def is_empty(there: Account) -> bool:
    group = there.group(GROUP)
    return not group["Instances"] and not group["DesiredCapacity"]


def test_throttling_and_late_answers_make_it_slow_and_not_wrong(
    ministack: Endpoint, moto: Endpoint, tmp_path: Path
) -> None:
    front = FaultyFront(throttled=0.3, lag_s=8.0)
    # The test does not pay for time or requests, so the manager uses short intervals to avoid waiting.
    hasty = "[manager]\ntick_s = 1\nidle_s = 2\n"
    with account(ministack, moto, tmp_path / "account", front=front, settings=hasty) as there:
        until(there.manager_pid, 60)
        job = job_of(tmp_path / "job", 300, seconds=0.05)
        home, out = there.home(), tmp_path / "out"
        batchlab(there, "run", job, "--backend", "aws", "--home", home.path, "--out", out)
        assert total(out) == sum(i * i for i in range(300))
        assert 1 <= len(launches(there)) <= 2, "a late answer makes nobody launch again"
        assert front.refused
        assert front.stale
        until(lambda: is_empty(there), 150)
        assert front.asked["SetDesiredCapacity"] <= 10, front.asked


def test_a_wave_that_takes_every_instance_at_once_costs_only_time(
    ministack: Endpoint, moto: Endpoint, tmp_path: Path
) -> None:
    """Spot capacity may end without a notice."""
    with account(ministack, moto, tmp_path / "account") as there:
        there.write_templates(there.hasty_worker(visibility_s=10.0))
        until(there.manager_pid, 60)
        home, job, out = there.home(), job_of(tmp_path / "job", 60, seconds=0.5), tmp_path / "out"
        batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path)
        batchlab(there, "grid", "scale", POOL.name, "--desired", 2, "--home", home.path)
        batchlab(there, "job", "submit", job, "--home", home.path)
        until(lambda: in_service(there) == 2, 90)
        before = there.worker_pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        batchlab(there, "job", "watch", "last", "--home", home.path)
        batchlab(there, "job", "results", "last", "--out", out, "--home", home.path)
        assert total(out) == sum(i * i for i in range(60))
        assert len(before) == 2
        assert not set(before) & set(there.worker_pids())
        replaced = [a for a in activities(there) if "health check" in a["Cause"]]
        assert len(replaced) >= 2, "each says why it ended"
        batchlab(there, "grid", "down", "--home", home.path)


def in_service(there: Account) -> int:
    states = [one["LifecycleState"] for one in there.group(GROUP)["Instances"]]
    return states.count("InService")


@pytest.mark.parametrize(
    ("command", "said"),
    [(["/nowhere/at-all"], "cannot be started"), (["/bin/sleep", "600"], "was abandoned: Heartbeat Timeout")],
    ids=["no-capacity", "never-comes-up"],
)
def test_failing_launches_are_reported_and_retried_slowly(
    ministack: Endpoint, moto: Endpoint, tmp_path: Path, command: list[str], said: str
) -> None:
    with account(ministack, moto, tmp_path / "account") as there:
        until(there.manager_pid, 60)
        there.write_templates(command)
        home, job = there.home(), job_of(tmp_path / "job", 20)
        batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path)
        batchlab(there, "job", "submit", job, "--home", home.path)
        until(lambda: any(a["StatusCode"] in ("Failed", "Cancelled") for a in activities(there)), 90)
        shown, _ = batchlab(there, "grid", "activities", "--home", home.path, "--json")
        told = [f"{load['description']} {load['cause']}" for load in json.loads(shown)]
        assert any(said in one for one in told), told
        assert len(activities(there)) < 20
        there.write_templates()
        if said == "cannot be started":  # otherwise, the next launch must first time out
            batchlab(there, "job", "watch", "last", "--home", home.path)
        batchlab(there, "grid", "down", "--home", home.path)


def test_pool_with_failing_boots_stops_and_resumes_after_the_repair(
    ministack: Endpoint, moto: Endpoint, tmp_path: Path
) -> None:
    """In a failing boot, the instance reports the reason and powers itself off."""
    paused = "[manager]\ntick_s = 0.5\nboot_tries = 2\nboot_pause_s = 600\n"
    with account(ministack, moto, tmp_path / "account", settings=paused) as there:
        until(there.manager_pid, 60)
        there.write_templates(["/bin/sh", "-c", "sleep 6; exit 1"])  # longer than the pause between two looks
        home, job = there.home(), job_of(tmp_path / "job", 20)
        batchlab(there, "grid", "up", "--backend", "aws", "--home", home.path)
        batchlab(there, "job", "submit", job, "--home", home.path)
        until(lambda: len(launches(there)) >= 2 and is_empty(there), 90, pause_s=2.0)
        tries = len(launches(there))
        assert tries <= 3, "the group replaces the second before the manager has seen it end"
        why, _ = batchlab(there, "job", "why", "last", "--home", home.path)
        assert "the last 2 instances of pool default ended before their worker had" in why
        assert "an EC2 health check indicating it has been terminated or stopped" in why
        shown, _ = batchlab(there, "grid", "status", "--home", home.path)
        assert "launching is stopped, the next is tried in" in shown
        shown, _ = batchlab(there, "doctor", "--backend", "aws", "--home", home.path)
        assert "pool default" in shown
        assert "launching is stopped" in shown
        assert len(launches(there)) == tries, "and none since"
        there.write_templates()
        batchlab(there, "grid", "scale", POOL.name, "--auto", "--home", home.path)
        batchlab(there, "job", "watch", "last", "--home", home.path)
        batchlab(there, "grid", "down", "--home", home.path)


def launches(there: Account) -> list[Any]:
    return [activity for activity in activities(there) if activity["Description"].startswith("Launching")]
