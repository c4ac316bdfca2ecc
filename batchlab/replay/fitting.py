"""Whether a grid is the one that a scenario asks for, and what its manager is to be told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from batchlab.errors import Refused
from batchlab.scenario.model import Policy, Scenario
from batchlab.views import GridView, JobView

_HOW = "Take it down with `batchlab grid down`, or name another folder with --home."
_STACK = "Let the scenario have the stack's own, or change the stack with `batchlab deploy apply`."
_CLOSE = 1e-6


def settings_of(policy: Policy) -> Mapping[str, float]:
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
                f"The pool {wanted.name!r} of the grid that is up is {_form(*theirs)}, and the "
                f"scenario asks for {_form(*ours)}.",
                remedy=remedy,
            )
        if found["held_by_hand"]:
            raise Refused(
                f"The capacity of the pool {wanted.name!r} of the grid that is up is set by hand.",
                remedy=f"`batchlab grid scale {wanted.name} --auto` hands it back to the policy.",
            )
    for name, value in settings_of(scenario.policy).items():
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


def _form(least: int, most: int, slots: int) -> str:
    return f"{least}-{most}x{slots}"
