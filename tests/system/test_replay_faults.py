"""The injection of faults at their times, and the report of faults that were not injected."""

from __future__ import annotations

import asyncio
from pathlib import Path

from batchlab.core.errors import BackendError
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.scenarios import record
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import Fault, FaultName, JobTemplate
from batchlab.scenarios.record import InjectedFault
from batchlab.scenarios.replay import driver
from tests.support.grid.backends import command
from tests.support.scenarios.replay import scenario, stage, up
from tests.system.test_replay_cli import write


class Notes:
    """A fault injector that only records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[FaultName, float]] = []
        self.undone = self.closed = 0
        self.stood = asyncio.Event()

    async def inject(self, fault: Fault, at_s: float) -> InjectedFault:
        self.asked.append((fault.name, at_s))
        if fault.name is FaultName.SLOW_DISK:
            raise BackendError("The disk was not to be slowed.")
        if fault.name is FaultName.PAUSE:
            await self.stood.wait()
        return InjectedFault(fault.name, at_s, evidence="seen")

    async def undo(self) -> None:
        self.undone += 1
        self.stood.set()

    async def close(self) -> None:
        self.closed += 1


def test_faults_have_their_times_and_are_undone_at_the_end(tmp_path: Path) -> None:
    wanted = scenario(
        JobTemplate("quick", (stage("work", 1.0),), Constant(12)),
        faults=(
            Fault(FaultName.KILL, at_s=0.5, for_s=0.1),
            Fault(FaultName.SLOW_DISK, at_s=1.0, for_s=0.1),
            Fault(FaultName.PAUSE, at_s=1.5, for_s=600.0),
            Fault(FaultName.PARTITION, at_s=900.0),
        ),
    )
    home = Home(tmp_path / "home")
    notes: list[Notes] = []

    def injector() -> Notes:
        notes.append(Notes())
        return notes[-1]

    with up(home, wanted) as backend:
        run = asyncio.run(driver.replay(wanted, home, backend, patience=factory.patience(), injector=injector))
    (asked,) = notes
    names = [name for name, _ in asked.asked]
    assert names == [FaultName.KILL, FaultName.SLOW_DISK, FaultName.PAUSE]
    for (_, at_s), due_s in zip(asked.asked, (0.5, 1.0, 1.5), strict=True):
        assert due_s <= at_s < due_s + 0.5
    assert (asked.undone, asked.closed) == (1, 1)
    told = {fault.name: (fault.evidence, fault.impossible) for fault in run.faults}
    assert told["kill"] == ("seen", "")
    assert told["slow-disk"] == ("", "")
    assert [fault.trouble for fault in run.faults if fault.trouble] == ["The disk was not to be slowed."]
    # Faults that are active at the end are undone, and faults that were not due by then are reported.
    assert told["pause"] == ("seen", "")
    assert told["partition"] == ("", "the run was over before")
    assert run.cut == ""


def test_a_killed_instance_and_a_crashed_manager_cost_only_time(tmp_path: Path) -> None:
    faults = [{"at": "40s", "fault": "kill", "count": 1}, {"at": "60s", "fault": "manager-crash", "for": "10s"}]
    jobs = {"claims": {"tasks": 16, "task": "15s"}}
    out = tmp_path / "record.json"
    path = write(tmp_path, faults=faults, jobs=jobs)
    command("scenario", "replay", path, "--home", tmp_path / "home", "--out", out, "--no-forecast")
    run = record.read(out)
    kill, crash = run.faults
    assert (kill.name, len(kill.targets), kill.impossible) == ("kill", 1, "")
    assert (crash.name, crash.impossible) == ("manager-crash", "")
    assert kill.evidence
    assert crash.evidence
    (dead,) = [instance for instance in run.instances if instance.id == kill.targets[0]]
    assert dead.ended_s is not None
    assert (run.lost, run.duplicates) == (0, 0)
    assert sum(job.succeeded for job in run.jobs) == 32
    assert run.cut == ""
