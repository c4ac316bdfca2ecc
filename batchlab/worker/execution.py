"""One execution of a bundle in child processes: its tasks, the tasks' limits, and the causes of failures.

Invariant: the execution yields exactly one result (Ran) for every task, or no result for a task that has not ended when
the run stops. The death of a child fails only the task that was running in the child. The remaining tasks continue in a
new child. All steps of an execution share the remaining tasks and the state of the child, so the steps are methods of
one class.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
from asyncio import Task
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from batchlab.core.errors import BackendError, NotFound
from batchlab.core.model import Failure, FailureKind, Json, Ran
from batchlab.core.operating_system import since_boot_s
from batchlab.core.ports import Clock, LocalFiles, Objects
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.core.protocol.settlement import LOSS_LIMIT
from batchlab.worker import materialization, task_log
from batchlab.worker.child import RequestLine
from batchlab.worker.child_process import (
    TICK_S,
    ChildProcess,
    Children,
    Limits,
    Sampler,
    Termination,
    describe_crash,
    monotonic_s,
)
from batchlab.worker.code_cache import CodeCache
from batchlab.worker.handlers import Fault, Problem, fault
from batchlab.worker.inflight_message import Handle, Peek, Work
from batchlab.worker.shared_memory import IMPORTING
from batchlab.worker.task_executor import ExecutionRequest

T = TypeVar("T")
Chunk = list[tuple[int, Json | Failure]]

_UPLOADS = 4
_MIN_GATHER_S = 0.001
_MAX_GATHER_S = TICK_S
_GATHER_PART = 1 / 4


@dataclass(frozen=True, slots=True)
class ExecutionContext:
    """Ports and caches that all executions of a worker share."""

    objects: Objects
    files: LocalFiles | None
    clock: Clock
    children: Children
    code_cache: CodeCache
    sampler: Sampler
    folders: Folders
    gpu_names: tuple[str, ...] = ()
    """Names of the instance's GPUs, or () for an instance without declared GPUs."""


