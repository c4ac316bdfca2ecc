"""Answers of the manager to requests about jobs and the grid.

The endpoints of the API and the quick API return these answers. Invariant: the module does not import the web
framework, because the quick API answers requests before the import of the web framework.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import BackendError, NotFound, UsageError
from batchlab.core.fair_share import check_identifier
from batchlab.core.model import GroupView, JobId, Outcome, StageName
from batchlab.core.ports import BundleRecord, ChangeResult, JobRows
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.field_checks import shallow
from batchlab.manager import fleet_commands
from batchlab.server import job_views

if TYPE_CHECKING:
    from batchlab.core import api_types
    from batchlab.core.job_definition import JobDef
    from batchlab.core.users import Caller
    from batchlab.manager.manager import Manager
    from batchlab.manager.state import LiveJob

LEADER_WAIT_S = 3.0
"""Time in seconds that a request waits for the manager to become the leader.

If the manager does not become the leader within LEADER_WAIT_S, the request fails.
"""
MAX_WAIT_S = 60.0
BUSY_WAIT_S = 3.0
"""Time in seconds that a request waits for a lock that another request holds."""
MAX_LISTED = 1000


async def acquire(lock: asyncio.Lock, message: str, remedy: str) -> None:
    """Acquire the lock. Raise BackendError with `message` if another request holds the lock for too long."""
    try:
        async with asyncio.timeout(BUSY_WAIT_S):
            await lock.acquire()
    except TimeoutError:
        raise BackendError(message, remedy=remedy) from None


async def wait_for_change(live: LiveJob, version: int, wait_s: float) -> None:
    """Wait until the job's version differs from `version`, but at most `wait_s` seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await live.wait_for_change(version)


async def outcomes_page(
    manager: Manager, job: JobId, stage: StageName | None, after: int | None, limit: int, wait_s: float
) -> api_types.OutcomesView:
    """Return outcomes with a seq above `after`, of one stage or of all stages.

    If no outcome exists, wait up to `wait_s` seconds for an outcome.
    """
    loop = asyncio.get_running_loop()
    end_s = loop.time() + wait_s
    while True:
        live = manager.lives.get(job)
        # The number of folds is read before the outcomes, so that a fold during the read of the outcomes ends the wait
        # below.
        folds = live.folds if live else 0
        record = live.record if live else await manager.ports.ledger.job(job)
        ended = record.state.ended
        rows: Sequence[tuple[BundleRecord, Outcome | None]]
        recent = live.outcomes_after(after) if live else None
        if recent is not None:
            rows = [(row, outcome) for row, outcome in recent if stage in (None, row.bundle.stage)][:limit]
        else:
            stored = await manager.ports.ledger.bundles(job, stage=stage, done=True, after_seq=after, limit=limit)
            rows = [(row, None) for row in stored]
        if rows or ended or live is None or loop.time() >= end_s:
            key = await manager.ports.keys.key_of(record.job)
            return {
                "outcomes": [job_views.outcome_view(row, key, outcome) for row, outcome in rows],
                "ended": ended and len(rows) < limit,
            }
        while live.folds == folds and not live.record.state.ended and loop.time() < end_s:
            await wait_for_change(live, live.version, end_s - loop.time())


async def accept(
    manager: Manager, job: JobDef, items: list[Any] | None, caller: Caller, *, is_sent: bool = False
) -> ChangeResult:
    """Submit the job of the user `caller`. Raise UsageError if the grid cannot run the job."""
    # The owner comes from the authenticated request, and never from the definition that the client has sent.
    job = replace(job, owner=caller.as_owner)
    try:
        # Job ids must be in lower case. On a file system that ignores case, two ids that differ only in case would name
        # the same files.
        if job.id != job.id.lower():
            raise UsageError(f"The job id {job.id!r} has capital letters.", remedy="Use small letters.")
        manager.admit(job)
    except UsageError as error:
        await _raise_unless_accepted(manager, job.id, error)
    try:
        shallow([*(items or ()), *(value for _, value in job.params)])
    except ValueError as error:
        raise UsageError(
            f"An item or a parameter of job {job.id} cannot be used: {error}.",
            remedy="Nest the value less deeply, or store it as a file.",
        ) from None
    if items is not None and (job.items != len(items) or job.input is not None):
        raise UsageError(
            f"The request for job {job.id} has {len(items)} items, which contradicts the job's `items` or `input`.",
            remedy="Set `items` of the job to the number of items, and leave out `input`.",
        )
    return await manager.job_commands.submit(job, items, is_sent=is_sent, role=caller.role)


