"""Questions that a user asks about a job and its grid, on any backend, through commands and the web page.

Invariant: the questions and the answers are the same on a laptop, in containers, and on AWS.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from batchlab.core.model import JobId
from batchlab.reports.tables.write import Index, index_of
from batchlab.runtime import factory
from batchlab.runtime.home import Home, ManagerRecord
from tests.support.grid.backends import World
from tests.support.waiting import until

JOB = """\
name: tour
input: {files: items.jsonl, split: items}
params: {nap_s: 0.0}
failure: {max_failures: 100%}
stages:
  - {name: look, python: "work:look", bundle: 2, retry: 1}
  - {name: total, python: "work:total", gather: all}
"""
WORK = """\
import time

def look(item, ctx):
    print("looks at", item, flush=True)
    if item == 0:
        time.sleep(float(ctx.params["nap_s"]))
    if item == 3:
        raise ValueError("three is too much")
    return item

def total(values):
    return sum(values)
"""
ITEMS = 5
WARM = 4
"""More instances than the job itself needs."""


def job_in(folder: Path) -> Path:
    """Write the job's folder, and return the job file."""
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB)
    (folder / "work.py").write_text(WORK)
    (folder / "items.jsonl").write_text("".join(f"{n}\n" for n in range(ITEMS)))
    return folder / "job.yaml"


