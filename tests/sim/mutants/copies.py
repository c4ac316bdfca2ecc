"""Planted bugs in speculative copies: which bundles are copied, where copies run, and how losers end.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from dataclasses import replace

from batchlab.core.job_definition import StageDef
from batchlab.core.model import Bundle
from batchlab.manager import speculation
from batchlab.manager.speculation import Speculation, Straggler
from batchlab.manager.state import Outstanding
from batchlab.worker import commit_and_forward
from batchlab.worker.commit_and_forward import BundleFinisher
from batchlab.worker.inflight_message import InflightMessage
from batchlab.worker.loop import Worker
from tests.sim.mutants.kit import Plant, planted

FAR_TOO_MANY = 1_000


@planted("copies", weather="speculative")
def copies_of_tasks_with_side_effects(plant: Plant) -> None:
    """The manager ignores that a stage declares side effects. A side effect then happens in two places at once
    (copies).
    """

    @plant.property(StageDef, "may_be_copied")
    def may_be_copied(self: StageDef) -> bool:
        return self.speculative_copies


@planted("copies", weather="speculative")
def copies_without_a_limit(plant: Plant) -> None:
    """The number of copies of a stage is not limited, so the copies may cost as much as the stage itself (copies)."""

    @plant.everywhere(speculation.quota)
    def quota(planned: int, sent: int) -> int:
        return FAR_TOO_MANY


@planted("copies", weather="speculative")
def copies_while_work_waits(plant: Plant) -> None:
    """The manager does not check whether work waits for a slot. A copy then runs before other work (copies)."""

    @plant.method(Speculation, "_is_drained")
    def _is_drained(self: Speculation, pool: str) -> bool:
        return True

    @plant.method(Speculation, "_free_slots")
    def _free_slots(self: Speculation, pool: str) -> dict[str, int]:
        return {status.beat.worker: FAR_TOO_MANY for status in self._registry.workers.values()}


@planted("copies", weather="speculative")
def copy_at_each_tick(plant: Plant) -> None:
    """The manager forgets that it has sent a copy, and sends another copy of the straggler at the next tick
    (copies).
    """
    original = Speculation._send

    @plant.method(Speculation, "_send")
    async def _send(self: Speculation, straggler: Straggler) -> None:
        await original(self, straggler)
        self._copied.clear()
        self._sent.clear()
        straggler.outstanding.copied_from = ""


@planted("copies", weather="speculative")
def copy_on_the_worker_of_the_original(plant: Plant) -> None:
    """A worker runs the copy of a bundle that it runs already. A copy on the same slow worker is useless (copies)."""

    @plant.method(Worker, "_refuse_copy")
    async def _refuse_copy(self: Worker, inflight: InflightMessage) -> bool:
        return False


@planted("step 3", "I1", "I2", weather="speculative")
def copy_as_an_attempt_of_its_own(plant: Plant) -> None:
    """A copy has the name of the next attempt. The outcomes of the original and of the copy then have different keys,
    and both results count (I1, I2).
    """

    @plant.method(Outstanding, "bundle_to_resend")
    def bundle_to_resend(self: Outstanding) -> Bundle:
        return replace(self.bundle, losses=1, attempt=self.bundle.attempt + 1)


@planted("copies", weather="speculative")
def stopped_loser_counts_as_a_lost_worker(plant: Plant) -> None:
    """A worker whose run was stopped by the outcome of a copy sends its bundle again as a lost run, also after the end
    of its message's visibility timeout. The bundle runs again although it has an outcome (copies).
    """

    @plant.method(Worker, "_end_superseded")
    async def _end_superseded(self: Worker, inflight: InflightMessage) -> bool:
        return False

    @plant.method(InflightMessage, "has_lapsed")
    def has_lapsed(self: InflightMessage, now_s: float) -> bool:
        return False


@planted("copies", weather="speculative")
def failure_of_a_copy_counts(plant: Plant) -> None:
    """A copy commits its failure although the original run may still succeed, so a copy uses up an attempt of its
    tasks (copies).
    """

    @plant.everywhere(commit_and_forward.has_succeeded)
    def has_succeeded(inflight: InflightMessage) -> bool:
        return bool(inflight.ran)


@planted("step 4", "silence", "I6", "I7", weather="speculative")
def original_dropped_like_a_copy(plant: Plant) -> None:
    """A worker that cannot run a bundle deletes the message of each bundle that may be copied. Only a copy may be
    dropped, because another worker has its bundle (step 4).
    """
    original = BundleFinisher.send_again

    @plant.method(BundleFinisher, "send_again")
    async def send_again(
        self: BundleFinisher, inflight: InflightMessage, *, delay_s: float = 0.0, watchdog: bool = False
    ) -> None:
        if inflight.stage.may_be_copied:
            await self.delete(inflight)
        else:
            await original(self, inflight, delay_s=delay_s, watchdog=watchdog)
