"""Submission of a job file: upload of the code and the input, and creation of the job.

Invariant: every object that a job names is in the bucket before the manager receives the job.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from batchlab.core.errors import AlreadyExists, UsageError
from batchlab.core.job_definition import JobDef, SplitBy
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, ObjectInfo, Objects
from batchlab.core.protocol import object_keys
from batchlab.jobs import handler_lookup
from batchlab.jobs.checks import bucket_and_key
from batchlab.jobs.job_file import JobFile, compile_job
from batchlab.manager.input_split import check_items
from batchlab.worker import code_cache

RAW = "raw/"
"""Prefix of the keys of uploaded input in the bucket. Workers on AWS may read input only below the prefix RAW."""
UPLOADS_AT_ONCE = 16
MANY_FILES = 1000
"""Maximum number of input files that a job's definition lists by name.

The definition of a job with more input files names only the folder of the uploaded files. A job's definition must be
short, because the definition is read often.
"""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Progress of an upload: the numbers of uploaded files, of all files, and of uploaded bytes."""

    files: int
    of: int
    size_bytes: int


def code_digest(jobfile: JobFile, most_bytes: int | None = None) -> tuple[bytes, str]:
    """Return a zip of the code folder without the job's input, and the SHA-256 of the zip.

    Raise UsageError if the zip exceeds `most_bytes` or the limit of the workers.
    """
    data = code_cache.pack(jobfile.code, [f for f in jobfile.input_files() if isinstance(f, Path)], most_bytes)
    return data, hashlib.sha256(data).hexdigest()


def refuse_recurring(jobfile: JobFile) -> None:
    """Raise UsageError if the job file contains a schedule."""
    if jobfile.job.cron is not None:
        raise UsageError(
            f"{jobfile.path.name} contains cron, so its job runs repeatedly and cannot run once.",
            remedy=f"Add it with `batchlab schedule add {jobfile.path.name}`. "
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
    bucket: str = "",
    keys: Sequence[str] | None = None,
    recurring: bool = False,
) -> JobDef:
    """Upload the code and the input of `jobfile`, and return the job to submit.

    With `recurring`, the returned job is for a schedule. `packed` is the result of `code_digest(jobfile)` if the caller
    has it. `prepare` may be repeated, because a repeated upload stores the same objects.

    `bucket` is the name of the grid's bucket in job files. If `bucket` is empty, the job file cannot name input in the
    bucket. With `keys`, the input consists of the objects with the given keys or prefixes. The function neither uploads
    nor checks the objects in `keys`.
    """
    if not recurring:
        refuse_recurring(jobfile)
    if keys is None:
        keys = own_keys(jobfile, bucket)
        for key in keys or ():
            await _look(objects, key, patience)
    data, digest = packed or code_digest(jobfile)
    code_key = object_keys.code(digest)
    # The key of the code is a hash of its content, so an existing object has the same content.
    with suppress(AlreadyExists):
        await patience(lambda: objects.put(code_key, data, if_absent=True))
    job_id = object_keys.job_id(jobfile.job.name, token)
    if keys is None:
        keys = await _upload(jobfile, object_keys.raw(job_id), objects, progress)
    return compile_job(
        jobfile, job_id=job_id, token=token, code_key=code_key, input_keys=keys, submitted_s=clock.now_s()
    )


# --- Input in the bucket -------------------------------------------------------------------------


MAX_CHECKED_FILES = 100
CHECKED_BYTES = 65536


def check_input(jobfile: JobFile) -> None:
    """Raise UsageError for an input URL that is not valid on any grid, and for local files that cannot be split as the
    job file says.
    """
    urls = jobfile.urls
    if urls and len(urls) < len(jobfile.files):
        raise UsageError(
            f"The input is partly files, and partly, with {urls[0]}, objects of a bucket.",
            remedy="Name files only, which are uploaded, or objects of the grid's bucket only.",
        )
    for url in urls:
        check_key(url, _parts(url)[1])
    if SplitBy(jobfile.job.input.split) is SplitBy.ITEMS:
        for file in jobfile.files[:MAX_CHECKED_FILES]:
            if isinstance(file, Path):
                try:
                    with file.open("rb") as opened:
                        beginning = opened.read(CHECKED_BYTES)
                except OSError as error:
                    raise _unreadable_input(file, error) from error
                check_items(beginning, file.name, is_whole=len(beginning) < CHECKED_BYTES)


def _unreadable_input(path: Path, error: OSError) -> UsageError:
    if isinstance(error, FileNotFoundError):
        return UsageError(f"The input file {path} no longer exists.", remedy="Put it back, or run again.")
    return UsageError(f"The input file {path} cannot be read.", remedy="Allow your user to read it.")


def check_key(shown: str, key: str) -> None:
    """Raise UsageError for a key or prefix that cannot be a job's input. `shown` is the key as the user wrote it."""
    parts = key.removesuffix("/").split("/")
    if not key.startswith(RAW) or {"", ".", ".."} & set(parts):
        raise UsageError(
            f"The input {shown!r} is not below raw/ in the grid's bucket, where workers may read.",
            remedy="Write a prefix such as raw/incoming/, which ends in a slash.",
        )
    if why := handler_lookup.unfit(key):
        raise UsageError(f"The input {shown!r} {why}.", remedy="Give the objects other names, and name those.")


