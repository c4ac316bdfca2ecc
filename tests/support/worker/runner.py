"""A ProcessRunner with a bucket in memory, and functions to run tasks on it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from batchlab.adapters.clock import WallClock
from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, JobId, Json, Ran, StageName, TaskSet
from batchlab.core.ports import LocalFiles, Objects
from batchlab.worker import code_cache
from batchlab.worker.inflight_message import Handle, Scratch, Work
from batchlab.worker.process_runner import ProcessRunner
from tests.support.processes import children, command_line

USER_CODE = Path(__file__).parent / "user_code"


class Rig:
    """A ProcessRunner and its bucket. `run` and `values` run one bundle of stage `s` of job `j`."""

    def __init__(self, root: Path, objects: Objects, slots: int, files: LocalFiles | None = None) -> None:
        self.scratch = Scratch(root / "scratch")
        self.objects = objects
        self.clock = WallClock()
        self.runner = ProcessRunner(objects, self.scratch, self.clock, slots, files)
        self.handle = Handle()
        self._executions = 0
        self._code: dict[Path, str] = {}

    async def pack(self, folder: Path) -> str:
        if folder not in self._code:
            data = code_cache.pack(folder)
            await self.objects.put(code_cache.key(data), data)
            self._code[folder] = code_cache.key(data)
        return self._code[folder]

    async def work(
        self,
        items: Sequence[Json],
        *,
        handler: str | None = "acts:act",
        folder: Path | None = USER_CODE,
        params: dict[str, Json] | None = None,
        first: int = 0,
        budget_s: float | None = None,
        **stage: Any,
    ) -> Work:
        handler = None if "command" in stage else handler
        step = StageDef(StageName("s"), handler=handler, **stage)
        key = await self.pack(folder) if folder else None
        job = JobDef(JobId("j"), "j", (step,), 0.0, code=key, params=tuple((params or {}).items()))
        self._executions += 1
        tasks = TaskSet.span(first, first + len(items))
        bundle = Bundle(job.id, step.name, tasks)
        return Work(job, step, bundle, f"e-{self._executions}", items, budget_s)

    async def run(self, items: Sequence[Json], **how: Any) -> list[Ran]:
        self.handle = Handle()
        work = await self.work(items, **how)
        return [ran async for ran in self.runner.run(work, self.handle)]

    async def values(self, items: Sequence[Json], **how: Any) -> list[Any]:
        """Return the values in task order. A Failure is returned as "kind: reason"."""
        ran = await self.run(items, **how)
        assert [one.task for one in ran] == list(range(len(items))), ran
        return [f"{one.failure.kind}: {one.failure.reason}" if one.failure else one.value for one in ran]

    async def failure(self, item: Json, **how: Any) -> Failure:
        """Return the failure of a task with this item."""
        [ran] = await self.run([item], **how)
        assert ran.failure is not None, ran
        assert ran.failure.task == ran.task
        return ran.failure

    async def runs_left(self) -> list[Path]:
        """Return the folders of executions that still exist after all cleaning is done."""
        await asyncio.gather(*self.runner._cleaning)
        return list((self.scratch.root / "run").iterdir())

    async def log(self, task: int) -> str:
        """Return the output of the task in the last run."""
        data = await self.objects.get(self.handle.log) if self.handle.log else b""
        return "".join(data[start:stop].decode() for one, start, stop in self.handle.log_spans if one == task)


@asynccontextmanager
async def opened(
    root: Path, objects: Objects | None = None, slots: int = 2, files: LocalFiles | None = None
) -> AsyncIterator[Rig]:
    rig = Rig(root, objects or SimObjects(), slots, files)
    try:
        yield rig
    finally:
        await rig.runner.close()


def go(coro: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coro)


async def collect(rig: Rig, work: Work, handle: Handle) -> list[Ran]:
    return [one async for one in rig.runner.run(work, handle)]


async def until(true: Callable[[], Any], what: str, limit_s: float = 20.0) -> float:
    """Wait for a condition, and return the seconds until it was true."""
    began_s = time.monotonic()
    while not true():
        assert time.monotonic() - began_s < limit_s, f"not within {limit_s} s: {what}"
        await asyncio.sleep(0.005)
    return time.monotonic() - began_s


def children_of(pid: int | None = None) -> set[int]:
    """Return the pids of the task children. Other tests of this process may run a grid at the same time."""
    return {one for one in children(pid or os.getpid()) if "batchlab.worker.child" in command_line(one)}
