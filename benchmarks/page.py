"""Duration of each view of the web page, and of each API request for the web page, while a grid runs a large job.

    python benchmarks/page.py [--tasks N] [--times N] [--json FILE] [--docs]
    python benchmarks/page.py --growth [--times N] [--json FILE] [--docs]

Target: with a job of 100,000 tasks, of which 5,000 have failed, the 95th percentile of every view's duration is below
100 ms. The grid runs on `local`, and its two workers run the job during all requests. Each request of a view alternates
with a bare request to `/v1/health`. Other work on the machine delays both kinds of requests, so the ratio of their
durations is more reliable than the milliseconds. The option `--docs` writes the table into
docs/contributing/web-page.md.

With `--growth`, the benchmark compares the CPU time of requests about a job of 10,000 bundles with the CPU time of the
same requests about a job of 100 bundles. The requests of both jobs alternate. Target: every ratio is at most 5.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx

from batchlab.core.api_types import JobView
from batchlab.core.model import JobId, Pool
from tests.support.grid.local_grid import LocalGrid
from tests.support.server.api import TOKEN, Rig
from tests.support.server.large_jobs import FINE, SINGLES, add_fine_job

TARGET_MS = 100.0
BARE = "/v1/health"
READING = "reads the results of"
"""Text of a page that loads itself again, because the manager has not read all bundles of the job yet."""
BAD = 20
"""One of `BAD` tasks fails. The failing tasks come first."""
WITHIN_S = 120.0
ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- views: begin -->", "<!-- views: end -->"
GROWTH_BEGIN, GROWTH_END = "<!-- growth: begin -->", "<!-- growth: end -->"
MOST_GROWTH = 5.0
SMALL = replace(FINE, id=JobId("small-0123456789"), name="small", token="small")
SMALL_BUNDLES = 100
AFTER_A_START = "first page after a start"
FINE_PATHS = {
    AFTER_A_START: "/tasks",
    "list of tasks": "/tasks",
    "list by state": "/tasks?state=failed",
    "list by worker": "/tasks?search=worker-1",
    "search for an input file": "/tasks?search=nowhere",
    "timeline": "/timeline",
    "a task": "/stages/map/tasks/99",
}
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


@dataclass(frozen=True, slots=True)
class Growth:
    """Median CPU times of a request about a job of 10,000 bundles, and about a job of 100 bundles."""

    request: str
    large_ms: float
    small_ms: float

    @property
    def ratio(self) -> float:
        return self.large_ms / self.small_ms


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


def grown(times: int) -> list[Growth]:
    """Measure the requests about both jobs in turn, `times` times, on a manager in this process."""
    with Rig() as rig, httpx.Client(base_url=rig.url, trust_env=False, verify=False) as http:
        add_fine_job(rig)
        add_fine_job(rig, SMALL_BUNDLES, SMALL)
        opened = http.post("/ui/login", data={"word": TOKEN}, headers={"Sec-Fetch-Site": "same-origin"})
        http.base_url = http.base_url.join(opened.headers["location"].removesuffix("/"))

        def longest_ms(path: str) -> float:
            """Load the page until it has all bundles, and return the CPU time of the longest request."""
            took_ms: list[float] = []
            is_reading = True
            while is_reading:
                begun_s = time.process_time()
                answer = http.get(path)
                took_ms.append((time.process_time() - begun_s) * 1000)
                answer.raise_for_status()
                is_reading = READING in answer.text
            return max(took_ms)

        found = []
        for request, path in FINE_PATHS.items():
            took_ms: dict[str, list[float]] = {FINE.id: [], SMALL.id: []}
            for turn in range(times + 2):
                for job, some_ms in took_ms.items():
                    if request == AFTER_A_START:
                        rig.served.indexes.clear()
                    spent_ms = longest_ms(f"/jobs/{job}{path}")
                    # The first two requests fill caches, so their durations do not count.
                    if turn >= 2:
                        some_ms.append(spent_ms)
            found.append(Growth(request, *(round(statistics.median(some), 2) for some in took_ms.values())))
        return found


def growth_table(found: list[Growth]) -> str:
    lines = [
        f"| request | {SINGLES:,} bundles, ms | {SMALL_BUNDLES} bundles, ms | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [f"| {one.request} | {one.large_ms:.1f} | {one.small_ms:.1f} | {one.ratio:.1f} |" for one in found]
    return "\n".join(lines)


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


def head_of(tasks: int, state: JobView) -> str:
    """Return the sentence above the table of views."""
    stage = state["stages"][0]
    busy = os.getloadavg()[0]
    return (
        f"{tasks:,} tasks, {stage['failed']:,} of them failed, {os.cpu_count()} cores, two workers "
        f"at work; load of the machine {busy:.1f}."
    )


def document(begin: str, text: str, end: str) -> None:
    """Write the text between the two markers of docs/contributing/web-page.md."""
    file = ROOT / "docs" / "contributing" / "web-page.md"
    before, _, rest = file.read_text().partition(begin)
    _, _, after = rest.partition(end)
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=40, help="requests for each view")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/contributing/web-page.md")
    parser.add_argument("--growth", action="store_true", help="compare a job of 10,000 bundles with one of 100 bundles")
    given = parser.parse_args()
    if given.growth:
        grown_by = grown(given.times)
        print(growth_table(grown_by))
        if given.json:
            given.json.write_text(json.dumps([asdict(one) for one in grown_by], indent=2) + "\n")
        if given.docs:
            document(GROWTH_BEGIN, growth_table(grown_by), GROWTH_END)
        slow = [one.request for one in grown_by if one.ratio > MOST_GROWTH]
        print(f"over {MOST_GROWTH:g} times: {', '.join(slow) or 'none'}")
        return int(bool(slow))
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
        document(BEGIN, f"{head_of(given.tasks, state)}\n\n{table(found)}", END)
    late = [one.view for one in found if one.p95_ms > TARGET_MS]
    print(f"over {TARGET_MS:.0f} ms at p95: {', '.join(late) or 'none'}")
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
