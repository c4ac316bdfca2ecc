"""Jobs of a rehearsal on AWS: the shipped examples, jobs during which a fault occurs, and the expected cost.

Invariant: a job of a rehearsal counts as correct only if its results are equal to the results of the same job on this
machine, or to a known number.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import demo, run_job
from batchlab.cli.cost import count as count_input
from batchlab.cli.option_values import connect
from batchlab.cli.progress import JobDisplay
from batchlab.cli.session import Session
from batchlab.cli.submission import fetch_results, submit
from batchlab.core.errors import BackendError, BatchlabError, JobFailed, UsageError
from batchlab.core.model import ENDED, JobId, JobState
from batchlab.core.pricing import price_book
from batchlab.core.pricing.estimate import Estimate, Policy, PoolPlan, Three, loads
from batchlab.core.pricing.estimate import estimate as compute_estimate
from batchlab.core.pricing.hourly import Hourly, Worker
from batchlab.core.pricing.price_book import NOTHING, Item, PriceBook, Usd, shown, total
from batchlab.core.text import count, span
from batchlab.deploy import plan
from batchlab.deploy.rehearsal import StepNotes
from batchlab.runtime import factory
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import GridView, JobView
    from batchlab.deploy.rehearsal import StepNotes
    from batchlab.deploy.settings import Settings
    from batchlab.deploy.template import Template

POOL = "default"
"""Pool in which the jobs of a rehearsal run."""
EXAMPLES = ("claims", "transform", "sort", "media")
NEEDS_FFMPEG = "media"
EXAMPLE_S: Three = (0.02, 0.2, 2.0)
"""Assumed lowest, typical, and highest run time in seconds of an example's task, for the estimate."""
TASKS = 150
TASK_S = 2.0
"""Number and run time in seconds of the tasks of a job during which a fault occurs.

The job must run until a killed instance is replaced, which takes a few minutes on AWS.
"""

EXPECTED_S = 4500.0
"""Expected duration of a rehearsal in seconds, including the removal of the stack."""
DATABASE_S = 1200.0
"""Additional seconds of a rehearsal for the creation and the deletion of an RDS database."""
CONFORM_USD = Usd(0.005, 0.01, 0.03)
NOTICE_USD = Usd(0.0, 0.3, 0.6)
"""Assumed cost in USD of the requests of conform, and of an experiment of AWS Fault Injection Service."""
OTHER_REGION = 2.0
"""Factor of the highest cost if the prices are of another region. AWS's regions differ by less."""

_WORK = """\
import time


def square(item):
    time.sleep({seconds})
    return item * item


def total(values):
    return sum(values)
"""
_JOB = """\
name: {name}
input: {{files: items.jsonl, split: items}}
stages:
  - {{name: square, python: work:square, retry: 3, bundle: 1}}
  - {{name: total, python: work:total, gather: all, retry: 3}}
"""

Injection = Callable[["Client"], tuple[Sequence[str], str]]
"""Function that causes a fault, and returns the affected instances and the evidence of the fault."""


@dataclass(frozen=True, slots=True)
class Job:
    """Job file of a rehearsal. `obstacle` is the reason why the job cannot run, or ""."""

    name: str
    file: Path
    seconds: Three
    obstacle: str = ""

    def estimate(self, pools: Sequence[PoolPlan], book: PriceBook) -> Estimate:
        """Return the estimated cost of the job on AWS."""
        from batchlab.jobs import job_file

        jobfile = job_file.load(self.file, {})
        definition = job_file.compile_job(
            jobfile, job_id=JobId("estimate"), token="", code_key=None, input_keys=(), submitted_s=0.0
        )
        tasks, files, size_bytes = asyncio.run(count_input(jobfile))
        stages, assumed = loads(
            definition.stages, tasks, dict.fromkeys((str(stage.name) for stage in definition.stages), self.seconds), {}
        )
        manager, pace = factory.load("aws").manager, factory.load("aws").pace
        policy = Policy(manager.drain_target_s, manager.idle_s, pace)
        return compute_estimate(stages, pools, book, policy, input_files=files, input_bytes=size_bytes, assumed=assumed)


def example(name: str, folder: Path, *, has_ffmpeg: bool) -> Job:
    """Write the files and the input of a shipped example below `folder`."""
    place = folder / name
    obstacle = ""
    if name == NEEDS_FFMPEG and not has_ffmpeg:
        obstacle = "Amazon Linux does not have ffmpeg. Set WorkerImage to an image with ffmpeg to run this job."
    else:
        try:
            demo.make_data(name, place / demo.DATA)
        except UsageError as error:
            obstacle = str(error)
    demo.write(place, demo.example_files(name))
    return Job(name, place / "job.yaml", EXAMPLE_S, obstacle)


