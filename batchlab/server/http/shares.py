"""Endpoints of the grid's fair-share policy.

Invariant: the answer to a request shows the policy as changed by the request.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, cast

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from batchlab.core import api_usage_types, fair_share
from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.jobs.field_types import SharePrefix
from batchlab.manager.manager import Manager
from batchlab.server.http.common import Leader, change_text, guarded_router
from batchlab.server.http.permissions import store_record

router = guarded_router()

WHOLE_POLICY = "the policy"
"""Changed object of a change of the whole policy in the audit log. A share identifier cannot contain a space."""


class Entry(BaseModel):
    """Entry of the fair-share policy. A value that the request omits does not change. A `max_slots` of 0 removes the
    limit."""

    model_config = ConfigDict(extra="forbid")

    identifier: SharePrefix
    weight: Annotated[float | None, Field(ge=fair_share.MIN_WEIGHT, le=fair_share.MAX_WEIGHT)] = None
    max_slots: Annotated[int | None, Field(ge=0, le=fair_share.MAX_SLOTS)] = None


class Times(BaseModel):
    """Decay, compute reservation, and permitted shares of the fair-share policy. A value that the request omits does
    not change."""

    model_config = ConfigDict(extra="forbid")

    decay_s: Annotated[float | None, Field(gt=0, le=fair_share.MAX_DECAY_S)] = None
    reservation: Annotated[int | None, Field(ge=0, le=fair_share.MAX_RESERVATION)] = None
    only_listed: bool | None = None


class Removal(BaseModel):
    """Entry to remove. Without an identifier, the whole policy is removed."""

    model_config = ConfigDict(extra="forbid")

    identifier: SharePrefix | None = None


@router.get("/shares")
async def list_shares(manager: Leader) -> api_usage_types.SharesView:
    """Return the fair-share policy, and the state of each share in each pool."""
    return _view(manager)


@router.post("/shares")
async def set_share(manager: Leader, request: Request, entry: Entry) -> api_usage_types.SharesView:
    """Set the weight factor or the limit of a share. The first entry creates the policy."""

    def change(policy: SharePolicy) -> SharePolicy:
        new = ShareAttributes(entry.identifier)
        attributes = next((one for one in policy.shares if one.identifier == entry.identifier), new)
        if entry.weight is not None:
            attributes = replace(attributes, weight=entry.weight)
        if entry.max_slots is not None:
            attributes = replace(attributes, max_slots=entry.max_slots or None)
        return policy.with_share(attributes)

    await store_record(request.scope, entry.identifier, change_text(entry, "identifier"))
    await manager.fair_share.change(change)
    return _view(manager)


@router.post("/shares/policy")
async def set_policy(manager: Leader, request: Request, times: Times) -> api_usage_types.SharesView:
    """Set the share decay, the compute reservation, or whether jobs may name only listed shares. The first value
    creates the policy."""
    changes = times.model_dump(exclude_none=True)
    await store_record(request.scope, WHOLE_POLICY, change_text(times))
    await manager.fair_share.change(lambda policy: replace(policy, **changes))
    return _view(manager)


@router.post("/shares/remove")
async def remove_share(manager: Leader, request: Request, removal: Removal) -> api_usage_types.SharesView:
    """Remove an entry of the fair-share policy, or the whole policy."""
    identifier = removal.identifier
    await store_record(request.scope, WHOLE_POLICY if identifier is None else identifier)
    await manager.fair_share.change(None if identifier is None else lambda policy: policy.without_share(identifier))
    return _view(manager)


def _view(manager: Manager) -> api_usage_types.SharesView:
    state = manager.fair_share
    policy = state.policy.to_json() if state.policy else None
    return {
        "policy": cast("api_usage_types.SharePolicyView | None", policy),
        "shares": state.status(),
        "problem": state.problem,
    }
