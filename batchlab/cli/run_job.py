"""Run of a job file from its submission to its results, and summary of the run, for `batchlab run` and `batchlab demo`.

Invariant: after any interruption, the same command with --resume continues the job. Each second of the wall time counts
in exactly one phase. A remark on a phase mentions work that runs at the same time as the phase.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from batchlab.cli import output
from batchlab.cli.output import Stopped
from batchlab.cli.progress import JobDisplay
from batchlab.cli.session import Session
from batchlab.cli.startup import START_S
from batchlab.cli.submission import (
    EarlierRun,
    Submission,
    default_folder,
    fetch_json,
    fetch_results,
    submit_capped,
    watch,
)
from batchlab.client.task_times import size_warnings_of
from batchlab.core.api_types import FailureView, JobView, StageView
from batchlab.core.errors import Refused, UsageError
from batchlab.core.job_definition import JobDef, task_name, without_task
from batchlab.core.model import JobState, Pool
from batchlab.core.task_sizes import SizeWarning
from batchlab.jobs.attempts import definition
from batchlab.jobs.results import Fetched
from batchlab.runtime import factory
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.jobs.job_file import JobFile

MAX_FAILURES = 5
MAX_TRACEBACK_LINES = 12  # The last lines of a traceback show the code that raised the exception.
NEGLIGIBLE_S = 0.05

_PHASES = {
    "load": "load batchlab",
    "data": "make the data",
    "check": "check the job file",
    "start": "start the grid",
    "upload": "upload",
    "wait": "plan, wait for workers",
    "run": "run",
    "fetch": "fetch the results",
    "stop": "stop the grid",
    "else": "all else",
}


@dataclass(slots=True)
class Phases:
    """Wall time in seconds that a command has spent in each phase."""

    begun_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    spent_s: dict[str, float] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    """Remarks by phase, about work that runs at the same time as the phase."""

    @classmethod
    def of_process(cls) -> Self:
        """Return phases whose time begins at the start of this process."""
        phases = cls(START_S)
        phases.add("load", time.monotonic() - START_S)
        return phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the `with` block to the phase `name`."""
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begun_s)

    def add(self, name: str, seconds: float) -> None:
        self.spent_s[name] = self.spent_s.get(name, 0.0) + seconds

    @property
    def wall_s(self) -> float:
        """Seconds from the beginning of the first phase until the call of `end`, or until now."""
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.begun_s

    def end(self) -> None:
        """Stop the measurement, and add the wall time outside of all phases to the phase "else"."""
        self.ended_s = time.monotonic()
        self.add("else", self.wall_s - sum(self.spent_s.values()))

    def split(self, name: str, earlier: str, seconds: float) -> None:
        """Move the first `seconds` of the phase `name` to the phase `earlier`.

        If the phase `name` is shorter than `seconds`, move the whole time of the phase.
        """
        part_s = min(max(0.0, seconds), self.spent_s.get(name, 0.0))
        self.add(name, -part_s)
        self.add(earlier, part_s)


