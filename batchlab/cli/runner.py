"""One run of a job file from start to end: what `run` and `demo` have in common.

Invariant: whatever ends this process, the same command with --resume goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output, progress, runs
from batchlab.cli.session import Session
from batchlab.cli.signals import Stopped
from batchlab.cli.summary import SHOWN_FAILURES, Phases, Summary
from batchlab.client import Client
from batchlab.errors import Refused, UsageError
from batchlab.home import Home
from batchlab.model import ENDED, JobDef, JobState
from batchlab.results import Fetched, Listed, definition, fetch
from batchlab.views import GridView, JobView

if TYPE_CHECKING:
    from batchlab.backends import Backend
    from batchlab.model import Pool
    from batchlab.ports import Objects
    from batchlab.spec.jobfile import JobFile

POLL_S = 1.0
"""Longest wait for news of the job, which is how often the workers are looked at too."""
GAP_S = 0.1
"""Least time between two looks: a busy job has news all the time."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for. `again` is the command that goes on after an interruption."""

    file: Path
    home: Home
    backend: str
    again: str
    out: Path | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False
    cache: bool = False
    workers: int | None = None
    keep_up: bool = False


def run(request: Request) -> Summary:
    """Run the job to its end and fetch its results; raises Stopped after a signal."""
    from batchlab import backends, spec
    from batchlab.submission import code_digest

    phases = Phases()
    with phases.phase("check"):
        backend = backends.load(request.backend)
        jobfile = spec.load(request.file, request.overrides)
        packed = code_digest(jobfile)
        submission = Submission(
            jobfile,
            packed,
            spec.fingerprint(jobfile, packed[1]),
            backend.open_objects(request.home),
            backend,
        )
        earlier = asyncio.run(submission.earlier())
        number = choose(earlier, resume=request.resume, cache=request.cache)
        pools = pools_for(backend, jobfile, request.workers)
    if request.workers is not None and request.home.record() is not None:
        raise UsageError(
            f"A grid is up in {request.home.path}, so --workers cannot size one.",
            remedy="Use `batchlab grid scale POOL --max N`, or leave --workers out.",
        )
    with Session(request.home, backend, pools, keep_up=request.keep_up) as session:
        try:
            return _Runner(request, submission, session, phases).run(earlier, number)
        except Stopped:
            _say_what_next(request, session, submission)
            raise


def _say_what_next(request: Request, session: Session, submission: Submission) -> None:
    if session.ours:
        output.say("Stopped; what has run is kept, nothing is lost. Go on with")
    else:
        output.say("No longer watching; the job goes on in the grid that is up. Watch it with")
    output.say(f"  {request.again}")


def choose(earlier: runs.Run | None, *, resume: bool, cache: bool) -> int:
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
    instances, and room for every stage. None where the backend's own will do."""
    from batchlab.model import Pool

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


@dataclass(frozen=True, slots=True)
class Submission:
    """A job file that has passed its checks, and where it is going."""

    jobfile: JobFile
    packed: tuple[bytes, str]
    fingerprint: str
    objects: Objects
    backend: Backend

    async def earlier(self) -> runs.Run | None:
        """The last run of just this, if there was one."""
        from batchlab.backends import patience

        name = self.jobfile.job.name
        return await runs.latest(self.objects, name, self.fingerprint, patience())

    async def prepare(self, number: int) -> tuple[JobDef, str]:
        """Upload what run `number` needs; the job to submit, and what was uploaded in words."""
        from batchlab.backends import patience
        from batchlab.submission import Uploaded, prepare

        begun_s = time.monotonic()
        last = Uploaded(0, 0, 0)

        def note(uploaded: Uploaded) -> None:
            nonlocal last
            last = uploaded

        job = await prepare(
            self.jobfile,
            objects=self.objects,
            clock=self.backend.open_clock(),
            patience=patience(),
            token=runs.token(self.fingerprint, number),
            packed=self.packed,
            progress=note,
        )
        took = output.span(time.monotonic() - begun_s)
        return job, f"{output.count(last.of, 'file')}, {output.size(last.size_bytes)} in {took}"


