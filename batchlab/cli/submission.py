"""Functions that submit a job file, find earlier runs of a job file, wait for the end of a job, and fetch its results.

Invariant: only a job file that has passed all checks is uploaded. The client token of a run is the source digest,
followed by #2, #3, and so on for later runs. A repeated command computes the client token again, and so finds its
earlier run without a manager.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.option_values import client_of, parameters_of, resolve
from batchlab.cli.progress import JobDisplay
from batchlab.cli.session import Session
from batchlab.client.http import Client
from batchlab.core.api_types import GridView, JobView
from batchlab.core.errors import BackendError, NotFound, UsageError
from batchlab.core.job_definition import Dependency, JobDef
from batchlab.core.model import ENDED, JobId, JobState, StageName
from batchlab.core.protocol import json_format, object_keys
from batchlab.jobs.attempts import definition
from batchlab.jobs.results import Fetched, fetch, list_results, make_room
from batchlab.runtime import home as fetches
from batchlab.runtime.factory import Backend, patience
from batchlab.runtime.home import Home, RemoteHome

if TYPE_CHECKING:
    from batchlab.cli.bills import LiveCost
    from batchlab.core.port_retries import Patience
    from batchlab.core.ports import Objects
    from batchlab.jobs.job_file import JobFile


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """Run of a job file that was submitted before.

    `ended` is the final state of the job, or None before the end of the job.
    """

    number: int
    job: JobId
    ended: JobState | None


def token(source_digest: str, number: int) -> str:
    """Return the client token of the run `number` of a job file. The first run has the number 1."""
    return source_digest if number == 1 else f"{source_digest}#{number}"


async def find_latest_run(objects: Objects, name: str, source_digest: str, patience: Patience) -> EarlierRun | None:
    """Return the latest run of a job file with the source digest, or None if no run exists."""
    number = 0
    job: JobId | None = None
    while True:
        candidate = object_keys.job_id(name, token(source_digest, number + 1))
        if await patience(partial(objects.head, object_keys.spec(candidate))) is None:
            break
        number, job = number + 1, candidate
    if job is None:
        return None
    return EarlierRun(number, job, await _end_state(objects, job, patience))


async def _end_state(objects: Objects, job: JobId, patience: Patience) -> JobState | None:
    """Return the final state of a job, or None before the end of the job. A deleted job counts as canceled."""
    round_ = 0
    while await patience(partial(objects.head, object_keys.retry(job, round_ + 1))):
        round_ += 1
    try:
        data = await patience(lambda: objects.get(object_keys.final(job, round_)))
    except NotFound:
        # The job runs, or a user has deleted the job or is deleting the job.
        last = object_keys.retry(job, round_) if round_ else object_keys.spec(job)
        doc = json_format.loads(await patience(partial(objects.get, last)))
        return JobState.CANCELLED if json_format.is_deleted(doc) else None
    return JobState(json_format.loads(data)["state"])


@dataclass(frozen=True)
class Submission:
    """Job file that has passed all checks, with the grid and the backend that will run the job."""

    jobfile: JobFile
    packed: tuple[bytes, str]
    """Code of the job as a zip file, and the digest of the code."""
    source_digest: str
    home: Home
    backend: Backend
    keys: Sequence[str] | None = None
    """Keys and prefixes of the input if the input is already in the bucket, or None if the input files are uploaded."""
    dependencies: tuple[Dependency, ...] = ()

    @cached_property
    def objects(self) -> Objects:
        """Objects port of the grid's bucket. With some backends, the bucket exists only while the grid is up."""
        return self.backend.open_objects(self.home)

    @classmethod
    def of(cls, file: Path, params: Mapping[str, str], home: Home, backend: Backend) -> Submission:
        """Read and check a job file. Raise JobFileErrors for an invalid job file."""
        from batchlab.jobs import job_file
        from batchlab.jobs.submission import check_input, code_digest, refuse_recurring

        jobfile = job_file.load(file, params)
        refuse_recurring(jobfile)
        check_input(jobfile)
        packed = code_digest(jobfile)
        source_digest = job_file.source_digest(jobfile, packed[1])
        return cls(jobfile, packed, source_digest, home, backend)

    async def locate(self) -> Submission:
        """Return the submission with the keys of its input objects in the bucket.

        Raise UsageError if the input is invalid. The source digest covers the names, sizes, and ETags of the input
        objects. If the backend's bucket exists only while the grid is up, the grid must be running.
        """
        from batchlab.jobs.submission import contents, own_keys

        if not self.jobfile.urls:
            return self
        keys = own_keys(self.jobfile, self.backend.bucket(self.home))
        input_digest, keys = await contents(self.objects, keys or (), patience())
        digest = hashlib.sha256(f"{self.source_digest}/{input_digest}".encode()).hexdigest()
        return replace(self, source_digest=digest, keys=keys)

    def after(self, dependencies: Sequence[Dependency]) -> Submission:
        """Return the submission with dependencies. Runs with other dependencies are runs of another series."""
        if not dependencies:
            return self
        digest = _with_dependencies(self.source_digest, dependencies)
        return replace(self, source_digest=digest, dependencies=tuple(dependencies))

    async def find_latest_run(self) -> EarlierRun | None:
        """Return the latest run with the submission's source digest, or None if no run exists."""

        name = self.jobfile.job.name
        return await find_latest_run(self.objects, name, self.source_digest, patience())

    async def prepare(self, number: int, max_cost_usd: float | None = None, share: str = "") -> tuple[JobDef, str]:
        """Upload the files of the run `number`. Return the definition of the job to submit, and a text about the
        upload.

        `max_cost_usd` replaces the cost cap of the job file, and `share` replaces its share.
        """
        from batchlab.jobs.submission import Uploaded, prepare

        begun_s = time.monotonic()
        last, notes = Uploaded(0, 0, 0), output.ThrottledNotes()

        def note(up: Uploaded) -> None:
            nonlocal last
            last = up
            notes.say_uploaded(up)

        job = await prepare(
            self.jobfile,
            objects=self.objects,
            clock=self.backend.open_clock(),
            patience=patience(),
            token=token(self.source_digest, number),
            packed=self.packed,
            progress=note,
            keys=self.keys,
        )
        job = replace(job, after=self.dependencies)
        if max_cost_usd is not None:
            job = replace(job, max_cost_usd=max_cost_usd)
        if share:
            job = replace(job, share=share)
        if self.keys is not None:
            return job, "the code; the input is in the bucket"
        took = output.span(time.monotonic() - begun_s)
        return job, f"{output.count(last.of, 'file')}, {output.size(last.size_bytes)} in {took}"