@dataclass(slots=True)
class Summary:
    """Summary of a run.

    `slots` contains the largest observed number of slots in service by pool. `per_task` contains the number of slots
    that one task occupies, by stage.
    """

    job: JobView
    phases: Phases
    slots: Mapping[str, int]
    per_task: Mapping[str, int]
    failures: Sequence[FailureView] = ()
    fetched: Fetched | None = None
    warnings: Sequence[SizeWarning] = ()
    """Warnings about the task times of earlier runs, which were printed before the run."""

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "wall_s": self.phases.wall_s,
            "phases_s": self.phases.spent_s,
            "stages": [self._stage(stage) for stage in self.job["stages"]],
            "failures": self.failures,
            "results": self.fetched and fetch_json(self.fetched),
            "warnings": [warning.to_json() for warning in self.warnings],
        }

    def _stage(self, stage: StageView) -> dict[str, Any]:
        first_s, last_s = stage["first_start_s"], stage["last_end_s"]
        span_s = last_s - first_s if first_s is not None and last_s is not None else 0.0
        slots = self.slots.get(stage["pool"], 0)
        used_s = stage["run_s"] * self.per_task.get(stage["name"], 1)
        return {
            "name": stage["name"],
            "tasks": stage["planned"],
            "span_s": span_s,
            "run_s": stage["run_s"],
            "slots": slots,
            "utilisation": min(1.0, used_s / (span_s * slots)) if span_s and slots else None,
        }

    def text(self) -> str:
        """Return the summary of a run as text."""
        return "\n".join([*self._outcome(), "", *self._times(), *self._results()])

    def _outcome(self) -> Iterator[str]:
        stages = self.job["stages"]
        tasks = sum(stage["planned"] or 0 for stage in stages)
        failed = sum(stage["failed"] for stage in stages)
        cancelled = sum(stage["cancelled"] for stage in stages)
        retried = sum(stage["retried"] for stage in stages)
        counts = [output.count(tasks, "task"), f"{failed:,} failed"]
        counts += [f"{cancelled:,} cancelled"] if cancelled else []
        counts += [f"{retried:,} retried"]
        wall = output.span(self.phases.wall_s)
        yield f"{self.job['id']} {self.job['state']} in {wall}: {', '.join(counts)}"
        # Show one failed task for each cause, because tasks with one cause fail in the same way.
        causes = {(failure["stage"], failure["fingerprint"]): failure for failure in reversed(self.failures)}
        reason = self.job["reason"]
        for cause in causes.values():
            reason = without_task(reason, cause["stage"], cause["task"], cause["reason"])
        if reason:
            yield f"  {output.clean(reason)}"
        examples = list(reversed(causes.values()))
        for example in examples:
            name = task_name(example["stage"], example["task"])
            yield f"  {name} {example['kind']}: {output.clean(example['reason'])}"
            yield from (f"    {line}" for line in _limit_texts(example)[-MAX_TRACEBACK_LINES:])
        if causes:
            job, more = self.job["id"], failed - len(causes)
            rest = f"{more:,} more: `batchlab job failures {job}`; " if more > 0 else ""
            yield f"  {rest}output of the tasks: `batchlab job logs {job}`"
            name = task_name(examples[0]["stage"], examples[0]["task"])
            yield f"  replay of {name} on this machine: `batchlab job replay-task {job} {name}`"

    def _times(self) -> Iterator[str]:
        yield "Where the time went"
        for phase, words in _PHASES.items():
            spent_s = self.phases.spent_s.get(phase)
            if spent_s is None or (phase in ("upload", "else") and spent_s < NEGLIGIBLE_S):
                continue
            beside = self.phases.beside.get(phase)
            yield f"  {words:<24}{output.span(spent_s):>9}" + (f"   {beside}" if beside else "")
            for stage in map(self._stage, self.job["stages"] if phase == "run" else ()):
                used, tasks = stage["utilisation"], output.count(stage["tasks"] or 0, "task")
                share = f", {used:.0%} of {output.count(stage['slots'], 'slot')}" if used else ""
                times = f"{tasks}, {output.span(stage['run_s'])} of task time{share}"
                yield f"    {stage['name']:<22}{output.span(stage['span_s']):>9}   {times}"

    def _results(self) -> Iterator[str]:
        if self.fetched is None:
            return
        yield ""
        yield f"Results in {self.fetched.folder}"
        for stage, number in self.fetched.results.items():
            yield f"  {stage}.jsonl: {output.count(number, 'result')}"
        if self.fetched.files:
            files = output.count(self.fetched.files, "file")
            yield f"  files/: {files}, {output.size(self.fetched.size_bytes)}"


def _limit_texts(failure: FailureView) -> Sequence[str]:
    """Return the lines of a failure's traceback, without the last lines if they repeat the failure's reason."""
    lines = output.visible(failure["traceback"]).rstrip("\n").splitlines()
    reason = output.clean(failure["reason"])
    for end in reversed(range(len(lines))):
        last = output.clean("\n".join(lines[end:]))
        if last == reason:
            return lines[:end]
        if len(last) > len(reason):
            break
    return lines


