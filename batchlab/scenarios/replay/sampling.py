"""Samples of fleet and queues once a second, and the lifetimes of all instances.

All data comes from views of the grid and from scaling activities.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller

from batchlab.client.http import Client
from batchlab.core.api_types import ActivityView, GridView, InstanceView, PoolView
from batchlab.core.model import LifecycleState, Market
from batchlab.core.protocol import object_keys
from batchlab.scenarios.record import InstanceRun, PoolSample, Sample
from batchlab.scenarios.replay.run_state import ManagerConnection

EVERY_S = 1.0
ACTIVITIES = 1000
_UP = LifecycleState.IN_SERVICE.value
_COMING = ("Pending", "Pending:Wait", "Pending:Proceed")
_LAUNCH = re.compile(r"Launching a new (?:EC2 )?instance: (\S+)")
_END = re.compile(r"Terminating (?:EC2 )?instance: (\S+)")


@dataclass(slots=True)
class _InstanceHistory:
    """Known life of one instance.

    Times are the manager's (epoch). `ready_s` and `ended_s` come from activities if possible.
    """

    view: InstanceView
    pool: str
    ready_s: float | None = None
    ended_s: float | None = None


class GridSampler:
    """Samples of a grid since `begin`."""

    def __init__(self, link: ManagerConnection) -> None:
        self.samples: list[Sample] = []
        self.grid: GridView | None = None
        """Latest view of the grid."""
        self._link = link
        self._begun_s = 0.0
        self._lives: dict[str, _InstanceHistory] = {}
        self._told: dict[tuple[str, int], ActivityView] = {}

    @property
    def last(self) -> Sample | None:
        """Return the latest sample."""
        return self.samples[-1] if self.samples else None

    def begin(self, begun_s: float) -> None:
        """Start the run at this time (epoch)."""
        self._begun_s = begun_s

    async def has_up(self, least: Mapping[str, int]) -> bool:
        """Return whether each pool has this many instances in service."""
        grid = await self._link.glance(Client.grid)
        up = {pool["name"]: _pool(pool).in_service for pool in grid["pools"]} if grid else {}
        return all(up.get(name, -1) >= size for name, size in least.items())

    def is_down_to(self, least: Mapping[str, int]) -> bool:
        """Return whether each pool had this size in the latest view, with no instance leaving."""
        if self.last is None or self.grid is None:
            return False
        gone = LifecycleState.TERMINATED.value
        living = {
            pool["name"]: sum(one["state"] != gone for one in pool["instances"])
            for pool in self.grid["pools"]
        }
        return all(
            living.get(name, 0) <= size and self.last.pools[name].desired <= size
            for name, size in least.items()
            if name in self.last.pools
        )

    async def look(self, now_s: float) -> None:
        """Take a sample at `now_s` (epoch), unless the manager does not answer."""
        grid = await self._link.glance(Client.grid)
        if grid is None:
            return
        self.grid = grid
        self.samples.append(_sample(grid, now_s - self._begun_s))
        seen = set()
        for pool in grid["pools"]:
            for instance in pool["instances"]:
                seen.add(instance["id"])
                self._see(pool["name"], instance, now_s)
        for name, life in self._lives.items():
            if name not in seen and life.ended_s is None:
                life.ended_s = now_s

    def _see(self, pool: str, view: InstanceView, now_s: float) -> None:
        life = self._lives.setdefault(view["id"], _InstanceHistory(view, pool))
        life.view = view
        if view["state"] != LifecycleState.TERMINATED.value:
            # An instance may be missing in a single view, for example during a change of the
            # leader.
            life.ended_s = None
        if view["state"] == _UP and life.ready_s is None:
            life.ready_s = now_s
        if view["state"] == LifecycleState.TERMINATED.value and life.ended_s is None:
            life.ended_s = now_s

    async def read_activities(self) -> None:
        """Read the available scaling activities of all pools."""
        for pool in self.grid["pools"] if self.grid else ():
            found = await self._link.glance(
                methodcaller("activities", pool=pool["name"], limit=ACTIVITIES)
            )
            for one in found or ():
                self._told[one["pool"], one["id"]] = one

    def instances(self) -> tuple[InstanceRun, ...]:
        """Return every instance of the run by launch.

        Earlier launches count from the run's start.
        """
        ready, ended = self._times(_LAUNCH), self._times(_END)
        runs = []
        for name, life in self._lives.items():
            view = life.view
            gone_s = life.ended_s
            if gone_s is not None:
                gone_s = min(gone_s, ended.get(name, gone_s))
            if gone_s is not None and gone_s < self._begun_s:
                continue
            ready_s = ready.get(name, life.ready_s)
            runs.append(
                InstanceRun(
                    name,
                    life.pool,
                    view["type"],
                    view["market"],
                    view["zone"],
                    max(0.0, view["launched_s"] - self._begun_s),
                    None if ready_s is None else max(0.0, ready_s - self._begun_s),
                    None if gone_s is None else gone_s - self._begun_s,
                    view["note"],
                )
            )
        return tuple(sorted([*runs, *self._unseen(ended)], key=lambda one: one.launched_s))

    def _unseen(self, ended: Mapping[str, float]) -> Iterator[InstanceRun]:
        """Yield instances that lived only between two samples, by their activities."""
        for one in self._told.values():
            named = _LAUNCH.match(one["description"])
            if not named or named[1] in self._lives or one["at_s"] < self._begun_s:
                continue
            ready_s, gone_s = one["ended_s"], ended.get(named[1])
            yield InstanceRun(
                id=named[1],
                pool=one["pool"],
                type="",
                market=Market.ON_DEMAND.value,
                zone="",
                launched_s=one["at_s"] - self._begun_s,
                ready_s=None if ready_s is None else ready_s - self._begun_s,
                ended_s=None if gone_s is None else gone_s - self._begun_s,
            )

    def _times(self, what: re.Pattern[str]) -> dict[str, float]:
        """Return the end of each instance's successful activity of that kind."""
        found: dict[str, float] = {}
        for one in self._told.values():
            named = what.match(one["description"])
            if named and one["ended_s"] is not None and one["status"] == "Successful":
                found[named[1]] = one["ended_s"]
        return found


def _sample(grid: GridView, at_s: float) -> Sample:
    tasks = {object_keys.tasks_queue(pool["name"]) for pool in grid["pools"]}
    queues = [queue for queue in grid["queues"] if queue["name"] in tasks]
    return Sample(
        at_s,
        {pool["name"]: _pool(pool) for pool in grid["pools"]},
        sum(queue["visible"] + queue["delayed"] for queue in queues),
        sum(queue["in_flight"] for queue in queues),
    )


def _pool(pool: PoolView) -> PoolSample:
    states: Sequence[str] = [one["state"] for one in pool["instances"]]
    return PoolSample(
        pool["desired"],
        states.count(_UP),
        sum(state in _COMING for state in states),
        pool["backlog_tasks"],
        pool["backlog_s"],
    )
