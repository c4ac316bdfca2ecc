"""A job file on its way into a grid.

Invariant: nothing is uploaded that has not passed every check.

A job that a grid runs: watched until it ends, its results fetched.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output, run_history
from batchlab.cli.progress import Progress
from batchlab.cli.session import Session
from batchlab.client.http import Client
from batchlab.core.api_types import GridView, JobView
from batchlab.core.errors import UsageError
from batchlab.core.model import ENDED
from batchlab.jobs.results import Fetched, fetch, listed
from batchlab.runtime import home as fetches
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.cli.bills import Burn
    from batchlab.client.http import Client
    from batchlab.core.api_types import JobView
    from batchlab.core.job_definition import JobDef
    from batchlab.core.ports import Objects
    from batchlab.jobs.job_file import JobFile
    from batchlab.runtime.factory import Backend


def overrides(texts: Iterable[str]) -> dict[str, str]:
    """KEY=VALUE pairs; UsageError."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(
                f"--set {text} is not KEY=VALUE.", remedy="Write for example --set year=2026."
            )
        found[key] = value
    return found


@dataclass(frozen=True)
class Submission:
    """A job file that has passed its checks, and where it is going."""

    jobfile: JobFile
    packed: tuple[bytes, str]
    """The code as a zip, and its digest."""
    source_digest: str
    home: Home
    backend: Backend
    keys: Sequence[str] | None = None
    """Keys and prefixes of the bucket that are the input, once it is `located`; None where files
    are uploaded."""

    @cached_property
    def objects(self) -> Objects:
        """The bucket it goes to; may need the grid to be up."""
        return self.backend.open_objects(self.home)

    @classmethod
    def of(cls, file: Path, params: Mapping[str, str], home: Home, backend: Backend) -> Submission:
        """Read and check the file; JobFileErrors."""
        from batchlab.jobs import api
        from batchlab.jobs.submission import check_input, code_digest, refuse_recurring

        jobfile = api.load(file, params)
        refuse_recurring(jobfile)
        check_input(jobfile)
        packed = code_digest(jobfile)
        source_digest = api.source_digest(jobfile, packed[1])
        return cls(jobfile, packed, source_digest, home, backend)

    async def located(self) -> Submission:
        """With what it names in the bucket, where all of that is; may need the grid to be up.
        Other objects there are another source. UsageError."""
        from batchlab.jobs.submission import contents, own_keys
        from batchlab.runtime.factory import patience

        if not self.jobfile.urls:
            return self
        keys = own_keys(self.jobfile, self.backend.bucket(self.home))
        found, keys = await contents(self.objects, keys or (), patience())
        digest = hashlib.sha256(f"{self.source_digest}/{found}".encode()).hexdigest()
        return replace(self, source_digest=digest, keys=keys)

    async def latest(self) -> run_history.Run | None:
        """The last run of just this, None where there was none."""
        from batchlab.runtime.factory import patience

        name = self.jobfile.job.name
        return await run_history.latest(self.objects, name, self.source_digest, patience())

    async def prepare(self, number: int, max_cost_usd: float | None = None) -> tuple[JobDef, str]:
        """Upload what run `number` needs; the job to submit, and what was uploaded in words.
        `max_cost_usd` takes the place of the cap that the file says."""
        from batchlab.jobs.submission import Uploaded, prepare
        from batchlab.runtime.factory import patience

        begun_s = time.monotonic()
        last, notes = Uploaded(0, 0, 0), output.Sometimes()

        def note(up: Uploaded) -> None:
            nonlocal last
            last = up
            notes.say(f"Uploaded {up.files:,} of {up.of:,} files, {output.size(up.size_bytes)}.")

        job = await prepare(
            self.jobfile,
            objects=self.objects,
            clock=self.backend.open_clock(),
            patience=patience(),
            token=run_history.token(self.source_digest, number),
            packed=self.packed,
            progress=note,
            keys=self.keys,
        )
        if max_cost_usd is not None:
            job = replace(job, max_cost_usd=max_cost_usd)
        if self.keys is not None:
            return job, "the code; the input lies in the bucket"
        took = output.span(time.monotonic() - begun_s)
        return job, f"{output.count(last.of, 'file')}, {output.size(last.size_bytes)} in {took}"


