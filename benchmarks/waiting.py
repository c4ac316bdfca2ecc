"""Cost of jobs that wait: submission, an idle manager, listings, and CPU time per job, from 500 to 20,000 jobs.

    python benchmarks/waiting.py [--small] [--json FILE] [--only grid|simulator]

Part `grid`: a grid on `local` has one slot, which is busy, so all further jobs wait. The benchmark submits jobs of one
task one after another, and measures the rate, the CPU time of the manager while nothing happens, and the duration of
requests of the HTTP API. Part `simulator`: N jobs of one task arrive at once on 40 slots, and the benchmark measures
the CPU time of the simulation per job.

Targets: 300 submissions a second, at most 3% of a core at rest, requests below 100 ms, and CPU time per job that
differs by at most 20% between the fewest and the most jobs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measured import Row, run

from batchlab import Grid
from batchlab.adapters.clock import WallClock
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, Pool, StageName
from batchlab.runtime.home import Home
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model.arrivals import FixedTimes
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import JobTemplate, PoolPlan, Scenario, StageTemplate

SIZES = (500, 2_000, 8_000, 20_000)
SMALL_SIZES = (200, 800)
IDLE_S = 20.0
REQUESTS = 5


def grid(sizes: list[int]) -> list[Row]:
    """Measure a real grid whose jobs wait."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="batchlab-waiting-") as name:
        home = Home(Path(name) / "grid")
        with Grid("local", home=home.path, workers=1) as running:
            client, done, pid = running.client, 0, None
            client.submit(_job("busy", "time:sleep"), [3600])
            for size in sizes:
                begun_s = time.perf_counter()
                last = [client.submit(_job(f"w{n}", "operator:neg"), [n])["id"] for n in range(done, size)][-1]
                rate = (size - done) / (time.perf_counter() - begun_s)
                done = size
                rows.append(Row(f"submissions up to {size:,} waiting jobs", rate, "a second", 300))
                pid = pid or _manager(home)
                time.sleep(5.0)
                before_s, begun_s = _cpu_s(pid), time.perf_counter()
                time.sleep(IDLE_S)
                share = (_cpu_s(pid) - before_s) / (time.perf_counter() - begun_s)
                rows.append(Row(f"manager at rest, {size:,} waiting jobs", 100 * share, "% of core", 3, at_most=True))
                for what, request in (
                    ("list of jobs", lambda: client.jobs()),
                    ("why a job waits", lambda job=last: client.why(job)),
                    ("state of a job", lambda job=last: client.job(job)),
                ):
                    ms = 1000 * _median_s(request)
                    rows.append(Row(f"{what}, {size:,} waiting jobs", ms, "ms", 100, at_most=True))
    return rows


def simulator(size: int) -> list[Row]:
    """Measure the simulation of `size` jobs that arrive at once."""
    stage = StageTemplate("map", Constant(2.0))
    jobs = {"call": JobTemplate("call", (stage,), Constant(1))}
    at_once = FixedTimes(template="call", moments=((0.0, size),))
    scenario = Scenario("waiting", "", jobs, (at_once,), (PoolPlan(Pool("default", 10, 10, slots=4)),))
    begun_s = time.process_time()
    record = simulate(scenario)
    if {job.state for job in record.jobs} != {"SUCCEEDED"}:
        raise SystemExit("A job did not succeed.")
    ms = 1000 * (time.process_time() - begun_s) / size
    return [Row(f"simulation of {size:,} jobs at once", ms, "ms a job")]


def _job(name: str, handler: str) -> JobDef:
    stage = StageDef(StageName("map"), handler=handler)
    return JobDef(JobId(name), "waiting", (stage,), WallClock().now_s(), items=1)


def _manager(home: Home) -> int:
    """Return the process id of the grid's manager."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(home.path) in " ".join(words) and "manager" in words:
                return int(entry.name)
    raise SystemExit("The manager of the grid was not found.")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _median_s(request: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REQUESTS):
        begun_s = time.perf_counter()
        request()
        seconds.append(time.perf_counter() - begun_s)
    return statistics.median(seconds)


def _choose(is_small: bool) -> list[tuple[str, list[object]]]:
    sizes = list(SMALL_SIZES if is_small else SIZES)
    return [("grid", [sizes]), *(("simulator", [size]) for size in sizes)]


if __name__ == "__main__":
    run(__doc__, {"grid": grid, "simulator": simulator}, _choose)
