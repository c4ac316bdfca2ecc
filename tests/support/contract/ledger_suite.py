"""The ledgers of the contract suite, an example job, and changes of it.

Run as a program, this module is the second process of the tests that need one.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Protocol

import pytest
from _pytest.mark.structures import ParameterSet

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.memory.ledger import SimLedger
from batchlab.adapters.simpledb import open_simpledb
from batchlab.adapters.sql import open_memory, open_postgres, open_sqlite
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import (
    Bundle,
    Completion,
    Control,
    Failure,
    FailureKind,
    Follow,
    JobId,
    JobState,
    Json,
    Outcome,
    Ran,
    StageCounts,
    StageName,
    TaskSet,
)
from batchlab.core.ports import (
    AddCut,
    AddJob,
    Cut,
    Ending,
    Finish,
    Fold,
    JobRows,
    Ledger,
    MoveJob,
    Reopen,
    Reopening,
    SetControl,
    SetPlanned,
    StageRecord,
)
from batchlab.core.protocol import settlement
from batchlab.core.retry_rule import RetryRule
from batchlab.sim.event_loop import SimLoop
from tests.support import ROOT
from tests.support.postgres.server import Postgres
from tests.support.simpledb.fixtures import Sdb

RESIZE, INDEX, TOTAL = StageName("resize"), StageName("index"), StageName("total")
JOB = JobDef(
    JobId("photos-1"),
    "photos",
    (
        StageDef(RESIZE, handler="photos:resize", retry=RetryRule(attempts=2)),
        StageDef(INDEX, after=(RESIZE,), handler="photos:index", retry=RetryRule(attempts=2)),
        StageDef(TOTAL, after=(INDEX,), gather="*", handler="photos:total"),
    ),
    submitted_s=1_700_000_000.25,
    items=100,
)
"""A job with a root stage, a chain that follows the root item by item, and a gather that waits for the chain."""


class DumpingLedger(Ledger, Protocol):
    """A ledger whose content can be compared with the content of another ledger."""

    async def dump(self) -> dict[str, Json]:
        """See SqlLedger."""


Check = Callable[[DumpingLedger], Awaitable[None]]
Place = Path | Postgres | Sdb
"""The place of a ledger that several processes can use: a file, a schema, or a domain."""


def opened(where: Place | None) -> DumpingLedger:
    """Open the ledger at a place, or in memory if the place is None."""
    if where is None:
        return open_memory()
    if isinstance(where, Path):
        return open_sqlite(where)
    if isinstance(where, Sdb):
        return open_simpledb(where.endpoint, where.domain)
    return open_postgres(where.url, schema=where.schema)


@asynccontextmanager
async def ledger_in(where: Place | None) -> AsyncIterator[DumpingLedger]:
    """Open the ledger at a place, and close it on exit."""
    ledger = opened(where)
    try:
        yield ledger
    finally:
        await ledger.close()


async def _checked(check: Check, where: Place | None) -> None:
    async with ledger_in(where) as ledger:
        await check(ledger)


def _sim_world(check: Check, _: pytest.FixtureRequest) -> None:
    SimLoop().run(_checked(check, None))


def _memory_world(check: Check, _: pytest.FixtureRequest) -> None:
    async def main() -> None:
        await check(SimLedger())

    SimLoop().run(main())


def _file_world(check: Check, request: pytest.FixtureRequest) -> None:
    asyncio.run(_checked(check, request.getfixturevalue("tmp_path") / "ledger.sqlite"))


def _postgres_world(check: Check, request: pytest.FixtureRequest) -> None:
    asyncio.run(_checked(check, request.getfixturevalue("postgres")))


def _simpledb_world(check: Check, request: pytest.FixtureRequest) -> None:
    asyncio.run(_checked(check, request.getfixturevalue("simpledb")))


def _rough_simpledb_world(check: Check, request: pytest.FixtureRequest) -> None:
    asyncio.run(_checked(check, request.getfixturevalue("rough_simpledb")))


# A new database joins the suite through one more function here.
LEDGER_WORLDS: Mapping[str, Callable[[Check, pytest.FixtureRequest], None]] = {
    "sim": _sim_world,
    "memory": _memory_world,
    "file": _file_world,
    "postgres": _postgres_world,
    "simpledb": _simpledb_world,
    "simpledb-rough": _rough_simpledb_world,
}


def _params(*parts_of_this_process: str, among: Iterable[str]) -> list[ParameterSet]:
    """Return test parameters; worlds that need a service have the marker `slow`."""
    return [pytest.param(name, marks=[] if name in parts_of_this_process else [pytest.mark.slow]) for name in among]


def on_every_ledger(check: Check) -> Callable[[str, pytest.FixtureRequest], None]:
    """Turn an async check of an empty ledger into a test that runs in each world."""

    @pytest.mark.parametrize("world", _params("sim", "memory", "file", among=LEDGER_WORLDS))
    def test(world: str, request: pytest.FixtureRequest) -> None:
        LEDGER_WORLDS[world](check, request)

    test.__name__, test.__doc__ = getattr(check, "__name__", ""), check.__doc__
    return test


@pytest.fixture(params=_params("file", among=["file", "postgres", "simpledb", "rough_simpledb"]))
def place(request: pytest.FixtureRequest) -> Place:
    """Return an unused place for a ledger that several processes can use."""
    if request.param != "file":
        found: Postgres | Sdb = request.getfixturevalue(request.param)
        return found
    folder: Path = request.getfixturevalue("tmp_path")
    return folder / "ledger.sqlite"


# --- Changes of a job ---------------------------------------------------------------------------


def bundle(start: int, stop: int, *, stage: StageName = RESIZE, attempt: int = 1) -> Bundle:
    return Bundle(JOB.id, stage, TaskSet.span(start, stop), attempt)


def done(
    of: Bundle,
    *follows: Bundle,
    failed: int = 0,
    cancelled: int = 0,
    run_s: float = 1.0,
    started_s: float = 1_700_000_100.0,
    retried: int = 0,
) -> Completion:
    """Return the completion of the bundle `of`: the first `failed` tasks failed, the next `cancelled` tasks were
    canceled, and the other tasks succeeded."""
    bad, rest = of.tasks.split_at(failed)
    dropped, good = rest.split_at(cancelled)
    return Completion(
        of,
        "w-1",
        started_s,
        started_s + 2.5,
        good,
        bad,
        dropped,
        run_s,
        tuple(Follow(follow) for follow in follows),
        retried,
    )


def cut(seq: int, *bundles: Bundle, round: int = 0, left: TaskSet = TaskSet()) -> Cut:
    return Cut(JOB.id, RESIZE, round, seq, bundles, left)


async def submit(ledger: Ledger, job: JobDef = JOB) -> None:
    await ledger.apply(AddJob(job, JobState.SUBMITTED))


async def fold(ledger: Ledger, *completions: Completion) -> list[bool]:
    """Fold them in one call, without casualties."""
    return list((await ledger.apply(Fold(completions, [{} for _ in completions]))).new)


async def set_control(ledger: Ledger, control: Control, *, round: int = 0) -> bool:
    """Set the control of JOB. Return whether JOB has it then."""
    change = SetControl(JOB.id, control, round)
    return (await ledger.apply(change)).has_control(change)


async def rows_of(ledger: Ledger, job: JobId = JOB.id) -> JobRows | None:
    """Return the rows of the job, None if it does not exist."""
    try:
        return await ledger.rows(job)
    except NotFound:
        return None


async def stage_of(ledger: Ledger, stage: StageName = RESIZE) -> StageRecord:
    return next(s for s in (await ledger.rows(JOB.id)).stages if s.counts.stage == stage)


async def counts_of(ledger: Ledger, stage: StageName = RESIZE) -> StageCounts:
    return (await stage_of(ledger, stage)).counts


async def fold_in_batches(ledger: Ledger, completions: Sequence[Completion], sizes: Callable[[], int]) -> None:
    """Fold as the manager does, casualties included."""
    i = 0
    while i < len(completions):
        batch = completions[i : i + sizes()]
        await ledger.apply(Fold(batch, [settlement.casualties(JOB, one) for one in batch]))
        i += len(batch)


def history(rng: Random, tasks: int) -> tuple[list[Cut], list[Completion]]:
    """Return one possible history of the first two stages of JOB: cuts of random sizes, and a completion of every
    bundle, parents first."""
    cuts: list[Cut] = []
    left = TaskSet.span(0, tasks)
    while left:
        tasks_of_one, left = left.split_at(rng.randint(1, 7))
        one = Bundle(JOB.id, RESIZE, tasks_of_one)
        planned = None if cuts else tasks
        cuts.append(Cut(JOB.id, RESIZE, 0, len(cuts), (one,), left, planned))
    waiting = [b for c in cuts for b in c.bundles]
    completions: list[Completion] = []
    for of in waiting:
        came_to = settlement.completion(_execution(rng, of))
        completions.append(came_to)
        waiting.extend(f.bundle for f in came_to.follows)
    return cuts, completions


def _execution(rng: Random, of: Bundle) -> Outcome:
    started_s = 1_700_000_000.0 + rng.randint(0, 10_000) / 7
    if rng.random() < 0.1:
        return settlement.seal(of, execution="e", worker="manager-0", now_s=started_s)
    until = rng.randint(1, len(of.tasks))
    ran = [
        Ran(
            task,
            rng.randint(0, 3_000_000) / 1e6,
            failure=Failure(task, FailureKind.EXCEPTION, "no") if rng.random() < 0.3 else None,
        )
        for task in of.tasks.split_at(until)[0]
    ]
    return settlement.settle(
        JOB,
        of,
        ran,
        execution="e",
        worker=f"w-{rng.randint(1, 3)}",
        started_s=started_s,
        ended_s=started_s + rng.randint(0, 1_000) / 3,
    )


_CHAINED, _AGAIN = bundle(0, 4, stage=INDEX), replace(bundle(0, 1), round=1)


def _end(ledger: Ledger, state: JobState, round: int, **closed: int) -> Awaitable[object]:
    names = {StageName(name): count for name, count in closed.items()}
    return ledger.apply(Finish(JOB.id, Ending(state, "r", 5.0, names), round))


CALLS: Sequence[Callable[[Ledger], Awaitable[object]]] = (
    lambda of: of.apply(AddJob(JOB, JobState.SUBMITTED)),
    lambda of: of.apply(SetControl(JOB.id, Control.CANCEL, 0)),
    lambda of: of.apply(AddCut(replace(cut(0, bundle(0, 5)), planned=9))),
    lambda of: of.apply(SetPlanned(JOB.id, INDEX, 9, 0)),
    lambda of: of.apply(MoveJob(JOB.id, JobState.RUNNING, 0)),
    lambda of: of.apply(Fold([done(bundle(0, 5), _CHAINED, failed=1)], [{INDEX: 1}])),
    lambda of: _end(of, JobState.FAILED, 0, resize=3, index=8),
    lambda of: of.apply(Reopen(JOB.id, 1, [Reopening(RESIZE, 0, 1, 4), Reopening(TOTAL, replan=True)])),
    lambda of: of.apply(AddCut(cut(0, _AGAIN, round=1, left=TaskSet.span(5, 9)))),
    lambda of: of.apply(Fold([done(_AGAIN)], [{}])),
    lambda of: _end(of, JobState.FAILED, 1, resize=4),
)
"""Every call that changes a job, in the order of the job's life."""