def submit(
    home: Home,
    file: Path,
    sets: Iterable[str],
    *,
    max_cost_usd: float | None = None,
    after: Sequence[str] = (),
    share: str = "",
) -> JobView:
    """Submit a job file to the running grid, and return the job.

    If an earlier submission of the same job file with the same dependencies is still active, the function returns the
    earlier job. `max_cost_usd` caps the cost of a new job or of the earlier job. `after` has the dependencies, as texts
    such as `last` or `ID:ended`. `share` replaces the share of the job file for a new job.
    """
    if isinstance(home, RemoteHome):
        return _submit_remotely(home, file, list(sets), max_cost_usd, after, share)
    with Session.attach(home) as session:
        submission = Submission.of(file, parameters_of(sets), home, session.backend)
        dependencies = session.call(partial(_dependencies, after))
        submission = asyncio.run(submission.locate()).after(dependencies)
        earlier = asyncio.run(submission.find_latest_run())
        if earlier and earlier.ended is None:
            job = asyncio.run(definition(submission.objects, earlier.job, patience()))
        else:
            job, note = asyncio.run(submission.prepare(earlier.number + 1 if earlier else 1, max_cost_usd, share))
            output.say(f"Uploaded {note}.")
        return session.call(partial(submit_capped, job, max_cost_usd))


