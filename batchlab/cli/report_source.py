"""Performance data of the runs that a user names. A run is a folder, a job of the grid, or the jobs of a replay.

Invariant: the read of a folder does not need a grid, an AWS account, or a network. If the performance data of a job in
the bucket is missing or outdated, the data is computed again.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.option_values import connect, resolve
from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.model import JobId
from batchlab.core.protocol import object_keys
from batchlab.runtime import factory
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.core.ports import Objects
    from batchlab.reports.tables.write import Index, Writer

LOCAL = "local"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Source:
    """The grid from whose bucket performance data is read.

    If `backend` is "", the grid has the backend of the running manager, or else the backend local.
    """

    home: Home
    backend: str = ""
    endpoint: str | None = None

    @property
    def name(self) -> str:
        """Name of the backend whose bucket contains the objects of the jobs."""
        if self.backend:
            return self.backend
        record = self.home.record()
        return record.backend if record else LOCAL

    def load(self) -> Backend:
        self.home.require_folder()
        return factory.load(self.name, self.endpoint)


@contextmanager
def folders(source: Source, runs: Sequence[str]) -> Iterator[list[Path]]:
    """Yield the folders with the performance data of the runs. Without runs, yield the folder of the last job.

    Raise UsageError for a run that is neither a folder nor a job.
    """
    with ExitStack() as stack:
        yield [_folder(source, run, stack) for run in expand_runs(runs or ["last"])]


def expand_runs(runs: Sequence[str]) -> Iterator[str]:
    """Yield the names of runs. A name of a replay's record is replaced by the ids of the replay's jobs.

    Raise UsageError for the record of a forecast, because the jobs of a forecast have not run.
    """
    from batchlab.scenarios import record

    for run in runs:
        path = Path(run)
        if path.suffix != ".json" or not path.is_file():
            yield run
            continue
        replay = record.read(path)
        if replay.simulated:
            raise UsageError(
                f"{run} is the record of a forecast, whose jobs have not run.",
                remedy="Name a replay's record, a folder, or a job. `batchlab scenario compare` compares forecasts.",
            )
        yield from (job.id for job in replay.jobs)


def _folder(source: Source, run: str, stack: ExitStack) -> Path:
    path = Path(run)
    if path.is_dir():
        return path
    if "/" in run:
        remedy = "Name a folder that `batchlab report pull` created, or a job."
        raise UsageError(f"The folder {run} does not exist.", remedy=remedy)
    return asyncio.run(_folder_of_job(source, job_of(source, run), stack))


async def _folder_of_job(source: Source, job: JobId, stack: ExitStack) -> Path:
    from batchlab.reports.tables.write import fetch, index_of

    backend = source.load()
    objects, patience = backend.open_bucket(source.home), factory.patience()
    index = await index_of(objects, patience, job)
    if index is None:
        return await _write(source, backend, objects, job, stack)
    files = backend.open_local_files(source.home)
    if files and (file := files.path(object_keys.reports(job) + "jobs.parquet")):
        return file.parent
    cached = source.home.reports / backend.name / job
    try:
        is_current = (cached / ".index.json").read_bytes() == index.to_bytes()
    except OSError:
        is_current = False
    if not is_current:
        with _replace_folder(cached) as fresh:
            await fetch(objects, patience, job, index, fresh)
            (fresh / ".index.json").write_bytes(index.to_bytes())
    return cached


async def _write(source: Source, backend: Backend, objects: Objects, job: JobId, stack: ExitStack) -> Path:
    """Compute the performance data of a job in a temporary folder, and return the folder.

    If the data is final, also upload the data to the bucket.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="batchlab-report-")))
    writer = writer_of(source, backend, objects)
    index = await writer.make(job, folder)
    if index.is_final:
        # A failed upload is ignored, because the upload only saves work for later commands, and the user may not have
        # the permission to write.
        with suppress(BatchlabError):
            await writer.publish(job, folder, index)
    return folder


def writer_of(source: Source, backend: Backend, objects: Objects) -> Writer:
    """Return the report writer for a grid's bucket.

    If the price book cannot be read, the writer omits the cost and a note is printed.
    """
    from batchlab.server.report_writer import open_writer

    return open_writer(
        backend,
        source.home,
        objects,
        backend.pools_in(source.home),
        lambda error: output.say(f"The data has no cost: {error}"),
    )


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder, which replaces `folder` at the end of the `with` block."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        yield fresh
        shutil.rmtree(folder, ignore_errors=True)
        fresh.chmod(0o755)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def copy_data(source: Source, job: JobId, out: Path) -> Index:
    """Copy the performance data of a job into the folder `out`. Earlier performance data in `out` is replaced.

    Raise UsageError if `out` contains anything other than the data of a job.
    """
    from batchlab.reports.tables.schema import JOBS

    is_run = (out / JOBS.file).is_file()
    if out.exists() and not is_run and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists, and does not contain the performance data of a job.",
            remedy="Name another folder with --out.",
        )
    try:
        with _replace_folder(out.absolute()) as fresh:
            return asyncio.run(_copy(source, job, fresh))
    except OSError as error:
        raise UsageError(
            f"{out} cannot be written: {error.strerror}.", remedy="Name another folder with --out."
        ) from error


async def _copy(source: Source, job: JobId, folder: Path) -> Index:
    from batchlab.reports.tables.write import fetch, index_of

    backend = source.load()
    objects, patience = backend.open_bucket(source.home), factory.patience()
    index = await index_of(objects, patience, job)
    if index is None:
        return await writer_of(source, backend, objects).make(job, folder)
    await fetch(objects, patience, job, index, folder)
    return index


async def write_data(source: Source, job: JobId) -> Index:
    """Compute the performance data of a job again, and upload the data to the bucket."""
    backend = source.load()
    objects = backend.open_bucket(source.home)
    writer = writer_of(source, backend, objects)
    with tempfile.TemporaryDirectory(prefix="batchlab-report-") as folder:
        index = await writer.make(job, Path(folder))
        await writer.publish(job, Path(folder), index)
    return index


# --- Jobs ----------------------------------------------------------------------------------------


def job_of(source: Source, text: str) -> JobId:
    """Return the id of the job whose id is `text`, or of the only job whose id begins with `text`.

    For the text "last", return the id of the newest job. Raise UsageError if no job matches. If the grid is down and
    its bucket is not local, `text` must be a complete id.
    """
    record = source.home.record()
    if record and record.backend == source.name:
        with connect(source.home) as client:
            return JobId(resolve(client, text)["id"])
    if source.load().capabilities.local_bucket:
        from batchlab.cli.bills import facts_of

        return JobId(facts_of(source.home, text).job["id"])
    if text == "last":
        raise UsageError(
            f"No grid on {source.name} is up in {source.home.path}, so the last job is unknown.",
            remedy="Write the job's whole id, or bring the grid up.",
        )
    if not _ID.fullmatch(text):
        raise UsageError(f"{text!r} is not the id of a job.", remedy="An id looks like month-end-0123456789.")
    return JobId(text)
