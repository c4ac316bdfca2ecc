"""What the API shows of notifications: typed dicts, filled by the manager, read by clients.

Invariant: as in views. An address is shown by its host alone, since its path may be a secret.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import TypedDict  # pydantic refuses the standard one before Python 3.12

if TYPE_CHECKING:
    from batchlab.manager.notifying import Notifying
    from batchlab.notification import Notification, Target


class TargetView(TypedDict):
    """Somebody who is told. `to` is where, without what may be a secret; `signed` says whether what
    is sent is; `job` is whose it is, "" where it is the grid's, which `jobs` may name or not.
    """

    name: str
    kind: str
    to: str
    on: list[str]
    signed: bool
    failures: int
    stuck_s: float
    job: str
    jobs: bool


class TargetsView(TypedDict):
    targets: list[TargetView]


class NotificationView(TypedDict):
    """`state` is pending, delivered or given up; `due_s` when the next try is, where it is pending;
    `error` what came of the last one."""

    id: str
    moment: str
    job: str
    target: str
    at_s: float
    state: str
    attempts: int
    due_s: float | None
    ended_s: float | None
    error: str


class NotificationsView(TypedDict):
    """Those on their way first, then what came of the others, the newest first."""

    notifications: list[NotificationView]


class TestedView(TypedDict):
    """`error` is "" where the test was delivered."""

    target: str
    error: str


def target_view(target: Target) -> TargetView:
    return {
        "name": target.name,
        "kind": target.kind,
        "to": target.shown,
        "on": list(target.on),
        "signed": bool(target.secret),
        "failures": target.failures,
        "stuck_s": target.stuck_s,
        "job": target.job,
        "jobs": target.jobs,
    }


def notification_view(one: Notification) -> NotificationView:
    is_pending = one.state == "pending"
    return {
        "id": one.id,
        "moment": one.moment,
        "job": one.job,
        "target": one.target,
        "at_s": one.at_s,
        "state": one.state,
        "attempts": one.attempts,
        "due_s": one.due_s if is_pending else None,
        "ended_s": one.ended_s,
        "error": one.error,
    }


def log_view(notifying: Notifying, limit: int) -> NotificationsView:
    """The log as it is, of so many at the most."""
    every = [*notifying.book.pending.values(), *reversed(notifying.book.log)]
    return {"notifications": [notification_view(one) for one in every[:limit]]}
