"""Planted bugs of the fair-share policy.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from batchlab.core import fair_share
from batchlab.core.fair_share import ShareLoad, SharePolicy
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Completion, JobId
from batchlab.manager.fair_share import FairShare, Scope
from batchlab.manager.state import LiveJob
from tests.sim.mutants.kit import Plant, planted


@planted("share", weather="shares")
def weight_factor_inverted(plant: Plant) -> None:
    """A higher weight factor means a larger share. The share with the lower weight factor waits for the other shares
    (share).
    """
    original = fair_share.places

    @plant.everywhere(original)
    def places(loads: Mapping[str, ShareLoad], window: int) -> dict[str, int]:
        return original({share: replace(load, weight=1 / load.weight) for share, load in loads.items()}, window)


@planted("share", weather="shares")
def use_never_decays(plant: Plant) -> None:
    """The use of a share does not decay. A share that was busy long ago waits for shares that were busy recently
    (share).
    """

    @plant.method(SharePolicy, "decayed")
    def decayed(self: SharePolicy, use_s: float, age_s: float) -> float:
        return use_s


@planted("share", weather="shares")
def limit_of_a_share_ignored(plant: Plant) -> None:
    """The manager ignores the maximum number of slots of a share (share)."""

    @plant.method(FairShare, "_limit")
    def _limit(self: FairShare, share: str) -> int | None:
        return None


@planted("share", weather="shares")
def reservation_ignored(plant: Plant) -> None:
    """The manager gives the slots of the compute reservation to active shares (share)."""

    @plant.method(SharePolicy, "usable_slots")
    def usable_slots(self: SharePolicy, max_slots: int, active: int) -> int:
        return max_slots * 4


@planted("share", weather="shares")
def use_lost_with_the_leader(plant: Plant) -> None:
    """A new leader does not read the stored use of the shares. After a change of the leader, a share with much use gets
    the places of other shares (share).
    """

    @plant.method(FairShare, "_merge_use")
    def _merge_use(self: FairShare, content: bytes) -> None:
        pass


@planted("share", weather="shares")
def use_counted_without_slots(plant: Plant) -> None:
    """A bundle counts its seconds and not its slot seconds. A share whose tasks need several slots gets too many slots
    (share).
    """
    original = FairShare.add_use

    @plant.method(FairShare, "add_use")
    def add_use(self: FairShare, job: JobDef, done: Completion) -> None:
        stages = tuple(replace(stage, slots=1) for stage in job.stages)
        original(self, replace(job, stages=stages), done)


@planted("share", weather="shares")
def larger_tasks_overtaken(plant: Plant) -> None:
    """Freed slots below a limit are not reserved. Smaller tasks of the share always take the slots before the task that
    needs several slots (share).
    """

    @plant.method(FairShare, "_reserving_job")
    def _reserving_job(self: FairShare, scope: Scope, slots: int, places_of: Mapping[str, int]) -> JobId | None:
        return None


@planted("share", weather="shares")
def backoff_uses_slots(plant: Plant) -> None:
    """A bundle that waits for its backoff counts as outstanding. The share is idle at its limit during the backoff
    (share).
    """

    @plant.method(LiveJob, "delay")
    def delay(self: LiveJob, bundles: Iterable[tuple[Bundle, float]]) -> None:
        pass
