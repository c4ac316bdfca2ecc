"""Copy of a task's input and code from the bucket into a folder, made with the worker's code.

Invariant: `ReadOnlyObjects` reads the bucket and cannot write to it. The folder contains copies, so
debugging cannot change the grid.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from batchlab.client.debug import task_folder
from batchlab.client.debug.task_folder import CODE, EXECUTION, README, RUN, TASK, TaskRun, write
from batchlab.core.errors import BackendError, NotFound, Refused, UsageError
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Json, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import ObjectInfo, Objects
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.bundle_inputs import JobObjects, NoSuchTask
from batchlab.jobs import attempts
from batchlab.jobs.attempts import Attempt
from batchlab.worker import environment, materialization
from batchlab.worker.code_cache import CodeCache
from batchlab.worker.environment import Environment
from batchlab.worker.handlers import Problem
from batchlab.worker.inflight_message import Scratch, Work

_FORBIDDEN = ("403", "AccessDenied", "Access Denied", "PermissionDenied", "Forbidden")


class ReadOnlyObjects:
    """Objects port that only reads."""

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        return await self._patience(lambda: self._objects.get(key, limit=limit))

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        return await self._patience(lambda: self._objects.get_range(key, start, stop))

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        return await self._patience(lambda: self._objects.get_if_changed(key, etag))

    async def head(self, key: str) -> ObjectInfo | None:
        return await self._patience(lambda: self._objects.head(key))

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        async for page in self._objects.list(prefix, after=after):
            yield page

    async def download(self, key: str, path: Path) -> int:
        return await self._patience(lambda: self._objects.download(key, path))

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        del data, if_absent, if_match
        raise _only_reads(key)

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        del path, if_absent
        raise _only_reads(key)

    async def delete(self, keys: Sequence[str]) -> None:
        raise _only_reads(", ".join(keys))


def _only_reads(key: str) -> Refused:
    return Refused(f"{key} is not written: a task that runs again on this machine commits nothing.")


class _Layout(Scratch):
    """Scratch folder of a worker, with the paths of a task folder."""

    def code(self, digest: str) -> Path:
        del digest
        return self.root / CODE

    def execution(self, name: str) -> Path:
        del name
        return self.root / EXECUTION


async def prepare_task(
    objects: Objects,
    job: JobId,
    stage: StageName,
    task: int,
    folder: Path,
    *,
    patience: Patience,
    number: int | None = None,
    round_: int | None = None,
) -> TaskRun:
    """Prepare `folder` for a task.

    The attempt is the named one, else the last failed one, else the last one. A task without an
    ended attempt is prepared if its input exists. Raise UsageError if the task or the attempt does
    not exist, or if one of its objects was deleted. Raise BackendError if the bucket cannot be
    read.
    """
    reading = ReadOnlyObjects(objects, patience)
    try:
        return await _bring(reading, job, stage, task, folder, patience, number, round_)
    except (NotFound, UsageError):
        raise
    except BackendError as error:
        if any(word in str(error) for word in _FORBIDDEN):
            raise UsageError(
                f"The bucket does not let you read what the task needs: {error.message}",
                remedy="It takes s3:GetObject below jobs/, raw/, files/, code/ and logs/ and of "
                "grid/commit-secret.json, and s3:ListBucket.",
            ) from error
        raise


async def _bring(
    reading: Objects,
    job_id: JobId,
    stage: StageName,
    task: int,
    folder: Path,
    patience: Patience,
    number: int | None,
    round_: int | None,
) -> TaskRun:
    job = await _definition(reading, job_id, patience)
    if stage not in (stage_def.name for stage_def in job.stages):
        names = ", ".join(stage_def.name for stage_def in job.stages)
        raise UsageError(f"Job {job_id} has no stage {stage!r}.", remedy=f"It has {names}.")
    found = await attempts.attempts(reading, job, stage, task, patience)
    attempt = attempts.chosen(found, number, round_)
    if attempt is None and (number, round_) != (None, None):
        raise _no_such_attempt(stage, task, found)
    try:
        bundle = attempt.bundle if attempt else await attempts.task_bundle(reading, job, stage, task, patience)
        item = await attempts.task_input(reading, job, bundle, patience)
    except NoSuchTask as error:
        raise UsageError(error.message, remedy=error.remedy) from error
    except NotFound as error:
        raise _gone("input", stage, task, error.message) from error
    there = None
    if attempt:
        there = await environment.load(reading, attempt.outcome.worker, patience)
    told = await _fetched(reading, job, bundle, item, folder, attempt, there)
    write(told)
    (folder / object_keys.MADE).touch()
    (folder / README).write_text(task_folder.text(told, attempts.describe(item)))
    (folder / RUN).write_text(task_folder.script(told))
    return told


async def _definition(reading: Objects, job: JobId, patience: Patience) -> JobDef:
    try:
        return await attempts.definition(reading, job, patience)
    except NotFound as error:
        raise UsageError(
            f"The bucket has no job {job}: it never had, or its objects have been removed.",
            remedy="Name the job by its whole id, as `batchlab job list` shows it.",
        ) from error


def _no_such_attempt(stage: str, task: int, found: Sequence[Attempt]) -> UsageError:
    there = [f"{a.outcome.bundle.attempt} (round {a.outcome.bundle.round})" for a in found]
    return UsageError(
        f"{task_name(stage, task)} has no such attempt.",
        remedy=f"It has {', '.join(there)}." if there else "None of it has ended yet.",
    )


async def _fetched(
    reading: Objects,
    job: JobDef,
    bundle: Bundle,
    item: Json,
    folder: Path,
    attempt: Attempt | None,
    there: Environment | None,
) -> TaskRun:
    step, task = job.stage(bundle.stage), bundle.tasks.first
    layout = _Layout(folder)
    code_cache = CodeCache(reading, layout, asyncio.to_thread)
    work = Work(job, step, bundle, "again", [item])
    try:
        _, code = await code_cache.code(job.code)
        key = materialization.function_key(work)
        function = await code_cache.function(key) if key else None
    except Problem as problem:
        raise _gone("code", bundle.stage, task, problem.fault["reason"]) from problem
    execution = layout.execution("")
    request = materialization.request(work, execution, function=function, code=code)
    inputs = materialization.Inputs(reading, execution, asyncio.to_thread, JobObjects.of_job(job))
    [(_, ready)] = await inputs.fetch([(task, item)])
    failure = attempt.failure if attempt else None
    if isinstance(ready, Failure):
        raise _gone("input", bundle.stage, task, ready.reason)
    return TaskRun(
        folder,
        job.id,
        bundle.stage,
        task,
        bundle.attempt,
        bundle.round,
        request,
        ready,
        step.timeout_s,
        step.memory_bytes,
        attempt.state if attempt else "",
        _fields(failure) if failure else None,
        attempt.value if attempt else None,
        environment.to_json(there) if there else None,
        _notes(attempt, there, is_pickled=function is not None),
    )


def _fields(failure: Failure) -> dict[str, Json]:
    names = ("kind", "reason", "error", "traceback", "exit_code")
    return {name: getattr(failure, name) for name in names}


def _notes(attempt: Attempt | None, there: Environment | None, *, is_pickled: bool) -> list[str]:
    """Return notes on differences from the grid that the run itself cannot detect."""
    notes = []
    if attempt and there is None:
        notes.append(
            f"Nothing is known of the surroundings of its worker {attempt.outcome.worker}: it has "
            "stored none, or they have expired."
        )
    if is_pickled and there and there.minor != environment.current().minor:
        notes.append(f"Its function was pickled for Python {there.minor}, which no other version is sure to run.")
    if attempt and attempt.failure and attempt.failure.kind is FailureKind.LOST:
        notes.append("On the grid nobody saw it fail: its workers were gone each time.")
    return notes


def _gone(what: str, stage: str, task: int, reason: str) -> UsageError:
    """Return the error for a missing part of the task, with a remedy."""
    if what == "code":
        remedy = "Submit the job again from its folder: that uploads its code again."
    elif "'files/" in reason:
        remedy = (
            "Files that tasks have written expire where the stack says so (AttemptDays); run the stage before it again."
        )
    elif "'raw/" in reason:
        remedy = "Submit the job again: that uploads its input again."
    else:
        remedy = f"`batchlab job show-task JOB {task_name(stage, task)}` shows what is left of it."
    text = reason.rstrip(".")
    return UsageError(f"The {what} of {task_name(stage, task)} cannot be had: {text}.", remedy=remedy)


def make_folder(folder: Path) -> None:
    """Create `folder`, or empty it if it is the folder of an earlier task. Raise UsageError if it
    has other contents or cannot be created."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not ((folder / object_keys.MADE).is_file() and (folder / TASK).is_file()):
                raise UsageError(
                    f"{folder} is not empty, and not the folder of a task.", remedy="Name another folder with --keep."
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made: {error.strerror}.", remedy="Name another folder with --keep."
        ) from error
