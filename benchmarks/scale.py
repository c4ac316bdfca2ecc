"""Speed and memory of the simulator with 10,000 workers and up to 10 million tasks, in bundles as on a real grid.

Target: 10,000 workers and 10,000,000 tasks run on two cores in under 60 s of wall time and under 2 GiB of memory. The
CPU time grows linearly from 10⁴ to 10⁷ tasks. The manager, the fleet, and the workers run the same code as on every
backend. The services and the ledger are in memory, every port call takes a simulated 2 to 20 ms, and the simulator does
not inject faults. Each row of the table runs in its own process, so that the peak memory of each row is measured
separately.

    python benchmarks/scale.py [--small] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, JobState, Pool, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.service_settings import ManagerSettings, WorkerSettings
from batchlab.manager.stage_plans import PartWriter
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.tasks import TimedRunner
from batchlab.sim.trial import calm
from batchlab.sim.world import EPOCH_S, World

TASK_S = 0.1
"""Duration of each task in virtual seconds."""

BUNDLE = 1000
"""Number of tasks in each bundle, as in a user's setting `bundle`."""

STAGE = StageName("a")
ITEMS_AT_ONCE = 4096

# The settings are for a grid with thousands of workers: heartbeats, leases, and ticks are less frequent than on a
# laptop. With these settings, workers may acknowledge a cancellation up to a minute late.
LEASE_S = 60.0
MANAGER = ManagerSettings(control_lease_s=LEASE_S, visibility_s=600.0, silence_s=600.0, tick_s=5.0, lease_ttl_s=60.0)
WORKER = WorkerSettings(control_lease_s=LEASE_S, visibility_s=600.0, beat_s=60.0, beat_gap_s=5.0)


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one run.

    `virtual_s` is the virtual time from the submission to the end of the job. `started_s` is the wall time until all
    workers are known to the manager. `wall_s` and `cpu_s` are the times of the whole run.
    """

    tasks: int
    workers: int
    bundles: int
    virtual_s: float
    started_s: float
    wall_s: float
    cpu_s: float
    steps: int
    peak_mib: float

    @property
    def us_per_task(self) -> float:
        """Return the CPU time per task in microseconds, including the start and the end of the workers."""
        return self.cpu_s / self.tasks * 1e6


def measure(tasks: int, workers: int) -> Row:
    """Run one job with `tasks` tasks in the simulator, in this process."""
    loop = SimLoop(inline_executor=True)
    return loop.run(_main(loop, tasks, workers))


async def _main(loop: SimLoop, tasks: int, workers: int) -> Row:
    begun = time.perf_counter()
    pool = Pool("default", workers, workers, 1)
    world = World(
        1,
        (pool,),
        faults=calm(1, answers=False),
        make_runner=lambda world, _die, _objects: TimedRunner(
            lambda work: (TASK_S,) * len(work.bundle.tasks), world.clock, together_s=LEASE_S
        ),
        manager_settings=MANAGER,
        worker_settings=WORKER,
        logged=False,
        watched=False,
        sql=False,
    )
    supervisor = asyncio.create_task(world.supervise(), name="supervisor")
    while not (world.manager and len(world.manager.registry.workers) == workers):  # noqa: ASYNC110
        await asyncio.sleep(1.0)
    started_s, since_s = time.perf_counter() - begun, loop.time()
    job = JobDef(
        JobId("job"), "job", (StageDef(STAGE, handler="sim:task", bundle=BUNDLE),), EPOCH_S, items=tasks, token="t"
    )
    writer = PartWriter(world.objects, Patience(world.rng("client")), job.id, STAGE, 0)
    for start in range(0, tasks, ITEMS_AT_ONCE):
        await writer.add(*range(start, min(start + ITEMS_AT_ONCE, tasks)))
    await writer.commit(TaskSet())
    await world.submit(job)
    record = await world.ended(job.id)
    virtual_s = loop.time() - since_s
    (stage,) = (await world.ledger.rows(job.id)).stages
    if record.state is not JobState.SUCCEEDED or stage.counts.succeeded != tasks:
        raise SystemExit(f"The job ended as {record.state}: {stage.counts}")
    bundles = len(await world.ledger.bundles(job.id, done=True))
    supervisor.cancel()
    await world.ledger.close()
    wall_s = time.perf_counter() - begun
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Row(tasks, workers, bundles, virtual_s, started_s, wall_s, time.process_time(), loop.steps, peak_mib)


def apart(tasks: int, workers: int) -> Row:
    """Run `measure` in a new process, and return the figures of the run."""
    command = [sys.executable, __file__, "--one", str(tasks), str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Row(**json.loads(done.stdout))


def main() -> None:
    """Parse the options, run the measurements, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="1,000 workers, up to 10⁵ tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--one", type=int, nargs=2, metavar=("TASKS", "WORKERS"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(measure(*options.one))))
        return
    workers, sizes = (1_000, (10**4, 10**5)) if options.small else (10_000, TASKS)
    rows = []
    print("      tasks  workers  bundles  virtual s  start s   wall s    CPU s  µs/task  peak MiB")
    for tasks in sizes:
        row = apart(tasks, workers)
        rows.append(row)
        print(
            f"{row.tasks:11,} {row.workers:8,} {row.bundles:8,} {row.virtual_s:10.1f} "
            f"{row.started_s:8.1f} {row.wall_s:8.1f} {row.cpu_s:8.1f} {row.us_per_task:8.2f} "
            f"{row.peak_mib:9.0f}",
            flush=True,
        )
    if options.json:
        told = [{**asdict(row), "us_per_task": row.us_per_task} for row in rows]
        options.json.write_text(json.dumps(told, indent=1) + "\n")


TASKS = (10**4, 10**5, 10**6, 10**7)

if __name__ == "__main__":
    main()
