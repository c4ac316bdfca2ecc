"""Endpoints of the grid: its pools, queues, capacity, ledger, shutdown, and notifications.

Invariant: the endpoints do not change the notification targets. The grid's own files and the jobs
define them.

Endpoints of the usage and the cost caps of the grid and its jobs.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends
from pydantic import BaseModel, ConfigDict, Field

from batchlab import __version__
from batchlab.core import api_types, api_usage_types, installation, notifications
from batchlab.core.errors import Refused
from batchlab.core.model import GroupView, JobId
from batchlab.core.protocol import object_keys
from batchlab.manager import fleet_commands
from batchlab.manager.manager import Manager
from batchlab.manager.notifier import Notifier
from batchlab.manager.spending import Spending
from batchlab.server import job_views
from batchlab.server.http.authentication import CODE_S, PAGE, page_session_name
from batchlab.server.http.common import Leader, Limit, SpendingDep, StateDep, guarded

public = APIRouter(prefix="/v1")
router = guarded()


@public.get("/health")
async def health(served: StateDep) -> api_types.HealthView:
    """Return whether the manager responds, and whether it is the leader."""
    leads = served.manager.is_leader.is_set()
    return {"status": "ok", "version": __version__, "leader": leads}


@router.post("/shutdown", status_code=202)
async def shutdown(served: StateDep, after: BackgroundTasks) -> api_types.HealthView:
    """End the manager and the processes that it started."""

    async def end() -> None:  # a coroutine, because a plain function would run on another thread
        served.on_shutdown()

    after.add_task(end)
    leads = served.manager.is_leader.is_set()
    return {"status": "ending", "version": __version__, "leader": leads}


@router.post("/sessions", status_code=201)
async def open_session(served: StateDep) -> api_types.SessionView:
    """Return a code that opens the web page once. The token itself must not be a part of an
    address."""
    if module := installation.missing("web"):
        said = installation.sentence("web", "The grid's page", module)
        # A path of this process helps only a client on the same machine.
        is_here = served.capabilities.local_manager
        raise Refused(said, remedy=installation.remedy("web") if is_here else installation.for_a_manager("web"))
    code = served.sessions.code()
    path = f"{PAGE}/login#{code}"
    return {"code": code, "name": page_session_name(code), "path": path, "valid_s": CODE_S}


@router.get("/sessions/{name}")
async def session_code(served: StateDep, name: str) -> api_types.CodeView:
    """Return whether the code with this name is still valid. A code becomes invalid after its use
    or at its expiry."""
    return {"name": name, "waits": served.sessions.waits(name)}


@router.post("/ledger/rebuild")
async def rebuild(manager: Leader) -> api_types.RebuiltView:
    """Rebuild the ledger from the bucket. Objects that cannot be read are skipped and listed."""
    rebuilt = await manager.rebuild_ledger()
    told = rebuilt.unreadable.items()
    return {"jobs": rebuilt.jobs, "unreadable": [{"key": key, "reason": why} for key, why in told]}


# --- Pools and queues ----------------------------------------------------------------------------


class Scaling(BaseModel):
    """Limits and desired capacity of a pool. Omitted values do not change. `auto` true returns the
    pool to the autoscaler."""

    model_config = ConfigDict(extra="forbid")

    min: int | None = None
    max: int | None = None
    desired: int | None = None
    auto: bool | None = None


class Draining(BaseModel):
    """The pool to drain. Without a pool, all pools are drained."""

    model_config = ConfigDict(extra="forbid")

    pool: str | None = None


@router.get("/grid")
async def grid(manager: Leader, served: StateDep) -> api_types.GridView:
    """Return the pools with their instances, and the queues with their depths."""
    return await _grid(manager, served.backend_name)


@router.get("/grid/activities")
async def activities(manager: Leader, pool: str | None = None, limit: Limit = 50) -> api_types.ActivitiesView:
    """Return scaling activities with their causes, newest first."""
    activities = await manager.ports.fleet.activities(pool, limit=limit)
    return {"activities": [job_views.activity_view(activity) for activity in activities]}


@router.get("/grid/history")
async def history(manager: Leader, served: StateDep) -> api_types.HistoryView:  # noqa: ARG001 - requires the leader
    """Return the instances, running bundles, and waiting work of each pool during the last half
    hour."""
    return served.history.view()


@router.post("/grid/pools/{pool}")
async def scale(manager: Leader, pool: str, scaling: Scaling) -> api_types.PoolView:
    """Change a pool's limits, set its desired capacity manually, or return it to the autoscaler."""
    view = await fleet_commands.scale(
        manager, pool, min_size=scaling.min, max_size=scaling.max, desired=scaling.desired, auto=scaling.auto
    )
    return _pool(manager, view)


