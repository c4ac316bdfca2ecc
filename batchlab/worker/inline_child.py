"""Child processes for a caller that blocks until a task has ended, such as the simulator.

Invariant: a task that ends its process, or breaks a real limit of its stage, is a failed task. The
caller's event loop stands still meanwhile, so its time does not pass.

Runs real handlers in child processes, each task taking as long as its caller says.

For the simulator: with its loop, time is virtual and everything else is what a worker's child
process does. Invariant: virtual time stands still while a child runs a task. What a task prints
goes to the standard error of the simulator.
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
from batchlab.core.protocol.references import Own
from batchlab.worker import materialization
from batchlab.worker.child import RequestLine
from batchlab.worker.child_process import ChildProcess, Children, describe_crash, monotonic_s
from batchlab.worker.code_cache import Library
from batchlab.worker.handlers import Fault, Problem, fault
from batchlab.worker.process_table import Sampler
from batchlab.worker.resource_limits import TICK_S, Limits, Verdict
from batchlab.worker.runner import Handle, Scratch, Work
from batchlab.worker.task_executor import Request

T = TypeVar("T")

Answer = list[Any]
"""A line of a child: see worker.child."""


MOST_CHILDREN = 8


class InlineChildren:
    """Runs requests of one task in child processes, one at a time.

    The runners of all simulated workers share it, since a killed one closes nothing.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="batchlab-children-"))
        self._children = Children(self._folder, MOST_CHILDREN)
        self._sampler = Sampler(monotonic_s, TICK_S / 2)
        # Real pipes need a loop in real time, and the caller's may have another time.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def ask(self, stage: StageDef, code: Path | None, request: RequestLine) -> Answer | None:
        """Return the child's answer, None if the request had no task and the handler loads.

        A crash or a broken limit is answered like a failed task. BackendError if no child starts.
        """
        log = Path(request["log"])
        before = log.stat().st_size if log.exists() else 0
        answer = self._wait(self._ask(stage, code, request))
        if log.exists():
            printed = log.read_bytes()[before:]
            sys.stderr.write(printed.decode(errors="backslashreplace"))
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the children and the thread."""
        self._wait(self._children.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # empty but for what a task left there

    def _wait(self, doing: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result()

    async def _ask(self, stage: StageDef, code: Path | None, request: RequestLine) -> Answer | None:
        try:
            child = await self._children.take(str(code or ""), code)
        except OSError as error:
            raise BackendError(f"A task process could not start: {error}") from error
        answer, is_alive = await self._answer(stage, child, request)
        # Memory that Python does not return would be charged to the next task.
        if is_alive and stage.memory_bytes is None:
            self._children.give_back(child)
        else:
            await self._children.bury(child)
        return answer

    async def _answer(
        self, stage: StageDef, child: ChildProcess, request: RequestLine
    ) -> tuple[Answer | None, bool]:
        """Return the answer, and whether the child still lives."""
        limits = Limits(stage, self._sampler)
        child.board.allow(stop=False, until_s=math.inf)
        child.send(request)
        answers: list[Answer] = []
        while True:
            lines = await child.answers(limits.wait_s(child), gather_s=0.0)
            answers += [line for line in lines if line[0] != "end"]
            if any(line[0] == "end" for line in lines):
                return (answers[0] if answers else None), True
            verdict = limits.broken(child)
            if verdict or child.spoilt or (not lines and child.ended):
                return await self._lost(child, verdict, answers), False

    async def _lost(
        self, child: ChildProcess, verdict: Verdict | None, answers: list[Answer]
    ) -> Answer:
        exit_code, last = await child.kill()
        child.check_booted(exit_code)
        task, since_s = child.board.running()
        ran_s = monotonic_s() - since_s
        answers += [line for line in last if line[0] != "end"]
        if answers:
            return answers[0]  # the task ended before its process did
        if verdict:
            found = fault(verdict.kind, verdict.sentence)
        elif child.spoilt:
            found = fault(FailureKind.CRASH, "wrote into its process's pipe")
        else:
            reason = describe_crash(exit_code, 0)
            found = fault(FailureKind.CRASH, reason, exit_code=exit_code)
        return ["failed", task, ran_s, found, None]


_SHORTEST_LOOK_S = 0.1
_LONGEST_LOOK_S = 5.0


async def _here(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@dataclass(frozen=True, slots=True)
class _Run:
    work: Work
    handle: Handle
    request: Request
    code: Path | None
    inputs: materialization.Inputs


class InlineRunner:
    """`duration_s(work, task)` is how long that task takes; it is asked once for each start."""

    def __init__(
        self,
        objects: Objects,
        clock: Clock,
        duration_s: Callable[[Work, int], float],
        children: InlineChildren,
    ) -> None:
        self._objects = objects
        self._clock = clock
        self._duration_s = duration_s
        self._scratch = Scratch(Path(tempfile.mkdtemp(prefix="batchlab-")))
        self._library = Library(objects, self._scratch, _here)
        self._children = children

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """See worker.runner."""
        began_s = self._clock.monotonic_s()
        folder = self._scratch.execution(work.execution)
        try:
            try:
                one = await self._prepare(work, handle, folder)
            except Problem as problem:
                for task in work.bundle.tasks:
                    yield _failed(task, problem.fault, 0.0)
                return
            started = False
            for task, item in zip(work.bundle.tasks, work.items, strict=True):
                if not self._may_start(work, handle, began_s, started=started):
                    return
                started = True
                ran = await self._task(one, task, item)
                if ran is None:
                    return
                yield ran
        finally:
            handle.running = None
            shutil.rmtree(folder, ignore_errors=True)  # most executions have none

    async def close(self) -> None:
        """Remove scratch files."""
        shutil.rmtree(self._scratch.root, ignore_errors=True)  # gone where it was called before

    async def _prepare(self, work: Work, handle: Handle, folder: Path) -> _Run:
        _, code = await self._library.code(work.job.code)
        key = materialization.function_key(work)
        function = await self._library.function(key) if key else None
        request = materialization.request(work, folder, function=function, code=code)
        (folder / "cwd").mkdir(parents=True)
        inputs = materialization.Inputs(self._objects, folder, _here, Own.of(work.job))
        one = _Run(work, handle, request, code, inputs)
        answer = self._ask(one, [])
        if answer:
            # Without a task, an answer says why the handler cannot be loaded.
            problem = Problem(FailureKind.CRASH, "")
            problem.fault = answer[1] if answer[0] == "import" else answer[3]
            raise problem
        return one

    def _ask(self, one: _Run, items: list[tuple[int, Json]]) -> Answer | None:
        folder, stage = Path(one.request["folder"]), one.work.stage
        line = RequestLine(
            request=one.request,
            items=items,
            log=str(folder / "log"),
            left_s=None,
            must_start=True,
            memory_bytes=stage.memory_bytes,
        )
        return self._children.ask(stage, one.code, line)

    def _may_start(self, work: Work, handle: Handle, began_s: float, *, started: bool) -> bool:
        now_s = self._clock.monotonic_s()
        spent = work.budget_s is not None and now_s - began_s >= work.budget_s
        return not (handle.stop or handle.kill or now_s >= handle.until_s or (started and spent))

    async def _task(self, one: _Run, task: int, item: Json) -> Ran | None:
        """How the task ends; None where it is killed."""
        [(_, ready)] = await one.inputs.fetch([(task, item)])
        if isinstance(ready, Failure):
            return Ran(task, 0.0, failure=ready)
        one.handle.running = task
        limit_s = one.work.stage.timeout_s or math.inf
        wanted_s = self._duration_s(one.work, task)
        run_s = min(wanted_s, limit_s)
        if not await self._pass(run_s, one.handle):
            return None
        one.handle.running = None
        if wanted_s > limit_s:
            reason = f"ran longer than its timeout of {limit_s:g} s"
            return _failed(task, fault(FailureKind.TIMEOUT, reason), run_s)
        answer = self._ask(one, [(task, ready)])
        assert answer is not None
        word, *_, payload, extra = answer
        if word == "import":
            payload = answer[1]
        if word != "ok":
            return _failed(task, payload, run_s)
        await materialization.upload(self._objects, (extra or {}).get("uploads", []))
        return Ran(task, run_s, payload)

    async def _pass(self, duration_s: float, handle: Handle) -> bool:
        """Let time pass, looking now and then whether somebody kills the task; False then."""
        until_s = self._clock.monotonic_s() + duration_s
        look_s = min(_LONGEST_LOOK_S, max(_SHORTEST_LOOK_S, duration_s / 10))
        while not handle.kill:
            left_s = until_s - self._clock.monotonic_s()
            if left_s <= 0:
                return True
            await asyncio.sleep(min(left_s, look_s))
        return False


def _failed(task: int, found: Fault, run_s: float) -> Ran:
    return Ran(task, run_s, failure=materialization.failure(task, found, run_s))
