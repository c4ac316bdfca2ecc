"""Runs real handlers in the worker's own process, each taking as long as it is told to.

For the simulator: with its loop, time is virtual and everything else is what a child process
does. Invariant: nothing here uses threads, processes or the wall clock. A handler that ends its
process ends the simulator, and what it prints goes where the simulator prints.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from batchlab.model import Failure, FailureKind, Json, Ran
from batchlab.ports import Clock, Objects
from batchlab.worker import materialise
from batchlab.worker.bench import Bench
from batchlab.worker.handlers import Fault, Problem, fault
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
    code: Path | None
    bench: Bench
    inputs: materialise.Inputs


class InlineRunner:
    """`duration_s(work, task)` is how long that task takes; it is asked once for each start."""

    def __init__(
        self, objects: Objects, clock: Clock, duration_s: Callable[[Work, int], float]
    ) -> None:
        self._objects = objects
        self._clock = clock
        self._duration_s = duration_s
        self._scratch = Scratch(Path(tempfile.mkdtemp(prefix="batchlab-")))
        self._library = Library(objects, self._scratch, _here)
        self._modules: dict[Path, dict[str, ModuleType]] = {}

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """See worker.runner."""
        began_s = self._clock.monotonic_s()
        folder = self._scratch.execution(work.execution)
        try:
            try:
                one = await self._prepare(work, handle, folder)
            except Problem as problem:
                if isinstance(problem.__cause__, KeyboardInterrupt):
                    raise problem.__cause__ from None  # a person's, as below
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
        request["cwd"] = ""
        with self._own_modules(code):
            bench = Bench(request)
        inputs = materialise.Inputs(self._objects, folder, _here)
        return _Run(work, handle, code, bench, inputs)

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
        try:
            with self._own_modules(one.code):
                done = one.bench.run(task, ready)
        except KeyboardInterrupt:
            raise  # a person's, most likely, who wants the simulator to end
        except BaseException as error:  # noqa: BLE001 - every way to fail is the task's failure
            return _failed(task, one.bench.explain(error), run_s)
        await materialise.upload(self._objects, done.uploads)
        return Ran(task, run_s, json.loads(done.text))

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

    @contextmanager
    def _own_modules(self, code: Path | None) -> Iterator[None]:
        """Modules of a job's code folder, apart from those of the same names of other jobs."""
        if code is None:
            yield
            return
        tops = {path.name.partition(".")[0] for path in code.iterdir()} - {"batchlab"}
        own = self._modules.setdefault(code, {})
        hidden = _taken(tops)
        sys.modules.update(own)
        sys.path.insert(0, str(code))
        try:
            yield
        finally:
            sys.path.remove(str(code))
            own.update(_taken(tops))
            sys.modules.update(hidden)


def _taken(tops: set[str]) -> dict[str, ModuleType]:
    """The modules below these top-level names, taken out of sys.modules."""
    names = [name for name in sys.modules if name.partition(".")[0] in tops]
    return {name: sys.modules.pop(name) for name in names}


def _failed(task: int, found: Fault, run_s: float) -> Ran:
    return Ran(task, run_s, failure=materialise.failure(task, found, run_s))
