"""What each task of a scenario takes, and how its attempts end.

Invariant: a function of (seed, job, stage, task, attempt) alone: the same in the simulator and in a
replay, and whichever tasks share a bundle.
"""

from __future__ import annotations

from functools import lru_cache

from batchlab.model import TaskSet
from batchlab.scenario.draws import Constant
from batchlab.scenario.model import Job, StageTemplate
from batchlab.scenario.streams import Stream

# A job's bundles come one after another, and are often small.
_stream = lru_cache(maxsize=1024)(Stream)


def _known(job: Job, stage: StageTemplate) -> float | None:
    """What every task of the stage takes, where that is no matter of chance."""
    if job.task_s is not None and not stage.after:
        return job.task_s
    return stage.task_s.value if isinstance(stage.task_s, Constant) else None


def task_s(seed: int, job: Job, stage: StageTemplate, task: int) -> float:
    """Seconds that one task takes whenever it is tried."""
    known = _known(job, stage)
    if known is not None:
        return known
    return stage.task_s.at(_stream(seed, "tasks", job.index, stage.name).unit(task))


def batch_s(seed: int, job: Job, stage: StageTemplate, tasks: TaskSet) -> list[float]:
    """`task_s` of each of `tasks`, in order, well under a microsecond each."""
    known = _known(job, stage)
    if known is not None:
        return [known] * len(tasks)
    stream = _stream(seed, "tasks", job.index, stage.name)
    at = stage.task_s.at
    if len(tasks.ranges) == 1:
        return list(map(at, stream.units(*tasks.ranges[0])))
    return [at(unit) for span in tasks.ranges for unit in stream.units(*span)]


def fails(seed: int, job: Job, stage: StageTemplate, task: int, attempt: int) -> bool:
    """Whether this attempt (counted from 1) of a task ends in an exception."""
    if not stage.fails:
        return False
    return _stream(seed, "fails", job.index, stage.name, attempt).unit(task) < stage.fails


def failing(
    seed: int, job: Job, stage: StageTemplate, tasks: TaskSet, attempt: int
) -> frozenset[int]:
    """Those of `tasks` whose attempt `fails`, for many tasks at once."""
    if not stage.fails:
        return frozenset()
    stream = _stream(seed, "fails", job.index, stage.name, attempt)
    return frozenset(
        task
        for start, stop in tasks.ranges
        for task, unit in enumerate(stream.units(start, stop), start)
        if unit < stage.fails
    )


def kills(job: Job, stage: StageTemplate, task: int) -> bool:  # noqa: ARG001 - of every job
    """Whether a task kills its worker whenever it runs."""
    return task < stage.poison
