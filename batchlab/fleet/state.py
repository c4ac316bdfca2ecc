"""An Auto Scaling group as plain data: members, the table of allowed moves, activities, storage.

Invariant: a member changes state only through `move`, hence only along an arrow of MOVES.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from batchlab.errors import BackendError
from batchlab.model import Activity, GroupView, Instance, LifecycleState, Pool

MOVES: dict[LifecycleState, frozenset[LifecycleState]] = {
    LifecycleState.PENDING: frozenset({LifecycleState.IN_SERVICE, LifecycleState.TERMINATING}),
    LifecycleState.IN_SERVICE: frozenset({LifecycleState.TERMINATING}),
    # An instance found dead passes through here as well, so that a hook on leaving has one place.
    LifecycleState.TERMINATING: frozenset({LifecycleState.TERMINATED}),
    LifecycleState.TERMINATED: frozenset(),
}
COUNTED = frozenset({LifecycleState.PENDING, LifecycleState.IN_SERVICE})
"""The states that count towards desired capacity; I5 bounds their number."""

KEEP_ACTIVITIES = 200
_FORMAT = 1


class Store(Protocol):
    """Where a fleet keeps its state over a restart of the manager: one value, replaced whole."""

    def load(self) -> bytes | None:
        """What was saved last, None where nothing was."""

    def save(self, data: bytes) -> None:
        """Replace it atomically: after a crash `load` gives the old value or the new one."""


@dataclass(slots=True)
class Member:
    """An instance with what its group alone knows about it.

    The three flags below `ready` and `since_s` do not outlive the manager: the next one asks the
    launcher again, gives the health-check grace period anew and repeats the request to terminate.
    """

    instance: Instance
    launch: int
    """Id of the activity that launched it; `end` of the one that ended it, 0 before."""
    end: int = 0
    ready: bool = False
    """The worker in it has reported for work."""
    running: bool = False
    """The launcher says that it lives."""
    asked: bool = False
    """The launcher was told to terminate it."""
    since_s: float = 0.0
    """Monotonic seconds of its launch or, once Terminated, of its end."""

    @property
    def state(self) -> LifecycleState:
        return self.instance.state

    @property
    def counted(self) -> bool:
        return self.instance.state in COUNTED

    def move(self, state: LifecycleState, *, note: str) -> None:
        """Change state; ValueError where the table has no such arrow, which is a defect."""
        if state not in MOVES[self.state]:
            raise ValueError(f"{self.instance.id} cannot go from {self.state} to {state}")
        self.instance = replace(self.instance, state=state, note=note)


@dataclass(slots=True)
class Group:
    """One pool's Auto Scaling group. `members` are in order of launch, the newest last.

    The crash-loop fields do not outlive the manager: whoever restarts it has often mended the
    cause and should not wait.
    """

    pool: Pool
    desired: int
    members: dict[str, Member] = field(default_factory=dict)
    stuck: int = 0
    """How far above desired capacity scale-in protection held the group when last reported."""
    failures: int = 0
    """Instances in a row that ended before they were ready."""
    reason: str = ""
    """How the last of those ended."""
    failed: bool = False
    """One more did since the wait was last computed."""
    waits: int = 0
    """Waits of this crash loop so far; each is twice as long as the one before."""
    retry_s: float = 0.0
    """Monotonic seconds before which a crash loop launches nothing."""

    def counted(self) -> list[Member]:
        """The members that count towards desired capacity, the newest last."""
        return [member for member in self.members.values() if member.counted]

    def view(self) -> GroupView:
        return GroupView(
            self.pool, self.desired, tuple(member.instance for member in self.members.values())
        )

    def calm(self) -> None:
        """Forget a crash loop: an instance became ready, or the pool was changed."""
        self.failures, self.reason, self.failed = 0, "", False
        self.waits, self.retry_s = 0, 0.0


class ActivityLog:
    """The last 200 activities of each pool; pool "" stands for the fleet as a whole."""

    def __init__(self) -> None:
        self._next = 1
        self._pools: dict[str, dict[int, Activity]] = {}

    def add(self, pool: str, at_s: float, description: str, cause: str, status: str) -> int:
        """Record one activity, return its id, which is greater than all before."""
        number, self._next = self._next, self._next + 1
        kept = self._pools.setdefault(pool, {})
        kept[number] = Activity(number, pool, at_s, description, cause, status)
        if len(kept) > KEEP_ACTIVITIES:
            del kept[next(iter(kept))]
        return number

    def settle(self, pool: str, number: int, status: str, *, more: str = "") -> None:
        """Give an activity in progress its final status and add to its cause.

        One that is settled already, or no longer kept, is left alone.
        """
        old = self._pools.get(pool, {}).get(number)
        if old is not None and old.status == "InProgress":
            self._pools[pool][number] = replace(old, status=status, cause=old.cause + more)

    def newest(self, pool: str | None, limit: int) -> Sequence[Activity]:
        """Up to `limit` activities of one pool, or of all, newest first."""
        if pool is not None:
            return list(self._pools.get(pool, {}).values())[::-1][:limit]
        return sorted(self, key=lambda activity: activity.id, reverse=True)[:limit]

    def __iter__(self) -> Iterator[Activity]:
        for kept in self._pools.values():
            yield from kept.values()

    @classmethod
    def restore(cls, activities: Sequence[Activity], following: int) -> ActivityLog:
        """A log with these activities, whose next id is `following`."""
        log = cls()
        for activity in activities:
            log._pools.setdefault(activity.pool, {})[activity.id] = activity
        log._next = following
        return log

    @property
    def following(self) -> int:
        return self._next


def encode(groups: dict[str, Group], log: ActivityLog) -> bytes:
    """The state as JSON."""
    return json.dumps(
        {
            "format": _FORMAT,
            "next_activity": log.following,
            "groups": [_group(group) for group in groups.values()],
            "activities": [[a.id, a.pool, a.at_s, a.description, a.cause, a.status] for a in log],
        },
        separators=(",", ":"),
    ).encode()


def decode(data: bytes) -> tuple[dict[str, Group], ActivityLog]:
    """The inverse of `encode`; BackendError for anything it did not write."""
    try:
        state = json.loads(data)
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']}, not {_FORMAT}")
        groups = [_regroup(saved) for saved in state["groups"]]
        log = ActivityLog.restore(
            [Activity(*saved) for saved in state["activities"]], state["next_activity"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"The fleet's saved state cannot be read: {error}.",
            remedy="Move it away (fleet/groups.json in the grid's folder) to start anew; instances "
            "still running are then terminated.",
        ) from error
    return {group.pool.name: group for group in groups}, log


def _group(group: Group) -> dict[str, Any]:
    return {
        "pool": asdict(group.pool),
        "desired": group.desired,
        "members": [
            [i.id, i.state, i.launched_s, i.healthy, i.protected, i.note, m.launch, m.end, m.ready]
            for m, i in ((member, member.instance) for member in group.members.values())
        ],
    }


def _regroup(saved: dict[str, Any]) -> Group:
    env = tuple((key, value) for key, value in saved["pool"].pop("env"))
    group = Group(Pool(**saved["pool"], env=env), saved["desired"])
    for id_, state, launched_s, healthy, protected, note, launch, end, ready in saved["members"]:
        instance = Instance(
            id_, group.pool.name, LifecycleState(state), launched_s, healthy, protected, note
        )
        group.members[id_] = Member(instance, launch, end, ready)
    return group
