"""Permissions of the routes: the role that each route of the API and of the web page needs, and the audit of requests.

Invariants: a route without a rule is refused. An endpoint runs only after its rule permits the request, and after the
audit log has stored the request if the request changes something. The audit log then gets the outcome from the status
of the answer. The owner of a job comes from the job's definition, and not from the request.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple, cast

from batchlab.core.errors import Forbidden
from batchlab.core.model import JobId
from batchlab.core.users import Caller, Role, owner_name
from batchlab.manager.audit_log import REFUSED, Change
from batchlab.manager.manager import Manager

Route = tuple[str, str]
"""Method and path template of a route."""

CALLER = "batchlab.caller"
"""Key of a request's authenticated sender in its ASGI scope."""

Scope = MutableMapping[str, Any]
"""ASGI scope of a request."""

_CHANGE = "batchlab.change"
"""Key of a request's `Change` in its ASGI scope."""


class Rule(NamedTuple):
    """Permission to use a route.

    `role` is the needed role. With `own`, the role SUBMIT is enough for a job that the user owns. `action` is the
    command that makes the request, for the audit log, or "" for a request that changes nothing. The endpoint of a rule
    with `is_recorded_later` calls `store_record`, because only the endpoint knows the changed object or the reason.
    """

    role: Role
    action: str = ""
    own: bool = False
    is_recorded_later: bool = False


_VIEW, _SUBMIT, _OPERATE, _ADMINISTER = Role
_SEEN = Rule(_VIEW)

_READS = (
    *("/metrics", "/v1/audit", "/v1/grid", "/v1/grid/activities", "/v1/grid/history", "/v1/jobs", "/v1/jobs/{job}"),
    *("/v1/jobs/{job}/eta", "/v1/jobs/{job}/failures", "/v1/jobs/{job}/failures/groups", "/v1/jobs/{job}/logs"),
    *("/v1/jobs/{job}/logs/after", "/v1/jobs/{job}/outcomes", "/v1/jobs/{job}/results"),
    *("/v1/jobs/{job}/stages/{stage}/tasks/{task}", "/v1/jobs/{job}/stages/{stage}/tasks/{task}/log"),
    *("/v1/jobs/{job}/tasks", "/v1/jobs/{job}/tasks.csv", "/v1/jobs/{job}/timeline", "/v1/jobs/{job}/use"),
    *("/v1/jobs/{job}/why", "/v1/notifications", "/v1/notifications/targets", "/v1/schedules", "/v1/schedules/{name}"),
    *("/v1/schedules/{name}/next", "/v1/sessions/{name}", "/v1/shares", "/v1/use", "/v1/users"),
)

