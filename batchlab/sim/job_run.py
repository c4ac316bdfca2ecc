"""Run of a job file on the `sim` backend: the job's own handlers on a grid in virtual time.

Invariant: the manager, fleet, and worker classes of the run are the same as on every other backend. Only services,
instances, and time of the run are simulated. The same seed gives the same run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from batchlab.core.api_types import JobView
from batchlab.core.model import JobId, Pool
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.pricing.usage import Accounting
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.jobs import submission
from batchlab.jobs.job_file import JobFile
from batchlab.jobs.results import Fetched, Listed, fetch
from batchlab.manager.admission import admit
from batchlab.manager.recorder import ReportQueue
from batchlab.reports.tables.build import Setting
from batchlab.reports.tables.write import Writer
from batchlab.server.job_views import job_view, outcome_view
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.trial import calm
from batchlab.sim.world import World
from batchlab.worker.inflight_message import Runner
from batchlab.worker.inline_child import InlineChildren, SimulatedTaskRunner

TASK_S = (0.5, 1.5)
"""Range of virtual seconds that a task takes, whatever its handler does."""


REPORT = "report-data"
"""Name of the folder of Parquet files among the results."""
MAX_TICKS = 60


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """Result of a simulated run. `virtual_s` counts from the start of the grid to the end of the job."""

    view: JobView
    fetched: Fetched
    virtual_s: float
    instances: int
    """Number of instances launched during the run."""


def run_job(
    jobfile: JobFile,
    pools: Sequence[Pool],
    *,
    seed: int,
    out: Path,
    setting: Setting,
    on_accepted: Callable[[], None] = lambda: None,
) -> SimulatedRun:
    """Run the job to its end in virtual time. Call `on_accepted` before the first task, unless the job is refused.

    The folder `out` receives the results, and a folder inside `out` receives the performance data.
    """
    loop = SimLoop(inline_executor=True)
    with InlineChildren() as children:
        return loop.run(_main(jobfile, pools, seed, out, setting, children, on_accepted))


async def _main(
    jobfile: JobFile,
    pools: Sequence[Pool],
    seed: int,
    out: Path,
    setting: Setting,
    children: InlineChildren,
    on_accepted: Callable[[], None],
) -> SimulatedRun:
    world = World(
        seed=seed,
        pools=pools,
        faults=calm(seed),
        make_runner=partial(_real_handlers, children),
        logged=False,
        accounting=Accounting(),
        reports=ReportQueue(),
    )
    supervisor = asyncio.create_task(world.supervise(), name="supervisor")
    patience = Patience(world.rng("client"))
    job = await submission.prepare(
        jobfile, objects=world.objects, clock=world.clock, patience=patience, token=f"seed-{seed}"
    )
    admit(job, {pool.name: pool.slots for pool in pools}, gpus={pool.name: pool.gpus for pool in pools})
    on_accepted()
    await world.submit(job)
    await world.ended(job.id)
    virtual_s = world.clock.monotonic_s()
    record = await world.ledger.job(job.id)
    view = job_view(record, (await world.ledger.rows(job.id)).stages)
    rows = await world.ledger.bundles(job.id, done=True)
    key = await CommitKeys(world.objects).key_of(record.job)
    listing = [Listed.from_view(outcome_view(row, key)) for row in rows]
    fetched = await fetch(world.objects, view, listing, out, patience=patience)
    await _wait_for_account(world, job.id)
    report = out / REPORT
    report.mkdir(parents=True, exist_ok=True)
    await Writer(world.objects, patience, setting).make(job.id, report)
    supervisor.cancel()
    await world.ledger.close()
    return SimulatedRun(view, fetched, virtual_s, len(world.workers))


async def _wait_for_account(world: World, job: JobId) -> None:
    """Wait until the manager has written the usage of the job, at the manager's next tick."""
    for _ in range(MAX_TICKS):
        if await world.objects.head(object_keys.reference_key(job)):
            return
        await asyncio.sleep(1.0)


def _real_handlers(children: InlineChildren, world: World, _die: Callable[[], None], objects: Objects) -> Runner:
    rng = world.rng("durations")
    return SimulatedTaskRunner(objects, world.clock, lambda _work, _task: rng.uniform(*TASK_S), children)
