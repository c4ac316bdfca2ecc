"""Endpoints of users and of the audit log.

Invariant: an answer contains the token of a user only once, when the user is added. A user who may not administer the
grid sees only the user's own entry in the list of users, and only the user's own records in the audit log.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, cast

from fastapi import Query, Request
from pydantic import BaseModel, ConfigDict, Field

from batchlab.core import api_types
from batchlab.core.errors import Forbidden, Refused
from batchlab.core.protocol.field_checks import MAX_S
from batchlab.core.users import Caller, Role, user_token
from batchlab.manager.audit_log import OUTCOMES, AuditFilter
from batchlab.server.http.common import CallerDep, Leader, Limit, StateDep, guarded_router
from batchlab.server.http.permissions import store_record

router = guarded_router()

Text = Annotated[str, Query(max_length=200)]
"""Value that the records of a page have."""
Before = Annotated[str, Query(pattern=r"^[0-9a-f.json-]*(:[0-9]{1,6})?$", max_length=70)]


class NewUser(BaseModel):
    """A user to add. `expires_s` is in epoch seconds. With `replace`, the user may exist and gets a new token."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200)]
    role: Role
    expires_s: Annotated[float | None, Field(ge=0, le=MAX_S, allow_inf_nan=False)] = None
    replace: bool = False


class NewRole(BaseModel):
    """The new role of a user."""

    model_config = ConfigDict(extra="forbid")

    role: Role


@router.get("/users")
async def list_users(served: StateDep, manager: Leader, caller: CallerDep) -> api_types.UsersView:
    """Return the users of the grid by name, without the owner of the grid's token."""
    now_s = manager.ports.clock.now_s()
    seen = [user for user in await served.users.all() if may_administer(caller) or user.name == caller.name]
    return {"users": [api_types.user_view(user, now_s) for user in seen]}


@router.post("/users", status_code=201)
async def add_user(
    served: StateDep, manager: Leader, caller: CallerDep, request: Request, new: NewUser
) -> api_types.NewUserView:
    """Add a user, and return the token of the user. The manager cannot show the token again."""
    await store_record(request.scope, new.name, f"role {new.role}")
    user, key = await served.users.add(
        new.name, new.role, by=caller.name, expires_s=new.expires_s, replacing=new.replace
    )
    now_s = manager.ports.clock.now_s()
    return {"user": api_types.user_view(user, now_s), "token": user_token(served.token, key)}


@router.post("/users/{name}/role")
async def set_role(served: StateDep, manager: Leader, request: Request, name: str, new: NewRole) -> api_types.UserView:
    """Change the role of a user. The token and the sessions of the user stay valid."""
    await store_record(request.scope, name, f"role {new.role}")
    return api_types.user_view(await served.users.set_role(name, new.role), manager.ports.clock.now_s())


@router.post("/users/{name}/revoke")
async def revoke_user(served: StateDep, manager: Leader, name: str) -> api_types.UserView:
    """Revoke the token of a user. The sessions of the user end, too."""
    return api_types.user_view(await served.users.revoke(name), manager.ports.clock.now_s())


@router.get("/audit")
async def audit(
    manager: Leader,
    caller: CallerDep,
    user: Text = "",
    action: Text = "",
    outcome: Text = "",
    since_s: Annotated[float, Query(ge=0, le=MAX_S, allow_inf_nan=False)] = 0.0,
    until_s: Annotated[float, Query(ge=0, le=MAX_S, allow_inf_nan=False)] = MAX_S,
    before: Before = "",
    limit: Limit = 100,
) -> api_types.AuditView:
    """Return audit records with the newest first. `before` is `next` of the previous page.

    A page may have fewer records than `limit` if the next page has further records.
    """
    if manager.audit is None:
        raise Refused("This manager does not write an audit log.", remedy="Use the manager of a running grid.")
    if outcome and outcome not in OUTCOMES:
        raise Refused(f"{outcome!r} is not an outcome.", remedy=f"Write {', '.join(OUTCOMES[:-1])}, or {OUTCOMES[-1]}.")
    if not may_administer(caller):
        if user not in ("", caller.name):
            raise Forbidden(
                f"The user {caller.name} with the role {caller.role} may read only their own audit records.",
                remedy="Ask an administrator of the grid.",
            )
        user = caller.name
    records, following = await manager.audit.page(AuditFilter(user, action, outcome, since_s, until_s), limit, before)
    return {"records": [cast("api_types.AuditRecordView", asdict(record)) for record in records], "next": following}


def may_administer(caller: Caller) -> bool:
    """Return whether the caller sees all users and all records of the audit log."""
    return caller.role.includes(Role.ADMINISTER)
