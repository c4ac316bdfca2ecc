"""One run of a job file from start to end: what `run` and `demo` have in common.

Invariant: whatever ends this process, the same command with --resume goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output, progress, run_history
from batchlab.cli.bills import Burn
from batchlab.cli.session import Session
from batchlab.cli.signals import Stopped
from batchlab.cli.submission import Submission, default_folder, fetch_results, submit_capped, watch
from batchlab.cli.summary import SHOWN_FAILURES, Phases, Summary
from batchlab.core.api_types import FailureView, JobView
from batchlab.core.errors import Refused, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobState
from batchlab.jobs.attempts import definition
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.core.model import Pool
    from batchlab.jobs.job_file import JobFile
    from batchlab.runtime.factory import Backend


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for. `again` is the command that goes on after an interruption."""

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


def run(request: Request, phases: Phases) -> Summary:
    """Run the job to its end and fetch its results; raises Stopped after a signal."""
    from batchlab.runtime import factory

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
                with phases.phase("start"):  # until then nobody knows of a bucket to look into
                    session.start()
            with phases.phase("check"):
                submission = asyncio.run(submission.located())
                earlier = asyncio.run(submission.latest())
                number = choose(earlier, resume=request.resume, cache=request.cache)
                if request.resume and earlier is None:
                    output.say(
                        "There is no run of this file, code and data to go on with: all of it runs."
                    )
                output.check_folder(request.out or default_folder(submission.jobfile.job.name))
            summary = _Runner(request, submission, session, phases).run(earlier, number)
        except Stopped:
            _say_what_next(request, session)
            raise
    if session.stop_s is not None:
        phases.add("stop", session.stop_s)
    phases.end()
    return summary


def _say_what_next(request: Request, session: Session) -> None:
    if session.ends_grid:
        output.say("Stopped; what has run is kept, nothing is lost. Go on with")
    else:
        output.say("No longer watching; the job goes on in the grid that is up. Watch it with")
    output.say(f"  {request.again}")


def choose(earlier: run_history.Run | None, *, resume: bool, cache: bool) -> int:
    """Which run of this job file this is: an earlier one to go on with, or the next number."""
    if earlier is None:
        return 1
    if resume and earlier.ended in (JobState.FAILED, JobState.CANCELLED):
        raise Refused(
            f"Job {earlier.job} of this file has ended {earlier.ended}.",
            remedy=f"With a grid up, `batchlab job retry {earlier.job}` runs again what did not "
            f"succeed; without --resume all of it runs anew.",
        )
    if resume or (cache and earlier.ended is JobState.SUCCEEDED):
        return earlier.number
    if earlier.ended is None:
        raise Refused(
            f"Job {earlier.job} of this file has not ended.",
            remedy="Go on with it by adding --resume, or end it with `batchlab job cancel "
            f"{earlier.job}` while a grid is up.",
        )
    return earlier.number + 1


def pools_for(backend: Backend, jobfile: JobFile, workers: int | None = None) -> Sequence[Pool]:
    """The pools of a grid brought up for this job: the backend's own with at most `workers`
    instances, and room for every stage. None where the backend's own will do, or are a stack's;
    UsageError where `workers` cannot size those."""
    from batchlab.core.model import Pool

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
            name: replace(pool, min_size=min(pool.min_size, workers), max_size=workers)
            for name, pool in pools.items()
        }
    made = tuple(pools.values())
    return () if made == backend.pools else made


@dataclass(slots=True)
class _Runner:
    request: Request
    submission: Submission
    session: Session
    phases: Phases
    slots: dict[str, int] = field(default_factory=dict)

    def run(self, earlier: run_history.Run | None, number: int) -> Summary:
        known = earlier if earlier and earlier.number == number else None
        job = asyncio.run(self._start(number, known))
        if known and known.ended:
            output.say(f"Job {job.id} has {known.ended} before, and nothing runs again.")
            with self.phases.phase("start"):  # until it leads
                view = self.session.call(lambda client: client.job(job.id))
        else:
            view = self._watch(job, known)
        with self.phases.phase("fetch"):
            failures = self._failures(view)
            fetched = fetch_results(self.session, view, self.request.out)
        per_task = {str(stage.name): stage.slots for stage in job.stages}
        return Summary(view, self.phases, self.slots, per_task, failures, fetched)

    def _failures(self, view: JobView) -> list[FailureView]:
        if not any(stage["failed"] for stage in view["stages"]):
            return []
        return self.session.call(lambda client: client.failures(view["id"], limit=SHOWN_FAILURES))

    def _watch(self, job: JobDef, known: run_history.Run | None) -> JobView:
        begun_s = time.time()
        with self.phases.phase("run"):
            # Again with the same token is the same job, wherever a run before us came to its end.
            cap = partial(submit_capped, job, self.request.max_cost_usd)
            view = self.session.call(cap)
            output.say(f"Job {job.id}{' goes on' if known else ''}.")
            if view["state"] == JobState.PAUSED:
                view = self.session.call(lambda client: client.resume(job.id))
            with progress.follow() as shown:
                # Who caps a cost wants to see it.
                capped = self.request.max_cost_usd is not None or job.max_cost_usd is not None
                burn = Burn(self.request.home, as_if_aws=self.request.as_if_aws or capped)
                view = watch(self.session, view, shown, self.slots, burn)
        starts = [s["first_start_s"] for s in view["stages"] if s["first_start_s"] is not None]
        if known:
            self.phases.beside["run"] = "of this run; stages since they first began"
        elif starts:
            self.phases.split("run", "wait", min(starts) - begun_s)
        return view

    async def _start(self, number: int, known: run_history.Run | None) -> JobDef:
        """Bring the grid up and meanwhile upload run `number`, or read what is known of it."""
        begun_s = time.monotonic()
        up_s, (job, ready_s) = await asyncio.gather(self._bring_up(), self._prepare(number, known))
        self.phases.add("start", up_s - begun_s)
        # Only by what it took longer than the start has anybody waited for the upload.
        self.phases.add("upload", max(0.0, ready_s - up_s))
        return job

    async def _bring_up(self) -> float:
        await asyncio.to_thread(self.session.start)
        return time.monotonic()

    async def _prepare(self, number: int, known: run_history.Run | None) -> tuple[JobDef, float]:
        from batchlab.runtime.factory import patience

        if known:
            job = await definition(self.submission.objects, known.job, patience())
        else:
            job, told = await self.submission.prepare(number, self.request.max_cost_usd)
            self.phases.beside["start"] = f"meanwhile uploaded {told}"
        return job, time.monotonic()
