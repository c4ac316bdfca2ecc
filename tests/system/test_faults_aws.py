"""The faults that `--backend aws` supports, on an emulated account.

The instances are processes, which a stub of EC2's calls ends, so the tests do not cover EC2 itself. Auto Scaling is
batchlab's own endpoint, and replaces the instances.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.local.processes import living
from batchlab.core.operating_system.processes import start_mark
from batchlab.runtime import aws_deployment
from batchlab.scenarios.faults.fault_injection import TABLE
from batchlab.scenarios.model.values import FaultName
from tests.support.aws.account import REGION, STACK, Account, account
from tests.support.aws.ec2_stub import Machines
from tests.support.grid.local_grid import LocalGrid
from tests.support.http_proxy import standing
from tests.support.scenarios.fault_injection import Bench, Work, number
from tests.support.waiting import until

GROUP = f"{STACK}-pool-default"
SMALL = 6
HASTY = "[manager]\ntick_s = 1\nlease_ttl_s = 6\n"
"""The tests do not pay for requests, so the manager uses short intervals to avoid waiting."""


@pytest.fixture(scope="module")
def there(ministack: Endpoint, moto: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    folder = tmp_path_factory.mktemp("harm") / "account"
    with account(ministack, moto, folder, settings=HASTY) as found:
        found.write_templates(found.hasty_worker(visibility_s=10.0))
        yield found


@pytest.fixture(scope="module")
def machines(there: Account) -> Machines:
    ledger = aws_deployment.folder(there.home("manager"))
    return Machines(there.folder / "asg", there.at.manager_group, ledger / "ledger.sqlite")


@pytest.fixture(scope="module")
def bench(there: Account, machines: Machines) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch, standing(machines) as ec2:
        for name, value in {**there.env, "AWS_ENDPOINT_URL_EC2": ec2}.items():
            patch.setenv(name, value)
        home = there.home()
        until(there.manager_pid, 60)
        grid = LocalGrid(home.path, backend="aws")
        try:
            grid.client.scale("default", min=2, desired=2)
            yield Bench(grid, there.folder)
        finally:
            grid.stop()


def right(bench: Bench) -> None:
    """Run a small job, and check its results."""
    with bench.work(SMALL, 0.05):
        pass


def test_a_termination_without_a_shutdown_is_a_kill(bench: Bench, machines: Machines) -> None:
    until(lambda: len(bench.in_service()) == 2, 90, pause_s=0.2)
    pids = living(machines.folder)
    seen = Work(bench.grid, None, "").hurt(FaultName.KILL, count=1)
    (target,) = seen.targets
    assert seen.evidence == f"{target}: terminated"
    until(lambda: start_mark(pids[target]) is None)
    (asked,) = [one for one in machines.asked if one["Action"] == "TerminateInstances"]
    assert asked["SkipOsShutdown"] == "true"
    until(lambda: target not in bench.in_service(), 60, pause_s=0.2)
    right(bench)


def test_wave_gives_instances_a_notice(bench: Bench) -> None:
    until(lambda: len(bench.in_service()) == 2, 90, pause_s=0.2)
    seen = Work(bench.grid, None, "").hurt(FaultName.SPOT_WAVE, count=1, notice_s=60.0)
    (target,) = seen.targets
    assert seen.evidence.startswith(("after the notice: 1 Terminating", "after the notice: 1 gone"))
    assert "1 of 1 were gone after" in seen.evidence
    until(lambda: target not in bench.in_service(), 60, pause_s=0.2)
    right(bench)


def test_a_group_with_one_zone_launches_nothing_while_that_is_lost(there: Account, bench: Bench) -> None:
    until(lambda: len(bench.in_service()) == 2, 90, pause_s=0.2)
    seen = Work(bench.grid, None, "").hurt(FaultName.ZONE_LOSS, for_s=3.0)
    assert len(seen.targets) == 2
    assert seen.evidence.startswith(f"2 instances of {REGION}a died")
    assert "launched in no zone only" in seen.evidence
    assert not there.group(GROUP)["SuspendedProcesses"]
    assert there.group(GROUP)["AvailabilityZones"] == [f"{REGION}a"]
    right(bench)


def test_messages_are_duplicated_and_delayed(bench: Bench) -> None:
    with bench.work(100, 0.2) as work:
        seen = work.hurt(FaultName.SQS_DUPLICATES, rate=1.0, for_s=3.0)
        assert number(r"and (\d+) of the originals", seen) > 0
    with bench.work(100, 0.2) as work:
        seen = work.hurt(FaultName.SQS_DELAYS, rate=0.5, for_s=3.0)
        assert number(r"were hidden, and (\d+) of them", seen) > 0


def test_a_manager_dies_with_its_instance(bench: Bench) -> None:
    owner = bench.grid.client.grid()["owner"]
    seen = Work(bench.grid, None, "").hurt(FaultName.MANAGER_CRASH)
    assert seen.targets == (owner,)
    assert ": terminated; " in seen.evidence
    assert bench.grid.client.grid()["owner"] != owner
    right(bench)


def test_a_file_of_a_ledger_is_lost_with_it_and_rebuilt(there: Account, bench: Bench) -> None:
    right(bench)
    jobs = len(bench.grid.client.jobs())
    assert jobs
    seen = Work(bench.grid, None, "").hurt(FaultName.DATABASE_LOSS, for_s=0.5)
    assert number(r"; of (\d+) jobs the ledger had 0 after the loss", seen) >= jobs
    found = number(r"and (\d+) after the rebuild", seen)
    assert found == len(bench.grid.client.jobs()) >= jobs
    right(bench)


@pytest.mark.parametrize("name", [FaultName.PAUSE, FaultName.PARTITION, FaultName.S3_ERRORS, FaultName.SLOW_DISK])
def test_faults_that_aws_cannot_inject_are_named(bench: Bench, name: FaultName) -> None:
    seen = Work(bench.grid, None, "").hurt(name)
    assert seen.impossible + "." == TABLE[name]["aws"].why_not