class Folders:
    """Folders of executions, of which `spares` empty folders are created before their executions begin.

    The creation of an execution's folder on a disk takes as long as all other steps of a short task.
    """

    def __init__(self, root: Path, spares: int) -> None:
        self._root = root
        self._max = spares
        self._spares: list[Path] = []
        self._count = count()

    async def create(self, folder: Path) -> None:
        """Create the folder of an execution with its current folder and its log. Remove an older folder."""
        try:
            self._create(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            await asyncio.to_thread(_remove, folder)
            self._create(folder)

    def _create(self, folder: Path) -> None:
        if not self._spares:
            _create_folder(folder)
            return
        spare = self._spares.pop()
        try:
            spare.rename(folder)
        except FileNotFoundError:
            folder.parent.mkdir(parents=True, exist_ok=True)
            spare.rename(folder)

    def prepare(self) -> None:
        """Create a spare folder, unless there are enough of them."""
        if len(self._spares) < self._max:
            folder = self._root / f"spare-{next(self._count)}"
            _create_folder(folder)
            self._spares.append(folder)


class Execution:
    """Execution of the bundle in `work`. The queue `results` receives the results, and None at the end."""

    def __init__(self, work: Work, handle: Handle, folder: Path, context: ExecutionContext) -> None:
        self.results: asyncio.Queue[list[Ran] | asyncio.Task[Ran] | None] = asyncio.Queue()
        """Lists of results, and asyncio tasks for results whose outputs have not been stored yet."""
        self._work = work
        self._handle = handle
        self._folder = folder
        self._log = folder / "log"
        self._objects = context.objects
        self._clock = context.clock
        self._children = context.children
        self._code_cache = context.code_cache
        self._folders = context.folders
        self._limits = Limits(work.stage, context.sampler)
        self._gpus = visible_gpus(work.gpus, context.gpu_names)
        self._began_s = context.clock.monotonic_s()
        self._child: ChildProcess | None = None
        self._busy = False
        """Whether the child has a request and has not reported the request's end."""
        self._unfinished = dict.fromkeys(work.bundle.tasks)
        self._pending: dict[int, Json] = {}
        """Items of the unfinished tasks whose inputs are on the worker's disk, by task."""
        self._started = False
        self._pace_s = 0.0
        """Average seconds per task in the most recent batch of answers."""
        self._empty_requests = 0
        """Number of consecutive requests in which no task ended."""
        self._sigkills: Counter[int] = Counter()
        """Number of deaths of each task's process by a SIGKILL that the worker did not send."""
        own = JobObjects.of_job(work.job)
        self._inputs = materialization.Inputs(
            context.objects, folder, asyncio.to_thread, own, context.files, context.code_cache
        )
        self._storing: set[asyncio.Task[Ran]] = set()
        self._uploads = asyncio.Semaphore(_UPLOADS)
        handle.peek = self._peek

    async def run(self) -> None:
        """Run the tasks of the bundle. A failure of a port or of the machine raises BackendError."""
        try:
            await self._run()
            await self._store_log()
        except OSError as error:
            reason = materialization.no_room(error)
            if reason is None:
                raise BackendError(f"The worker cannot run tasks: {error}") from error
            self._fail_unfinished(fault("input", f"The worker's disk is full: {reason}"))
        finally:
            self._handle.running = self._handle.peek = None
            try:
                # A process that has used a GPU holds memory of the GPU until the process ends.
                if self._child is not None and (self._busy or self._work.gpus):
                    await self._children.kill(self._child)
                elif self._child is not None:
                    self._children.release(self._child)
            finally:
                self.results.put_nowait(None)

    async def cancel_uploads(self) -> None:
        for task in self._storing:
            task.cancel()
        await asyncio.gather(*self._storing, return_exceptions=True)

    async def clean(self) -> None:
        """Remove the folder of the execution. The caller must call `cancel_uploads` before `clean`."""
        self._code_cache.release_function(self._folder)
        await asyncio.to_thread(_remove, self._folder)
        if not self._children.closed:  # Otherwise the runner has removed the spare folders.
            await asyncio.to_thread(self._folders.prepare)

    async def _run(self) -> None:
        await self._folders.create(self._folder)
        try:
            prepared = self._cached_request() or await self._unless_stopped(self._prepare())
        except Problem as problem:
            self._fail_unfinished(problem.fault)
            return
        if prepared is None:
            return
        request, digest = prepared
        chunks = materialization.chunks(tuple(self._unfinished), self._work.items)
        following = self._prefetch(next(chunks, []))
        try:
            while chunk := await self._unless_stopped(following) if isinstance(following, Task) else following:
                following = self._prefetch(next(chunks, []))
                for task, item in chunk:
                    if isinstance(item, Failure):
                        del self._unfinished[task]
                        self.results.put_nowait([Ran(task, 0.0, failure=item)])
                    else:
                        self._pending[task] = item
                while self._pending:
                    if not await self._run_request(request, digest):
                        return
        finally:
            if isinstance(following, Task):
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    def _prefetch(self, chunk: Chunk) -> Task[Chunk] | Chunk:
        """Return the chunk, or an asyncio task that fetches the chunk's inputs if the chunk refers to objects."""
        refers = materialization.refers(chunk)
        return asyncio.create_task(self._inputs.fetch(chunk)) if refers else chunk

    def _cached_request(self) -> tuple[ExecutionRequest, str] | None:
        """Return the result of `_prepare` if the preparation does not need to fetch anything, else None."""
        if self._work.job.code:
            return None
        key = materialization.function_key(self._work)
        function = self._code_cache.cached_function(key, self._folder) if key else None
        if key and function is None:
            return None
        return (materialization.request(self._work, self._folder, function=function, code=None), "")

    async def _prepare(self) -> tuple[ExecutionRequest, str]:
        """Fetch the code, and return the execution request and the digest of the code. Raise Problem if the code does
        not fit on the disk, even without the unused files of the cache."""
        try:
            try:
                return await self._fetch_code()
            except (BackendError, OSError) as error:
                if materialization.no_room(error) is None:
                    raise
                self._code_cache.evict_unused()
                return await self._fetch_code()
        except (BackendError, OSError) as error:
            reason = materialization.no_room(error)
            if reason is None:
                raise
            raise Problem("input", f"The job's code does not fit on the worker: {reason}") from error

    async def _fetch_code(self) -> tuple[ExecutionRequest, str]:
        digest, code = await self._code_cache.code(self._work.job.code)
        key = materialization.function_key(self._work)
        function = await self._code_cache.function(key, self._folder) if key else None
        request = materialization.request(self._work, self._folder, function=function, code=code)
        return request, digest

    async def _unless_stopped(self, work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T | None:
        """Return the result of `work`, or None if the run is stopped before the result is ready."""
        task = work if isinstance(work, asyncio.Task) else asyncio.create_task(work)
        try:
            while not task.done():
                if self._stopped:
                    return None
                await asyncio.wait({task}, timeout=TICK_S)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    @property
    def _stopped(self) -> bool:
        return self._handle.stop or self._handle.kill or self._children.closed

    @property
    def _killed(self) -> bool:
        return self._handle.kill or self._children.closed

    def _left_s(self) -> float | None:
        budget_s, ran_s = self._work.budget_s, self._clock.monotonic_s() - self._began_s
        return None if budget_s is None else budget_s - ran_s

    # --- With a child --------------------------------------------------------------------------

    async def _run_request(self, request: ExecutionRequest, digest: str) -> bool:
        """Send the pending tasks to a child, and read the child's answers until the child finishes or dies.

        Return False if the run of the bundle is over.
        """
        left_s = self._left_s()
        is_spent = left_s is not None and left_s <= 0 and self._started
        if self._stopped or is_spent or self._handle.until_s <= self._clock.monotonic_s():
            return False
        if self._child is None:
            # A process reads CUDA_VISIBLE_DEVICES only once, so a task with GPUs needs a process of its own.
            self._child = await self._children.acquire(f"{digest}/{self._gpus}" if self._work.gpus else digest)
        child, before = self._child, len(self._unfinished)
        self._allow(child)
        child.send(
            RequestLine(
                request=request,
                items=list(self._pending.items()),
                log=str(self._log),
                left_s=left_s,
                must_start=not self._started,
                memory_bytes=self._work.stage.memory_bytes,
                gpus=self._gpus,
            )
        )
        self._busy = True
        why = await self._watch(child)
        self._busy = False
        self._started = True
        if why in ("stop", "budget", "import", "killed"):
            return False
        if why == "worn out":
            await self._drop_child()
        if why == "retry":
            return True
        self._empty_requests = self._empty_requests + 1 if len(self._unfinished) == before else 0
        if self._empty_requests > 1 and self._pending:
            # Two consecutive requests have ended without a running task. The execution fails the first pending task,
            # because an execution without progress might never end.
            reason = "ended its process before it could begin"
            self._fail_task(Termination(next(iter(self._pending)), FailureKind.CRASH, reason, 0.0), None)
        return True

    async def _drop_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await self._children.kill(child)

    async def _watch(self, child: ChildProcess) -> str:
        """Read answers from the child until the request ends, and return the reason in one word."""
        while True:
            wait_s = self._limits.wait_s(child)
            gather_s = min(wait_s, self._gathering_s())
            lines = await child.answers(wait_s, gather_s=gather_s)
            if end := self._process_answers(lines):
                return end
            if child.corrupted and self._pending:
                # Tasks answer in order, so the first pending task wrote invalid data into the pipe.
                task, reason = next(iter(self._pending)), "wrote into its process's pipe"
                return await self._end_child(child, Termination(task, FailureKind.CRASH, reason, 0.0))
            if self._killed or (not lines and child.ended):
                return await self._end_child(child, None)
            self._allow(child)
            if verdict := self._limits.broken_termination(child):
                return await self._end_child(child, verdict)
            # The output of the running task is trimmed during the run, so that the output does not fill the disk.
            task, log_at = child.board.task, child.board.log_at
            if task >= 0 and task_log.overflowing(self._log_size(), log_at) and child.board.task == task:
                await asyncio.to_thread(task_log.trim, str(self._log), log_at)

    def _gathering_s(self) -> float:
        left_s = self._left_s()
        if self._pending and (self._stopped or (left_s is not None and left_s < 2 * _MAX_GATHER_S)):
            # The wait is short, because tasks that end or start during a long wait would be handed off and run twice.
            return _MIN_GATHER_S
        return gathering_s(len(self._pending), self._pace_s)

    def _allow(self, child: ChildProcess) -> None:
        # `until_s` is converted to the child's clock, which may differ from the worker's.
        until_s = since_boot_s() + self._handle.until_s - self._clock.monotonic_s()
        child.board.allow(stop=self._stopped, until_s=until_s)
        task = child.board.task
        self._handle.running = task if task >= 0 else None

    async def _end_child(self, child: ChildProcess, verdict: Termination | None) -> str:
        """Kill a child that has died or exceeded a limit, and fail the task that caused the child's end."""
        code, last = await child.kill()
        self._process_answers(last)
        task, since_s = child.board.running()
        log_at = child.board.log_at
        if not self._killed:
            child.check_booted(code)
        await self._drop_child()
        if task in self._pending and self._log_size() > log_at:
            end = task_log.trim(str(self._log), log_at)
            self._handle.log_spans.append((task, log_at, end))
        if self._killed:
            return "killed"
        if verdict is None:
            if code == -signal.SIGKILL and task in self._pending:
                # The SIGKILL came from another program, or from the kernel because memory ran out. A SIGKILL may not be
                # the task's fault, so the task is tried again.
                self._sigkills[task] += 1
                if self._sigkills[task] < LOSS_LIMIT:
                    return "retry"
            verdict = Termination(
                task, FailureKind.CRASH, describe_crash(code, self._sigkills[task]), monotonic_s() - since_s
            )
        exit_code = code if verdict.kind is FailureKind.CRASH else None
        if verdict.task == IMPORTING:
            self._fail_unfinished(fault(verdict.kind, verdict.sentence, exit_code=exit_code))
        elif verdict.task in self._pending:
            # A task that is not pending sent its answer just before the task exceeded its limit.
            self._fail_task(verdict, exit_code)
        return "lost"

    def _peek(self, max_bytes: int) -> Peek | None:
        child = self._child
        if child is None or not self._busy:
            return None
        task, log_at = child.board.task, child.board.log_at
        size = self._log_size()
        if task < 0 or size < log_at:
            return None
        start = max(log_at, size - max_bytes)
        data = task_log.read(str(self._log), start, size - start)
        # If the running task has changed, the data may contain output of the next task.
        return Peek(task, log_at, start, data) if child.board.task == task else None

    def _log_size(self) -> int:
        try:
            return os.stat(self._log).st_size  # noqa: PTH116 - 20 times a second for each child
        except FileNotFoundError:
            return 0

    # --- Results -------------------------------------------------------------------------------

    def _process_answers(self, lines: list[Any]) -> str | None:
        """Put the results in a child's answers into the queue, and return the reason if the request has ended."""
        batch: list[Ran] = []
        why: str | None = None
        pending, unfinished, fetched = self._pending, self._unfinished, self._inputs.fetched
        for line in lines:
            if line[0] == "ok" and not line[4] and (task := line[1]) in pending and task not in fetched:
                # Most answers are of this kind, and a call of `_process_answer` would double their time.
                del pending[task], unfinished[task]
                batch.append(Ran(task, line[2], line[3]))
            elif line[0] == "end":
                why = line[1]
            elif line[0] == "import":
                self._handle.log_spans.extend(_span_of(next(iter(self._unfinished)), line[2]))
                self._fail_unfinished(line[1])
            else:
                self._process_answer(line, batch)
        if batch:
            self._pace_s = sum(ran.run_s for ran in batch) / len(batch)
            self.results.put_nowait(batch)
        return why

    def _process_answer(self, line: list[Any], batch: list[Ran]) -> None:
        word, task, run_s, payload, extra = line
        if task not in self._pending:
            return  # The answer belongs to an ended task, so a process that the handler forked sent the answer.
        measured = extra.get("metrics") if extra else None
        failure = None if word == "ok" else materialization.failure(task, payload, run_s)
        metrics = None
        if measured or failure:
            # A failed task always has its input in the report, because the input is often the cause.
            metrics = materialization.metrics(self._pending[task], measured)
        del self._pending[task], self._unfinished[task]
        ran = Ran(task, run_s, None if failure else payload, failure, metrics)
        if extra:
            self._handle.log_spans.extend(_span_of(task, extra))
        if not (task in self._inputs.fetched or (extra and "folder" in extra)):
            batch.append(ran)
            return
        if batch:
            self.results.put_nowait(batch[:])
            batch.clear()
        storing = asyncio.create_task(self._store(ran, (extra or {}).get("uploads", [])))
        self._storing.add(storing)
        storing.add_done_callback(self._storing.discard)
        self.results.put_nowait(storing)

    async def _store(self, ran: Ran, uploads: list[tuple[str, str]]) -> Ran:
        try:
            async with self._uploads:
                await materialization.upload(self._objects, uploads)
        except (NotFound, FileNotFoundError) as error:
            reason = f"Its output disappeared before it could be stored: {error}"
            failure = materialization.failure(ran.task, fault(FailureKind.RESULT, reason), ran.run_s)
            ran = ran._replace(value=None, failure=failure)
        await asyncio.to_thread(_remove, self._folder / str(ran.task))
        return ran

    def _fail_task(self, why: Termination, exit_code: int | None) -> None:
        metrics = materialization.metrics(self._pending[why.task], None)
        del self._pending[why.task], self._unfinished[why.task]
        cause = fault(why.kind, why.reason, exit_code=exit_code)
        failure = materialization.failure(why.task, cause, why.ran_s)
        ran = Ran(why.task, why.ran_s, failure=failure, metrics=metrics)
        self.results.put_nowait([ran])

    def _fail_unfinished(self, cause: Fault) -> None:
        """Fail every task that has not ended."""
        self.results.put_nowait(
            [Ran(task, 0.0, failure=materialization.failure(task, cause, 0.0)) for task in self._unfinished]
        )
        self._unfinished.clear()
        self._pending.clear()

    async def _store_log(self) -> None:
        if self._killed:
            # A killed run does not wait for unfinished uploads of results.
            for task in self._storing:
                task.cancel()
        if self._handle.log_spans and self._log.is_file():
            key = object_keys.log(self._work.bundle, self._work.execution, self._work.key)
            await materialization.upload(self._objects, [(str(self._log), key)])
            self._handle.log = key


def visible_gpus(gpus: Sequence[int], names: Sequence[str]) -> str | None:
    """Return the value of CUDA_VISIBLE_DEVICES for the GPUs of a bundle. A bundle without GPUs gets the value "" on an
    instance with GPUs, and None, which leaves the variable unchanged, on an instance without declared GPUs."""
    return ",".join(names[gpu] for gpu in gpus) if names else None


def gathering_s(count: int, pace_s: float) -> float:
    """Return the seconds to wait for further answers if `count` tasks have not answered.

    The wait is a small part of the expected remaining time, `count` times `pace_s`, so that the worker soon detects the
    end.
    """
    if not count:
        return 0.0  # All tasks have answered, and only the "end" line is missing.
    return min(_MAX_GATHER_S, max(_MIN_GATHER_S, count * pace_s * _GATHER_PART))


def _span_of(task: int, extra: dict[str, Any]) -> list[tuple[int, int, int]]:
    start, end = extra.get("span", (0, 0))
    return [(task, start, end)] if end > start else []


def _create_folder(folder: Path) -> None:
    (folder / "cwd").mkdir(parents=True)
    (folder / "log").touch(0o644)


def _remove(folder: Path) -> None:
    # A program that a task left running may still write into the folder of the execution. Errors of the removal are
    # ignored, because remaining files only use disk space until the instance ends.
    shutil.rmtree(folder, ignore_errors=True)