def tour(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Ask all questions about a job on a running grid. `meanwhile` is called while a client follows the job's
    output."""
    for name, value in world.env.items():
        monkeypatch.setenv(name, value)
    job, file = submitted(world, folder)
    what_it_prints_is_seen_while_it_runs(world, job, meanwhile)
    why_a_task_failed_is_found_here(world, job)
    what_is_told_of_it(world, job, file)


def submitted(world: World, folder: Path) -> tuple[str, Path]:
    """Submit the job, and return its id and its file."""
    file = job_in(folder / "job")
    world.batchlab("grid", "up", "--backend", world.backend)
    world.batchlab("job", "submit", file, "--set", f"nap_s={nap_s(world)}")
    return str(asked(world, "job", "show", "last")["id"]), file


def what_is_told_of_it(world: World, job: str, file: Path) -> None:
    """Check the job in its performance data, in the metrics, and on the page, and submit it once more through the
    page."""
    what_it_did_is_told(world, JobId(job), file.parent.parent / "runs")
    with manager(world) as http:
        metrics_are_there(http, world)
        the_page_opens_and_takes_a_job(world, http, file.parent)


def nap_s(world: World) -> float:
    """Return a task time that is long enough for the manager to write the job's data, and for a worker to notice that a
    client follows the task."""
    return 6.0 + 2 * factory.load(world.backend).manager.control_lease_s


def asked(world: World, *words: object) -> Any:
    return json.loads(world.batchlab(*words, "--json")[0])


# --- A job ---------------------------------------------------------------------------------------


def what_it_prints_is_seen_while_it_runs(world: World, job: str, meanwhile: Callable[[], None]) -> None:
    argv = [sys.executable, "-u", "-m", "batchlab", "job", "logs", job, "--follow"]
    argv += ["--home", str(world.home)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout
        lines = [following.stdout.readline().strip()]
        while lines[-1] != "look/0 | looks at 0":
            assert lines[-1], "it ended too early"
            lines.append(following.stdout.readline().strip())
        assert asked(world, "job", "show", job)["ended_s"] is None, "seen only when it had ended"
        meanwhile()
        lines += following.stdout.read().splitlines()
    assert following.returncode == 0
    assert sorted(lines) == [f"look/{n} | looks at {n}" for n in range(ITEMS)]


def why_a_task_failed_is_found_here(world: World, job: str) -> None:
    (group,) = asked(world, "job", "failures", job)
    assert group["count"] == 1
    (failed,) = asked(world, "job", "why", job)["failed"]
    assert failed["last_lines"] == ["looks at 3"]
    again = [sys.executable, "-m", "batchlab", "job", "replay-task", job, "look/3", "--json"]
    done = subprocess.run([*again, "--home", str(world.home)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "same", found
    assert found["fingerprint"] == group["fingerprint"]
    unknown = [one for one in found["differences"] if "surroundings" in one]
    assert not unknown, "the worker has told what it has around it"


def what_it_did_is_told(world: World, job: JobId, runs: Path) -> None:
    home, backend = Home(world.home), factory.load(world.backend)

    def index() -> Index | None:
        objects = backend.open_objects(home)
        return asyncio.run(index_of(objects, factory.patience(), job))

    until(index, 60, pause_s=0.5)
    world.batchlab("report", "pull", job, "--backend", world.backend, "--out", runs)
    counted = "select succeeded, failed, backend from jobs"
    answer = json.loads(report("query", counted, runs / job, "--json"))
    assert answer["rows"] == [{"succeeded": ITEMS, "failed": 1, "backend": world.backend}]
    spent = "select kind, sum(cost_usd)::double as usd from cost group by kind"
    rows = json.loads(report("query", spent, runs / job, "--json"))["rows"]
    cost = {row["kind"]: row["usd"] for row in rows}
    assert cost["s3"] > 0, cost
    assert cost["sqs"] > 0, cost
    bill = asked(world, "cost", "bill", job)
    assert sum(cost.values()) == pytest.approx(bill["usd"]["typical"], rel=0.05)
    made = "select * from instances where in_service_s is not null"
    assert json.loads(report("query", made, runs / job, "--json"))["rows"]
    page = runs / "run.html"
    report("html", runs / job, "--out", page)
    assert job in page.read_text()


def report(*words: object) -> str:
    """Run `batchlab report` on a folder. This command needs neither a grid nor an account."""
    argv = [sys.executable, "-m", "batchlab", "report", *map(str, words)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


# --- The manager ---------------------------------------------------------------------------------


def record_of(world: World) -> ManagerRecord:
    record = Home(world.home).record()
    assert record
    return record


@contextmanager
def manager(world: World) -> Iterator[httpx.Client]:
    """Return an HTTP client of the manager's API, with the grid's token."""
    token = {"Authorization": f"Bearer {Home(world.home).token()}"}
    url = record_of(world).url
    with httpx.Client(base_url=url, headers=token, trust_env=False, timeout=60) as http:
        yield http


def metrics_are_there(http: httpx.Client, world: World) -> None:
    text = http.get("/metrics").text
    assert f'backend="{world.backend}"' in text
    for service in ("s3", "sqs"):
        (first, *_) = [
            line
            for line in text.splitlines()
            if line.startswith("batchlab_aws_requests_total{") and f'service="{service}"' in line
        ]
        assert float(first.rpartition(" ")[2]) > 0
    assert "batchlab_instance_billed_seconds_total{" in text


def the_page_opens_and_takes_a_job(world: World, http: httpx.Client, folder: Path) -> None:
    opened = asked(world, "grid", "open")["url"]
    login, _, code = opened.partition("#")
    assert login.startswith(record_of(world).url)
    ours = {"Sec-Fetch-Site": "same-origin"}
    with httpx.Client(trust_env=False, follow_redirects=True, timeout=60) as browser:
        assert browser.get(login).status_code == 200
        page = browser.post(login, data={"word": code}, headers=ours)
        assert page.status_code == 200
        assert "tour" in page.text
    files = [("files", (one.name, one.read_bytes())) for one in folder.iterdir()]
    sent = http.post("/v1/jobs/files", files=files)
    assert sent.status_code == 201, sent.text
    path = f"/v1/jobs/{sent.json()['id']}"
    until(lambda: http.get(path).json()["state"] == "SUCCEEDED", 90, pause_s=0.5)
    results = http.get(f"{path}/results")
    assert results.headers["content-type"] == "application/zip"


# --- Schedules -----------------------------------------------------------------------------------


def schedules_outlive_the_manager(world: World, folder: Path, other_manager: Callable[[], None]) -> None:
    """Check that one schedule is due while the manager is down, and that the fleet is prewarmed before that."""
    file = job_in(folder / "scheduled")
    yearly = ("--cron", "0 0 1 1 *", "--name", "yearly")
    world.batchlab("schedule", "add", file, *yearly)
    soon = ("--at", "+9s", "--name", "soon", "--prewarm", "8s", "--capacity", str(WARM))
    world.batchlab("schedule", "add", file, *soon)
    until(lambda: f"{WARM} as it asks for" in world.batchlab("grid", "activities")[0], 30, pause_s=0.5)
    other_manager()
    # Each look starts a process.
    until(lambda: came_to(world, "soon") == ["SUCCEEDED"], 90, pause_s=2.0)
    assert {one["name"]: one["state"] for one in asked(world, "schedule", "list")}["yearly"] == "active"


def came_to(world: World, name: str) -> list[str | None]:
    return [run["result"] for run in asked(world, "schedule", "show", name)["runs"]]
