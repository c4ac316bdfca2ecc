"""Speed of the manager's fold of completions, and the manager's memory for jobs of several sizes.

Targets on a machine with two cores:
- The ledger on SQLite folds 10,000 bundles a second. The benchmark measures the ledger alone, in transactions of 10
  completions (one receive of the manager) and more. The benchmark also measures a whole manager, which receives the
  events from a SQLite queue, ten messages at a time.
- The manager's memory does not grow with the size of a job, up to 10⁷ tasks. A manager plans an input with one line for
  each task, groups the tasks into bundles of 4,096, and folds the completions of the bundles. The workers are
  simulated. Each size of a job runs in its own process, which reports its largest memory and its memory at the end of
  the job.
- The ledger on PostgreSQL folds 2,000 bundles a second in transactions of 10 completions. Each transaction waits for
  PostgreSQL's network and disk. BATCHLAB_POSTGRES_URL names the database. The benchmark creates its own schema and
  deletes this schema at the end.

    python benchmarks/ledger.py [--small] [--json FILE] [--only fold|postgres|collect|memory]
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

# Python adds only the script's own folder to the import path, so this line adds the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measured import Part, Row, peak_mb, rss_mb, run

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.local.objects import open_local
from batchlab.adapters.local.sqlite_queue import SqliteQueue
from batchlab.adapters.sql import open_postgres, open_sqlite
from batchlab.core.job_definition import InputDef, JobDef, SplitBy, StageDef
from batchlab.core.model import Bundle, Completion, JobId, JobState, Pool, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import MAX_BATCH, AddCut, AddJob, Cut, Fold, Ledger, Outgoing
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import Events, events_message, read_task_message
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager.collector import events_queue
from batchlab.manager.manager import Manager
from batchlab.manager.state import Ports
from tests.support.no_fleet import NoFleet

PER_SECOND = 10_000
PER_SECOND_POSTGRES = 2_000
POSTGRES = "BATCHLAB_POSTGRES_URL"
GROWTH_MB = 32
"""Maximum difference in MB between the manager's largest memory for a job of any size and for the smallest job."""
BUNDLE = 4096
TASKS = 100
"""Number of tasks of each bundle in the measurements of folds."""
ROUNDS = 10
STAGE = StageName("map")
JOB = JobDef(JobId("bench-0123456789"), "bench", (StageDef(STAGE, handler="work:one"),), 0.0)
POOL = Pool("default", 0, 2, 1)


def open_ports(folder: Path) -> Ports:
    """Return the ports of the backend `local` without its fleet."""
    clock = WallClock()
    return Ports(
        open_local(folder / "objects"),
        SqliteQueue(folder / "queues" / "queues.db", clock),
        NoFleet(),
        open_sqlite(folder / "ledger.db"),
        clock,
        RandomIds(),
        Patience(Random(1)),
    )


def bundles(count: int) -> tuple[Bundle, ...]:
    spans = (TaskSet.span(TASKS * i, TASKS * (i + 1)) for i in range(count))
    return tuple(Bundle(JOB.id, STAGE, tasks) for tasks in spans)


def completion(bundle: Bundle) -> Completion:
    began_s = 1.7e9 + bundle.tasks.first * 1e-3
    nothing = TaskSet()
    return Completion(bundle, "w-1", began_s, began_s + 0.5, bundle.tasks, nothing, nothing, 0.4321)


# --- Folding -------------------------------------------------------------------------------------


def fold(batch: int, count: int) -> list[Row]:
    """Measure the fold of `count` completions by the ledger on SQLite, `batch` completions in a transaction."""
    with tempfile.TemporaryDirectory(prefix="batchlab-bench-") as folder:
        rate = asyncio.run(_fold(open_sqlite(Path(folder) / "ledger.db"), batch, count))
    return [Row(f"ledger: {batch} completions a transaction", rate, "/s", PER_SECOND)]


def postgres(batch: int, count: int) -> list[Row]:
    """Measure the fold of `count` completions by the ledger on PostgreSQL, `batch` completions in a transaction."""
    import psycopg

    url, schema = os.environ[POSTGRES], f"batchlab_bench_{os.getpid()}"
    try:
        rate = asyncio.run(_fold(open_postgres(url, schema=schema), batch, count))
    finally:
        with psycopg.connect(url) as connection:
            connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE".encode())
    what = f"ledger on PostgreSQL: {batch} completions a transaction"
    return [Row(what, rate, "/s", PER_SECOND_POSTGRES)]


