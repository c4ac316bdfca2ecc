"""Makespan with automatic bundle sizes in the simulator, compared with a schedule that knows all durations beforehand.

Target: without settings, the makespan is within 5% of the makespan of a schedule that knows all durations beforehand.
This clairvoyant schedule starts the longest task first, on the same slots, without overhead. The target is for three
distributions of task durations:

- mixed: for each slot, 3 tasks of 10 minutes among 2,000 tasks of 10 µs, in random order;
- heavy: a Pareto distribution with α = 1.3 from 50 ms, limited to 20 s, with 600 s of work for each slot on average;
- giants: for each slot, 5,000 tasks of about 100 ms, and at the end of the list one task of 20 s for every second slot.

In all three distributions, each long task is a small part of the work. If the last task took as long as all other tasks
together, a schedule without knowledge of the durations could not be within 5%.

The makespan is the time from the submission of a job to its end in the ledger. All workers run before the submission,
and every port call takes 2 to 20 ms. The table counts as requests all port calls of the manager and the workers from
the submission to the end of the job, including polls and heartbeats.

    python benchmarks/sizing.py [--small] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, JobState, Pool, StageName
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.tasks import TimedRunner
from batchlab.sim.trial import calm
from batchlab.sim.users import bring_items
from batchlab.sim.world import EPOCH_S, World

STAGE = StageName("a")
TARGET = 1.05

Draw = Callable[[random.Random, int], list[float]]


def mixed(rng: random.Random, slots: int) -> list[float]:
    """Return the durations of the tasks of the distribution "mixed": 10 µs and 10 minutes."""
    found = [600.0] * (3 * slots) + [1e-5] * (2000 * slots)
    rng.shuffle(found)
    return found


def heavy(rng: random.Random, slots: int) -> list[float]:
    """Return the durations of the tasks of the distribution "heavy", a Pareto distribution with a maximum."""
    found: list[float] = []
    left_s = 600.0 * slots
    while left_s > 0:
        found.append(min(20.0, 0.05 * rng.paretovariate(1.3)))
        left_s -= found[-1]
    return found


def giants(rng: random.Random, slots: int) -> list[float]:
    """Return the durations of the tasks of the distribution "giants", with a few long tasks at the end of the list."""
    even = [0.1 * rng.uniform(0.95, 1.05) for _ in range(5000 * slots)]
    return even + [20.0] * max(1, slots // 2)


def even(rng: random.Random, slots: int) -> list[float]:
    """Return task durations of about 5 ms.

    The distribution "even" shows the cost of a bundle and does not have a target.
    """
    return [0.005 * rng.uniform(0.95, 1.05) for _ in range(12000 * slots)]


DRAWS: dict[str, Draw] = {"mixed": mixed, "heavy": heavy, "giants": giants, "even": even}


def clairvoyant_s(durations: Sequence[float], slots: int) -> float:
    """Return the makespan of a list schedule that starts the tasks in order of duration, the longest task first."""
    free = [0.0] * slots
    for run_s in sorted(durations, reverse=True):
        heapq.heapreplace(free, free[0] + run_s)
    return max(free)


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one run. `ratio` is the makespan of the run divided by the makespan of the clairvoyant schedule."""

    name: str
    slots: int
    seed: int
    tasks: int
    bundles: int
    requests: int
    best_s: float
    virtual_s: float

    @property
    def ratio(self) -> float:
        return self.virtual_s / self.best_s


def measure(name: str, slots: int, seed: int) -> Row:
    """Run one job with durations of the distribution `name` on a new simulated grid."""
    durations = DRAWS[name](random.Random(f"{seed}/{name}/{slots}"), slots)
    loop = SimLoop(inline_executor=True)
    return loop.run(_main(loop, name, slots, seed, durations))


async def _main(loop: SimLoop, name: str, slots: int, seed: int, durations: list[float]) -> Row:
    faults = calm(seed)
    world = World(
        seed,
        (Pool("default", slots, slots, 1),),
        faults=faults,
        make_runner=lambda world, _die, _objects: TimedRunner(
            lambda work: [durations[task] for task in work.bundle.tasks], world.clock
        ),
        logged=False,
        watched=False,
    )
    supervisor = asyncio.create_task(world.supervise(), name="supervisor")
    while not (world.manager and len(world.manager.registry.workers) == slots):  # noqa: ASYNC110
        await asyncio.sleep(1.0)
    await asyncio.sleep(5.0)  # After the next tick, the manager knows the number of slots.
    job = JobDef(JobId("job"), "job", (StageDef(STAGE, handler="sim:task"),), EPOCH_S, items=len(durations), token="t")
    await bring_items(world, job)
    before, since_s = sum(faults.calls.values()), loop.time()
    await world.submit(job)
    record = await world.ended(job.id)
    requests = sum(faults.calls.values()) - before
    if record.state is not JobState.SUCCEEDED or record.ended_s is None:
        raise SystemExit(f"The job ended as {record.state}.")
    virtual_s = record.ended_s - EPOCH_S - since_s
    bundles = len(await world.ledger.bundles(job.id, done=True))
    supervisor.cancel()
    await world.ledger.close()
    best_s = clairvoyant_s(durations, slots)
    return Row(name, slots, seed, len(durations), bundles, requests, best_s, virtual_s)


def main() -> None:
    """Parse the options, run the measurements, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="2 and 16 slots, one seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--only", nargs="*", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--slots", type=int, nargs="*", default=None)
    parser.add_argument("--seeds", type=int, default=None)
    options = parser.parse_args()
    seeds = options.seeds or (1 if options.small else 3)
    rows = []
    print("tasks    slots seed    tasks  bundles  requests/task  best s  makespan s  ratio")
    for name in options.only:
        for slots in options.slots or ((2, 16) if options.small else (2, 16, 64)):
            for seed in range(seeds):
                row = measure(name, slots, seed)
                rows.append(row)
                print(
                    f"{name:8} {slots:5} {seed:4} {row.tasks:8,} {row.bundles:8,} "
                    f"{row.requests / row.tasks:14.4f} {row.best_s:7.1f} {row.virtual_s:11.1f} "
                    f"{row.ratio:6.3f}{'' if row.ratio <= TARGET else ' !'}",
                    flush=True,
                )
    if options.json:
        told = [{**asdict(row), "ratio": row.ratio} for row in rows]
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if any(row.ratio > TARGET for row in rows):
        sys.exit("Some are over the target.")


if __name__ == "__main__":
    main()
