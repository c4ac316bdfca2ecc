"""Child processes for a caller that blocks until a task has ended, such as the simulator.

Invariant: a task that ends its process, or breaks a real limit of its stage, is a failed task. The
caller's event loop stands still meanwhile, so its time does not pass.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import sys
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar

from batchlab.errors import BackendError
from batchlab.jobdef import StageDef
from batchlab.model import FailureKind
from batchlab.worker.child import RequestLine
from batchlab.worker.child_process import ChildProcess, describe_crash, monotonic_s
from batchlab.worker.children import Children
from batchlab.worker.handlers import fault
from batchlab.worker.limits import TICK_S, Limits, Verdict
from batchlab.worker.processes import Sampler

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
