"""Views of the grid: pools, instances and their workers, queues, activities, curves."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from batchlab.api import grid as api
from batchlab.api.common import Given, Leader
from batchlab.web.rendering import live
from batchlab.web.shared import Page, guarded

router = guarded()

ACTIVITIES = 20


@router.get("/grid")
async def grid(request: Request, manager: Leader, served: Given, page: Page) -> Response:
    """The fleet, as it is."""
    return live(
        request,
        "grid",
        here="grid",
        grid=await page.grid(manager, served),
        activities=(await api.activities(manager, limit=ACTIVITIES))["activities"],
        now_s=manager.ports.clock.now_s(),
    )


@router.get("/history.json")
async def history(manager: Leader, served: Given) -> Response:
    """What the curves are drawn from."""
    return JSONResponse(await api.history(manager, served))