RULES: Mapping[Route, Rule] = {
    **{("GET", path): _SEEN for path in _READS},
    ("POST", "/v1/sessions"): _SEEN,
    # A request for live logs changes nothing for other users: workers store live logs while a client requests them.
    ("POST", "/v1/jobs/{job}/tails"): _SEEN,
    ("POST", "/v1/jobs"): Rule(_SUBMIT, "job submit", is_recorded_later=True),
    ("POST", "/v1/jobs/files"): Rule(_SUBMIT, "job submit", is_recorded_later=True),
    ("POST", "/v1/jobs/{job}/cancel"): Rule(_OPERATE, "job cancel", own=True),
    ("POST", "/v1/jobs/{job}/pause"): Rule(_OPERATE, "job pause", own=True),
    ("POST", "/v1/jobs/{job}/resume"): Rule(_OPERATE, "job resume", own=True),
    ("POST", "/v1/jobs/{job}/retry"): Rule(_OPERATE, "job retry", own=True, is_recorded_later=True),
    ("DELETE", "/v1/jobs/{job}"): Rule(_OPERATE, "job delete", own=True),
    ("POST", "/v1/grid/pools/{pool}"): Rule(_OPERATE, "grid scale", is_recorded_later=True),
    ("POST", "/v1/grid/drain"): Rule(_OPERATE, "grid drain", is_recorded_later=True),
    ("POST", "/v1/notifications/targets/{target}/test"): Rule(_OPERATE, "notify test"),
    ("POST", "/v1/schedules"): Rule(_OPERATE, "schedule add", is_recorded_later=True),
    ("POST", "/v1/schedules/{name}/pause"): Rule(_OPERATE, "schedule pause"),
    ("POST", "/v1/schedules/{name}/resume"): Rule(_OPERATE, "schedule resume"),
    ("POST", "/v1/schedules/{name}/remove"): Rule(_OPERATE, "schedule delete"),
    ("POST", "/v1/schedules/{name}/run"): Rule(_OPERATE, "schedule run"),
    ("POST", "/v1/jobs/{job}/cap"): Rule(_ADMINISTER, "job cap", is_recorded_later=True),
    ("POST", "/v1/use/cap"): Rule(_ADMINISTER, "grid cap", is_recorded_later=True),
    ("POST", "/v1/shares"): Rule(_ADMINISTER, "share set", is_recorded_later=True),
    ("POST", "/v1/shares/policy"): Rule(_ADMINISTER, "share policy", is_recorded_later=True),
    ("POST", "/v1/shares/remove"): Rule(_ADMINISTER, "share remove", is_recorded_later=True),
    ("POST", "/v1/ledger/rebuild"): Rule(_ADMINISTER, "grid rebuild-ledger"),
    ("POST", "/v1/shutdown"): Rule(_ADMINISTER, "grid down"),
    # Only a client with access to the bucket makes direct calls.
    ("POST", "/v1/calls"): Rule(_ADMINISTER),
    ("POST", "/v1/users"): Rule(_ADMINISTER, "user add", is_recorded_later=True),
    ("POST", "/v1/users/{name}/role"): Rule(_ADMINISTER, "user role", is_recorded_later=True),
    ("POST", "/v1/users/{name}/revoke"): Rule(_ADMINISTER, "user revoke"),
}
"""Rules of all routes of the API, except the public routes."""

_PAGE_ACTIONS: Mapping[str, Route] = {
    **{
        f"/jobs/{{job}}/{verb}": ("POST", f"/v1/jobs/{{job}}/{verb}")
        for verb in ["cancel", "pause", "resume", "retry", "cap"]
    },
    "/costs/cap": ("POST", "/v1/use/cap"),
    "/grid/pools/{pool}": ("POST", "/v1/grid/pools/{pool}"),
    "/grid/drain": ("POST", "/v1/grid/drain"),
    "/submit": ("POST", "/v1/jobs/files"),
    **{
        f"/schedules/{{name}}/{verb}": ("POST", f"/v1/schedules/{{name}}/{verb}")
        for verb in ["pause", "resume", "run", "remove"]
    },
}
"""Route of the API for each action of the web page. The action and the question before the action have its rule."""

_PAGE_QUESTIONS = (
    *("/jobs/{job}/cancel", "/jobs/{job}/cap", "/costs/cap", "/grid/pools/{pool}", "/grid/drain", "/submit"),
    "/schedules/{name}/remove",
)
"""Pages that ask for the values or for the confirmation of an action."""

_PAGE_VIEWS = (
    *("/", "/audit", "/costs", "/failures", "/grid", "/history.json", "/jobs/{job}", "/jobs/{job}/failures"),
    *("/jobs/{job}/failures/{fingerprint}", "/jobs/{job}/report.html", "/jobs/{job}/results.zip"),
    *("/jobs/{job}/stages/{stage}/tasks/{task}", "/jobs/{job}/stages/{stage}/tasks/{task}/log", "/jobs/{job}/task"),
    *("/jobs/{job}/tasks", "/jobs/{job}/tasks.csv", "/jobs/{job}/timeline", "/schedules", "/schedules/{name}"),
)

PAGE_RULES: Mapping[Route, Rule] = {
    **{("GET", path): _SEEN for path in _PAGE_VIEWS},
    ("POST", "/logout"): _SEEN,
    **{("GET", path): RULES[_PAGE_ACTIONS[path]]._replace(action="") for path in _PAGE_QUESTIONS},
    **{("POST", path): RULES[route] for path, route in _PAGE_ACTIONS.items()},
}
"""Rules of all routes of the web page, except the login page. The paths are below the web page's path."""


