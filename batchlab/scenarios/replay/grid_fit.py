"""Whether a grid is the one that a scenario asks for, and what its manager is to be told.

Scheduled capacity: a pool's least size raised for a while.

Invariant: where several want a pool warm at the same time, the largest counts; and however a run
is left, the pool's own least size counts again.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress

from batchlab.core.api_types import GridView, JobView, PoolView
from batchlab.core.errors import BackendError, Refused
from batchlab.scenarios.model.values import Policy, Prewarm, Scenario
from batchlab.scenarios.replay.run_state import ManagerConnection, RunState
from batchlab.scenarios.replay.sampling import EVERY_S, GridSampler

_HOW = "Take it down with `batchlab grid down`, or name another folder with --home."
_STACK = "Let the scenario have the stack's own, or change the stack with `batchlab deploy apply`."
_CLOSE = 1e-6


def policy_settings(policy: Policy) -> Mapping[str, float]:
    """What the scenario asks of the manager, by the manager's own names."""
    named = {
        "drain_target_s": policy.drain_target_s,
        "cooldown_in_s": policy.cooldown_in_s,
        "idle_s": policy.idle_s,
    }
    return {name: value for name, value in named.items() if value is not None}


def check(grid: GridView, scenario: Scenario, *, deployed: bool) -> None:
    """Refused where the grid's pools or its policy are others than the scenario's. Pools that only
    the grid has stand by."""
    remedy = _STACK if deployed else _HOW
    there = {pool["name"]: pool for pool in grid["pools"]}
    for plan in scenario.pools:
        wanted, found = plan.pool, there.get(plan.pool.name)
        if found is None:
            raise Refused(
                f"The grid that is up has no pool {wanted.name!r}, which the scenario asks for.",
                remedy=remedy,
            )
        ours = (wanted.min_size, wanted.max_size, wanted.slots)
        theirs = (found["min"], found["max"], found["slots"])
        if ours != theirs:
            raise Refused(
                f"The pool {wanted.name!r} of the grid that is up is {_describe_pool(*theirs)}, "
                f"and the scenario asks for {_describe_pool(*ours)}.",
                remedy=remedy,
            )
        if found["held_by_hand"]:
            raise Refused(
                f"The capacity of the pool {wanted.name!r} of the grid that is up is set by hand.",
                remedy=f"`batchlab grid scale {wanted.name} --auto` hands it back to the policy.",
            )
    for name, value in policy_settings(scenario.policy).items():
        is_so = grid["settings"].get(name)
        if is_so is None or not math.isclose(is_so, value, rel_tol=_CLOSE):
            shown = "not known" if is_so is None else f"{is_so:g}"
            raise Refused(
                f"{name} of the grid that is up is {shown}, and the scenario asks for {value:g}.",
                remedy=remedy,
            )


def check_quiet(active: Sequence[JobView]) -> None:
    """Refused where the grid has other work to do: it would be measured along."""
    if active:
        others = f" and {len(active) - 1} others" if len(active) > 1 else ""
        raise Refused(
            f"The grid has a job that has not ended: {active[0]['id']}{others}.",
            remedy="Wait for it, cancel it with `batchlab job cancel`, or name another folder "
            "with --home.",
        )


def _describe_pool(least: int, most: int, slots: int) -> str:
    return f"{least}-{most}x{slots}"


class Prewarmer:
    """Of one run. Another manager than the one that was told has limits of its own: it is told
    again as soon as it is seen to lead."""

    def __init__(self, course: RunState, link: ManagerConnection, sampler: GridSampler) -> None:
        self._course = course
        self._link = link
        self._sampler = sampler
        self._own = {one.pool.name: one.pool.min_size for one in course.scenario.pools}
        self._wanted: dict[str, list[int]] = defaultdict(list)
        self._told: dict[str, tuple[int, str]] = {}
        """What each pool's least size was made last, and who led then."""
        self._telling: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._flying: set[asyncio.Task[PoolView]] = set()

    async def warm(self, one: Prewarm) -> None:
        """Wait for its time, and keep the pool warm until that is over. BackendError."""
        await self._course.until(one.at_s)
        self._wanted[one.pool].append(one.min_size)
        while (left_s := one.until_s - self._course.at_s()) > 0:
            await self._tell(one.pool)
            await asyncio.sleep(min(EVERY_S, left_s))
        self._wanted[one.pool].remove(one.min_size)
        await self._tell(one.pool)

    async def cool(self, *, within_s: float) -> None:
        """All pools have their own least size, as far as the manager can be told."""
        if self._flying:  # else what is in a thread could come after what is told now
            _, late = await asyncio.wait(set(self._flying), timeout=within_s)
            for one in late:
                one.cancel()
        for pool in list(self._told):
            self._wanted[pool].clear()
            # What was noted may have failed.
            self._told.pop(pool, None)
            with suppress(BackendError):
                await self._tell(pool, within_s=within_s)

    async def _tell(self, pool: str, *, within_s: float | None = None) -> None:
        async with self._telling[pool]:  # what was told last must be what is wanted last
            least = max(self._own[pool], *self._wanted[pool], 0)
            leads = self._sampler.grid["owner"] if self._sampler.grid else ""
            if self._told.get(pool) == (least, leads):
                return
            # Noted before it is so: who is cancelled meanwhile has it taken back.
            self._told[pool] = least, leads
            call = self._link.call(lambda there: there.scale(pool, min=least), within_s=within_s)
            flying = asyncio.create_task(call)
            self._flying.add(flying)
            flying.add_done_callback(self._flying.discard)
            await asyncio.shield(flying)