def _submit_remotely(
    home: RemoteHome, file: Path, sets: Sequence[str], max_cost_usd: float | None, after: Sequence[str], share: str
) -> JobView:
    """Submit a job file with its code and input through the manager's API.

    The manager stores the files in the bucket, so all of them must be in the job file's folder.
    """
    from batchlab.jobs import job_file
    from batchlab.jobs.submission import check_input, code_digest, refuse_recurring

    if max_cost_usd is not None:
        raise UsageError(
            "--max-cost needs the grid's folder.",
            remedy="Write max_cost in the job file, or ask for `batchlab job cap`.",
        )
    jobfile = job_file.load(file, parameters_of(sets))
    refuse_recurring(jobfile)
    check_input(jobfile)
    if jobfile.urls:
        raise UsageError(
            f"{file} names input in a bucket, which needs the grid's folder.", remedy="Use files as input of the job."
        )
    packed, digest_of_code = code_digest(jobfile)
    files = _files_of(jobfile, packed)
    with client_of(home) as client:
        dependencies = _dependencies(after, client)
        digest = _with_dependencies(job_file.source_digest(jobfile, digest_of_code), dependencies)
        number, earlier = 1, None
        while view := _find(client, object_keys.job_id(jobfile.job.name, token(digest, number))):
            number, earlier = number + 1, view
        if earlier and earlier["state"] not in ENDED:
            return earlier
        size_bytes = sum(map(len, files.values()))
        output.say(f"Uploading {output.count(len(files), 'file')}, {output.size(size_bytes)}.")
        others = list(map(str, dependencies))
        return client.submit_files(files, jobfile.path.name, sets, token(digest, number), after=others, share=share)


def _find(client: Client, job: JobId) -> JobView | None:
    try:
        return client.job(job)
    except NotFound:
        return None


def _files_of(jobfile: JobFile, packed: bytes) -> dict[str, bytes]:
    """Return the contents of the job file, its code, and its input by their paths in the job file's folder."""
    files = {jobfile.path.name: jobfile.path.read_bytes()}
    code = PurePosixPath(jobfile.name_of(jobfile.code))
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        files |= {str(code / name): archive.read(name) for name in archive.namelist()}
    for path in jobfile.files:
        assert isinstance(path, Path)
        files[jobfile.name_of(path)] = path.read_bytes()
    for name in files:
        if name.startswith("../"):
            raise UsageError(
                f"{name} is not in the folder of the job file {jobfile.path.name}.",
                remedy="Move the file into this folder. Only the grid's folder allows other files.",
            )
    return files


def _fetch_remotely(client: Client, view: JobView, folder: Path, stages: Sequence[str]) -> Fetched:
    """Fetch the results of succeeded tasks into the folder through the manager's API."""
    data = client.results_archive(view["id"], stages)
    results: dict[str, int] = {}
    files = size_bytes = 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        paths = {name: PurePosixPath(name.removeprefix(f"{view['id']}/")) for name in archive.namelist()}
        if wrong := [name for name, path in paths.items() if path.is_absolute() or ".." in path.parts]:
            raise BackendError(f"The archive contains the path {wrong[0]!r}.", remedy="Report this as a bug.")
        try:
            make_room(folder, [StageName(path.stem) for path in paths.values() if path.suffix == ".jsonl"])
            for name, path in paths.items():
                content, target = archive.read(name), folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                if path.parts[0] == "files":
                    files, size_bytes = files + 1, size_bytes + len(content)
                elif path.suffix == ".jsonl":
                    results[path.stem] = content.count(b"\n")
        except OSError as error:
            raise UsageError(
                f"The results cannot be written to {folder}: {error.strerror or error}.",
                remedy="Free some space, or name another folder with --out.",
            ) from error
    return Fetched(folder, results, files, size_bytes, len(data))


def _with_dependencies(source_digest: str, dependencies: Sequence[Dependency]) -> str:
    if not dependencies:
        return source_digest
    facts = "/".join([source_digest, *sorted(map(str, dependencies))])
    return hashlib.sha256(facts.encode()).hexdigest()


