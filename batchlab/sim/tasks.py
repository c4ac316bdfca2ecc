"""Durations and results of simulated tasks, which do not run code.

Invariant: the result of a task is a function of the seed, the task's name, and the attempt.
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
"""Seconds after which a running task checks whether it must stop."""


@dataclass(frozen=True, slots=True)
class ScriptedAttempt:
    """One attempt of one task. A task runs for `run_s`, then returns `value` or fails.

    With `kills_worker`, the worker dies at the end of the attempt.
    """

    run_s: float
    value: Json = None
    failure: Failure | None = None
    kills_worker: bool = False


@dataclass(frozen=True, slots=True)
class AttemptInput:
    """Input of a script: one attempt of a task."""

    job: JobDef
    stage: StageDef
    bundle: Bundle
    task: int
    item: Json
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs that the worker has given to the task."""


Script = Callable[[AttemptInput], ScriptedAttempt]


class ScriptedRunner:
    """A Runner whose tasks follow a script.

    The runner calls `started` at each start of a task, and calls the returned function at the task's end. The runner
    calls `die` for a task that kills its worker.
    """

    def __init__(
        self,
        script: Script,
        clock: Clock,
        started: Callable[[AttemptInput], Callable[[], None]],
        die: Callable[[], None],
        slowness: float = 1.0,
    ) -> None:
        """Run tasks `slowness` times as long as in the script."""
        self._script = script
        self._slowness = slowness
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
            scene = AttemptInput(work.job, work.stage, work.bundle, task, item, work.gpus)
            play = self._script(scene)
            run_s = play.run_s * self._slowness
            handle.running = task
            ended = self._started(scene)
            # Long tasks check less often whether they must stop. Frequent checks of a 12 h task would cost 10⁶ events.
            check_s = max(STEP_S, run_s / 200)
            if not await _run_for(run_s, check_s, handle, self._clock, self._pause):
                ended()
                return
            handle.running = None
            if play.kills_worker:
                self._die()
            ended()
            yield Ran(task, run_s, play.value, play.failure)

    async def close(self) -> None:
        """Do nothing, because the tasks use no processes."""


async def _run_for(run_s: float, check_s: float, handle: Handle, clock: Clock, pause: Pause) -> bool:
    """Wait while tasks run, and check the handle every `check_s`. Return False if the run was killed."""
    time_s = clock.monotonic_s
    end_s = time_s() + run_s

    def next_s() -> float:
        remaining_s = end_s - time_s()
        return 0.0 if handle.kill else remaining_s if remaining_s < check_s else check_s

    await pause.until(next_s)
    return not handle.kill


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """Duration and result of each attempt of a task. The first `failing_attempts` attempts fail in each of the first
    `failing_rounds` rounds."""

    run_s: float
    failing_attempts: int = 0
    failing_rounds: int = 1
    poison: bool = False


def value_of(stage: str, item: Json) -> Json:
    """Return the result of a task, which is a function of its input."""
    if isinstance(item, int):
        return {"key": f"k{item % 3}", "n": item}
    if isinstance(item, list):
        # The sum depends on the order of the results, so a wrong order gives another number.
        return {"key": "sum", "n": sum(place * result["n"] for place, result in enumerate(item, start=1))}
    if set(item) == {"key", "n"}:
        return {"key": item["key"], "n": item["n"] * 2 + len(stage)}
    return {"key": "joined", "n": sum(result["n"] for result in item.values())}


class TaskPlans:
    """Script of the tasks of one seed. Each task takes one of the durations in `run_s`. With `mended`, more tasks fail,
    and some of them fail again after a retry."""

    def __init__(self, seed: int, run_s: Sequence[float], *, mended: bool = False) -> None:
        self._seed = seed
        self._run_s = run_s
        self._mended = mended

    def plan_of(self, job: str, stage: str, task: int) -> TaskPlan:
        """Return the plan of a task."""
        rng = random.Random(f"{self._seed}/{job}/{stage}/{task}")  # noqa: S311 - simulation
        run_s, chance, attempts = rng.choice(self._run_s), rng.random(), rng.randint(1, 4)
        if chance < 0.02:
            return TaskPlan(run_s, poison=True)
        if self._mended and chance < 0.4:
            return TaskPlan(run_s, failing_attempts=attempts, failing_rounds=rng.randint(1, 3))
        return TaskPlan(run_s, failing_attempts=attempts if chance < 0.12 else 0)

    def __call__(self, scene: AttemptInput) -> ScriptedAttempt:
        plan = self.plan_of(scene.job.id, scene.stage.name, scene.task)
        if plan.poison:
            return ScriptedAttempt(plan.run_s, kills_worker=True)
        if scene.bundle.attempt <= plan.failing_attempts and scene.bundle.round < plan.failing_rounds:
            failure = Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck")
            return ScriptedAttempt(plan.run_s, failure=failure)
        try:
            value = value_of(scene.stage.name, scene.item)
        except (KeyError, TypeError):
            # Only a lying worker creates an item without the expected fields, and a real handler would fail at such an
            # item.
            failure = Failure(scene.task, FailureKind.EXCEPTION, "an odd item", error="Odd")
            return ScriptedAttempt(plan.run_s, failure=failure)
        return ScriptedAttempt(plan.run_s, value)


def inputs_of(job: JobDef, stage: StageDef, done: Mapping[str, Mapping[int, Json]]) -> dict[int, Json]:
    """Return the input of each task of `stage` that could run, from the results `done` of earlier stages.

    The computation of the inputs is independent of the grid's code.
    """
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

CHECKS = 20
"""Number of times that a long task checks whether the task's bundle was killed."""

Durations = Callable[[Work], Sequence[float]]
"""Function that returns the seconds that each task of a bundle takes."""


class TimedRunner:
    """A Runner for forecasts, whose tasks take given times and succeed.

    Each task begins and ends as if the tasks ran one by one, but one timer covers several short tasks. Tasks share a
    timer if they take at most `together_s` in total, which delays the reaction to a stop by `together_s`. The runner
    reacts to a kill within `look_s`, or within a twentieth of the longest task if the twentieth is longer.
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
        """See `inflight_message.Runner`."""
        tasks = list(work.bundle.tasks)
        durations = self._durations(work)
        begun_s = self._clock.monotonic_s()
        # Results are reported in groups, at the latest before a long task. The groups keep thousands of concurrent
        # bundles from storing the results of their tasks.
        reported = 0
        for first, takes_s in self._groups(durations):
            now_s = self._clock.monotonic_s()
            spent = work.budget_s is not None and first and now_s - begun_s >= work.budget_s
            if spent or handle.stop or now_s >= handle.until_s:
                break
            if takes_s > self._together_s:
                for n in range(reported, first):
                    yield Ran(tasks[n], durations[n])
                reported = first
            handle.running = tasks[first]
            check_s = max(self._look_s, takes_s / CHECKS)
            if not await _run_for(takes_s, check_s, handle, self._clock, self._pause):
                break
            handle.running = None
        else:
            first = len(tasks)
        for n in range(reported, first):
            yield Ran(tasks[n], durations[n])

    async def close(self) -> None:
        """Do nothing, because the tasks use no processes."""

    def _groups(self, durations: Sequence[float]) -> Iterator[tuple[int, float]]:
        """Yield (first task, seconds) for each group of tasks that share a timer."""
        first, takes_s = 0, 0.0
        for n, run_s in enumerate(durations):
            if n > first and takes_s + run_s > self._together_s:
                yield first, takes_s
                first, takes_s = n, 0.0
            takes_s += run_s
        yield first, takes_s