def submit(
    home: Home, file: Path, sets: Iterable[str], *, max_cost_usd: float | None = None
) -> JobView:
    """Submit a job file to the grid that is up in `home`; while an earlier submission of just
    this has not ended, it is that one. `max_cost_usd` is its cap in either case."""
    from batchlab.cli.session import Session
    from batchlab.jobs.attempts import definition
    from batchlab.runtime.factory import patience

    with Session.attached(home) as session:
        submission = Submission.of(file, overrides(sets), home, session.backend)
        submission = asyncio.run(submission.located())
        earlier = asyncio.run(submission.latest())
        if earlier and earlier.ended is None:
            job = asyncio.run(definition(submission.objects, earlier.job, patience()))
        else:
            job, told = asyncio.run(
                submission.prepare(earlier.number + 1 if earlier else 1, max_cost_usd)
            )
            output.say(f"Uploaded {told}.")
        return session.call(partial(submit_capped, job, max_cost_usd))


def submit_capped(job: JobDef, max_cost_usd: float | None, client: Client) -> JobView:
    """Submit the job, with that cap in place of what it says; one that is known gets it too."""
    if max_cost_usd is None:
        return client.submit(job)
    view = client.submit(job)
    if view["state"] not in ENDED and job.max_cost_usd != max_cost_usd:
        client.cap_job(job.id, max_cost_usd)
    return view


POLL_S = 1.0
"""Longest wait for news of the job, which is how often the workers are looked at too."""
GAP_S = 0.1
"""Least time between two looks: a busy job has news all the time."""


def watch(
    session: Session,
    view: JobView,
    shown: Progress,
    slots: dict[str, int],
    burn: Burn | None = None,
) -> JobView:
    """Show the job until it ends, and with `burn` what it costs, where that applies; `slots` learns
    the most slots seen in service by pool."""
    looked_s, grid = float("-inf"), None
    if burn and not burn.applies(session.backend.name):
        burn = None
    while True:
        asked_s = time.monotonic()
        if asked_s - looked_s >= POLL_S / 2 or view["state"] in ENDED:
            grid, looked_s = session.call(lambda client: client.grid()), asked_s
            _note_slots(grid, slots)
            if burn:
                shown.cost(session.call(partial(burn.line, job=view["id"], grid=grid)))
        shown.show(view, grid)
        if view["state"] in ENDED:
            return view
        view = session.call(partial(_news, view))
        if view["state"] not in ENDED:
            time.sleep(max(0.0, asked_s + GAP_S - time.monotonic()))


def _news(view: JobView, client: Client) -> JobView:
    return client.job(view["id"], version=view["version"], wait_s=POLL_S)


def _note_slots(grid: GridView, slots: dict[str, int]) -> None:
    for pool in grid["pools"]:
        up = sum(one["state"] == "InService" for one in pool["instances"]) * pool["slots"]
        slots[pool["name"]] = max(slots.get(pool["name"], 0), up)


def default_folder(job: str) -> Path:
    """Where the results of a job of that name go unless somebody says."""
    return Path("out") / job


def fetch_results(
    session: Session, view: JobView, out: Path | None, stages: Sequence[str] = ()
) -> Fetched:
    """The results of what has succeeded, in `out` or out/<job name>."""
    from batchlab.runtime.factory import patience

    listing = listed(
        lambda after: session.call(partial(Client.outcomes, job=view["id"], after=after))
    )
    objects = session.backend.open_objects(session.home)
    folder = out or default_folder(view["name"])
    notes = output.Sometimes()

    def note(done: int, of: int) -> None:
        notes.say(f"Fetching results: {done:,} of {of:,} outcomes are read.")

    found = asyncio.run(
        fetch(objects, view, listing, folder, patience=patience(), stages=stages, progress=note)
    )
    fetches.note(session.home, view["id"], found.read_bytes)
    return found
