"""Scaling of a pool on `localstack` during bursts of work, compared with the simulator's forecast.

    python benchmarks/scaling.py [--small] [--json FILE] [--svg FILE]

The benchmark needs Docker. Each burst begins on an idle grid without an instance. Targets: the pool never has more
instances than the scaling policy requests. The pool does not flap: no change of desired capacity is reversed within a
cooldown. The steps of desired capacity differ from the forecast's steps by at most one instance. The only figure that
the simulator gets from this machine is the median boot time of a container.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batchlab.runtime.factory import Backend
from benchmarks.measured import Row
from benchmarks.stepplot import Line, Panel, svg
from tests.support.docker.chaos import Containers
from tests.support.docker.timeline import Look, Timeline, apart, foretold, watch_burst
from tests.support.grid.local_grid import LocalGrid

BURSTS: Mapping[str, list[float]] = {
    "240 tasks of 0.5 s": [0.5] * 240,
    "120 tasks of 0.5 s, then one of 15 s and one of 40 s": [0.5] * 120 + [15.0, 40.0],
    "30 tasks of 0.5 s": [0.5] * 30,
}
SMALL: Mapping[str, list[float]] = {"60 tasks of 0.5 s": [0.5] * 60}


@dataclass(frozen=True, slots=True)
class Run:
    """One burst of work, with the measured and the forecast course of the pool."""

    name: str
    naps_s: list[float]
    seen: Timeline
    told: Timeline

    def knowing(self, backend: Backend) -> int:
        """Return the number of instances that the scaling policy would request if all task durations were known."""
        pool = self.seen.pool
        drained = backend.manager.drain_target_s * pool.slots
        return min(pool.max_size, max(1, math.ceil(sum(self.naps_s) / drained)))


def measure(bursts: Mapping[str, list[float]], folder: Path) -> tuple[Backend, list[Run]]:
    """Run the bursts one after another on one grid, and forecast each burst."""
    grid = LocalGrid(folder / "home", backend="localstack")
    try:
        runs = []
        for number, (name, naps_s) in enumerate(bursts.items()):
            print(f"{name} …", file=sys.stderr, flush=True)
            job = folder / f"burst-{number}"
            seen = watch_burst(Containers(grid), job, naps_s)
            pool = replace(seen.pool, boot_s=seen.boot_s)
            told = foretold(grid.backend, pool, job / "job.yaml", naps_s)
            runs.append(Run(name, naps_s, seen, told))
        return grid.backend, runs
    finally:
        grid.stop()


def rows(run: Run, backend: Backend) -> list[Row]:
    """Return the figures of one burst as rows of the table."""
    seen, told, cooldown_s = run.seen, run.told, backend.manager.cooldown_in_s
    needed = seen.needed(backend)
    return [
        Row("first task begins after", seen.first_task_s, "s"),
        Row("  forecast", told.first_task_s, "s"),
        Row("a container boots in (median)", seen.boot_s, "s"),
        Row("peak", seen.peak, "instances", seen.pool.max_size, at_most=True),
        Row("above what the policy asks for", seen.peak - needed, "instances", 0, at_most=True),
        Row("above what known durations ask for", seen.peak - run.knowing(backend), "instances"),
        Row("changes turned around in a cooldown", seen.flaps(cooldown_s), "", 0, at_most=True),
        Row("last task ends after", seen.last_task_s, "s"),
        Row("  forecast", told.last_task_s, "s"),
        Row("from there to desired at minimum", seen.asked_back_s - seen.last_task_s, "s"),
        Row("  forecast", told.asked_back_s - told.last_task_s, "s"),
        Row("  and the last container has ended", seen.back_s - seen.last_task_s, "s"),
        Row("steps that differ from the forecast", apart(seen.steps, told.steps), "inst.", 1, True),
    ]


def steps(timeline: Timeline) -> str:
    """Return a text with the levels of desired capacity and the start time of each level."""
    return ", ".join(f"{one.level} at {one.at_s:.1f} s" for one in timeline.steps)


def picture(runs: list[Run]) -> str:
    """Return an SVG picture with two panels for each burst: instances and remaining work."""
    panels = []
    for run in runs:
        seen, told = run.seen.looks, run.told.looks
        instances = (
            Line("desired", _points(seen, "desired"), 0),
            Line("desired, forecast", _points(told, "desired"), 1, dashed=True),
            Line("InService", _points(seen, "in_service"), 2),
            Line("running containers", _points(seen, "containers"), 3, dashed=True),
        )
        work = (
            Line("measured", _points(seen, "backlog_tasks"), 0),
            Line("forecast", _points(told, "backlog_tasks"), 1, dashed=True),
        )
        panels += [Panel(run.name, "instances", instances), Panel("Backlog", "tasks", work, height=70)]
    return svg(panels, "Desired capacity, instances, and backlog over time, measured and forecast")


def _points(looks: list[Look], name: str) -> list[tuple[float, float]]:
    return [(one.at_s, float(getattr(one, name))) for one in looks]


def main() -> None:
    """Run the measurements, print the figures, and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one short burst")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the timelines there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw them there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchlab-scaling-") as folder:
        backend, runs = measure(SMALL if options.small else BURSTS, Path(folder))
    told: dict[str, Any] = {}
    missed = False
    for run in runs:
        print(f"\n{run.name}\n  measured  {steps(run.seen)}\n  forecast  {steps(run.told)}")
        for row in rows(run, backend):
            missed |= "MISSED" in row.verdict
            print(f"  {row.what:<38} {row.value:>8,.3g} {row.unit:<10} {row.verdict}")
        told[run.name] = {"seen": run.seen.to_json(), "foretold": run.told.to_json()}
    if options.json:
        options.json.write_text(json.dumps(told) + "\n")
    if options.svg:
        options.svg.write_text(picture(runs))
    if missed:
        sys.exit("Some targets are missed.")


if __name__ == "__main__":
    main()
