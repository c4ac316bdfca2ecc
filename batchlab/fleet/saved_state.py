"""Encoding of a fleet's saved state. Format 1 of the saved state has only pools of the Fleet port, and activities
without end times."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import BackendError
from batchlab.core.model import Activity, Instance, LifecycleState, Machine, Market, Pool
from batchlab.core.ports import ANY_MACHINE
from batchlab.fleet.group_state import FINAL, ActivityLog, Asg, AsgMember, Group, Member

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_FORMAT = 2
_PLAIN = AsgMember()


@cache
def _asg_adapter() -> TypeAdapter[Asg]:
    # Groups of the Fleet port do not need pydantic, whose import takes a tenth of a manager's start-up time.
    from pydantic import TypeAdapter

    return TypeAdapter(Asg)


@cache
def _bond_adapter() -> TypeAdapter[AsgMember]:
    from pydantic import TypeAdapter

    return TypeAdapter(AsgMember)


def encode(groups: dict[str, Group], log: ActivityLog) -> bytes:
    state = {"format": _FORMAT, "next_activity": log.following, "groups": [_group(group) for group in groups.values()]}
    activities = ",".join(log.written(_activity_text))
    return f'{_dumps(state)[:-1]},"activities":[{activities}]}}'.encode()


_dumps = json.JSONEncoder(separators=(",", ":")).encode


def _activity_text(a: Activity) -> str:
    return _dumps([a.id, a.pool, a.at_s, a.description, a.cause, a.status, a.ended_s, a.message])


def decode(data: bytes) -> tuple[dict[str, Group], ActivityLog]:
    """Return the groups and the activity log that `encode` has encoded. Raise BackendError if the data is
    unreadable."""
    try:
        state = json.loads(data)
        if state["format"] not in (1, _FORMAT):
            raise ValueError(f"format {state['format']}, not {_FORMAT}")
        groups = [_regroup(saved) for saved in state["groups"]]
        log = ActivityLog.restore([_activity(*saved) for saved in state["activities"]], state["next_activity"])
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"The fleet's saved state cannot be read: {error}.",
            remedy="Move fleet/groups.json out of the grid's folder to start with an empty fleet. "
            "Running instances are then terminated.",
        ) from error
    return {group.pool.name: group for group in groups}, log


def _activity(
    id_: int,
    pool: str,
    at_s: float,
    description: str,
    cause: str,
    status: str,
    ended_s: float | None = None,
    message: str = "",
) -> Activity:
    if ended_s is None and status in FINAL:
        ended_s = at_s
    return Activity(id_, pool, at_s, description, cause, status, ended_s, message)


def _group(group: Group) -> dict[str, Any]:
    saved: dict[str, Any] = {
        "pool": _pool(group.pool),
        "desired": group.desired,
        "members": [_member(member) for member in group.members.values()],
    }
    if group.end_s is not None:
        saved["end_s"] = group.end_s
    if group.asg is not None:
        saved["asg"] = _asg_adapter().dump_python(group.asg, mode="json")
    return saved


@lru_cache(maxsize=256)
def _pool(pool: Pool) -> dict[str, Any]:
    saved = asdict(pool)
    if not pool.gpus:
        del saved["gpus"]  # An earlier release does not know the field.
    return saved


def _member(m: Member) -> list[Any]:
    i = m.instance
    saved: list[Any] = [i.id, i.state, i.launched_s, i.healthy, i.protected, i.note, m.launch, m.end, m.ready]
    if i.machine != ANY_MACHINE or m.asg != _PLAIN:
        machine = [i.machine.type, i.machine.zone, i.machine.market]
        saved += [machine, _bond_adapter().dump_python(m.asg, mode="json")]
    return saved


def _regroup(saved: dict[str, Any]) -> Group:
    env = tuple((key, value) for key, value in saved["pool"].pop("env"))
    group = Group(Pool(**saved["pool"], env=env), saved["desired"], end_s=saved.get("end_s"))
    if "asg" in saved:
        group.asg = _asg_adapter().validate_python(saved["asg"])
    for member in saved["members"]:
        again = _remember(group.pool.name, *member)
        group.members[again.instance.id] = again
    return group


def _remember(
    pool: str,
    id_: str,
    state: str,
    launched_s: float,
    healthy: bool,
    protected: bool,
    note: str,
    launch: int,
    end: int,
    ready: bool,
    machine: tuple[str, str, str] = ("", "", Market.ON_DEMAND),
    bond: dict[str, Any] | None = None,
) -> Member:
    kind, zone, market = machine
    instance = Instance(
        id=id_,
        pool=pool,
        state=LifecycleState(state),
        launched_s=launched_s,
        healthy=healthy,
        protected=protected,
        note=note,
        machine=Machine(kind, zone, Market(market)),
    )
    again = Member(instance, launch, end, ready)
    if bond is not None:
        again.asg = _bond_adapter().validate_python(bond)
    return again
