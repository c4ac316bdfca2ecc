"""Simulated tasks: how long each takes and what it comes to, without running any code.

What simulated tasks do, and what a job's results must then be.

Invariant: a task's fate is a function of the seed, its name and its attempt, so the results are
known whatever happens to the grid.

Simulated tasks of known durations that all succeed: what a forecast needs, and nothing else.

Invariant: tasks begin and end when they would one by one. Only short ones are waited for together,
so that ten million of them cost no ten million timers.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, Json, Ran
from batchlab.core.ports import Clock
from batchlab.sim.controls import Pause
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


@dataclass(frozen=True, slots=True)
class Fate:
    """How long each try takes, and how it ends: `unlucky` tries fail, in the first round only."""

    run_s: float
    unlucky: int = 0
    poison: bool = False


def value_of(stage: str, item: Json) -> Json:
    """What a task returns, a function of its input: so results can be checked whatever happened."""
    if isinstance(item, int):
        return {"key": f"k{item % 3}", "n": item}
    if isinstance(item, list):
        # Another order of the same results gives another number.
        return {"key": "sum", "n": sum(place * one["n"] for place, one in enumerate(item, start=1))}
    if set(item) == {"key", "n"}:
        return {"key": item["key"], "n": item["n"] * 2 + len(stage)}
    return {"key": "joined", "n": sum(one["n"] for one in item.values())}


class Fates:
    """The script of a seed's tasks; each takes one of `run_s`."""

    def __init__(self, seed: int, run_s: Sequence[float]) -> None:
        self._seed = seed
        self._run_s = run_s

    def of(self, job: str, stage: str, task: int) -> Fate:
        """The fate of one task."""
        rng = random.Random(f"{self._seed}/{job}/{stage}/{task}")  # noqa: S311 - simulation
        run_s, fate, stubborn = rng.choice(self._run_s), rng.random(), rng.randint(1, 4)
        if fate < 0.02:
            return Fate(run_s, poison=True)
        return Fate(run_s, unlucky=stubborn if fate < 0.12 else 0)

    def __call__(self, scene: Scene) -> Play:
        fate = self.of(scene.job.id, scene.stage.name, scene.task)
        if fate.poison:
            return Play(fate.run_s, kills_worker=True)
        if scene.bundle.attempt <= fate.unlucky and not scene.bundle.round:
            failure = Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck")
            return Play(fate.run_s, failure=failure)
        try:
            value = value_of(scene.stage.name, scene.item)
        except (KeyError, TypeError):
            # Only a lie brings such an item, and a handler would fail at it.
            failure = Failure(scene.task, FailureKind.EXCEPTION, "an odd item", error="Odd")
            return Play(fate.run_s, failure=failure)
        return Play(fate.run_s, value)


def inputs_of(
    job: JobDef, stage: StageDef, done: Mapping[str, Mapping[int, Json]]
) -> dict[int, Json]:
    """The input of each task of `stage` that could run, by the results `done` of those before it:
    a computation that knows nothing of grids."""
    if not stage.after:
        return dict(enumerate(range(job.items or 0)))
    first = done[stage.after[0]]
    if stage.gather == "*":
        return {0: [first[task] for task in sorted(first)]}
    if stage.gather:
        groups: dict[str, list[Json]] = {}
        for task in sorted(first):
            groups.setdefault(first[task][stage.gather], []).append(first[task])
        return {number: groups[key] for number, key in enumerate(sorted(groups))}
    if len(stage.after) == 1:
        return dict(first)
    every = set(first).intersection(*(done[u] for u in stage.after[1:]))
    return {task: {u: done[u][task] for u in stage.after} for task in sorted(every)}


TOGETHER_S = 0.05

LOOKS = 20
"""How often a long task looks whether it is to be killed."""

Durations = Callable[[Work], Sequence[float]]
"""Seconds that each task of a bundle takes."""


class TimedRunner:
    """A Runner whose tasks take the time that they are said to take.

    Tasks are waited for together as long as they take no more than `together_s`: so late a run
    notices that it is to stop. `look_s` is how soon it notices that it is to be killed, where a
    twentieth of its longest task is not later still.
    """

    def __init__(
        self,
        durations: Durations,
        clock: Clock,
        *,
        together_s: float = TOGETHER_S,
        look_s: float = 0.0,
    ) -> None:
        self._durations = durations
        self._clock = clock
        self._together_s = together_s
        self._look_s = max(together_s, look_s)
        self._pause = Pause()

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """See worker.runner."""
        tasks = list(work.bundle.tasks)
        durations = self._durations(work)
        begun_s = self._clock.monotonic_s()
        # Tasks are told of together too, at last before a long one: of thousands of bundles that
        # run side by side, none then keeps what its tasks came to.
        told = 0
        for first, takes_s in self._groups(durations):
            now_s = self._clock.monotonic_s()
            spent = work.budget_s is not None and first and now_s - begun_s >= work.budget_s
            if spent or handle.stop or now_s >= handle.until_s:
                break
            if takes_s > self._together_s:
                for n in range(told, first):
                    yield Ran(tasks[n], durations[n])
                told = first
            handle.running = tasks[first]
            if not await self._last(takes_s, handle):
                break
            handle.running = None
        else:
            first = len(tasks)
        for n in range(told, first):
            yield Ran(tasks[n], durations[n])

    async def close(self) -> None:
        """Nothing to end."""

    def _groups(self, durations: Sequence[float]) -> Iterator[tuple[int, float]]:
        """(first task, seconds) of what is waited for together."""
        first, takes_s = 0, 0.0
        for n, run_s in enumerate(durations):
            if n > first and takes_s + run_s > self._together_s:
                yield first, takes_s
                first, takes_s = n, 0.0
            takes_s += run_s
        yield first, takes_s

    async def _last(self, takes_s: float, handle: Handle) -> bool:
        """Let time pass; False where what runs was killed meanwhile."""
        end_s = self._clock.monotonic_s() + takes_s
        look_s = max(self._look_s, takes_s / LOOKS)
        while (left_s := end_s - self._clock.monotonic_s()) > 0:
            await self._pause(min(left_s, look_s))
            if handle.kill:
                return False
        return not handle.kill