# --- The second process ---------------------------------------------------------------------------

BATCH = 20


@contextmanager
def second_process(what: str, where: Place, owner: str = "") -> Iterator[subprocess.Popen[str]]:
    """Start another process of this module, and end it on exit."""
    if isinstance(where, Path):
        place = [str(where)]
    else:
        place = [where.url, where.domain if isinstance(where, Sdb) else where.schema]
    argv = [sys.executable, "-m", "tests.support.contract.ledger_suite", what, owner, *place]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    """Return the next output line of a process, or an empty line if the process has ended."""
    assert process.stdout
    return process.stdout.readline().strip()


def many() -> list[Completion]:
    """Return enough completions that a test can kill the process while it folds them."""
    return [done(bundle(i * 5, i * 5 + 5), bundle(i * 5, i * 5 + 5, stage=INDEX), failed=i % 2) for i in range(10_000)]


async def _fold_many(ledger: Ledger) -> None:
    """Print the number of completions folded so far, after each call."""
    completions = many()
    await submit(ledger)
    for i in range(0, len(completions), BATCH):
        await fold(ledger, *completions[i : i + BATCH])
        print(i + BATCH, flush=True)


async def _race(ledger: Ledger, owner: str) -> None:
    """Print "ready", wait for a line, try to take the lease, and print the holder of the lease."""
    print("ready", flush=True)
    sys.stdin.readline()
    stands = await ledger.lease("leader", owner)
    print(owner if stands.owner == owner else "", flush=True)


def opened_at(path: str, *part: str) -> DumpingLedger:
    """Open the ledger in the file `path`, or at the URL `path` in that schema or domain."""
    if path.startswith("http"):
        return open_simpledb(Endpoint(path), part[0])
    return open_postgres(path, schema=part[0]) if part else open_sqlite(Path(path))


async def _main(what: str, owner: str, *where: str) -> None:
    ledger = opened_at(*where)
    await (_race(ledger, owner) if what == "race" else _fold_many(ledger))
    await ledger.close()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
