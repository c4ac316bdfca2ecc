"""Endpoints of the grid itself: its pools and queues, its capacity, its ledger, its end."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter, BackgroundTasks
from pydantic import BaseModel, ConfigDict

from batchlab import __version__, extras, viewing, views
from batchlab.api.common import Given, Leader, Limit, guarded
from batchlab.api.door import PAGE
from batchlab.api.sessions import CODE_S, name_of
from batchlab.errors import Refused
from batchlab.manager import by_hand
from batchlab.manager.manager import Manager
from batchlab.model import GroupView
from batchlab.protocol import naming

public = APIRouter(prefix="/v1")
router = guarded()


@public.get("/health")
async def health(served: Given) -> views.HealthView:
    """Whether the manager answers, and leads."""
    leads = served.manager.is_leader.is_set()
    return {"status": "ok", "version": __version__, "leader": leads}


@router.post("/shutdown", status_code=202)
async def shutdown(served: Given, after: BackgroundTasks) -> views.HealthView:
    """End the manager, and with it what it started."""

    async def end() -> None:  # asynchronous: a plain function would be called in another thread
        served.on_shutdown()

    after.add_task(end)
    leads = served.manager.is_leader.is_set()
    return {"status": "ending", "version": __version__, "leader": leads}


@router.post("/sessions", status_code=201)
async def open_session(served: Given) -> views.SessionView:
    """A code that opens the web page once; the token itself has no place in an address."""
    if module := extras.missing("web"):
        said = extras.sentence("web", "The grid's page", module)
        # A path of this process is of use only to a client on the same machine.
        is_here = served.capabilities.local_manager
        raise Refused(said, remedy=extras.remedy("web") if is_here else extras.for_a_manager("web"))
    code = served.sessions.code()
    path = f"{PAGE}/login#{code}"
    return {"code": code, "name": name_of(code), "path": path, "valid_s": CODE_S}


@router.get("/sessions/{name}")
async def session_code(served: Given, name: str) -> views.CodeView:
    """Whether a code, by its name, may still be used: not once it was, nor after its time."""
    return {"name": name, "waits": served.sessions.waits(name)}


@router.post("/ledger/rebuild")
async def rebuild(manager: Leader) -> views.RebuiltView:
    """Make the ledger anew from the bucket alone; go on past objects that cannot be read."""
    rebuilt = await manager.rebuild_ledger()
    told = rebuilt.unreadable.items()
    return {
        "jobs": rebuilt.jobs,
        "unreadable": [{"key": key, "reason": why} for key, why in told],
    }


# --- Pools and queues ----------------------------------------------------------------------------


class Scaling(BaseModel):
    """What is left out stays as it is. `auto` true hands the pool back to the policy."""

    model_config = ConfigDict(extra="forbid")

    min: int | None = None
    max: int | None = None
    desired: int | None = None
    auto: bool | None = None


class Draining(BaseModel):
    """Without a pool it is all of them."""

    model_config = ConfigDict(extra="forbid")

    pool: str | None = None


@router.get("/grid")
async def grid(manager: Leader, served: Given) -> views.GridView:
    """Pools with their instances, and queues with their depths."""
    return await _grid(manager, served.backend_name)


@router.get("/grid/activities")
async def activities(
    manager: Leader, pool: str | None = None, limit: Limit = 50
) -> views.ActivitiesView:
    """Scaling activities with their causes, newest first."""
    found = await manager.ports.fleet.activities(pool, limit=limit)
    return {"activities": [viewing.activity_view(activity) for activity in found]}


@router.get("/grid/history")
async def history(manager: Leader, served: Given) -> views.HistoryView:  # noqa: ARG001 - who leads
    """Instances, running bundles and what waits, pool by pool, over the last half hour."""
    return served.history.view()


@router.post("/grid/pools/{pool}")
async def scale(manager: Leader, pool: str, scaling: Scaling) -> views.PoolView:
    """Change a pool's limits, set its capacity by hand, or hand it back to the policy."""
    view = await by_hand.scale(
        manager,
        pool,
        min_size=scaling.min,
        max_size=scaling.max,
        desired=scaling.desired,
        auto=scaling.auto,
    )
    return _pool(manager, view)


@router.post("/grid/drain")
async def drain(manager: Leader, draining: Draining, served: Given) -> views.GridView:
    """Take one pool, or all, to no instances, and hold it there."""
    await by_hand.drain(manager, draining.pool)
    return await _grid(manager, served.backend_name)


async def _grid(manager: Manager, backend_name: str) -> views.GridView:
    groups = await by_hand.groups(manager)
    names = [naming.EVENTS]
    for pool in groups:
        names += [naming.tasks_queue(pool), naming.dead_letters(pool)]
    depths = await asyncio.gather(*(manager.ports.queue.depth(name) for name in names))
    return {
        "backend": backend_name,
        "leader": manager.is_leader.is_set(),
        "owner": manager.owner,
        "settings": asdict(manager.settings),
        "pools": [_pool(manager, view) for view in groups.values()],
        "queues": [viewing.queue_view(*one) for one in zip(names, depths, strict=True)],
        "unreadable": manager.counts.unreadable.total(),
    }


def _pool(manager: Manager, view: GroupView) -> views.PoolView:
    name = view.pool.name
    scaler = manager.autoscaler
    workers = manager.registry.workers
    return viewing.pool_view(
        view,
        scaler.backlog(name),
        workers,
        held=name in scaler.held,
        trouble=scaler.boots.trouble(name),
    )