def sleeping(name: str, folder: Path) -> Job:
    """Write a job below `folder` whose tasks only wait, so that a fault occurs while the job runs."""
    place = folder / name
    place.mkdir(parents=True)
    (place / "work.py").write_text(_WORK.format(seconds=TASK_S))
    (place / "items.jsonl").write_text("".join(f"{number}\n" for number in range(TASKS)))
    (place / "job.yaml").write_text(_JOB.format(name=name))
    return Job(name, place / "job.yaml", (TASK_S, TASK_S, TASK_S))


def run_example(home: Home, job: Job, folder: Path, notes: StepNotes) -> str:
    """Run an example on this machine and on AWS, compare the results, and return the id of the job on AWS.

    Raise JobFailed if the job on AWS fails, or if its results differ.
    """
    local = _run(Home(folder / "local"), "local", job, folder / "expected" / job.name)
    summary = _run(home, "aws", job, folder / "results" / job.name)
    view = summary.job
    notes.figures["local_s"], notes.figures["aws_s"] = local.phases.wall_s, summary.phases.wall_s
    tasks = sum(stage["planned"] or 0 for stage in view["stages"])
    notes.done.append(f"The job {view['id']} ran {tasks:,} tasks.")
    if starts := [stage["first_start_s"] for stage in view["stages"] if stage["first_start_s"] is not None]:
        notes.figures["first_task_s"] = min(starts) - view["submitted_s"]
    differing = _differences(folder / "expected" / job.name, folder / "results" / job.name)
    if differing:
        raise JobFailed(f"The results differ from the results on this machine: {', '.join(differing)}.")
    notes.done.append("The results are equal to the results of the same job on this machine.")
    return view["id"]


def _run(home: Home, backend: str, job: Job, out: Path) -> run_job.Summary:
    request = run_job.RunRequest(file=job.file, home=home, backend=backend, again="", out=out)
    summary = run_job.run(request, run_job.Phases())
    _check_success(summary.job, backend)
    return summary


def _check_success(view: JobView, backend: str) -> None:
    if view["state"] != JobState.SUCCEEDED:
        raise JobFailed(f"The job {view['id']} on {backend} ended {view['state']}: {view['reason'] or 'no reason'}")


def _differences(expected: Path, observed: Path) -> list[str]:
    """Return the names of results with other contents, and of files that only one of the two folders has."""
    first, second = _contents(expected), _contents(observed)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def _contents(folder: Path) -> dict[str, str]:
    results = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.jsonl")}
    # Two programs may write different bytes for the same table or video, so only the names of files are compared.
    files = (path.relative_to(folder).as_posix() for path in (folder / "files").rglob("*") if path.is_file())
    return {**results, **dict.fromkeys(files, "")}


def run_with_fault(home: Home, job: Job, folder: Path, inject: Injection, notes: StepNotes) -> str:
    """Run a job, cause a fault while the job runs, and check the job's result. Return the id of the job.

    Raise JobFailed if the job fails or its result is wrong, and BackendError if the job ends before the fault.
    """
    with Session(home, factory.load("aws")) as session:
        session.start()
        view = submit(home, job.file, ())
        view, grid = _follow(session, view, lambda view, _: view["stages"][0]["succeeded"] > 0)
        if view["state"] in ENDED:
            raise BackendError(f"The job {view['id']} ended {view['state']} before the fault: {view['reason']}")
        before, begun_s = _in_service(grid), time.monotonic()
        try:
            with connect(home) as client:
                targets, evidence = inject(client)
        except Exception:
            # Without the fault, the job would only delay the next steps.
            with suppress(BatchlabError):
                session.call(lambda client: client.cancel(view["id"]))
            raise
        notes.done.append(evidence)
        notes.figures["fault_s"] = time.monotonic() - begun_s

        def look(_: JobView, grid: GridView) -> bool:
            now = _in_service(grid)
            if not now & set(targets):
                notes.figures.setdefault("gone_s", time.monotonic() - begun_s)
            if now - before:
                notes.figures.setdefault("replaced_s", time.monotonic() - begun_s)
            return False

        view, _ = _follow(session, view, look)
        _check_success(view, "aws")
        fetched = fetch_results(session, view, folder / "results" / job.name)
    notes.figures["job_s"] = (view["ended_s"] or view["submitted_s"]) - view["submitted_s"]
    values = [json.loads(line)["value"] for line in (fetched.folder / "total.jsonl").read_text().splitlines()]
    expected = sum(number * number for number in range(TASKS))
    if values != [expected]:
        raise JobFailed(f"The result of the job {view['id']} is {values}, not {expected}.")
    retried = sum(stage["retried"] for stage in view["stages"])
    notes.done.append(f"The job {view['id']} succeeded with the correct result, with {retried:,} retried tasks.")
    return view["id"]


def _in_service(grid: GridView) -> set[str]:
    return {one["id"] for pool in grid["pools"] for one in pool["instances"] if one["state"] == "InService"}


