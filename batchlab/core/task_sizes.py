"""Limits of the run time of a task, and the warnings about stages whose tasks are too short or too long.

The checks of a report, the commands that run before a job, and `job why` use the same limits and texts.

Invariant: a warning depends on the median of a stage's task times, so a single task with an unusual run time does not
cause a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from batchlab.core.text import count, span

TINY_S = 0.1
LONG_ON_SPOT_S = 600.0
TOO_LONG_S = 11 * 3600.0
MIN_TASKS = 20
"""Minimum number of measured tasks for a warning about a stage of which not all tasks were measured.

A warning about tiny tasks always needs MIN_TASKS tasks, because fewer tiny tasks cost nearly nothing.
"""
FINER = "Split the input into smaller parts (`size` in the job file's `input`)"


@dataclass(frozen=True, slots=True)
class SizeProblem:
    """Problem of a stage: the name of the report's check, a title, and the setting to change."""

    check: str
    title: str
    setting: str


def tiny(stage: str, median_s: float) -> SizeProblem:
    """Return the problem of a stage with tasks that are shorter than TINY_S."""
    tasks_per_second = max(1, math.ceil(1.0 / max(median_s, 1e-4)))
    return SizeProblem(
        "task size",
        f"Tasks of {stage} are tiny",
        "Give each task more work with a larger `size` in the job file's `input`. If the stage has a fixed `bundle`, "
        f"remove it, or set it to at least {tasks_per_second:,}, so that each message has work for a second.",
    )


def long_on_spot(stage: str) -> SizeProblem:
    """Return the problem of a stage with tasks that run longer than LONG_ON_SPOT_S on Spot Instances."""
    return SizeProblem(
        "long tasks on Spot",
        f"Tasks of {stage} are long for Spot",
        f"{FINER}. Or run the stage on On-Demand instances, with a `pool` of its own or with `--on-demand-percent "
        "100` of `batchlab deploy apply`.",
    )


def too_long(stage: str) -> SizeProblem:
    """Return the problem of a stage with tasks that run longer than TOO_LONG_S."""
    return SizeProblem(
        "task length",
        f"Tasks of {stage} are close to the limit of 12 h of SQS",
        f"{FINER}. Or split the stage into two stages.",
    )


@dataclass(frozen=True, slots=True)
class TaskTimes:
    """Median of the task times of a stage, and the number of tasks whose times are known.

    `source` is the beginning of a sentence about the median, such as "Half of the 40 sampled tasks of sums-1 took at
    most". `is_whole` means that the times of all tasks of the stage are known. `spot` is the end of a sentence about
    the stage's Spot Instances, or "" if the stage does not use Spot Instances.
    """

    stage: str
    median_s: float
    tasks: int
    source: str
    is_whole: bool = False
    spot: str = ""


@dataclass(frozen=True, slots=True)
class SizeWarning:
    """Warning about the tasks of a stage, with the evidence in `figure` and the change to make in `setting`."""

    stage: str
    check: str
    title: str
    figure: str
    setting: str
    median_s: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.title}. {self.figure} {self.setting}"


def size_warnings(times: Iterable[TaskTimes]) -> list[SizeWarning]:
    """Return the warnings about stages whose median task time is outside of the limits, in the order of the stages."""
    return [warning for one in times for warning in _warnings(one)]


def _warnings(times: TaskTimes) -> Iterator[SizeWarning]:
    took = f"{times.source} {span(times.median_s)}"
    if times.median_s < TINY_S and times.tasks >= MIN_TASKS:
        effect = f"which is less than {span(TINY_S)}. A message, a commit, and a row cost more than such a task."
        yield _warning(times, tiny(times.stage, times.median_s), f"{took}, {effect}")
    if times.tasks < MIN_TASKS and not times.is_whole:
        return
    if times.spot and times.median_s > LONG_ON_SPOT_S:
        effect = f"which is more than {span(LONG_ON_SPOT_S)}, and {times.spot}. If an instance is interrupted, its task"
        yield _warning(times, long_on_spot(times.stage), f"{took}, {effect} starts again.")
    if times.median_s > TOO_LONG_S:
        effect = "which is more than 11 h. If the worker fails, half a day of work is lost."
        yield _warning(times, too_long(times.stage), f"{took}, {effect}")


def _warning(times: TaskTimes, problem: SizeProblem, figure: str) -> SizeWarning:
    return SizeWarning(times.stage, problem.check, problem.title, figure, problem.setting, times.median_s)


def sampled(samples_s: Sequence[float], of: str) -> tuple[float, str]:
    """Return the median in seconds of sampled task times, and the source of the median. `of` names the job."""
    return median(samples_s), f"Half of the {count(len(samples_s), 'sampled task')} of {of} took at most"