def own_keys(jobfile: JobFile, bucket: str) -> list[str] | None:
    """Return the keys and key prefixes of the job's input in the grid's bucket `bucket`.

    A prefix ends in a slash. Return None if the job's input consists of local files. Raise UsageError if the grid
    cannot read the input.
    """
    check_input(jobfile)
    urls = jobfile.urls
    if not urls:
        return None
    if not bucket:
        raise UsageError(
            f"The grid cannot read the input {urls[0]} of a job that is submitted this way.",
            remedy="Name local files; `batchlab run`, `batchlab job submit` and schedules take "
            "input of the bucket on a grid that has one: not the simulator, a replay, or the page.",
        )
    others = [url for url in urls if _parts(url)[0] != bucket]
    if others and len(others) < len(urls):
        raise UsageError(
            f"The input is partly in the grid's bucket, and partly, with {others[0]}, in another.",
            remedy=f"Name objects of s3://{bucket}/raw/ only.",
        )
    if others:
        raise UsageError(
            f"The grid cannot read the input {others[0]}: its own bucket is s3://{bucket}/.",
            remedy=f"Copy it to s3://{bucket}/raw/ and name it there, or name local files, which are uploaded.",
        )
    keys = [_parts(url)[1] for url in urls]
    # Remove a key if one of the prefixes covers it, so that each object is used once.
    wider = [key for key in keys if key.endswith("/")]
    return [key for key in keys if not any(key != w and key.startswith(w) for w in wider)]


async def contents(objects: Objects, keys: Sequence[str], patience: Patience) -> tuple[str, list[str]]:
    """Return a hash of the input objects, and the keys of the input objects.

    The hash is a SHA-256 of the names, sizes, and ETags of the input objects. If the input has more than MANY_FILES
    objects, `keys` is returned unchanged. Raise UsageError if a key or prefix does not match any object.
    """
    digest = hashlib.sha256()
    keys_found: list[str] = []

    def note(info: ObjectInfo) -> None:
        digest.update(f"{info.key}\0{info.size}\0{info.etag}\n".encode())
        if len(keys_found) <= MANY_FILES:
            keys_found.append(info.key)

    for key in keys:
        await _look(objects, key, patience, note)
    return digest.hexdigest(), keys_found if len(keys_found) <= MANY_FILES else list(keys)


async def _look(
    objects: Objects, key: str, patience: Patience, note: Callable[[ObjectInfo], None] | None = None
) -> None:
    """Call `note` for each object that matches the key or prefix `key`.

    Without `note`, check that one matching object exists.
    """
    is_empty = True
    async for page in _pages(objects, key, patience):
        is_empty = False
        if note is None:
            return
        for info in page:
            note(info)
    if is_empty:
        below = "below" if key.endswith("/") else "named"
        raise UsageError(
            f"The grid's bucket does not contain an object {below} {key}.",
            remedy="Put the input there, or name another key, or a prefix that ends in a slash; "
            "`*` has no meaning in a bucket.",
        )


async def _pages(objects: Objects, key: str, patience: Patience) -> AsyncIterator[Sequence[ObjectInfo]]:
    """Yield non-empty pages of the objects that match a key or prefix."""
    if not key.endswith("/"):
        if info := await patience(partial(objects.head, key)):
            yield [info]
        return
    async for page in objects.list(key):
        # Skip keys that end in "/", because the S3 console represents a folder as an empty object whose key ends in
        # "/".
        if object_infos := [info for info in page if not info.key.endswith("/")]:
            yield object_infos


def _parts(url: str) -> tuple[str, str]:
    return bucket_and_key(url) or ("", "")


# --- Uploaded input ------------------------------------------------------------------------------


async def _upload(
    jobfile: JobFile, prefix: str, objects: Objects, progress: Callable[[Uploaded], None] | None
) -> list[str]:
    files = [file for file in jobfile.files if isinstance(file, Path)]
    many = len(files) > MANY_FILES
    digits = 9 if many else 7
    names = [f"{number:0{digits}d}/{path.name}" for number, path in enumerate(files)]
    if many:
        # Upload each list of files to a separate folder, so that a folder contains only the files of one list.
        prefix += f"{hashlib.sha256(chr(0).join(names).encode()).hexdigest()[:16]}/"
    await _upload_all(list(zip(files, names, strict=True)), prefix, objects, progress)
    return [prefix] if many else [prefix + name for name in names]


async def _upload_all(
    files: Sequence[tuple[Path, str]], prefix: str, objects: Objects, progress: Callable[[Uploaded], None] | None
) -> None:
    waiting = iter(files)
    done = size_bytes = 0

    async def next_ones() -> None:
        nonlocal done, size_bytes
        for path, name in waiting:
            try:
                # Await the upload before `+=`, because `+=` with an `await` on its right side would add to the sum from
                # before the wait.
                uploaded_bytes = await objects.upload(prefix + name, path)
            except (FileNotFoundError, PermissionError) as error:
                raise _unreadable_input(path, error) from error
            done += 1
            size_bytes += uploaded_bytes
            if progress:
                progress(Uploaded(done, len(files), size_bytes))
            # Let other asyncio tasks run, because a million uploads may follow each other without a pause.
            await asyncio.sleep(0)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(UPLOADS_AT_ONCE, len(files))):
                group.create_task(next_ones())
    except ExceptionGroup as several:
        # Report only the first error, because the other errors have the same reason or are cancellations.
        raise several.exceptions[0] from several
