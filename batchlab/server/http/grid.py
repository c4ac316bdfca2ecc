"""Endpoints of the grid: pools, queues, capacity, ledger, shutdown, notifications, usage, and cost caps.

Invariant: the endpoints do not change the notification targets. The grid's files and the jobs define the notification
targets.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Request
from pydantic import BaseModel, ConfigDict, Field

from batchlab import __version__
from batchlab.core import api_types, api_usage_types
from batchlab.core.model import JobId
from batchlab.core.pricing import price_book
from batchlab.core.protocol.field_checks import MAX_S
from batchlab.manager import fleet_commands
from batchlab.server import job_views
from batchlab.server.answers import grid_view, pool_view
from batchlab.server.http.authentication import CODE_S, PAGE, page_session_name
from batchlab.server.http.common import (
    CallerDep,
    Leader,
    Limit,
    NotifierDep,
    SpendingDep,
    StateDep,
    change_text,
    guarded_router,
)
from batchlab.server.http.permissions import store_record

public = APIRouter(prefix="/v1")
router = guarded_router()


@public.get("/health")
async def health(served: StateDep) -> api_types.HealthView:
    """Return the state of the manager, and whether the manager is the leader."""
    leads = served.manager.is_leader.is_set()
    return {"status": "ok", "version": __version__, "leader": leads}


@router.post("/shutdown", status_code=202)
async def shutdown(served: StateDep, after: BackgroundTasks) -> api_types.HealthView:
    """End the manager and the processes that the manager started."""

    async def end() -> None:  # `end` is a coroutine, because FastAPI runs a plain function on another thread
        served.on_shutdown()

    after.add_task(end)
    leads = served.manager.is_leader.is_set()
    return {"status": "ending", "version": __version__, "leader": leads}


@router.post("/sessions", status_code=201)
async def open_session(served: StateDep, caller: CallerDep) -> api_types.SessionView:
    """Return a one-time code that opens the web page for the user of the request.

    The address of the web page contains a one-time code, because the address must not contain the token.
    """
    code = served.sessions.new_code(caller.key)
    path = f"{PAGE}/login#{code}"
    return {"code": code, "name": page_session_name(code), "path": path, "valid_s": CODE_S}


@router.get("/sessions/{name}")
async def session_code(served: StateDep, name: str) -> api_types.CodeView:
    """Return whether the one-time code with the given name is still valid.

    A one-time code becomes invalid after its use or at its expiry.
    """
    return {"name": name, "waits": served.sessions.is_code_valid(name)}


@router.post("/ledger/rebuild")
async def rebuild(manager: Leader) -> api_types.RebuiltView:
    """Rebuild the ledger from the bucket. The response lists the objects that could not be read."""
    rebuilt = await manager.rebuild_ledger()
    unreadable = rebuilt.unreadable.items()
    return {"jobs": rebuilt.jobs, "unreadable": [{"key": key, "reason": reason} for key, reason in unreadable]}


# --- Pools and queues ----------------------------------------------------------------------------


class Scaling(BaseModel):
    """Limits and desired capacity of a pool.

    A limit that the request omits does not change. If `auto` is true, the autoscaler sets the desired capacity again.
    """

    model_config = ConfigDict(extra="forbid")

    min: int | None = None
    max: int | None = None
    desired: int | None = None
    auto: bool | None = None


class Draining(BaseModel):
    """The pool to drain. If no pool is named, all pools are drained."""

    model_config = ConfigDict(extra="forbid")

    pool: str | None = None


@router.get("/grid")
async def grid(manager: Leader, served: StateDep) -> api_types.GridView:
    """Return the pools with their instances, and the queues with their depths."""
    return await grid_view(manager, served.backend_name)


@router.get("/grid/activities")
async def activities(manager: Leader, pool: str | None = None, limit: Limit = 50) -> api_types.ActivitiesView:
    """Return scaling activities of the pools with their causes. The newest activity is the first."""
    activities = await manager.ports.fleet.activities(pool, limit=limit)
    return {"activities": [job_views.activity_view(activity) for activity in activities]}


@router.get("/grid/history")
async def history(manager: Leader, served: StateDep) -> api_types.HistoryView:  # noqa: ARG001 - requires the leader
    """Return the instances, running bundles, and waiting work of each pool during the last half hour."""
    return served.history.view()


@router.post("/grid/pools/{pool}")
async def scale(manager: Leader, request: Request, pool: str, scaling: Scaling) -> api_types.PoolView:
    """Change a pool's limits, set the pool's desired capacity manually, or let the autoscaler set the desired
    capacity.
    """
    await store_record(request.scope, pool, change_text(scaling))
    view = await fleet_commands.scale(
        manager, pool, min_size=scaling.min, max_size=scaling.max, desired=scaling.desired, auto=scaling.auto
    )
    return pool_view(manager, view)


@router.post("/grid/drain")
async def drain(manager: Leader, draining: Draining, served: StateDep, request: Request) -> api_types.GridView:
    """Scale one pool or all pools to zero instances, and keep the pools at zero instances."""
    await store_record(request.scope, draining.pool or "all pools")
    await fleet_commands.drain(manager, draining.pool)
    return await grid_view(manager, served.backend_name)


# --- Notifications --------------------------------------------------------------------------------


@router.get("/notifications")
async def log(notifier: NotifierDep, limit: Limit = 100) -> api_types.NotificationsView:
    """Return pending notifications, and the results of recent notifications."""
    return api_types.log_view(notifier, limit)


@router.get("/notifications/targets")
async def targets(notifier: NotifierDep, manager: Leader) -> api_types.TargetsView:
    """Return the notification targets of the grid and of jobs that have not ended."""
    directory = notifier.directory()
    own = [
        directory.own(live.id, number, notify_def)
        for live in manager.lives.values()
        for number, notify_def in enumerate(live.job.notify, start=1)
    ]
    return {"targets": [api_types.target_view(target) for target in (*directory.targets, *own)]}


@router.post("/notifications/targets/{target}/test")
async def test(notifier: NotifierDep, target: str) -> api_types.TestedView:
    """Send a test notification to a target of the grid."""
    return {"target": target, "error": await notifier.test(target)}


# --- Usage and cost caps ---------------------------------------------------------------------------


class Cap(BaseModel):
    """Cost cap in USD. The value null removes the cost cap."""

    model_config = ConfigDict(extra="forbid")

    max_cost_usd: Annotated[float | None, Field(ge=0, le=MAX_S, allow_inf_nan=False)]


def _cap_text(cap: Cap) -> str:
    return "no cap" if cap.max_cost_usd is None else f"cap {price_book.shown(cap.max_cost_usd)}"


@router.get("/use")
async def use(spending: SpendingDep) -> api_usage_types.UseView:
    """Return the grid's usage in AWS's billing units, and the instances that are billed now."""
    return api_usage_types.use_view(spending)


@router.post("/use/cap")
async def cap_grid(spending: SpendingDep, manager: Leader, request: Request, cap: Cap) -> api_usage_types.UseView:
    """Set the cap on the grid's cost since the grid's account was opened."""
    await store_record(request.scope, "the grid", _cap_text(cap))
    spending.set_cap(None, cap.max_cost_usd)
    manager.wake()
    return api_usage_types.use_view(spending)


@router.get("/jobs/{job}/use")
async def job_use(spending: SpendingDep, manager: Leader, job: JobId) -> api_usage_types.JobUseView:
    """Return the usage of a job."""
    record = await manager.ports.ledger.job(job)
    live = manager.lives.get(job)
    return api_usage_types.job_use_view(
        record.job,
        await spending.account(job),
        manager.pools.values(),
        max_cost_usd=spending.caps.cap_of(live) if live else record.job.max_cost_usd,
        capped=live.capped if live else "",
    )


@router.post("/jobs/{job}/cap")
async def cap_job(
    spending: SpendingDep, manager: Leader, request: Request, job: JobId, cap: Cap
) -> api_usage_types.JobUseView:
    """Set the cap on the cost of a job that has not ended."""
    await store_record(request.scope, job, _cap_text(cap))
    manager.job_commands.running(job, "capped")
    spending.set_cap(job, cap.max_cost_usd)
    manager.wake()
    return await job_use(spending, manager, job)