async def check_share(manager: Manager, job: JobId, share: str) -> None:
    """Raise UsageError if the grid cannot accept a job with the id `job` because of its share."""
    try:
        manager.fair_share.check_share(check_identifier(share))
    except UsageError as error:
        await _raise_unless_accepted(manager, job, error)


async def _raise_unless_accepted(manager: Manager, job: JobId, error: UsageError) -> None:
    """Raise the error, except for a job that the grid accepted before, even if the grid would refuse the job now."""
    try:
        await manager.ports.ledger.job(job)
    except (NotFound, UnicodeEncodeError):  # a UnicodeEncodeError means that no job can have the id
        raise error from None


async def changed_view(manager: Manager, job: JobId, version: int | None, wait_s: float) -> api_types.JobView:
    """Return the view of a job. With `version`, wait until the job's version differs from `version`."""
    live = manager.lives.get(job)
    if live and version is not None:
        await wait_for_change(live, version, wait_s)
    return await current_view(manager, job)


async def jobs_page(manager: Manager, limit: int, before: str | None, *, active: bool) -> api_types.JobsView:
    """Return a page of jobs, with the newest job first. `before` is the id of the last job of the previous page."""
    page = await manager.ports.ledger.jobs(active=active, limit=limit, before=before)
    return {"jobs": [_view(manager, rows) for rows in page]}


async def current_view(manager: Manager, job: JobId) -> api_types.JobView:
    """Return the view of the job in its current state."""
    if live := manager.lives.get(job):
        return _live_view(manager, live)
    return _view(manager, await manager.ports.ledger.rows(job))


def _view(manager: Manager, rows: JobRows) -> api_types.JobView:
    if live := manager.lives.get(rows.id):
        return _live_view(manager, live)
    trouble = manager.reports.troubles.get(rows.id, "")
    return job_views.job_view(rows.job, rows.stages, report=trouble)


def _live_view(manager: Manager, live: LiveJob) -> api_types.JobView:
    return job_views.job_view(live.record, list(live.stages.values()), live, manager.registry.workers.values())


async def grid_view(manager: Manager, backend_name: str) -> api_types.GridView:
    """Return the pools with their instances, and the queues with their depths."""
    groups = await fleet_commands.groups(manager)
    names = [object_keys.EVENTS]
    for pool in groups:
        names += [object_keys.tasks_queue(pool), object_keys.dead_letters(pool)]
    depths = await asyncio.gather(*(manager.ports.queue.depth(name) for name in names))
    return {
        "backend": backend_name,
        "leader": manager.is_leader.is_set(),
        "owner": manager.owner,
        "settings": asdict(manager.settings),
        "pools": [pool_view(manager, view) for view in groups.values()],
        "queues": [job_views.queue_view(name, depth) for name, depth in zip(names, depths, strict=True)],
        "unreadable": manager.counts.unreadable.total(),
        "trouble": manager.ledger_trouble,
    }


def pool_view(manager: Manager, view: GroupView) -> api_types.PoolView:
    """Return the view of a pool."""
    name = view.pool.name
    scaler = manager.autoscaler
    workers = manager.registry.workers
    return job_views.pool_view(
        view,
        scaler.backlog(name),
        workers,
        held=name in scaler.user_capacity,
        image=manager.pools[name].image if name in manager.pools else "",
        trouble=scaler.launch_breaker.trouble(name),
        ends_in_s=manager.fleet_end.left_s(name),
        end_trouble=manager.fleet_end.trouble(name),
    )
