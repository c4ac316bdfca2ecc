"""Simulated tasks: their durations and results, without running any code.

Invariant: the result of a task is a function of the seed, its name, and its attempt, so the results
are known whatever happens to the grid.

Forecasts use tasks of known durations that all succeed. These tasks begin and end as if run one by
one, but one timer covers several short tasks: ten million tasks do not need ten million timers.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, Json, Ran
from batchlab.core.ports import Clock
from batchlab.sim.actors import Pause
from batchlab.worker.inflight_message import Handle, Work

STEP_S = 0.05
"""Seconds after which a running task notices that it must stop."""


@dataclass(frozen=True, slots=True)
class Play:
    """One attempt of one task: it runs for `run_s`, then returns `value` or fails. With
    `kills_worker`, its worker dies in the middle of the attempt."""

    run_s: float
    value: Json = None
    failure: Failure | None = None
    kills_worker: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """Input of a script: one attempt of a task."""

    job: JobDef
    stage: StageDef
    bundle: Bundle
    task: int
    item: Json


Script = Callable[[Scene], Play]


class ScriptedRunner:
    """A Runner whose tasks follow a script. `started` is called at each start, and its return value
    at the task's end. A task that kills its worker calls `die`."""

    def __init__(
        self, script: Script, clock: Clock, started: Callable[[Scene], Callable[[], None]], die: Callable[[], None]
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
        """Do nothing: there are no processes to end."""

    async def _last(self, run_s: float, handle: Handle) -> bool:
        """Let the task run. Return False if it was killed in the meantime."""
        end_s = self._clock.monotonic_s() + run_s
        while (left_s := end_s - self._clock.monotonic_s()) > 0:
            # Long tasks are checked less often. Otherwise a 12 h task would cost 10⁶ events.
            await self._pause(min(left_s, max(STEP_S, run_s / 200)))
            if handle.kill:
                return False
        return not handle.kill


@dataclass(frozen=True, slots=True)
class Fate:
    """Return how long each attempt takes, and how it ends. `unlucky` attempts fail, in the first
    round only."""

    run_s: float
    unlucky: int = 0
    poison: bool = False


def value_of(stage: str, item: Json) -> Json:
    """Return the result of a task. It is a function of the input, so results can be checked in any
    case."""
    if isinstance(item, int):
        return {"key": f"k{item % 3}", "n": item}
    if isinstance(item, list):
        # Another order of the same results gives another number.
        return {"key": "sum", "n": sum(place * one["n"] for place, one in enumerate(item, start=1))}
    if set(item) == {"key", "n"}:
        return {"key": item["key"], "n": item["n"] * 2 + len(stage)}
    return {"key": "joined", "n": sum(one["n"] for one in item.values())}


class Fates:
    """Return the script of a seed's tasks. Each takes one of `run_s`."""

    def __init__(self, seed: int, run_s: Sequence[float]) -> None:
        self._seed = seed
        self._run_s = run_s

    def of(self, job: str, stage: str, task: int) -> Fate:
        """Return the plan of one attempt."""
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
            # Only a lie leads to such an item, and a handler would fail at it.
            failure = Failure(scene.task, FailureKind.EXCEPTION, "an odd item", error="Odd")
            return Play(fate.run_s, failure=failure)
        return Play(fate.run_s, value)


def inputs_of(job: JobDef, stage: StageDef, done: Mapping[str, Mapping[int, Json]]) -> dict[int, Json]:
    """Return the input of each task of `stage` that could run, from the results `done` of earlier
    stages. This computation is independent of the grid."""
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
"""Number of times that a long task checks whether it must stop."""

Durations = Callable[[Work], Sequence[float]]
"""Function that returns the seconds that each task of a bundle takes."""


class TimedRunner:
    """A Runner whose tasks take given times.

    Tasks share one wait as long as they take no more than `together_s`, which delays the reaction
    to a stop by that time. A kill is noticed within `look_s`, or within a twentieth of the longest
    task if that is longer.
    """

    def __init__(
        self, durations: Durations, clock: Clock, *, together_s: float = TOGETHER_S, look_s: float = 0.0
    ) -> None:
        self._durations = durations
        self._clock = clock
        self._together_s = together_s
        self._look_s = max(together_s, look_s)
        self._pause = Pause()

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """Run the tasks; see worker.runner."""
        tasks = list(work.bundle.tasks)
        durations = self._durations(work)
        begun_s = self._clock.monotonic_s()
        # Results are also reported in groups, at the latest before a long task. So thousands of
        # bundles that run side by side do not store the results of their tasks.
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
        """Do nothing: there are no processes to end."""

    def _groups(self, durations: Sequence[float]) -> Iterator[tuple[int, float]]:
        """Yield (first task, seconds) for each group of tasks that share a wait."""
        first, takes_s = 0, 0.0
        for n, run_s in enumerate(durations):
            if n > first and takes_s + run_s > self._together_s:
                yield first, takes_s
                first, takes_s = n, 0.0
            takes_s += run_s
        yield first, takes_s

    async def _last(self, takes_s: float, handle: Handle) -> bool:
        """Let time pass. Return False if the bundle was killed in the meantime."""
        end_s = self._clock.monotonic_s() + takes_s
        look_s = max(self._look_s, takes_s / LOOKS)
        while (left_s := end_s - self._clock.monotonic_s()) > 0:
            await self._pause(min(left_s, look_s))
            if handle.kill:
                return False
        return not handle.kill