def _follow(
    session: Session, view: JobView, is_enough: Callable[[JobView, GridView], bool]
) -> tuple[JobView, GridView]:
    """Show the progress of a job until `is_enough` returns true or the job ends. Return the last views."""
    with JobDisplay() as display:
        while True:
            grid = session.call(lambda client: client.grid())
            display.show(view, grid)
            if is_enough(view, grid) or view["state"] in ENDED:
                return view, grid
            view = session.call(partial(_news, view))


def _news(view: JobView, client: Client) -> JobView:
    return client.job(view["id"], version=view["version"], wait_s=1.0)


# --- Expected cost -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """Expected cost of a rehearsal that takes `seconds`. `jobs` has the estimate of each job by name.

    `usd_per_h` is the highest cost of the stack per hour, with all workers on demand. `fixed_usd` is the highest cost
    that does not depend on time. `database_s` is the part of `seconds` for a database. `note` is a sentence if the
    prices are of another region.
    """

    seconds: float
    hourly: Hourly
    note: str
    jobs: dict[str, Estimate]
    usd_per_h: float
    database_s: float = 0.0

    @property
    def items(self) -> tuple[Item, ...]:
        hours = self.seconds / 3600
        idle = [replace(item, usd=item.usd.times(hours), how=f"{item.how}, {hours:.2f} h") for item in self.hourly.idle]
        jobs: dict[str, Usd] = {}
        for estimate in self.jobs.values():
            for item in estimate.items:
                jobs[_service(item.what)] = jobs.get(_service(item.what), NOTHING) + item.usd
        more = [Item(what, usd, f"estimates of {count(len(self.jobs), 'job')}") for what, usd in jobs.items()]
        conform = Item("conform", CONFORM_USD, "requests of about 130 checks")
        return (*idle, *more, conform, Item("fault injection", NOTICE_USD, "one experiment of AWS FIS"))

    @property
    def fixed_usd(self) -> float:
        requests = [item.usd for item in self.items if item.what in ("SQS", "S3", "data out of AWS")]
        # AWS bills a started hour of a VPC endpoint as a whole hour.
        return self.margin * sum(usd.high for usd in (*requests, CONFORM_USD, NOTICE_USD, self.hourly.idle_usd_h))

    @property
    def margin(self) -> float:
        return OTHER_REGION if self.note else 1.0

    @property
    def highest_usd(self) -> float:
        return self.fixed_usd + self.usd_per_h * self.seconds / 3600

    def text(self) -> str:
        note = f" {self.note}" if self.note else ""
        return (
            f"The rehearsal takes about {span(self.seconds)} and costs {total(self.items)}, at most "
            f"{shown(self.highest_usd)} in this time. Prices: {self.hourly.prices}.{note}"
        )


def _service(what: str) -> str:
    """Return the name of the AWS service for a line of an estimate."""
    names = {"SQS requests": "SQS", "S3 requests": "S3", "S3 storage": "S3", "data out of AWS": "data out of AWS"}
    return names.get(what, "EC2 workers")


def expect(wanted: Settings, source: Template, home: Home, jobs: Sequence[Job]) -> Expected:
    """Return the expected cost of a rehearsal. Raise UsageError if the cost is unknown."""
    _, cost = plan.offline_plan(wanted, source, home)
    if cost.hourly is None:
        raise UsageError(cost.note, remedy="A rehearsal needs prices, because it checks its budget.")
    book = price_book.load(home.path)
    usual = {pool.name: pool for pool in factory.load("aws").pools}[POOL]
    workers = {worker.pool: worker for worker in cost.hourly.workers}
    pools = [
        PoolPlan(
            pool.name,
            pool.types[0] if pool.types else usual.instance_type,
            pool.slots,
            pool.min_size,
            pool.max_size,
            usual.boot_s,
            spot_share=1 - workers[pool.name].on_demand_percent / 100,
            gpus=int(dict(pool.parameters).get("PoolGpus", 0)),
        )
        for pool in wanted.pools
    ]
    database_s = DATABASE_S if dict(wanted.parameters).get("Ledger") == "postgres" else 0.0
    most = sum(_highest_usd_h(pool.types, workers[pool.name], book) * pool.max_size for pool in wanted.pools)
    estimates = {job.name: job.estimate(pools, book) for job in jobs if not job.obstacle}
    expected = Expected(EXPECTED_S + database_s, cost.hourly, cost.note, estimates, 0.0, database_s)
    return replace(expected, usd_per_h=expected.margin * (cost.hourly.idle_usd_h.high + most))


def _highest_usd_h(types: Sequence[str], worker: Worker, book: PriceBook) -> float:
    """Return the highest cost of a worker per hour. `worker` has the price of the first instance type."""
    prices = [book.instance_usd_h(name).high for name in types]
    return worker.on_demand.high + (max(prices) - prices[0] if prices else 0.0)
