"""Managers that share one ledger, each in its own process, and the workers that they share.

Run as a program, this module is one manager that leads or stands by until it is killed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import cast

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.local.objects import open_local
from batchlab.adapters.local.sqlite_queue import SqliteQueue
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, Json, Pool, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import JobRecord, Ledger
from batchlab.core.protocol import json_format
from batchlab.core.service_settings import ManagerSettings, WorkerSettings
from batchlab.manager.manager import Manager
from batchlab.manager.state import Ports
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, ScriptedRunner
from batchlab.worker.inflight_message import Identity
from batchlab.worker.loop import Worker
from tests.support import ROOT
from tests.support.contract.ledger_suite import DumpingLedger, opened_at
from tests.support.no_fleet import NoFleet

SQUARE, TOTAL = StageName("square"), StageName("total")
ITEMS = list(range(400))
JOB = JobDef(
    JobId("squares-1"),
    "squares",
    (StageDef(SQUARE, handler="m:square", bundle=2), StageDef(TOTAL, after=(SQUARE,), gather="*", handler="m:total")),
    submitted_s=1_700_000_000.0,
    items=len(ITEMS),
)
POOL = Pool("default", 0, 2, 2)
LEASE_S = 2.0
SETTINGS = ManagerSettings(lease_ttl_s=LEASE_S, tick_s=0.2, silence_s=6.0, visibility_s=3.0, wait_s=0.5)
TASK_S = 0.05
# A standby manager looks every third of the lease time. The remaining time allows for a busy machine.
TAKEN_OVER_S = LEASE_S * 5 / 3 + 20.0


@asynccontextmanager
async def ports_in(folder: Path, ledger: Ledger) -> AsyncIterator[Ports]:
    """Yield ports with a bucket and queues in this folder, and with that ledger."""
    clock = WallClock()
    queue = SqliteQueue(folder / "queues" / "queues.db", clock)
    objects = open_local(folder / "objects")
    try:
        yield Ports(objects, queue, NoFleet(), ledger, clock, RandomIds(), Patience(Random()))
    finally:
        await queue.close()


# --- Workers -------------------------------------------------------------------------------------


def _play(scene: AttemptInput) -> ScriptedAttempt:
    value = sum(scene.item) if scene.stage.name == TOTAL else scene.item**2
    return ScriptedAttempt(TASK_S, value)


@asynccontextmanager
async def workers(ports: Ports, count: int) -> AsyncIterator[None]:
    """Run `count` workers in this process."""
    settings = WorkerSettings(visibility_s=3.0, wait_s=0.5, drain_s=2.0)
    crew = []
    for n in range(count):
        runner = ScriptedRunner(_play, ports.clock, lambda _: lambda: None, lambda: None)
        who = Identity(f"w-{n}", f"i-{n}", POOL.name, POOL.slots)
        worker = Worker(who, ports.objects, ports.queue, ports.clock, runner, ports.patience, settings)
        crew.append((worker, asyncio.create_task(worker.run())))
    try:
        yield
    finally:
        for worker, _ in crew:
            worker.drain()
        await asyncio.gather(*(task for _, task in crew))


# --- Progress of the job -------------------------------------------------------------------------


async def done(ledger: DumpingLedger, at_least: int) -> None:
    """Wait until at least that many tasks have succeeded."""
    deadline_s = time.monotonic() + 60
    while True:
        try:
            if (await ledger.rows(JOB.id)).stages[0].counts.succeeded >= at_least:
                return
        except NotFound:
            pass  # the job was not submitted yet
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.05)


async def ended(ledger: DumpingLedger) -> JobRecord:
    """Wait until the job has ended, and return its record."""
    deadline_s = time.monotonic() + 60
    while not (record := await ledger.job(JOB.id)).state.ended:
        assert time.monotonic() < deadline_s, await ledger.rows(JOB.id)
        await asyncio.sleep(0.1)
    return record


async def check_bucket(ports: Ports, ledger: DumpingLedger) -> None:
    """Check invariants I1 and I2: each task has one result, and the sums are consistent."""
    squares: dict[int, Json] = {}
    totals: dict[int, Json] = {}
    async for page in ports.objects.list(f"jobs/{JOB.id}/"):
        for info in page:
            if "/outcomes/" in info.key:
                outcome = json_format.outcome_from_json(json_format.loads(await ports.objects.get(info.key)))
                values = dict(zip(outcome.succeeded, outcome.values, strict=True))
                into = squares if outcome.bundle.stage == SQUARE else totals
                assert not into.keys() & values.keys()
                into |= values
    assert squares == {n: n**2 for n in ITEMS}
    assert totals == {0: sum(n**2 for n in ITEMS)}
    for stage in (await ledger.rows(JOB.id)).stages:
        counts = stage.counts
        assert counts.planned == counts.succeeded == (len(ITEMS) if counts.stage == SQUARE else 1)


# --- Managers ------------------------------------------------------------------------------------


@dataclass
class Process:
    """A manager process, as a test sees it."""

    owner: str
    process: subprocess.Popen[str]

    async def says(self, word: str, within_s: float) -> None:
        """Wait for the next output line. Fail if the line is not `word`."""
        assert self.process.stdout
        line = asyncio.to_thread(self.process.stdout.readline)
        assert (await asyncio.wait_for(line, within_s)).strip() == word


@contextmanager
def manager(folder: Path, url: str, schema: str, owner: str) -> Iterator[Process]:
    """Start a manager process with a ledger at `url` in that schema or domain, and kill the process on exit."""
    argv = [sys.executable, "-m", "tests.support.postgres.managers", str(folder)]
    with (
        (folder / f"{owner}.log").open("w") as log,
        subprocess.Popen(
            [*argv, url, schema, owner], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            yield Process(owner, process)
        finally:
            # SIGKILL also ends a paused process.
            process.kill()


async def _manage(folder: Path, url: str, schema: str, owner: str) -> None:
    """Run a manager, and print "leads" and "lost" at each change of the lease."""
    async with ports_in(folder, opened_at(url, schema)) as ports:
        while True:
            one = Manager(ports, SETTINGS, [POOL], owner)
            leading = asyncio.create_task(one.run())
            await asyncio.wait(
                [leading, asyncio.create_task(one.is_leader.wait())], return_when=asyncio.FIRST_COMPLETED
            )
            if one.is_leader.is_set():
                print("leads", flush=True)
                await one.job_commands.submit(JOB, ITEMS)
            await leading
            print("lost", flush=True)


if __name__ == "__main__":
    asyncio.run(_manage(Path(sys.argv[1]), *cast(tuple[str, str, str], tuple(sys.argv[2:]))))
