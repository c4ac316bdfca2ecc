"""What simulated tasks do, and what a job's results must then be.

Invariant: a task's fate is a function of the seed, its name and its attempt, so the results are
known whatever happens to the grid.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchlab.jobdef import JobDef, StageDef
from batchlab.model import Failure, FailureKind, Json
from batchlab.sim.runner import Play, Scene


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
