"""Simulated tasks: how long each takes and what it comes to, without running any code."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from batchlab.jobdef import JobDef, StageDef
from batchlab.model import Bundle, Failure, Json, Ran
from batchlab.ports import Clock
from batchlab.sim.pauses import Pause
from batchlab.worker.runner import Handle, Work

STEP_S = 0.05
"""How soon a running task notices that it is to be killed."""


@dataclass(frozen=True, slots=True)
class Play:
    """What one attempt of one task does: runs `run_s`, then gives `value` or fails; with
    `kills_worker` its worker dies in the middle of it."""

    run_s: float
    value: Json = None
    failure: Failure | None = None
    kills_worker: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """What a script is asked about."""

    job: JobDef
    stage: StageDef
    bundle: Bundle
    task: int
    item: Json


Script = Callable[[Scene], Play]


class ScriptedRunner:
    """A Runner whose tasks follow a script. `started` hears of each start, and what it returns is
    called at the task's end; `die` is called by a task that kills its worker."""

    def __init__(
        self,
        script: Script,
        clock: Clock,
        started: Callable[[Scene], Callable[[], None]],
        die: Callable[[], None],
    ) -> None:
        self._script = script
        self._clock = clock
        self._started = started
        self._die = die
        self._pause = Pause()

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        begun_s = self._clock.monotonic_s()
        for index, (task, item) in enumerate(zip(work.bundle.tasks, work.items, strict=True)):
            now_s = self._clock.monotonic_s()
            over = work.budget_s is not None and index > 0 and now_s - begun_s >= work.budget_s
            if handle.stop or over or now_s >= handle.until_s:
                return
            scene = Scene(work.job, work.stage, work.bundle, task, item)
            play = self._script(scene)
            handle.running = task
            ended = self._started(scene)
            if not await self._last(play.run_s, handle):
                return
            handle.running = None
            if play.kills_worker:
                self._die()
            ended()
            yield Ran(task, play.run_s, play.value, play.failure)

    async def close(self) -> None:
        """Nothing to end."""

    async def _last(self, run_s: float, handle: Handle) -> bool:
        """Let the task run; False where it was killed meanwhile."""
        end_s = self._clock.monotonic_s() + run_s
        while (left_s := end_s - self._clock.monotonic_s()) > 0:
            # Long tasks are looked at less often, or a 12 h task would cost 10⁶ events.
            await self._pause(min(left_s, max(STEP_S, run_s / 200)))
            if handle.kill:
                return False
        return not handle.kill