def watch(
    session: Session, view: JobView, shown: progress.Progress, slots: dict[str, int]
) -> JobView:
    """Show the job until it ends; `slots` learns the most slots seen in service by pool."""
    looked_s, grid = float("-inf"), None
    while True:
        asked_s = time.monotonic()
        if asked_s - looked_s >= POLL_S / 2 or view["state"] in ENDED:
            grid, looked_s = session.call(Client.grid), asked_s
            _note_slots(grid, slots)
        shown.show(view, grid)
        if view["state"] in ENDED:
            return view
        job, version = view["id"], view["version"]
        view = session.call(lambda client: client.job(job, version=version, wait_s=POLL_S))
        if view["state"] not in ENDED:
            time.sleep(max(0.0, asked_s + GAP_S - time.monotonic()))


def _note_slots(grid: GridView, slots: dict[str, int]) -> None:
    for pool in grid["pools"]:
        up = sum(one["state"] == "InService" for one in pool["instances"]) * pool["slots"]
        slots[pool["name"]] = max(slots.get(pool["name"], 0), up)


def fetch_results(
    session: Session, objects: Objects, view: JobView, out: Path | None, stages: Sequence[str] = ()
) -> Fetched:
    """The results of what has succeeded, in `out` or out/<job name>."""
    from batchlab.backends import patience

    listing: list[Listed] = []
    after: int | None = None
    while page := session.call(lambda c: c.outcomes(view["id"], after=after))["outcomes"]:
        listing += map(Listed.of, page)
        after = page[-1]["seq"]
    folder = out or Path("out") / view["name"]
    return asyncio.run(
        fetch(objects, view, listing, folder, patience=patience(), stages=stages)
    )


@dataclass(slots=True)
class _Runner:
    request: Request
    submission: Submission
    session: Session
    phases: Phases
    slots: dict[str, int] = field(default_factory=dict)

    def run(self, earlier: runs.Run | None, number: int) -> Summary:
        is_new = earlier is None or earlier.number != number
        job = asyncio.run(self._start(number if is_new else None, earlier))
        with self.phases.phase("run"):
            begun_s = time.time()
            view = self._view(job, earlier if not is_new else None)
            if view["state"] not in ENDED:
                with progress.follow() as shown:
                    view = watch(self.session, view, shown, self.slots)
        starts = [s["first_start_s"] for s in view["stages"] if s["first_start_s"] is not None]
        if starts and is_new:
            self.phases.split("run", "wait", min(starts) - begun_s)
        failures = (
            self.session.call(lambda client: client.failures(view["id"], limit=SHOWN_FAILURES))
            if any(stage["failed"] for stage in view["stages"])
            else []
        )
        with self.phases.phase("fetch"):
            fetched = fetch_results(
                self.session, self.submission.objects, view, self.request.out
            )
        per_task = {str(stage.name): stage.slots for stage in job.stages}
        return Summary(view, self.phases, self.slots, per_task, failures, fetched)

    async def _start(self, number: int | None, earlier: runs.Run | None) -> JobDef:
        """Bring the grid up and meanwhile upload run `number`, or read the earlier one."""
        begun_s = time.monotonic()
        up_s, (job, ready_s) = await asyncio.gather(
            self._bring_up(), self._prepare(number, earlier)
        )
        self.phases.add("start", up_s - begun_s)
        # Only by what it took longer than the start has anybody waited for the upload.
        self.phases.add("upload", max(0.0, ready_s - up_s))
        return job

    async def _bring_up(self) -> float:
        await asyncio.to_thread(self.session.start)
        return time.monotonic()

    async def _prepare(self, number: int | None, earlier: runs.Run | None) -> tuple[JobDef, float]:
        from batchlab.backends import patience

        if number is None:
            assert earlier is not None
            job = await definition(self.submission.objects, earlier.job, patience())
        else:
            job, told = await self.submission.prepare(number)
            self.phases.beside["start"] = f"meanwhile uploaded {told}"
        return job, time.monotonic()

    def _view(self, job: JobDef, known: runs.Run | None) -> JobView:
        if known and known.ended is not None:
            return self.session.call(lambda client: client.job(job.id))
        # Again with the same token is the same job, wherever a run before us came to its end.
        view = self.session.call(lambda client: client.submit(job))
        output.say(f"Job {job.id}{' goes on' if known else ''}.")
        return view
