"""Endpoints of notifications: whom the grid tells, a test of that, and what came of it.

Invariant: nothing here changes whom is told; that stands in the grid's own files and in jobs.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from batchlab import notification, notified
from batchlab.api.common import Leader, Limit, guarded
from batchlab.errors import Refused
from batchlab.manager.manager import Manager
from batchlab.manager.notifying import Notifying

router = guarded()


async def _notifying(manager: Leader) -> Notifying:
    if manager.notifying is None:
        raise Refused(
            "This manager notifies nobody.", remedy="One that `batchlab grid up` starts does."
        )
    return manager.notifying


Telling = Annotated[Notifying, Depends(_notifying)]


@router.get("/notifications")
async def log(telling: Telling, limit: Limit = 100) -> notified.NotificationsView:
    """What is on its way, and what came of what was."""
    return notified.log_view(telling, limit)


@router.get("/notifications/targets")
async def targets(telling: Telling, manager: Leader) -> notified.TargetsView:
    """Whom the grid tells, and whom the jobs name that have not ended."""
    return {"targets": [notified.target_view(one) for one in _all(telling, manager)]}


def _all(telling: Notifying, manager: Manager) -> list[notification.Target]:
    known = telling.directory()
    own = [
        known.own(live.id, number, one)
        for live in manager.lives.values()
        for number, one in enumerate(live.job.notify, start=1)
    ]
    return [*known.targets, *own]


@router.post("/notifications/targets/{target}/test")
async def test(telling: Telling, target: str) -> notified.TestedView:
    """Tell one of the grid's own targets that this is a test, once."""
    return {"target": target, "error": await telling.test(target)}
