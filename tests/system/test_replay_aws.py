"""A scenario replayed with `--backend aws` on an emulated account, in which one instance dies.

Auto Scaling is batchlab's own endpoint, whose instances are processes. EC2 is a stub that ends these processes. The
commands, the connection, and the stack's pools and policy are those of a real stack.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.runtime import aws_deployment
from batchlab.scenarios import record
from tests.support.aws.account import POOL, account
from tests.support.aws.ec2_stub import Machines
from tests.support.grid.backends import command
from tests.support.http_proxy import standing
from tests.support.waiting import until

IDLE_S = 5.0
SCENARIO = {
    "name": "one-dies",
    "about": "A job on a stack, and an instance that is gone in the middle of it.",
    "jobs": {"sleepers": {"tasks": 8, "task": "4s"}},
    "arrivals": [{"job": "sleepers", "at": ["0s"]}],
    "pools": {POOL.name: {"min": POOL.min_size, "max": POOL.max_size, "slots": POOL.slots}},
    # The instances must exist when the fault is due, although a boot on a busy machine may take long.
    "prewarm": [{"pool": POOL.name, "min": 1, "at": "0s", "until": "14s"}],
    "faults": [{"at": "10s", "fault": "kill", "count": 1}],
    "expect": {"lost": 0, "duplicates": 0, "failed_jobs": 0},
}


def test_a_scenario_with_a_kill_is_replayed_on_a_stack(ministack: Endpoint, moto: Endpoint, tmp_path: Path) -> None:
    out, path = tmp_path / "record.json", tmp_path / "one-dies.yaml"
    path.write_text(yaml.safe_dump(SCENARIO))
    # The test does not pay for time, so the idle time is short to avoid waiting.
    settings = f"[manager]\nidle_s = {IDLE_S:g}\n"
    with account(ministack, moto, tmp_path / "account", settings=settings) as there:
        until(there.manager_pid, 60)
        home = there.home()
        disk = aws_deployment.folder(there.home("manager")) / "ledger.sqlite"
        machines = Machines(there.folder / "asg", there.at.manager_group, disk)
        with standing(machines) as ec2:
            _, said = command(
                "scenario",
                "replay",
                path,
                "--backend",
                "aws",
                "--home",
                home.path,
                "--out",
                out,
                "--no-forecast",
                env={**there.env, "AWS_ENDPOINT_URL_EC2": ec2},
                within_s=200,
            )
        assert "Connecting to the stack" in said
        assert "The grid is stopped" not in said, "a stack goes on"
        assert home.record() is None, "the connection ends with its command"
        assert there.manager_pid()
    run = record.read(out)
    assert (run.backend, run.cut, run.lost, run.duplicates) == ("aws", "", 0, 0)
    assert [(job.state, job.succeeded) for job in run.jobs] == [("SUCCEEDED", 8)]
    (kill,) = run.faults
    assert (kill.impossible, kill.trouble) == ("", "")
    (target,) = kill.targets
    assert kill.evidence == f"{target}: terminated"
    (asked,) = [one for one in machines.asked if one["Action"] == "TerminateInstances"]
    assert asked["InstanceId.1"] == target
    lives = {instance.id: instance for instance in run.instances}
    assert lives[target].ended_s is not None
    assert len(lives) >= 2, "its group has replaced it"
    assert run.settings["idle_s"] == IDLE_S, "the stack's own policy"
    assert run.usd is not None
