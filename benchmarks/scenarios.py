"""Simulation of a day of a real cluster: 24 hours of Facebook's Hadoop jobs in 2009.

Target: the simulator runs the 5,894 jobs of the trace in under 30 s. A job has one task for each 128 MiB of its input.
The fleet grows and shrinks with the backlog, and instances boot for 90 s. The settings are the settings of the backend
`aws`. Each row of the table runs in its own process, so that the peak memory of each row is measured separately.

    python benchmarks/scenarios.py TRACE [--small] [--json FILE]

TRACE is the file FB-2009_samples_24_times_1hr_0.tsv of the workload suite in github.com/SWIMProjectUCB/SWIM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from measured import peak_mb

from batchlab.core.model import Pool
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import JobTemplate, PoolPlan, Scenario, StageTemplate
from batchlab.scenarios.traces.rows import Columns, ColumnSum
from batchlab.scenarios.traces.source import Trace, TraceFormat

HOURS = (1, 6, 24)
TASK_BYTES = 128 * 2**20
TASK_S = 2.0
"""Duration of each task in seconds: the time to read 128 MiB at 64 MiB per second."""

BUNDLE = 64
"""Maximum number of tasks in a bundle, as in a user's setting `bundle`.

Most jobs of the trace have one task, and some jobs have thousands of tasks.
"""

POOL = Pool("default", 0, 40, slots=4, boot_s=90.0)
COLUMNS = ("job", "submit", "gap", "input", "shuffle", "output")


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of a simulation of the first `hours` of the trace.

    `virtual_s` is the time at which the last job ended.
    """

    hours: float
    jobs: int
    tasks: int
    bundles: int
    instances: int
    virtual_s: float
    wall_s: float
    cpu_s: float
    peak_mb: float


def facebook(trace: Path, hours: float) -> Scenario:
    """Return the first `hours` hours of the trace as a scenario."""
    columns = Columns("submit", tasks=ColumnSum(("input",), per=TASK_BYTES), label="job")
    stage = StageTemplate("map", Constant(TASK_S), bundle=BUNDLE)
    source = Trace(
        template="map",
        path=trace,
        format=TraceFormat.TABLE,
        columns=columns,
        names=COLUMNS,
        delimiter="\t",
        until_s=None if hours == HOURS[-1] else hours * 3600,
    )
    jobs = {"map": JobTemplate("map", (stage,), Constant(1))}
    return Scenario("facebook", "", jobs, (source,), (PoolPlan(POOL),))


def measure(trace: Path, hours: float) -> Row:
    """Simulate the first `hours` hours of the trace in this process."""
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    record = simulate(facebook(trace, hours))
    if {job.state for job in record.jobs} != {"SUCCEEDED"} or record.lost or record.duplicates:
        raise SystemExit(f"Not all went well: {record.lost} lost, {record.duplicates} twice")
    return Row(
        hours,
        len(record.jobs),
        sum(job.succeeded for job in record.jobs),
        sum(stage.bundles for stage in record.stages),
        len(record.instances),
        max(job.ended_s or 0.0 for job in record.jobs),
        time.perf_counter() - begun_s,
        time.process_time() - cpu_s,
        peak_mb(),
    )


def apart(trace: Path, hours: float) -> Row:
    """Run `measure` in a new process, and return the figures of the simulation."""
    command = [sys.executable, __file__, str(trace), "--one", str(hours)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Row(**json.loads(done.stdout))


def main() -> None:
    """Parse the options, run the simulations, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trace", type=Path, metavar="TRACE")
    parser.add_argument("--small", action="store_true", help="its first hour only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(measure(options.trace, options.one))))
        return
    rows = []
    print("  hours    jobs     tasks  bundles  instances  virtual s   wall s    CPU s  peak MB")
    for hours in HOURS[: 1 if options.small else None]:
        row = apart(options.trace, hours)
        rows.append(row)
        print(
            f"{row.hours:7g} {row.jobs:7,} {row.tasks:9,} {row.bundles:8,} {row.instances:10,} "
            f"{row.virtual_s:10,.0f} {row.wall_s:8.1f} {row.cpu_s:8.1f} {row.peak_mb:8.0f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
