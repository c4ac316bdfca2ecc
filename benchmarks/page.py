"""Duration of each view of the web page, and of each API request for the web page, while a grid runs a large job.

    python benchmarks/page.py [--tasks N] [--times N] [--json FILE] [--docs]

Target: with a job of 100,000 tasks, of which 5,000 have failed, the 95th percentile of every view's duration is below
100 ms. The grid runs on `local`, and its two workers run the job during all requests. Each request of a view alternates
with a bare request to `/v1/health`. Other work on the machine delays both kinds of requests, so the ratio of their
durations is more reliable than the milliseconds. The option `--docs` writes the table into
docs/contributing/web-page.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx

from batchlab.core.api_types import JobView
from batchlab.core.model import Pool
from tests.support.grid.local_grid import LocalGrid

TARGET_MS = 100.0
BARE = "/v1/health"
READING = "reads the results of"
"""Text of a page that loads itself again, because the manager has not read all bundles of the job yet."""
BAD = 20
"""One of `BAD` tasks fails. The failing tasks come first."""
WITHIN_S = 120.0
ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- views: begin -->", "<!-- views: end -->"
JOB = """\
name: large
input: {files: data/*.txt, split: lines, size: 1}
params: {bad: 0}
failure: {max_failures: 100%}
stages:
  - name: look
    python: handlers:look
    retry: 1
  - name: total
    python: handlers:total
    gather: all
"""
CODE = """\
import time

def look(part, ctx):
    number = int(part.path.read_text())
    if number < ctx.params["bad"]:
        raise ValueError(f"row {number} of kind {'ab'[number % 2]}")
    time.sleep(0.004)
    return number

def total(numbers):
    return sum(numbers)
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """Durations in milliseconds of one view's requests, and of the bare requests between the view's requests."""

    view: str
    p50_ms: float
    p95_ms: float
    bare_p50_ms: float
    bare_p95_ms: float
    kib: float

    @property
    def ratio(self) -> float:
        """Return the median duration of the view's requests divided by the median duration of the bare requests."""
        return self.p50_ms / self.bare_p50_ms


def written(place: Path, tasks: int) -> Path:
    """Write the folder of a job with `tasks` tasks, and return the path of its job file."""
    (place / "data").mkdir(parents=True)
    (place / "job.yaml").write_text(JOB)
    (place / "handlers.py").write_text(CODE)
    lines = "".join(f"{number}\n" for number in range(tasks))
    (place / "data" / "numbers.txt").write_text(lines)
    return place / "job.yaml"


def views(job: str, first: Mapping[str, object], running: Mapping[str, object]) -> dict[str, str]:
    """Return the path of every view by the view's name. `first` is one failure of the job `job`, and `running` is one
    running task."""
    cause, task = first["fingerprint"], f"stages/look/tasks/{first['task']}"
    page, api, worker = f"/ui/jobs/{job}", f"/v1/jobs/{job}", running["worker"]
    return {
        "jobs": "/ui/",
        "a job": page,
        "a job, what changes": f"{page}?part=live",
        "50 tasks": f"{page}/tasks",
        "50 waiting tasks": f"{page}/tasks?state=waiting",
        "tasks of one worker": f"{page}/tasks?search={worker}",
        "timeline": f"{page}/timeline",
        "a running task, its live log": f"{page}/stages/{running['stage']}/tasks/{running['task']}",
        "failures": "/ui/failures",
        "a job's failures by cause": f"{page}/failures",
        "50 tasks of one cause": f"{page}/failures/{cause}",
        "a task, its log and input": f"{page}/{task}?seq={first['seq']}",
        "schedules": "/ui/schedules",
        "grid": "/ui/grid",
        "the curves": "/ui/history.json",
        "costs": "/ui/costs",
        "`/v1/jobs`": "/v1/jobs",
        "`/v1/jobs/JOB`": api,
        "`/v1/jobs/JOB/why`": f"{api}/why",
        "`/v1/jobs/JOB/eta`": f"{api}/eta",
        "`/v1/jobs/JOB/tasks`": f"{api}/tasks",
        "`/v1/jobs/JOB/timeline`": f"{api}/timeline",
        "`/v1/jobs/JOB/failures`": f"{api}/failures",
        "`/v1/jobs/JOB/failures/groups`": f"{api}/failures/groups",
        "`/v1/grid`": "/v1/grid",
    }


def measured(grid: LocalGrid, job: str, times: int) -> list[Figure]:
    """Request each view `times` times, and return the measured durations. Raise an error if a request fails."""
    token = grid.home.token()
    bearer = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=grid.client.url, trust_env=False, verify=False) as http:
        ours = {"Sec-Fetch-Site": "same-origin"}
        opened = http.post("/ui/login", data={"word": token}, headers=ours)
        ui = opened.headers["location"].removesuffix("/")
        first = http.get(f"/v1/jobs/{job}/failures?limit=1", headers=bearer).json()["failures"][0]
        running = http.get(f"/v1/jobs/{job}/tasks?state=running&limit=1", headers=bearer).json()["tasks"][0]
        found = []
        for name, path in views(job, first, running).items():
            path = path.replace("/ui", ui, 1)
            headers = bearer if path.startswith("/v1") else {}
            if path.endswith("part=live"):
                headers = {"HX-Request": "true"}
            while READING in http.get(path, headers=headers).text:
                pass
            took_ms: list[float] = []
            bare_ms: list[float] = []
            size = 0
            for turn in range(times + 2):
                for into, asked in ((took_ms, path), (bare_ms, BARE)):
                    begun_s = time.perf_counter()
                    answer = http.get(asked, headers=headers)
                    spent_ms = (time.perf_counter() - begun_s) * 1000
                    answer.raise_for_status()
                    if answer.status_code != 200:
                        raise RuntimeError(f"{asked}: {answer.status_code}")
                    # The first two requests of a view fill caches, so their durations do not count.
                    if turn >= 2:
                        into.append(spent_ms)
                    size = len(answer.content) if into is took_ms else size
            found.append(Figure(name, *_points(took_ms), *_points(bare_ms), round(size / 1024, 1)))
    return found


def _points(some_ms: list[float]) -> tuple[float, float]:
    parts = statistics.quantiles(some_ms, n=100, method="inclusive")
    return round(parts[49], 2), round(parts[94], 2)


def table(found: list[Figure]) -> str:
    lines = [
        "| view | KiB | p50, ms | p95, ms | bare request p50, p95, ms | times the bare |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        bare = f"{one.bare_p50_ms:.1f}, {one.bare_p95_ms:.1f}"
        lines.append(
            f"| {one.view} | {one.kib:,.0f} | {one.p50_ms:.1f} | {one.p95_ms:.1f} | {bare} | {one.ratio:.1f} |"
        )
    return "\n".join(lines)


def document(tasks: int, state: JobView, found: list[Figure]) -> None:
    """Write the table of durations into docs/contributing/web-page.md."""
    file = ROOT / "docs" / "contributing" / "web-page.md"
    text = file.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    stage = state["stages"][0]
    busy = os.getloadavg()[0]
    head = (
        f"{tasks:,} tasks, {stage['failed']:,} of them failed, {os.cpu_count()} cores, two workers "
        f"at work; load of the machine {busy:.1f}."
    )
    file.write_text(f"{before}{BEGIN}\n{head}\n\n{table(found)}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=40, help="requests for each view")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/contributing/web-page.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        grid = LocalGrid(place / "home", [Pool("default", max_size=2, slots=1)])
        try:
            bad = given.tasks // BAD
            job = grid.submit(written(place / "large", given.tasks), bad=str(bad))["id"]
            grid.wait(job, until=lambda view: view["stages"][0]["failed"] >= bad, within_s=WITHIN_S)
            found = measured(grid, job, given.times)
            state = grid.client.job(job)
        finally:
            grid.stop()
    if state["ended_s"] is not None:
        print("The job has ended before everything was measured: give it more --tasks.")
        return 2
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    if given.docs:
        document(given.tasks, state, found)
    late = [one.view for one in found if one.p95_ms > TARGET_MS]
    print(f"over {TARGET_MS:.0f} ms at p95: {', '.join(late) or 'none'}")
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
