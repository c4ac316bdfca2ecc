"""Runner that runs real handlers in child processes for the simulator.

The caller of the runner defines how much virtual time each task takes, and blocks while a child runs a task.

Invariants: virtual time does not pass while a child runs a task. A task that ends its process or exceeds a real limit
of its stage fails. The output of tasks is written to the simulator's standard error.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from batchlab.core.errors import BackendError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Failure, FailureKind, Json, Ran
from batchlab.core.ports import Clock, Objects
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.worker import materialization
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
from batchlab.worker.inflight_message import Handle, Scratch, Work
from batchlab.worker.task_executor import ExecutionRequest

T = TypeVar("T")

Answer = list[Any]
"""Answer of a child as a line of JSON; see `worker.child`."""


MAX_CHILDREN = 8


class InlineChildren:
    """Child processes for requests of one task, with one request at a time.

    The runners of all simulated workers share the child processes, because a killed worker does not close its runner.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="batchlab-children-"))
        self._children = Children(self._folder, MAX_CHILDREN)
        self._sampler = Sampler(monotonic_s, TICK_S / 2)
        # Pipes need an event loop in real time, and the caller's loop may use virtual time.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def ask(self, stage: StageDef, code: Path | None, request: RequestLine) -> Answer | None:
        """Return the child's answer, or None if the request does not contain a task and the handler loads.

        After a crash or an exceeded limit, return the answer of a failed task. A child that cannot start raises
        BackendError.
        """
        log = Path(request["log"])
        before = log.stat().st_size if log.exists() else 0
        answer = self._wait(self._ask(stage, code, request))
        if log.exists():
            with log.open("rb") as file:
                file.seek(before)
                sys.stderr.write(file.read().decode(errors="backslashreplace"))
        return answer

    def create_scratch(self) -> Scratch:
        """Return the scratch folders of a new runner, which `__exit__` removes."""
        return Scratch(Path(tempfile.mkdtemp(dir=self._folder, prefix="runner-")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the child processes, stop the thread of the event loop, and remove the folders of all runners."""
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # A task may still write into the folder during the removal.

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _close(self) -> None:
        # Ctrl-C ends the wait for an answer, but not the request, whose child may still run a task.
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._children.close()

    async def _ask(self, stage: StageDef, code: Path | None, request: RequestLine) -> Answer | None:
        try:
            child = await self._children.acquire(str(code or ""))
        except OSError as error:
            raise BackendError(f"A task process could not start: {error}") from error
        try:
            answer, is_alive = await self._answer(stage, child, request)
        except asyncio.CancelledError:
            await self._children.kill(child)
            raise
        # The child is killed, because Python seldom returns memory, and the next task would be charged for the earlier
        # task's memory.
        if is_alive and stage.memory_bytes is None:
            self._children.release(child)
        else:
            await self._children.kill(child)
        return answer

    async def _answer(self, stage: StageDef, child: ChildProcess, request: RequestLine) -> tuple[Answer | None, bool]:
        """Return the answer to the request, and whether the child is still alive."""
        limits = Limits(stage, self._sampler)
        child.board.allow(stop=False, until_s=math.inf)
        child.send(request)
        answers: list[Answer] = []
        while True:
            lines = await child.answers(limits.wait_s(child), gather_s=0.0)
            answers += [line for line in lines if line[0] != "end"]
            if any(line[0] == "end" for line in lines):
                return (answers[0] if answers else None), True
            verdict = limits.broken_termination(child)
            if verdict or child.corrupted or (not lines and child.ended):
                return await self._end_child(child, verdict, answers), False

    async def _end_child(self, child: ChildProcess, verdict: Termination | None, answers: list[Answer]) -> Answer:
        exit_code, last = await child.kill()
        child.check_booted(exit_code)
        task, since_s = child.board.running()
        ran_s = monotonic_s() - since_s
        answers += [line for line in last if line[0] != "end"]
        if answers:
            return answers[0]  # The task ended before its process ended.
        if verdict:
            cause = fault(verdict.kind, verdict.sentence)
        elif child.corrupted:
            cause = fault(FailureKind.CRASH, "wrote into its process's pipe")
        else:
            cause = fault(FailureKind.CRASH, describe_crash(exit_code, 0), exit_code=exit_code)
        return ["failed", task, ran_s, cause, None]


_MIN_CHECK_S = 0.1
_MAX_CHECK_S = 5.0


async def _call_inline(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@dataclass(frozen=True, slots=True)
class _Run:
    work: Work
    handle: Handle
    request: ExecutionRequest
    code: Path | None
    inputs: materialization.Inputs


class SimulatedTaskRunner:
    """The Runner of real handlers in the simulator.

    The runner calls `duration_s(work, task)` once per start of a task for the task's virtual duration.
    """

    def __init__(
        self, objects: Objects, clock: Clock, duration_s: Callable[[Work, int], float], children: InlineChildren
    ) -> None:
        self._objects = objects
        self._clock = clock
        self._duration_s = duration_s
        self._scratch = children.create_scratch()
        self._code_cache = CodeCache(objects, self._scratch, _call_inline)
        self._children = children

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """See `inflight_message.Runner`."""
        began_s = self._clock.monotonic_s()
        folder = self._scratch.execution(work.execution)
        try:
            try:
                run = await self._prepare(work, handle, folder)
            except Problem as problem:
                for task in work.bundle.tasks:
                    yield _failure(task, problem.fault, 0.0)
                return
            started = False
            for task, item in zip(work.bundle.tasks, work.items, strict=True):
                now_s = self._clock.monotonic_s()
                is_spent = started and work.budget_s is not None and now_s - began_s >= work.budget_s
                if handle.stop or handle.kill or now_s >= handle.until_s or is_spent:
                    return
                started = True
                ran = await self._task(run, task, item)
                if ran is None:
                    return
                yield ran
        finally:
            handle.running = None
            self._code_cache.release_function(folder)
            shutil.rmtree(folder, ignore_errors=True)  # Many executions never create their folder.

    async def close(self) -> None:
        """Remove the scratch files of the runner. Repeated calls of `close` are safe."""
        shutil.rmtree(self._scratch.root, ignore_errors=True)

    async def _prepare(self, work: Work, handle: Handle, folder: Path) -> _Run:
        _, code = await self._code_cache.code(work.job.code)
        key = materialization.function_key(work)
        function = await self._code_cache.function(key, folder) if key else None
        request = materialization.request(work, folder, function=function, code=code)
        (folder / "cwd").mkdir(parents=True)
        inputs = materialization.Inputs(self._objects, folder, _call_inline, JobObjects.of_job(work.job))
        run = _Run(work, handle, request, code, inputs)
        answer = self._ask(run, [])
        if answer:
            # A child answers a request without a task only if the handler does not load.
            problem = Problem(FailureKind.CRASH, "")
            problem.fault = answer[1] if answer[0] == "import" else answer[3]
            raise problem
        return run

    def _ask(self, run: _Run, items: list[tuple[int, Json]]) -> Answer | None:
        folder, stage = Path(run.request["folder"]), run.work.stage
        line = RequestLine(
            request=run.request,
            items=items,
            log=str(folder / "log"),
            left_s=None,
            must_start=True,
            memory_bytes=stage.memory_bytes,
            gpus=None,
        )
        return self._children.ask(stage, run.code, line)

    async def _task(self, run: _Run, task: int, item: Json) -> Ran | None:
        """Return the result of the task, or None if the task is killed."""
        [(_, local_item)] = await run.inputs.fetch([(task, item)])
        if isinstance(local_item, Failure):
            return Ran(task, 0.0, failure=local_item)
        run.handle.running = task
        limit_s = run.work.stage.timeout_s or math.inf
        duration_s = self._duration_s(run.work, task)
        run_s = min(duration_s, limit_s)
        if not await self._sleep(run_s, run.handle):
            return None
        run.handle.running = None
        if duration_s > limit_s:
            reason = f"ran longer than its timeout of {limit_s:g} s"
            return _failure(task, fault(FailureKind.TIMEOUT, reason), run_s)
        answer = self._ask(run, [(task, local_item)])
        assert answer is not None
        word, *_, payload, extra = answer
        if word == "import":
            payload = answer[1]
        if word != "ok":
            return _failure(task, payload, run_s)
        await materialization.upload(self._objects, (extra or {}).get("uploads", []))
        return Ran(task, run_s, payload)

    async def _sleep(self, duration_s: float, handle: Handle) -> bool:
        """Let virtual time pass while a task runs.

        Return False if the task is killed before the end of its duration.
        """
        until_s = self._clock.monotonic_s() + duration_s
        check_s = min(_MAX_CHECK_S, max(_MIN_CHECK_S, duration_s / 10))
        while not handle.kill:
            remaining_s = until_s - self._clock.monotonic_s()
            if remaining_s <= 0:
                return True
            await asyncio.sleep(min(remaining_s, check_s))
        return False


def _failure(task: int, cause: Fault, run_s: float) -> Ran:
    return Ran(task, run_s, failure=materialization.failure(task, cause, run_s))