@dataclass(frozen=True, slots=True)
class RunRequest:
    """Arguments of the run of a job file. `again` is the command line that resumes the run after an interruption."""

    file: Path
    home: Home
    backend: str
    again: str
    endpoint: str | None = None
    out: Path | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False
    cache: bool = False
    workers: int | None = None
    keep_up: bool = False
    max_cost_usd: float | None = None
    as_if_aws: bool = False


def run(request: RunRequest, phases: Phases) -> Summary:
    """Run a job to its end, and fetch the job's results. Raise Stopped after SIGINT or SIGTERM."""
    if request.workers is not None and request.home.record() is not None:
        raise UsageError(
            f"A grid is up in {request.home.path}, so --workers cannot size one.",
            remedy="Use `batchlab grid scale POOL --max N`, or leave --workers out.",
        )
    with phases.phase("check"):
        backend = factory.load(request.backend, request.endpoint)
        submission = Submission.of(request.file, request.overrides, request.home, backend)
        pools = pools_for(backend, submission.jobfile, request.workers)
    with Session(request.home, backend, pools, keep_up=request.keep_up) as session:
        try:
            if not backend.capabilities.local_bucket:
                with phases.phase("start"):  # This backend has a bucket only while the grid is up.
                    session.start()
            with phases.phase("check"):
                submission = asyncio.run(submission.locate())
                earlier = asyncio.run(submission.find_latest_run())
                number = choose(earlier, resume=request.resume, cache=request.cache)
                if request.resume and earlier is None:
                    output.say("No earlier run has this file, code, and data, so all tasks run.")
                output.check_folder(request.out or default_folder(submission.jobfile.job.name))
            summary = _Runner(request, submission, session, phases).run(earlier, number)
        except Stopped:
            if session.ends_grid:
                output.say("Stopped. The results of ended tasks are stored. Continue the job with")
            else:
                output.say("Stopped watching. The job continues in the running grid. Watch the job with")
            output.say(f"  {request.again}")
            raise
    if session.stop_s is not None:
        phases.add("stop", session.stop_s)
    phases.end()
    return summary


def choose(earlier: EarlierRun | None, *, resume: bool, cache: bool) -> int:
    """Return the number of the earlier run if the earlier run is resumed or reused, or else the number of a new run."""
    if earlier is None:
        return 1
    if resume and earlier.ended in (JobState.FAILED, JobState.CANCELLED):
        raise Refused(
            f"Job {earlier.job} of this file has ended {earlier.ended}.",
            remedy=f"With a grid up, `batchlab job retry {earlier.job}` runs the unsuccessful tasks again. Without "
            "--resume, all tasks run again.",
        )
    if resume or (cache and earlier.ended is JobState.SUCCEEDED):
        return earlier.number
    if earlier.ended is None:
        raise Refused(
            f"Job {earlier.job} of this file has not ended.",
            remedy="Continue the job by adding --resume, or cancel it with "
            f"`batchlab job cancel {earlier.job}` while a grid is up.",
        )
    return earlier.number + 1


def pools_for(backend: Backend, jobfile: JobFile, workers: int | None = None) -> Sequence[Pool]:
    """Return the pools of a grid for this job, with at most `workers` instances in each pool.

    The backend's default pools are extended, so that each stage has a pool with enough slots for one task of the stage.

    Return an empty sequence if the backend's default pools suffice, or if the pools belong to a stack. Raise UsageError
    if `workers` is given for a stack.
    """
    if backend.capabilities.fixed_pools:
        if workers is not None:
            raise UsageError(
                "The pools of a stack on AWS are not sized by --workers.",
                remedy="Use `batchlab grid scale POOL --max N`, or leave --workers out.",
            )
        return ()
    pools = {pool.name: pool for pool in backend.pools}
    most = max((pool.max_size for pool in backend.pools), default=1)
    for stage in jobfile.job.stages:
        pool = pools.get(stage.pool) or Pool(stage.pool, 0, most, 1)
        pools[stage.pool] = replace(pool, slots=max(pool.slots, stage.resources.slots))
    if workers is not None:
        pools = {
            name: replace(pool, min_size=min(pool.min_size, workers), max_size=workers) for name, pool in pools.items()
        }
    wanted = tuple(pools.values())
    return () if wanted == backend.pools else wanted


