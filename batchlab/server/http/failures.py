"""Endpoints that list failed tasks page by page or grouped by cause.

Invariant: a request reads failures from at most MAX_OUTCOMES_READ outcomes in the bucket. The failure groups that the
manager stores between requests are a cache.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Annotated

from fastapi import Query

from batchlab.core import api_types
from batchlab.core.errors import Refused, UsageError
from batchlab.core.model import JobId, StageName, TaskSet
from batchlab.core.ports import BundleRecord, JobRecord
from batchlab.manager.manager import Manager
from batchlab.manager.retry_rounds import RetriedTasks, TaskSelection
from batchlab.server import job_views
from batchlab.server.http.common import (
    OTHERS,
    Groups,
    Leader,
    Limit,
    ServerState,
    StateDep,
    guarded_router,
    outcomes_of,
)

router = guarded_router()

MAX_OUTCOMES_READ = 500
MAX_CACHED_JOBS = 8
"""Maximum number of jobs whose failure groups are cached."""


@router.get("/jobs/{job}/failures")
async def failures(
    manager: Leader,
    served: StateDep,
    job: JobId,
    limit: Limit = 100,
    after: Annotated[str | None, Query(description="Value of `next` in the response with the previous page")] = None,
    fingerprint: str | None = None,
) -> api_types.FailuresView:
    """Return failed tasks, in the order in which the ledger folded their outcomes.

    The answer omits failed tasks that a retry runs again. The parameter `fingerprint` selects the failures of one
    cause. A page with fewer than `limit` tasks may have a next page.
    """
    begin = _cursor(after)
    record = await manager.ports.ledger.job(job)
    rows = await _rows(manager, job, begin[0] - 1)
    others = (await _read_more(manager, served, record))[0].others if fingerprint == OTHERS else {}
    views: list[api_types.FailureView] = []
    async for at, failure in _current_failures(manager, record, rows):
        is_other = failure["task"] in others.get(failure["stage"], ())
        if at < begin or not (is_other or fingerprint in (None, failure["fingerprint"])):
            continue
        if len(views) == limit:
            return {"failures": views, "next": f"{at[0]}.{at[1]}"}
        views.append(failure)
    more = len(rows) == MAX_OUTCOMES_READ
    return {"failures": views, "next": f"{(rows[-1].seq or 0) + 1}.0" if more else None}


def _cursor(after: str | None) -> tuple[int, int]:
    if after is None:
        return 0, 0
    seq, _, at = after.partition(".")
    if not all(part.isascii() and part.isdigit() and len(part) < 18 for part in (seq, at)):
        raise UsageError(f"{after!r} is not a position of a failure.", remedy="Use `next` of the previous page.")
    return int(seq), int(at)


@router.get("/jobs/{job}/failures/groups")
async def failure_groups(manager: Leader, served: StateDep, job: JobId) -> api_types.FailureGroupsView:
    """Return the failed tasks, grouped by stage and fingerprint."""
    record = await manager.ports.ledger.job(job)
    groups, is_whole = await _read_more(manager, served, record)
    live = manager.lives.get(job)
    stages = live.stages.values() if live else (await manager.ports.ledger.rows(job)).stages
    views: list[api_types.FailureGroupView] = [
        {"fingerprint": fingerprint, "stage": stage, "count": len(tasks), "first": groups.first[stage, fingerprint]}
        for (stage, fingerprint), tasks in groups.tasks.items()
    ]
    return {
        "groups": sorted(views, key=lambda group: (-group["count"], group["stage"], group["fingerprint"])),
        "read": sum(map(len, groups.tasks.values())),
        "failed": sum(stage.counts.failed for stage in stages),
        "is_whole": is_whole,
    }


async def chosen_tasks(
    manager: Manager, served: ServerState, job: JobId, fingerprints: Collection[str], tasks: TaskSelection
) -> TaskSelection:
    """Return the tasks in `tasks` together with the failed tasks that have one of the fingerprints.

    Raise Refused for an unknown fingerprint.
    """
    chosen: dict[StageName, list[TaskSet]] = {name: [task_set] for name, task_set in tasks.items()}
    record = await manager.ports.ledger.job(job)
    is_whole = not fingerprints
    groups = Groups(record.round)
    while not is_whole:
        groups, is_whole = await _read_more(manager, served, record)
    for fingerprint in fingerprints:
        causes = [cause for cause in groups.tasks if cause[1] == fingerprint]
        if not causes:
            raise Refused(
                f"No failed task of job {job} has the fingerprint {fingerprint!r}.",
                remedy="`batchlab job failures` lists the fingerprints.",
            )
        for cause in causes:
            chosen.setdefault(StageName(cause[0]), []).append(TaskSet.from_indices(groups.tasks[cause]))
    return {name: TaskSet.union(sets) for name, sets in chosen.items()}


async def _read_more(manager: Manager, served: ServerState, record: JobRecord) -> tuple[Groups, bool]:
    """Read the next outcomes of a job, and add their failures to the failure groups of the job.

    Return the failure groups, and whether all outcomes were read.
    """
    cache = served.groups
    groups = cache.pop(record.job.id, None)
    if groups is None or groups.round != record.round:
        groups = Groups(record.round)
    cache[record.job.id] = groups  # the most recently used job is the last key
    while len(cache) > MAX_CACHED_JOBS:
        del cache[next(iter(cache))]
    rows = await _rows(manager, record.job.id, groups.seq)
    async for _, failure in _current_failures(manager, record, rows):
        groups.add(failure)
    if rows:
        groups.seq = max(groups.seq, rows[-1].seq or 0)
    return groups, len(rows) < MAX_OUTCOMES_READ


async def _rows(manager: Manager, job: JobId, after_seq: int) -> Sequence[BundleRecord]:
    return await manager.ports.ledger.bundles(job, failed=True, after_seq=max(0, after_seq), limit=MAX_OUTCOMES_READ)


async def _current_failures(
    manager: Manager, record: JobRecord, rows: Sequence[BundleRecord]
) -> AsyncIterator[tuple[tuple[int, int], api_types.FailureView]]:
    """Yield each failure of the bundles in `rows` with its position. Skip failures whose task a retry runs again.

    The position of a failure is the seq of the outcome and the failure's index in the outcome.
    """
    retried = await RetriedTasks.read(manager.ports, record)
    async for row, outcome in outcomes_of(manager, rows):
        seq, failed = row.seq or 0, row.completion.failed if row.completion else TaskSet()
        current = set(retried.remaining(row.bundle.round, row.bundle.stage, failed))
        for index, failure in enumerate(outcome.failed):
            if failure.final and failure.task in current:
                yield (seq, index), job_views.failure_view(seq, outcome, failure)
