"""Planted bugs in the ledger, the events, and the fleet.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.core import ledger_projection
from batchlab.core.ledger_projection import BundleRow, Known, Projection
from batchlab.core.model import GroupView, Pool
from batchlab.core.ports import Fold
from batchlab.fleet import termination
from batchlab.manager import autoscaler
from batchlab.manager.autoscaler import Autoscaler
from batchlab.manager.state import Backlog
from tests.sim.mutants.kit import Plant, planted

# --- Events and counters -------------------------------------------------------------------------


def _count(projection: Projection, change: Fold, position: int) -> None:
    c = change.completions[position]
    projection.stage(c.bundle.stage).count(c)
    for stage, lost in change.casualties[position].items():
        projection.stage(stage).cancelled += lost


@planted("I1", "I2", "I3")
def events_counted_without_dedupe(plant: Plant) -> None:
    """The ledger counts every received completion. The tasks of an event that arrives twice are counted twice (I2)."""
    original = ledger_projection.fold

    @plant.everywhere(original)
    def fold(
        projection: Projection, change: Fold, positions: Sequence[int], known: Known, *, first_seq: int
    ) -> tuple[list[int], list[BundleRow] | None]:
        new, rows = original(projection, change, positions, known, first_seq=first_seq)
        for position in positions:
            if position not in new:
                _count(projection, change, position)
        return list(positions), rows or []


@planted("I1", "I2", "I3")
def dedupe_across_calls_only(plant: Plant) -> None:
    """The ledger counts every completion of a call that earlier calls have not counted. Two copies of a completion in
    one call are both counted (I2).
    """
    original = ledger_projection.fold

    @plant.everywhere(original)
    def fold(
        projection: Projection, change: Fold, positions: Sequence[int], known: Known, *, first_seq: int
    ) -> tuple[list[int], list[BundleRow] | None]:
        new, rows = original(projection, change, positions, known, first_seq=first_seq)
        fresh = ledger_projection.keys_of(change, new, with_follows=False)
        again = [
            position
            for position in positions
            if position not in new and ledger_projection.keys_of(change, [position], with_follows=False)[0] in fresh
        ]
        for position in again:
            _count(projection, change, position)
        return sorted(new + again), rows


# --- Capacity ------------------------------------------------------------------------------------


@planted("I5")
def scale_in_takes_a_busy_one(plant: Plant) -> None:
    """Scale-in lowers the desired capacity and lets the group choose the instance. The group terminates its newest
    instance, even if this instance is busy (I5).
    """

    @plant.method(Autoscaler, "protect_the_busy")
    async def protect_the_busy(self: Autoscaler, view: GroupView) -> None:
        pass

    @plant.method(Autoscaler, "_shrink")
    async def _shrink(self: Autoscaler, view: GroupView, desired: int, why: str) -> None:
        await self._ports.fleet.set_desired(view.pool.name, desired, cause=why)


@planted("I5")
def desired_without_a_maximum(plant: Plant) -> None:
    """The desired capacity of a pool follows the backlog, and may exceed the maximum of the pool (I5)."""
    original = autoscaler.desired_capacity

    @plant.everywhere(original)
    def wanted(backlog: Backlog, view: GroupView, drain_target_s: float) -> tuple[int, str]:
        _, why = original(backlog, view, drain_target_s)
        needed = backlog.seconds / (drain_target_s * view.pool.slots)
        return max(view.pool.min_size, round(needed)), why

    @plant.everywhere(termination.clamp)
    def clamp(pool: Pool, desired: int) -> int:
        return desired


@planted("I5")
def scale_in_forgotten(plant: Plant) -> None:
    """The desired capacity of a pool grows with the backlog and never decreases (I5)."""

    @plant.method(Autoscaler, "_may_shrink")
    def _may_shrink(self: Autoscaler, pool: str, backlog: Backlog, now_s: float) -> bool:
        return False
