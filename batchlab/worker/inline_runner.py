"""Runs real handlers in child processes, each task taking as long as its caller says.

For the simulator: with its loop, time is virtual and everything else is what a worker's child
process does. Invariant: virtual time stands still while a child runs a task. What a task prints
goes to the standard error of the simulator.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchlab.model import Failure, FailureKind, Json, Ran
from batchlab.ports import Clock, Objects
from batchlab.protocol.references import Own
from batchlab.worker import materialise
from batchlab.worker.bench import Request
from batchlab.worker.child import RequestLine
from batchlab.worker.handlers import Fault, Problem, fault
from batchlab.worker.inline_child import Answer, InlineChildren
from batchlab.worker.library import Library
from batchlab.worker.runner import Handle, Scratch, Work

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
    inputs: materialise.Inputs


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
        key = materialise.function_key(work)
        function = await self._library.function(key) if key else None
        request = materialise.request(work, folder, function=function, code=code)
        (folder / "cwd").mkdir(parents=True)
        inputs = materialise.Inputs(self._objects, folder, _here, Own.of(work.job))
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
        await materialise.upload(self._objects, (extra or {}).get("uploads", []))
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
    return Ran(task, run_s, failure=materialise.failure(task, found, run_s))