async def _fold(ledger: Ledger, batch: int, count: int) -> float:
    """Fold `count` completions in several rounds. Return the rate of the fastest round, in bundles a second."""
    planned = bundles(count)
    await ledger.apply(AddJob(JOB, JobState.SUBMITTED))
    await ledger.apply(AddCut(Cut(JOB.id, STAGE, 0, 0, planned, TaskSet(), TASKS * count)))
    done = [completion(bundle) for bundle in planned]
    rates = []
    for at in range(0, count, count // ROUNDS):
        some = done[at : at + count // ROUNDS]
        began_s = time.perf_counter()
        for first in range(0, len(some), batch):
            part = some[first : first + batch]
            await ledger.apply(Fold(part, [{}] * len(part)))
        rates.append(len(some) / (time.perf_counter() - began_s))
    assert (await ledger.rows(JOB.id)).stages[0].counts.ended
    await ledger.close()
    return max(rates)


def collect(each: int, count: int) -> list[Row]:
    """Measure how fast a whole manager folds `count` completions from the events queue.

    Each message has `each` completions.
    """

    async def measure(folder: Path) -> float:
        ports = open_ports(folder)
        planned = bundles(count)
        await ports.ledger.apply(AddJob(JOB, JobState.SUBMITTED))
        cut = Cut(JOB.id, STAGE, 0, 0, planned, TaskSet(), TASKS * count)
        await ports.ledger.apply(AddCut(cut))
        await ports.queue.ensure(events_queue(ManagerSettings()))
        done = tuple(map(completion, planned))
        packs = (done[first : first + each] for first in range(0, count, each))
        bodies = [events_message(Events(pack)) for pack in packs]
        for first in range(0, len(bodies), MAX_BATCH):
            some = bodies[first : first + MAX_BATCH]
            await ports.queue.send(object_keys.EVENTS, [Outgoing(body) for body in some])
        async with leading(ports) as manager:
            began_s = time.perf_counter()
            await end_of(manager)
            return count / (time.perf_counter() - began_s)

    with tempfile.TemporaryDirectory(prefix="batchlab-bench-") as folder:
        rate = asyncio.run(measure(Path(folder)))
    what = f"manager: events queue to ledger, {each} to a message"
    return [Row(what, rate, "/s", PER_SECOND), Row("  its memory at the end", peak_mb(), "MB")]


@asynccontextmanager
async def leading(ports: Ports) -> AsyncIterator[Manager]:
    """Run a manager on `ports` that holds the lease."""
    manager = Manager(ports, ManagerSettings(), [POOL], "bench")
    task = asyncio.create_task(manager.run())
    leads = asyncio.create_task(manager.is_leader.wait())
    await asyncio.wait((task, leads), return_when=asyncio.FIRST_COMPLETED)
    try:
        yield manager
    finally:
        for one in (task, leads):
            one.cancel()
        ended = await asyncio.gather(task, leads, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error


async def end_of(manager: Manager) -> None:
    """Wait until the manager's only job has ended."""
    conducting = manager.lives[JOB.id].conducting
    assert conducting is not None
    await conducting


# --- Memory --------------------------------------------------------------------------------------


def memory(sizes: list[int]) -> list[Row]:
    """Measure the manager's memory for a job of each size in `sizes`. The sizes are in ascending order."""
    import json
    import subprocess
    import sys

    rows: list[Row] = []
    least = 0.0
    for tasks in sizes:
        command = [sys.executable, __file__, "--one", "manage", json.dumps([tasks])]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        some = [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]
        least = least or some[0].value
        rows += [replace(some[0], target=least + GROWTH_MB, at_most=True), *some[1:]]
    return rows


def manage(tasks: int) -> list[Row]:
    """Measure the manager during a job of `tasks` tasks, from the submission to the end of the job."""

    async def measure(folder: Path) -> float:
        ports = open_ports(folder)
        with (folder / "lines.jsonl").open("w") as lines:
            lines.writelines(f"{number}\n" for number in range(tasks))
        await ports.objects.upload("raw/lines.jsonl", folder / "lines.jsonl")
        stage = replace(JOB.stages[0], bundle=BUNDLE)
        source = InputDef(("raw/lines.jsonl",), SplitBy.ITEMS)
        job = replace(JOB, stages=(stage,), input=source)
        began_s = time.perf_counter()
        async with leading(ports) as manager:
            await manager.job_commands.submit(job)
            crew = asyncio.create_task(work(ports))
            await end_of(manager)
            crew.cancel()
            counts = (await ports.ledger.rows(job.id)).stages[0].counts
            assert counts.succeeded == tasks
        return time.perf_counter() - began_s

    with tempfile.TemporaryDirectory(prefix="batchlab-bench-") as folder:
        took_s = asyncio.run(measure(Path(folder)))
    gc.collect()
    return [
        Row(f"manager of {tasks:,} tasks: most memory", peak_mb(), "MB"),
        Row("  memory at the job's end", rss_mb(), "MB"),
        Row("  from submission to end", took_s, "s"),
    ]


async def work(ports: Ports) -> None:
    """Simulate the workers: receive each bundle that the manager sends, and report a completion of the bundle."""
    queue, name = ports.queue, object_keys.tasks_queue(POOL.name)
    while True:
        messages = await queue.receive(name, wait_s=1.0)
        if messages:
            found = [read_task_message(message.body).bundle for message in messages]
            events = Events(tuple(map(completion, found)))
            await queue.send(object_keys.EVENTS, [Outgoing(events_message(events))])
            await queue.delete(name, [message.receipt for message in messages])


def choose(small: bool) -> list[tuple[str, list[Any]]]:
    """Return the parts of the benchmark to run, with the arguments of each part."""
    some = 1 if small else 4
    largest = 5 if small else 7
    batches = (10, 100, 1000)
    return [
        *(("fold", [batch, 10_000 * some]) for batch in batches),
        *(("postgres", [batch, 10_000 * some]) for batch in batches if POSTGRES in os.environ),
        *(("collect", [each, 10_000 * some]) for each in (1, 10)),
        ("memory", [[10**power for power in range(4, largest + 1)]]),
    ]


if __name__ == "__main__":
    parts: Mapping[str, Part] = {
        "fold": fold,
        "postgres": postgres,
        "collect": collect,
        "memory": memory,
        "manage": manage,
    }
    run(__doc__, parts, choose)
