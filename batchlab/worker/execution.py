"""One execution of a bundle in child processes: its tasks, their limits, and causes of failures.

Invariant: every task ends in exactly one Ran, or in none if the run is stopped. A child that dies
fails only the task that was running. The other tasks continue in a fresh child. All steps share
the remaining tasks and the state of the child, so they are one class.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from asyncio import Task
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from batchlab.core.errors import BackendError, NotFound
from batchlab.core.model import Failure, FailureKind, Json, Ran
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
from batchlab.worker.shared_memory import IMPORTING, boot_s
from batchlab.worker.task_executor import ExecutionRequest

T = TypeVar("T")
Chunk = list[tuple[int, Json | Failure]]

_UPLOADS = 4
_GATHER_LEAST_S = 0.001
_MAX_GATHER_S = 0.02
_GATHER_PART = 1 / 4


class Execution:
    """Execution of `work`. The queue `ended` receives results, and None at the end."""

    def __init__(
        self,
        work: Work,
        handle: Handle,
        folder: Path,
        *,
        objects: Objects,
        files: LocalFiles | None,
        clock: Clock,
        children: Children,
        code_cache: CodeCache,
        sampler: Sampler,
    ) -> None:
        self.ended: asyncio.Queue[list[Ran] | asyncio.Task[Ran] | None] = asyncio.Queue()
        """Lists of results, and asyncio tasks for results that are still being stored."""
        self._work = work
        self._handle = handle
        self._folder = folder
        self._log = folder / "log"
        self._objects = objects
        self._clock = clock
        self._children = children
        self._code_cache = code_cache
        self._limits = Limits(work.stage, sampler)
        self._began_s = clock.monotonic_s()
        self._child: ChildProcess | None = None
        self._busy = False
        """The child has a request and has not reported its end."""
        self._left = dict.fromkeys(work.bundle.tasks)
        self._pending: dict[int, Json] = {}
        """Tasks of `_left` whose inputs are local and that have not ended."""
        self._started = False
        self._pace_s = 0.0
        """Average seconds per task in the most recent batch of answers."""
        self._barren = 0
        """Number of consecutive requests that ended no task."""
        self._slain: Counter[int] = Counter()
        """Number of times that each task's process died by a SIGKILL that this worker did not
        send."""
        own = JobObjects.of_job(work.job)
        self._inputs = materialization.Inputs(objects, folder, asyncio.to_thread, own, files)
        self._storing: set[asyncio.Task[Ran]] = set()
        self._uploads = asyncio.Semaphore(_UPLOADS)
        handle.peek = self._peek

    async def drive(self) -> None:
        """Run the tasks. Raise BackendError if a port or this machine fails."""
        try:
            await self._drive()
            await self._keep_log()
        except OSError as error:
            reason = materialization.no_room(error)
            if reason is None:
                raise BackendError(f"The worker cannot run tasks: {error}") from error
            self._fail_left(fault("input", f"The worker's disk is full: {reason}"))
        finally:
            self._handle.running = self._handle.peek = None
            if self._child is not None and self._busy:
                await self._children.bury(self._child)
            elif self._child is not None:
                self._children.give_back(self._child)
            self.ended.put_nowait(None)

    async def drop(self) -> None:
        """Cancel uploads that are still in progress."""
        for task in self._storing:
            task.cancel()
        await asyncio.gather(*self._storing, return_exceptions=True)

    async def clean(self) -> None:
        """Remove the folder. Call `drop` first."""
        await asyncio.to_thread(_remove, self._folder)

    async def _drive(self) -> None:
        if self._folder.exists():
            await asyncio.to_thread(_remove, self._folder)
        _make(self._folder)
        try:
            prepared = self._at_hand() or await self._unless_told(self._prepare())
        except Problem as problem:
            self._fail_left(problem.fault)
            return
        if prepared is None:
            return
        request, digest, code = prepared
        chunks = materialization.chunks(tuple(self._left), self._work.items)
        ahead = self._ahead(next(chunks, []))
        try:
            while ready := await self._unless_told(ahead) if isinstance(ahead, Task) else ahead:
                ahead = self._ahead(next(chunks, []))
                self._accept(ready)
                while self._pending:
                    if not await self._some(request, digest, code):
                        return
        finally:
            if isinstance(ahead, Task):
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    def _ahead(self, chunk: Chunk) -> Task[Chunk] | Chunk:
        """Return the chunk, or a task that fetches its inputs if it refers to objects."""
        refers = materialization.refers(chunk)
        return asyncio.create_task(self._inputs.fetch(chunk)) if refers else chunk

    def _at_hand(self) -> tuple[ExecutionRequest, str, Path | None] | None:
        """Return the result of `_prepare` if it needs no fetch, else None."""
        key = materialization.function_key(self._work)
        function = self._code_cache.at_hand(key) if key else None
        if self._work.job.code or (key and function is None):
            return None
        return (materialization.request(self._work, self._folder, function=function, code=None), "", None)

    async def _prepare(self) -> tuple[ExecutionRequest, str, Path | None]:
        digest, code = await self._code_cache.code(self._work.job.code)
        key = materialization.function_key(self._work)
        function = await self._code_cache.function(key) if key else None
        request = materialization.request(self._work, self._folder, function=function, code=code)
        return request, digest, code

    async def _unless_told(self, doing: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T | None:
        """Return the result, or None if the run is stopped before it is ready."""
        task = doing if isinstance(doing, asyncio.Task) else asyncio.create_task(doing)
        try:
            while not task.done():
                if self._told:
                    return None
                await asyncio.wait({task}, timeout=TICK_S)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _accept(self, ready: Chunk) -> None:
        for task, item in ready:
            if isinstance(item, Failure):
                del self._left[task]
                self.ended.put_nowait([Ran(task, 0.0, failure=item)])
            else:
                self._pending[task] = item

    @property
    def _told(self) -> bool:
        return self._handle.stop or self._handle.kill or self._children.closed

    @property
    def _killed(self) -> bool:
        return self._handle.kill or self._children.closed

    def _left_s(self) -> float | None:
        budget_s, ran_s = self._work.budget_s, self._clock.monotonic_s() - self._began_s
        return None if budget_s is None else budget_s - ran_s

    # --- With a child --------------------------------------------------------------------------

    async def _some(self, request: ExecutionRequest, digest: str, code: Path | None) -> bool:
        """Send the pending tasks to a child and take its answers until it finishes or dies.

        Return False if the run is over.
        """
        left_s = self._left_s()
        spent = left_s is not None and left_s <= 0 and self._started
        if self._told or spent or self._handle.until_s <= self._clock.monotonic_s():
            return False
        if self._child is None:
            self._child = await self._children.take(digest, code)
        child, before = self._child, len(self._left)
        self._allow(child)
        child.send(
            RequestLine(
                request=request,
                items=list(self._pending.items()),
                log=str(self._log),
                left_s=left_s,
                must_start=not self._started,
                memory_bytes=self._work.stage.memory_bytes,
            )
        )
        self._busy = True
        why = await self._watch(child)
        self._busy = False
        self._started = True
        if why in ("stop", "budget", "import", "told"):
            return False
        if why == "worn out":
            await self._drop_child()
        if why == "slain":
            return True
        self._barren = self._barren + 1 if len(self._left) == before else 0
        if self._barren > 1 and self._pending:
            # Two requests ended without a running task. The first pending task is failed, because
            # the execution would otherwise never end.
            reason = "ended its process before it could begin"
            self._blame(Termination(next(iter(self._pending)), FailureKind.CRASH, reason, 0.0), None)
        return True

    async def _drop_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await self._children.bury(child)

    async def _watch(self, child: ChildProcess) -> str:
        """Take answers until the request ends. Return the reason in one word."""
        while True:
            wait_s = self._limits.wait_s(child)
            gather_s = min(wait_s, self._gathering_s())
            lines = await child.answers(wait_s - gather_s, gather_s=gather_s)
            if end := self._take(lines):
                return end
            if child.spoilt and self._pending:
                # Tasks answer in order, so the first pending task wrote into the pipe.
                task, reason = next(iter(self._pending)), "wrote into its process's pipe"
                return await self._lost(child, Termination(task, FailureKind.CRASH, reason, 0.0))
            if self._killed or (not lines and child.ended):
                return await self._lost(child, None)
            self._allow(child)
            if verdict := self._limits.broken(child):
                return await self._lost(child, verdict)
            await self._cut_log(child)

    def _gathering_s(self) -> float:
        left_s = self._left_s()
        if self._pending and (self._told or (left_s is not None and left_s < 2 * _MAX_GATHER_S)):
            # Tasks that end or start during a long wait would be handed off and run twice.
            return _GATHER_LEAST_S
        return gathering_s(len(self._pending), self._pace_s)

    def _allow(self, child: ChildProcess) -> None:
        # `until_s` is converted to the child's clock, which may differ from the worker's.
        until_s = boot_s() + self._handle.until_s - self._clock.monotonic_s()
        child.board.allow(stop=self._told, until_s=until_s)
        task = child.board.task
        self._handle.running = task if task >= 0 else None

    async def _cut_log(self, child: ChildProcess) -> None:
        """Trim the output of the running task, so that it does not fill the disk."""
        task, log_at = child.board.task, child.board.log_at
        if task >= 0 and task_log.overflowing(self._log_size(), log_at) and child.board.task == task:
            await asyncio.to_thread(task_log.trim, str(self._log), log_at)

    async def _lost(self, child: ChildProcess, verdict: Termination | None) -> str:
        """Kill a child that has died or broke a limit, and fail the task that caused it."""
        code, last = await child.kill()
        self._take(last)
        task, since_s = child.board.running()
        log_at = child.board.log_at
        if not self._killed:
            child.check_booted(code)
        await self._drop_child()
        self._span(task, log_at)
        if self._killed:
            return "told"
        if verdict is None:
            if code == -signal.SIGKILL and task in self._pending:
                # The SIGKILL came from another program, or from the kernel when memory ran out.
                # It may not be the task's fault, so the task is tried again.
                self._slain[task] += 1
                if self._slain[task] < LOSS_LIMIT:
                    return "slain"
            verdict = Termination(
                task, FailureKind.CRASH, describe_crash(code, self._slain[task]), monotonic_s() - since_s
            )
        exit_code = code if verdict.kind is FailureKind.CRASH else None
        if verdict.task == IMPORTING:
            self._fail_left(fault(verdict.kind, verdict.sentence, exit_code=exit_code))
        elif verdict.task in self._pending:
            # A task that is not pending sent its answer just before its limit.
            self._blame(verdict, exit_code)
        return "lost"

    def _span(self, task: int, log_at: int) -> None:
        """Record the output of a task that did not end."""
        if task >= 0 and task in self._pending and self._log_size() > log_at:
            end = task_log.trim(str(self._log), log_at)
            self._handle.log_spans.append((task, log_at, end))

    def _peek(self, most: int) -> Peek | None:
        child = self._child
        if child is None or not self._busy:
            return None
        task, log_at = child.board.task, child.board.log_at
        size = self._log_size()
        if task < 0 or size < log_at:
            return None
        start = max(log_at, size - most)
        data = task_log.read(str(self._log), start, size - start)
        # If the running task changed, the data may contain the next task's output.
        return Peek(task, log_at, start, data) if child.board.task == task else None

    def _log_size(self) -> int:
        try:
            return os.stat(self._log).st_size  # noqa: PTH116 - 20 times a second for each child
        except FileNotFoundError:
            return 0

    # --- Ends of tasks -------------------------------------------------------------------------

    def _take(self, lines: list[Any]) -> str | None:
        """Turn a child's answers into results. Return the end reason if the request has ended."""
        batch: list[Ran] = []
        why: str | None = None
        for line in lines:
            if line[0] == "end":
                why = line[1]
            elif line[0] == "import":
                self._handle.log_spans.extend(_span_of(next(iter(self._left)), line[2]))
                self._fail_left(line[1])
            else:
                self._end_one(line, batch)
        if batch:
            self._pace_s = sum(ran.run_s for ran in batch) / len(batch)
            self.ended.put_nowait(batch)
        return why

    def _end_one(self, line: list[Any], batch: list[Ran]) -> None:
        word, task, run_s, payload, extra = line
        if task not in self._pending:
            return  # A process forked by the handler sent it. The task has already ended.
        del self._pending[task], self._left[task]
        if word == "ok":
            ran = Ran(task, run_s, payload)
        else:
            ran = Ran(task, run_s, failure=materialization.failure(task, payload, run_s))
        if extra:
            self._handle.log_spans.extend(_span_of(task, extra))
        if not (task in self._inputs.fetched or (extra and "folder" in extra)):
            batch.append(ran)
            return
        if batch:
            self.ended.put_nowait(batch[:])
            batch.clear()
        storing = asyncio.create_task(self._store(ran, (extra or {}).get("uploads", [])))
        self._storing.add(storing)
        storing.add_done_callback(self._storing.discard)
        self.ended.put_nowait(storing)

    async def _store(self, ran: Ran, uploads: list[tuple[str, str]]) -> Ran:
        try:
            async with self._uploads:
                await materialization.upload(self._objects, uploads)
        except (NotFound, FileNotFoundError) as error:
            reason = f"Its output disappeared before it could be stored: {error}"
            failure = materialization.failure(ran.task, fault(FailureKind.RESULT, reason), ran.run_s)
            ran = Ran(ran.task, ran.run_s, failure=failure)
        await asyncio.to_thread(_remove, self._folder / str(ran.task))
        return ran

    def _blame(self, why: Termination, exit_code: int | None) -> None:
        del self._pending[why.task], self._left[why.task]
        found = fault(why.kind, why.reason, exit_code=exit_code)
        ran = Ran(why.task, why.ran_s, failure=materialization.failure(why.task, found, why.ran_s))
        self.ended.put_nowait([ran])

    def _fail_left(self, why: Fault) -> None:
        """Fail every task that has not ended."""
        self.ended.put_nowait([Ran(task, 0.0, failure=materialization.failure(task, why, 0.0)) for task in self._left])
        self._left.clear()
        self._pending.clear()

    async def _keep_log(self) -> None:
        if self._killed:
            # A killed run does not wait for results that are not stored yet.
            for task in self._storing:
                task.cancel()
        if self._handle.log_spans and self._log.is_file():
            key = object_keys.log(self._work.bundle, self._work.execution, self._work.key)
            await materialization.upload(self._objects, [(str(self._log), key)])
            self._handle.log = key


def gathering_s(left: int, pace_s: float) -> float:
    """Return the seconds to wait for further answers while `left` tasks have not answered.

    It is a small part of the expected remaining time, `left` times `pace_s`, so that the end of a
    bundle is noticed soon.
    """
    if not left:
        return 0.0  # Only the "end" line is missing.
    return min(_MAX_GATHER_S, max(_GATHER_LEAST_S, left * pace_s * _GATHER_PART))


def _span_of(task: int, extra: dict[str, Any]) -> list[tuple[int, int, int]]:
    start, end = extra.get("span", (0, 0))
    return [(task, start, end)] if end > start else []


def _make(folder: Path) -> None:
    (folder / "cwd").mkdir(parents=True)


def _remove(folder: Path) -> None:
    # A program that a task left running may still write there. Remaining files only use disk space
    # until the instance ends, so errors are ignored.
    shutil.rmtree(folder, ignore_errors=True)
