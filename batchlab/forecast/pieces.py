"""A scenario's jobs cut into pieces of work, for a sketch of a run.

Invariant: the same tasks with the same times as in the simulator. Short neighbours are one piece, a
long task is its own, so that a tail stays one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchlab.model import TaskSet
from batchlab.protocol.sizing import TARGET_S
from batchlab.scenario import sizes, times
from batchlab.scenario.calibration import Calibration
from batchlab.scenario.model import Job, Schedule, StageTemplate

PIECES = 20_000
"""About so many pieces are made of all work, where there are more tasks."""
MOST_FAILS = 0.9
"""Of a stage whose attempts nearly all fail nobody knows how often they are made."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tasks of one stage that run one after another in the same slots. `run_s` is what they take
    together, `bundles` in how many bundles the grid would run them."""

    job: int
    stage: int
    number: int
    tasks: int
    run_s: float
    bundles: int


@dataclass(frozen=True, slots=True)
class Work:
    """One job; `stages` has the pieces of each of its template's stages."""

    job: Job
    stages: tuple[tuple[Piece, ...], ...]


def works(schedule: Schedule, seed: int, calibration: Calibration) -> tuple[Work, ...]:
    """All jobs, cut."""
    total_s = 0.0
    for job in schedule.jobs:
        counts = sizes.of(job.template, job.tasks)
        total_s += sum(_mean_s(job, stage) * counts[stage.name] for stage in job.template.stages)
    return tuple(_work(job, seed, calibration, total_s / PIECES) for job in schedule.jobs)


def _mean_s(job: Job, stage: StageTemplate) -> float:
    if job.task_s is not None and not stage.after:
        return job.task_s
    return stage.task_s.mean


def _work(job: Job, seed: int, calibration: Calibration, grain_s: float) -> Work:
    counts = sizes.of(job.template, job.tasks)
    base = _bases(job.template.stages)
    lengths = []
    for stage in job.template.stages:
        takes = times.batch_s(seed, job, stage, TaskSet.span(0, counts[stage.name]))
        stretch = calibration.stretch.get(f"{job.template.name}/{stage.name}", 1.0)
        again = 1 / (1 - min(MOST_FAILS, stage.fails))
        lengths.append([one * stretch * again for one in takes])
    cuts: dict[int, list[tuple[int, int]]] = {}
    for first in dict.fromkeys(base):
        fed = [lengths[n] for n, one in enumerate(base) if one == first]
        cuts[first] = list(_cut([max(column) for column in zip(*fed, strict=True)], grain_s))
    return Work(
        job,
        tuple(
            tuple(_pieces(job, number, cuts[base[number]], lengths[number]))
            for number, _ in enumerate(job.template.stages)
        ),
    )


def _bases(stages: Sequence[StageTemplate]) -> list[int]:
    """Of each stage the first one of those that it is joined with item by item, on whatever way: a
    piece that follows several waits for the same items of each."""
    base = list(range(len(stages)))
    places = {stage.name: n for n, stage in enumerate(stages)}
    for number, stage in enumerate(stages):
        if stage.gather is None:
            joined = {number, *(base[places[name]] for name in stage.after)}
            base = [min(joined) if one in joined else one for one in base]
    return base


def _cut(longest_s: list[float], grain_s: float) -> Iterator[tuple[int, int]]:
    begin, sum_s = 0, 0.0
    for number, one_s in enumerate(longest_s):
        if number > begin and sum_s + one_s > grain_s:
            yield begin, number
            begin, sum_s = number, 0.0
        sum_s += one_s
    if longest_s:
        yield begin, len(longest_s)


def _pieces(
    job: Job, number: int, cuts: list[tuple[int, int]], takes: list[float]
) -> Iterator[Piece]:
    fixed = job.template.stages[number].bundle
    for n, (begin, end) in enumerate(cuts):
        run_s, count = sum(takes[begin:end]), end - begin
        bundles = -(-count // fixed) if fixed else min(count, max(1, round(run_s / TARGET_S)))
        yield Piece(job.index, number, n, count, run_s, bundles)
