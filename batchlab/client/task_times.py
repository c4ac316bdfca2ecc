"""Task times of earlier runs of a job, as samples of the task list of the manager.

Invariant: a median is the median of task times that workers measured. The mean time of a stage only excludes stages
that need no warning, because one slow task can raise the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

from batchlab.core.errors import BatchlabError
from batchlab.core.job_definition import task_name
from batchlab.core.task_sizes import LONG_ON_SPOT_S, MIN_TASKS, SizeWarning, TaskTimes, sampled, size_warnings

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import JobView, StageView

MAX_EARLIER_JOBS = 200
"""Maximum number of recent jobs among which the earlier runs of a job are searched."""
PAGES = 5
"""Number of places in a stage from which tasks are sampled. The places have equal distances."""
TASKS_PER_PAGE = 20
Connection = AbstractContextManager["Client"]
MAX_TINY_MEAN_S = 1.0
"""Mean task time in seconds from which a stage does not count as a stage with tiny tasks.

The list of jobs contains the means, so most stages need no samples.
"""


def earlier_runs(client: Client, name: str) -> list[JobView]:
    """Return the recent jobs with the name `name`. The newest job comes first."""
    return [view for view in client.jobs(limit=MAX_EARLIER_JOBS) if view["name"] == name]


def size_warnings_of(connection: Connection, name: str, pools: Mapping[str, str], new: str = "") -> list[SizeWarning]:
    """Return the warnings about the stages of a job, by the task times of its last runs (see `last_times`)."""
    return size_warnings(last_times(connection, name, pools, new))


def last_times(connection: Connection, name: str, pools: Mapping[str, str], new: str = "") -> list[TaskTimes]:
    """Return the task times of the stages in the last runs of a job with the name `name`.

    `pools` maps the job's stages to their pools. The job with the id `new` is not an earlier run. Stages whose mean
    task time excludes a warning are missing. The list is empty if the grid cannot be reached or refuses an answer,
    because the warnings are advice.
    """
    with suppress(BatchlabError), connection as client:
        runs = [view for view in earlier_runs(client, name) if view["id"] != new]
        return [times for stage, pool in pools.items() for times in _last_times(client, runs, stage, pool)]
    return []


def _last_times(client: Client, runs: Sequence[JobView], name: str, pool: str) -> Iterator[TaskTimes]:
    """Yield the task times of the stage in the newest run that has enough ended tasks of the stage."""
    for view in runs:
        stage = next((one for one in view["stages"] if one["name"] == name), None)
        if stage and (_is_whole(stage) or stage["succeeded"] >= MIN_TASKS):
            if _may_need_warning(stage) and (samples_s := _samples(client, view["id"], stage)):
                yield _times(client, view["id"], stage, samples_s, pool)
            return


def _may_need_warning(stage: StageView) -> bool:
    """Return whether the median task time may be outside of the limits. A median is at most twice the mean."""
    mean_s = stage["mean_s"] or 0.0
    return mean_s < MAX_TINY_MEAN_S or 2 * mean_s > LONG_ON_SPOT_S


def _is_whole(stage: StageView) -> bool:
    return bool(stage["succeeded"]) and stage["succeeded"] == stage["planned"]


def _samples(client: Client, job: str, stage: StageView) -> list[float]:
    """Return the run times in seconds of at most PAGES * TASKS_PER_PAGE succeeded tasks, spread over the stage."""
    name, planned = stage["name"], stage["planned"] or 0
    # The pages of a stage with few tasks follow each other, so that each task is sampled.
    distance = max(planned / PAGES, TASKS_PER_PAGE)
    found: dict[int, float] = {}
    for begin in (int(page * distance) for page in range(PAGES) if page * distance < planned):
        after = task_name(name, begin)
        for task in client.tasks(job, stage=name, state="succeeded", after=after, limit=TASKS_PER_PAGE)["tasks"]:
            if task["run_s"] is not None:
                found[task["task"]] = task["run_s"]
    return list(found.values())


def _times(client: Client, job: str, stage: StageView, samples_s: Sequence[float], pool: str) -> TaskTimes:
    median_s, source = sampled(samples_s, job)
    had_spot = median_s > LONG_ON_SPOT_S and _had_spot(client, job, stage["pool"])
    # An earlier run in another pool says nothing about the Spot Instances of this pool.
    spot = f"pool {pool} had Spot Instances in that run" if had_spot and stage["pool"] == pool else ""
    return TaskTimes(stage["name"], median_s, stage["succeeded"], source, _is_whole(stage), spot)


def _had_spot(client: Client, job: str, pool: str) -> bool:
    """Return whether Spot Instances of the pool were billed for the job."""
    account = client.job_use(job)["account"]
    billed = account["billed"] if account else []
    return any(one["pool"] == pool and one["market"] == "spot" for one in billed)