@dataclass(slots=True)
class _Runner:
    request: RunRequest
    submission: Submission
    session: Session
    phases: Phases
    slots: dict[str, int] = field(default_factory=dict)

    def run(self, earlier: EarlierRun | None, number: int) -> Summary:
        earlier_run = earlier if earlier and earlier.number == number else None
        job = asyncio.run(self._start(number, earlier_run))
        warnings: Sequence[SizeWarning] = ()
        if earlier_run and earlier_run.ended:
            output.say(f"Job {job.id} has {earlier_run.ended} before, and nothing runs again.")
            with self.phases.phase("start"):  # The phase "start" includes the wait until a manager leads.
                view = self.session.call(lambda client: client.job(job.id))
        else:
            with self.phases.phase("check"):
                pools = {str(stage.name): stage.pool for stage in job.stages}
                warnings = self.session.call(
                    lambda client: size_warnings_of(nullcontext(client), job.name, pools, new=job.id)
                )
                output.show_warnings(warnings)
            view = self._watch(job, earlier_run)
        with self.phases.phase("fetch"):
            failures = self._failures(view)
            fetched = fetch_results(self.session, view, self.request.out)
        per_task = {str(stage.name): stage.slots for stage in job.stages}
        return Summary(view, self.phases, self.slots, per_task, failures, fetched, warnings)

    def _failures(self, view: JobView) -> list[FailureView]:
        if not any(stage["failed"] for stage in view["stages"]):
            return []
        return self.session.call(lambda client: client.failures(view["id"], limit=MAX_FAILURES))

    def _watch(self, job: JobDef, earlier: EarlierRun | None) -> JobView:
        begun_s = time.time()
        with self.phases.phase("run"):
            # If an earlier run has submitted the job already, the repeated submission returns the job of the earlier
            # run.
            cap = partial(submit_capped, job, self.request.max_cost_usd)
            view = self.session.call(cap)
            output.say(f"Job {job.id}{' continues' if earlier else ''}.")
            if view["state"] == JobState.PAUSED:
                view = self.session.call(lambda client: client.resume(job.id))
            with JobDisplay() as display:
                from batchlab.cli.bills import LiveCost

                # Show the cost of a job that has a cost cap, even without --as-if-aws.
                capped = self.request.max_cost_usd is not None or job.max_cost_usd is not None
                live_cost = LiveCost(self.request.home, as_if_aws=self.request.as_if_aws or capped)
                view = watch(self.session, view, display, self.slots, live_cost)
        starts = [s["first_start_s"] for s in view["stages"] if s["first_start_s"] is not None]
        if earlier:
            self.phases.beside["run"] = "of this run; stages since they first began"
        elif starts:
            self.phases.split("run", "wait", min(starts) - begun_s)
        return view

    async def _start(self, number: int, earlier: EarlierRun | None) -> JobDef:
        """Start the grid, and at the same time upload the files of run `number` or read the definition of an earlier
        run.
        """
        begun_s = time.monotonic()
        up_s, (job, ready_s) = await asyncio.gather(self._bring_up(), self._prepare(number, earlier))
        self.phases.add("start", up_s - begun_s)
        # The phase "upload" contains only the part of the upload's time that follows the start of the grid.
        self.phases.add("upload", max(0.0, ready_s - up_s))
        return job

    async def _bring_up(self) -> float:
        await asyncio.to_thread(self.session.start)
        return time.monotonic()

    async def _prepare(self, number: int, earlier: EarlierRun | None) -> tuple[JobDef, float]:
        # The module is imported while the grid starts, because `_watch` uses it later.
        import batchlab.cli.bills  # noqa: F401

        if earlier:
            job = await definition(self.submission.objects, earlier.job, factory.patience())
        else:
            job, note = await self.submission.prepare(number, self.request.max_cost_usd)
            self.phases.beside["start"] = f"meanwhile uploaded {note}"
        return job, time.monotonic()
