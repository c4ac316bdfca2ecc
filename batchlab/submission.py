"""From a job file to a job the grid can run: code and raw data go to the bucket first.

Invariant: payload before pointer. When the manager hears of a job, all that it names is there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchlab.errors import AlreadyExists, UsageError
from batchlab.jobdef import JobDef
from batchlab.patience import Patience
from batchlab.ports import Clock, Objects
from batchlab.protocol import naming
from batchlab.spec.jobfile import JobFile, compile_job
from batchlab.worker import code

UPLOADS_AT_ONCE = 16
MANY_FILES = 1000
"""A job with more input files names the folder that they are uploaded to: the files' keys would
make its definition, which is read again and again, as long as their list."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Progress of an upload: files done, of how many, and bytes so far."""

    files: int
    of: int
    size_bytes: int


def code_digest(jobfile: JobFile, most_bytes: int | None = None) -> tuple[bytes, str]:
    """The code folder as a zip, without the input that may lie in it, and its sha256; UsageError
    where it is more than that, or than what workers take."""
    data = code.pack(
        jobfile.code, [f for f in jobfile.input_files() if isinstance(f, Path)], most_bytes
    )
    return data, hashlib.sha256(data).hexdigest()


def refuse_recurring(jobfile: JobFile) -> None:
    """UsageError where the job file asks for a schedule."""
    if jobfile.job.cron is not None:
        raise UsageError(
            f"{jobfile.path.name} says cron: it is to run again and again, and not once.",
            remedy=f"`batchlab schedule add {jobfile.path.name}` sees to that; "
            f"`batchlab schedule run {jobfile.job.name}` then runs it now.",
        )


async def prepare(
    jobfile: JobFile,
    *,
    objects: Objects,
    clock: Clock,
    patience: Patience,
    token: str,
    packed: tuple[bytes, str] | None = None,
    progress: Callable[[Uploaded], None] | None = None,
    keys: Sequence[str] | None = None,
    recurring: bool = False,
) -> JobDef:
    """Upload the code and the raw data of `jobfile`; the job to submit, or where it is `recurring`
    the one that a schedule runs.

    `packed` is `code_digest(jobfile)` where it is at hand. Uploading the same again is harmless.
    With `keys` no input is uploaded: it is these objects, or those below these prefixes.
    """
    if not recurring:
        refuse_recurring(jobfile)
    data, digest = packed or code_digest(jobfile)
    code_key = f"code/{digest}.zip"
    try:
        await patience(lambda: objects.put(code_key, data, if_absent=True))
    except AlreadyExists:
        # Named by its content, so what is there is the same.
        code_key = f"code/{digest}.zip"
    job_id = naming.job_id(jobfile.job.name, token)
    if keys is None:
        keys = await _upload(jobfile, naming.raw(job_id), objects, progress)
    return compile_job(
        jobfile,
        job_id=job_id,
        token=token,
        code_key=code_key,
        input_keys=keys,
        submitted_s=clock.now_s(),
    )


async def _upload(
    jobfile: JobFile,
    prefix: str,
    objects: Objects,
    progress: Callable[[Uploaded], None] | None,
) -> list[str]:
    paths: list[Path] = []
    for file in jobfile.input_files():
        if isinstance(file, str):
            raise UsageError(
                f"The input {file} lies in S3, from where `run` and `submit` take none.",
                remedy="Name local files, which are uploaded; a schedule can read `--input raw/…/` "
                "of the grid's own bucket.",
            )
        paths.append(file)
    many = len(paths) > MANY_FILES
    digits = 9 if many else 7
    names = [f"{number:0{digits}d}/{path.name}" for number, path in enumerate(paths)]
    if many:
        # Another list of files has another folder, so that nothing else is ever found there.
        prefix += f"{hashlib.sha256(chr(0).join(names).encode()).hexdigest()[:16]}/"
    await _upload_all(list(zip(paths, names, strict=True)), prefix, objects, progress)
    return [prefix] if many else [prefix + name for name in names]


async def _upload_all(
    files: Sequence[tuple[Path, str]],
    prefix: str,
    objects: Objects,
    progress: Callable[[Uploaded], None] | None,
) -> None:
    waiting = iter(files)
    done = size_bytes = 0

    async def next_ones() -> None:
        nonlocal done, size_bytes
        for path, name in waiting:
            try:
                # Not `+= await`, which would add to what the sum was before the wait.
                uploaded_bytes = await objects.upload(prefix + name, path)
            except FileNotFoundError as error:
                raise UsageError(
                    f"The input file {path} has vanished.", remedy="Put it back, or run again."
                ) from error
            except PermissionError as error:
                raise UsageError(
                    f"The input file {path} may not be read.", remedy="Make it readable for you."
                ) from error
            done += 1
            size_bytes += uploaded_bytes
            if progress:
                progress(Uploaded(done, len(files), size_bytes))
            # An upload may not wait for anything, and there may be a million.
            await asyncio.sleep(0)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(UPLOADS_AT_ONCE, len(files))):
                group.create_task(next_ones())
    except ExceptionGroup as several:
        # One sentence for a person; the others end for the same reason, or by being cancelled.
        raise several.exceptions[0] from several