@router.post("/grid/drain")
async def drain(manager: Leader, draining: Draining, served: StateDep) -> api_types.GridView:
    """Scale one pool or all pools to zero instances, and keep them there."""
    await fleet_commands.drain(manager, draining.pool)
    return await _grid(manager, served.backend_name)


async def _grid(manager: Manager, backend_name: str) -> api_types.GridView:
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
        "pools": [_pool(manager, view) for view in groups.values()],
        "queues": [job_views.queue_view(*one) for one in zip(names, depths, strict=True)],
        "unreadable": manager.counts.unreadable.total(),
    }


def _pool(manager: Manager, view: GroupView) -> api_types.PoolView:
    name = view.pool.name
    scaler = manager.autoscaler
    workers = manager.registry.workers
    return job_views.pool_view(
        view,
        scaler.backlog(name),
        workers,
        held=name in scaler.user_capacity,
        trouble=scaler.launch_breaker.trouble(name),
    )


async def _notifying(manager: Leader) -> Notifier:
    if manager.notifier is None:
        raise Refused("This manager notifies nobody.", remedy="One that `batchlab grid up` starts does.")
    return manager.notifier


NotifierDep = Annotated[Notifier, Depends(_notifying)]


@router.get("/notifications")
async def log(telling: NotifierDep, limit: Limit = 100) -> api_types.NotificationsView:
    """Return pending notifications, and the results of recent ones."""
    return api_types.log_view(telling, limit)


@router.get("/notifications/targets")
async def targets(telling: NotifierDep, manager: Leader) -> api_types.TargetsView:
    """Return the grid's notification targets, and those of jobs that have not ended."""
    return {"targets": [api_types.target_view(target) for target in _all(telling, manager)]}


def _all(telling: Notifier, manager: Manager) -> list[notifications.Target]:
    directory = telling.directory()
    own = [
        directory.own(live.id, number, notify_def)
        for live in manager.lives.values()
        for number, notify_def in enumerate(live.job.notify, start=1)
    ]
    return [*directory.targets, *own]


@router.post("/notifications/targets/{target}/test")
async def test(telling: NotifierDep, target: str) -> api_types.TestedView:
    """Send one test notification to one of the grid's own targets."""
    return {"target": target, "error": await telling.test(target)}


class Cap(BaseModel):
    """Cap in USD. null removes the cap."""

    model_config = ConfigDict(extra="forbid")

    max_cost_usd: Annotated[float | None, Field(ge=0, allow_inf_nan=False)]


@router.get("/use")
async def use(books: SpendingDep) -> api_usage_types.UseView:
    """Return the grid's usage, as AWS bills it, and the instances that are billed now."""
    return api_usage_types.use_view(books)


@router.post("/use/cap")
async def cap_grid(books: SpendingDep, manager: Leader, cap: Cap) -> api_usage_types.UseView:
    """Set the cap on the grid's cost since its account was opened."""
    books.set_cap(None, cap.max_cost_usd)
    manager.wake()
    return api_usage_types.use_view(books)


@router.get("/jobs/{job}/use")
async def job_use(books: SpendingDep, manager: Leader, job: JobId) -> api_usage_types.JobUseView:
    """Return the usage of a job."""
    return await _job_use(books, manager, job)


@router.post("/jobs/{job}/cap")
async def cap_job(books: SpendingDep, manager: Leader, job: JobId, cap: Cap) -> api_usage_types.JobUseView:
    """Set the cap on the cost of a job that has not ended."""
    manager.job_commands.running(job, "capped")
    books.set_cap(job, cap.max_cost_usd)
    manager.wake()
    return await _job_use(books, manager, job)


async def _job_use(books: Spending, manager: Manager, job: JobId) -> api_usage_types.JobUseView:
    record = await manager.ports.ledger.job(job)
    live = manager.lives.get(job)
    return api_usage_types.job_use_view(
        record.job,
        await books.account(job),
        manager.pools.values(),
        max_cost_usd=books.caps.cap_of(live) if live else record.job.max_cost_usd,
        capped=live.capped if live else "",
    )