def permits(caller: Caller, rule: Rule, owner: str | None = None) -> bool:
    """Return whether the caller may use a route with the rule. `owner` is the owner of the route's job, if known."""
    if caller.role.includes(rule.role):
        return True
    return rule.own and caller.role.includes(Role.SUBMIT) and caller.name == owner


def may(caller: Caller | None, action: str, owner: str | None = None) -> bool:
    """Return whether the caller may make the change `action`, such as `job cancel`, for a job of `owner`."""
    rule = next(rule for rule in RULES.values() if rule.action == action)
    return caller is not None and permits(caller, rule, owner)


async def authorize(
    manager: Manager, caller: Caller, rules: Mapping[Route, Rule], route: Route, parameters: Mapping[str, Any]
) -> Rule:
    """Return the rule of the route. Unless the caller may use the route, note the refusal, and raise Forbidden."""
    rule = rules.get(route)
    subject, audit = _subject(parameters), manager.audit
    if rule is None or not (permits(caller, rule) or await _permits_owner(manager, caller, rule, subject)):
        action = (rule.action if rule else "") or " ".join(route)
        if audit:
            audit.note_refusal(audit.record(caller.name, caller.role, action, subject, outcome=REFUSED))
        raise _forbidden(caller, rule, action, subject)
    return rule


async def record_change(manager: Manager, scope: Scope, rule: Rule, parameters: Mapping[str, Any]) -> None:
    """Store the record of a permitted request, unless the request changes nothing or the endpoint stores the record.

    Raise BackendError if the record cannot be stored.
    """
    caller = caller_of(scope)
    if rule.action and (audit := manager.audit) and caller:
        subject = _subject(parameters)
        change = scope[_CHANGE] = Change(audit, caller.name, caller.role, rule.action, subject)
        if not rule.is_recorded_later:
            await change.store(subject)


def _subject(parameters: Mapping[str, Any]) -> str:
    """Return the changed object, which the first parameter in the path of a route names, or ""."""
    return str(next(iter(parameters.values()), ""))


async def _permits_owner(manager: Manager, caller: Caller, rule: Rule, job: str) -> bool:
    if not permits(caller, rule, caller.name):
        return False  # Not even the owner of the job may use the route.
    live = manager.lives.get(JobId(job))
    record = live.record if live else await manager.job_record(JobId(job))
    return permits(caller, rule, owner_name(record.job.owner))


def _forbidden(caller: Caller, rule: Rule | None, action: str, subject: str) -> Forbidden:
    if rule is None:
        return Forbidden(f"{action} has no rule, so no user may use it.", remedy="Report this as a bug.")
    of = f" of {subject}" if subject else ""
    needed = f"the role {rule.role}"
    if rule.own:
        needed = f"the role {Role.SUBMIT} for own jobs, and {rule.role} for jobs of others"
    return Forbidden(
        f"The user {caller.name} with the role {caller.role} may not do `{action}`{of}: it needs {needed}.",
        remedy="Ask an administrator of the grid.",
    )


async def store_record(scope: Scope, subject: str, *reasons: str) -> None:
    """Store the record of a change whose rule has `is_recorded_later`. The endpoint calls the function before it makes
    the change. With several reasons, store one record for each reason."""
    change: Change | None = scope.get(_CHANGE)
    if change:
        await change.store(subject, reasons or ("",))


def note_outcome(scope: Scope, status: int, error: str = "") -> None:
    """Note the outcome of a permitted change in the audit log. `status` is the status of the answer.

    Only the first outcome of a request counts. A request without a record does not have an outcome.
    """
    change: Change | None = scope.pop(_CHANGE, None)
    if change:
        change.end(status, error)


def caller_of(scope: Mapping[str, Any]) -> Caller | None:
    """Return the authenticated sender of a request, or None."""
    return cast("Caller | None", scope.get(CALLER))