def _dependencies(texts: Sequence[str], client: Client) -> tuple[Dependency, ...]:
    parsed = map(Dependency.parse, texts)
    return tuple(replace(one, job=JobId(resolve(client, one.job)["id"])) for one in parsed)


def submit_capped(job: JobDef, max_cost_usd: float | None, client: Client) -> JobView:
    """Submit the job, and cap the job's cost. If the job was submitted before, change the cap of the existing job."""
    if max_cost_usd is None:
        return client.submit(job)
    view = client.submit(job)
    if view["state"] not in ENDED and job.max_cost_usd != max_cost_usd:
        client.cap_job(job.id, max_cost_usd)
    return view


MAX_WAIT_S = 1.0
"""Maximum time in seconds for which a request waits for a change of the job."""
MIN_REQUEST_INTERVAL_S = 0.1
"""Minimum time in seconds between two requests, for jobs of at least one second.

Without a minimum, the changes of a busy job would cause too many requests. The minimum is shorter in a job's first
second, so that the command notices the end of a short job at once.
"""


def watch(
    session: Session, view: JobView, display: JobDisplay, slots: dict[str, int], live_cost: LiveCost | None = None
) -> JobView:
    """Show the progress of a job until the job ends, and return the last view of the job.

    The display includes the cost of a job with a billed backend. The function stores the maximum number of slots in
    service of each pool in `slots`.
    """
    looked_s, grid, begun_s = float("-inf"), None, time.monotonic()
    if live_cost and not live_cost.applies(session.backend.name):
        live_cost = None
    while True:
        asked_s = time.monotonic()
        if asked_s - looked_s >= MAX_WAIT_S / 2 or view["state"] in ENDED:
            grid, looked_s = session.call(lambda client: client.grid()), asked_s
            _note_slots(grid, slots)
            if live_cost:
                display.cost(session.call(partial(live_cost.line, job=view, grid=grid)))
        display.show(view, grid)
        if view["state"] in ENDED:
            return view
        view = session.call(partial(_news, view))
        if view["state"] not in ENDED:
            now_s = time.monotonic()
            interval_s = min(MIN_REQUEST_INTERVAL_S, (now_s - begun_s) * MIN_REQUEST_INTERVAL_S)
            time.sleep(max(0.0, asked_s + interval_s - now_s))


def _news(view: JobView, client: Client) -> JobView:
    return client.job(view["id"], version=view["version"], wait_s=MAX_WAIT_S)


def _note_slots(grid: GridView, slots: dict[str, int]) -> None:
    for pool in grid["pools"]:
        up = sum(one["state"] == "InService" for one in pool["instances"]) * pool["slots"]
        slots[pool["name"]] = max(slots.get(pool["name"], 0), up)


def fetch_json(fetched: Fetched) -> dict[str, object]:
    """Return the summary of fetched results as a JSON object."""
    sizes = {"files": fetched.files, "size_bytes": fetched.size_bytes}
    return {"folder": str(fetched.folder), "results": dict(fetched.results), **sizes}


def default_folder(job: str) -> Path:
    """Return the default folder for the results of a job."""
    return Path("out") / job


def fetch_results(session: Session, view: JobView, out: Path | None, stages: Sequence[str] = ()) -> Fetched:
    """Fetch the results of succeeded tasks into the folder `out`.

    If `out` is None, fetch the results into out/<job name>.
    """
    if isinstance(session.home, RemoteHome):
        return session.call(lambda client: _fetch_remotely(client, view, out or default_folder(view["name"]), stages))
    listing = list_results(lambda after: session.call(partial(Client.outcomes, job=view["id"], after=after)))
    objects = session.backend.open_objects(session.home)
    folder = out or default_folder(view["name"])
    notes = output.ThrottledNotes()

    def note(done: int, of: int) -> None:
        notes.say(f"Fetching results: {done:,} of {of:,} outcomes are read.")

    fetched = asyncio.run(fetch(objects, view, listing, folder, patience=patience(), stages=stages, progress=note))
    fetches.record_fetch(session.home, view["id"], fetched.read_bytes)
    return fetched
