"""Preparation of a task folder, for which the worker's code copies the input and the code of a task from the bucket.

Invariant: `ReadOnlyObjects` cannot write to the bucket. The task folder contains copies, so debugging cannot change the
grid.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from batchlab.client.debug import task_folder
from batchlab.client.debug.task_folder import CODE, EXECUTION, README, RUN, TASK, TaskRun, write
from batchlab.core.container_images import image_of_worker
from batchlab.core.errors import BackendError, Malformed, NotFound, Refused, UsageError
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Json, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import ObjectInfo, Objects
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.bundle_inputs import JobObjects, NoSuchTask
from batchlab.core.protocol.mended_inputs import is_mended, mended_sha256
from batchlab.jobs import attempts
from batchlab.jobs.attempts import Attempt
from batchlab.worker import environment, materialization
from batchlab.worker.code_cache import CodeCache
from batchlab.worker.environment import Environment
from batchlab.worker.handlers import Problem
from batchlab.worker.inflight_message import Scratch, Work

_FORBIDDEN = ("403", "AccessDenied", "Access Denied", "PermissionDenied", "Forbidden")


class ReadOnlyObjects:
    """Implementation of the Objects port that can only read objects."""

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        return await self._patience(lambda: self._objects.get(key, limit=limit))

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        return await self._patience(lambda: self._objects.get_range(key, start, stop))

    async def get_if_changed(self, key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        return await self._patience(lambda: self._objects.get_if_changed(key, etag, limit=limit))

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
    return Refused(f"{key} cannot be written, because this command only reads the bucket.")


class _Layout(Scratch):
    """Scratch folder for the worker's code, with the paths of a task folder instead of the paths on a worker."""

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

    `number` and `round_` select the attempt of the task. Without `number` and `round_`, the last failed attempt or else
    the last attempt is selected. If no attempt of the task has ended, the folder is prepared from the task's input.
    Raise UsageError if the task or the attempt does not exist, or if an object of the task was deleted. Raise
    BackendError if the bucket cannot be read.
    """
    reading = ReadOnlyObjects(objects, patience)
    with _explain_denied_access():
        job_def = await _definition(reading, job, patience)
        names = [stage_def.name for stage_def in job_def.stages]
        if stage not in names:
            raise UsageError(f"Job {job} does not have a stage {stage!r}.", remedy=f"It has {', '.join(names)}.")
        ended = await attempts.attempts(reading, job_def, stage, task, patience)
        attempt = attempts.choose(ended, number, round_)
        if attempt is None and (number, round_) != (None, None):
            numbers = [f"{a.outcome.bundle.attempt} (round {a.outcome.bundle.round})" for a in ended]
            raise UsageError(
                f"{task_name(stage, task)} does not have the selected attempt.",
                remedy=f"It has {', '.join(numbers)}." if numbers else "No attempt of the task has ended yet.",
            )
        try:
            bundle = attempt.bundle if attempt else await attempts.task_bundle(reading, job_def, stage, task, patience)
            item = await attempts.task_input(reading, job_def, bundle, patience)
        except NoSuchTask as error:
            raise UsageError(error.message, remedy=error.remedy) from error
        except NotFound as error:
            raise _missing("input", stage, task, error.message) from error
        worker = await environment.load(reading, attempt.outcome.worker, patience) if attempt else None
        task_run = await _fetch(reading, job_def, bundle, item, folder, attempt, worker)
        try:
            images = await attempts.pool_images(reading, job_def.stage(stage).pool, patience)
        except Malformed as error:
            images = []
            task_run.notes.append(f"The task runs without the image of its worker. {error.message} {error.remedy}")
        image = image_of_worker(images, worker.image if worker else "")
        task_run = replace(task_run, mended_sha256=mended_sha256(bundle.source), image=image)
        last = ended[-1].bundle if ended else bundle
        if last.round > bundle.round and last.source != bundle.source and is_mended(last):
            task_run.notes.append(
                f"A later retry gave the task a new input. `--round {last.round}` runs the task with the new input."
            )
    write(task_run)
    (folder / object_keys.MADE).touch()
    (folder / README).write_text(task_folder.text(task_run, attempts.describe(item)))
    (folder / RUN).write_text(task_folder.script(task_run))
    return task_run


@contextmanager
def _explain_denied_access() -> Iterator[None]:
    """Convert an error that reports missing permissions into a UsageError that lists the permissions."""
    try:
        yield
    except (NotFound, UsageError):
        raise
    except BackendError as error:
        if any(text in str(error) for text in _FORBIDDEN):
            raise UsageError(
                f"You are not allowed to read the objects of the task: {error.message}",
                remedy="The required permissions are s3:GetObject below jobs/, raw/, files/, code/, and logs/ and for "
                "grid/commit-secret.json and grid/pool-images.json, and s3:ListBucket.",
            ) from error
        raise


async def _definition(reading: Objects, job: JobId, patience: Patience) -> JobDef:
    try:
        return await attempts.definition(reading, job, patience)
    except NotFound as error:
        raise UsageError(
            f"The bucket does not contain the job {job}. The id is wrong, or the objects of the job were deleted.",
            remedy="Use the whole id of the job, as `batchlab job list` shows it.",
        ) from error


async def _fetch(
    reading: Objects,
    job: JobDef,
    bundle: Bundle,
    item: Json,
    folder: Path,
    attempt: Attempt | None,
    worker: Environment | None,
) -> TaskRun:
    step, task = job.stage(bundle.stage), bundle.tasks.first
    layout = _Layout(folder)
    code_cache = CodeCache(reading, layout, asyncio.to_thread)
    work = Work(job, step, bundle, "again", [item])
    try:
        _, code = await code_cache.code(job.code)
        key = materialization.function_key(work)
        function = await code_cache.function(key, folder) if key else None
    except Problem as problem:
        raise _missing("code", bundle.stage, task, problem.fault["reason"]) from problem
    execution = layout.execution("")
    request = materialization.request(work, execution, function=function, code=code)
    inputs = materialization.Inputs(reading, execution, asyncio.to_thread, JobObjects.of_job(job))
    [(_, ready)] = await inputs.fetch([(task, item)])
    failure = attempt.failure if attempt else None
    if isinstance(ready, Failure):
        raise _missing("input", bundle.stage, task, ready.reason)
    fields = ("kind", "reason", "error", "traceback", "exit_code")
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
        {name: getattr(failure, name) for name in fields} if failure else None,
        attempt.value if attempt else None,
        environment.to_json(worker) if worker else None,
        _notes(attempt, worker, is_pickled=function is not None),
    )


def _notes(attempt: Attempt | None, worker: Environment | None, *, is_pickled: bool) -> list[str]:
    """Return notes on differences between this machine and the grid that the local run itself cannot detect."""
    notes = []
    if attempt and worker is None:
        notes.append(
            f"The environment of the worker {attempt.outcome.worker} is unknown, because it was not stored or has "
            "expired."
        )
    if is_pickled and worker and worker.minor != environment.current().minor:
        notes.append(f"The function was pickled with Python {worker.minor}, and another version may not run it.")
    if attempt and attempt.failure and attempt.failure.kind is FailureKind.LOST:
        notes.append("On the grid, each worker of the task disappeared, and no worker reported an error.")
    return notes


def _missing(what: str, stage: str, task: int, reason: str) -> UsageError:
    """Return the error for a missing part of a task, such as the task's input or code, with a remedy."""
    if what == "code":
        remedy = "Submit the job again from its folder, which uploads its code again."
    elif "'files/" in reason:
        remedy = "Run the previous stage again. Files of tasks expire after the stack's parameter AttemptDays."
    elif "'raw/" in reason:
        remedy = "Submit the job again, which uploads its input again."
    else:
        remedy = f"`batchlab job show JOB {task_name(stage, task)}` shows the stored parts of the task."
    text = reason.rstrip(".")
    return UsageError(f"The {what} of {task_name(stage, task)} cannot be fetched: {text}.", remedy=remedy)


def make_folder(folder: Path) -> None:
    """Create `folder`. If `folder` is the task folder of an earlier task, remove the folder's content.

    Raise UsageError if `folder` contains other files, or cannot be created.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not ((folder / object_keys.MADE).is_file() and (folder / TASK).is_file()):
                raise UsageError(
                    f"{folder} is not empty, and is not the folder of a task.",
                    remedy="Name another folder with --keep.",
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be created: {error.strerror}.", remedy="Name another folder with --keep."
        ) from error
