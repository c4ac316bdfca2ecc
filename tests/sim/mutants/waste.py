"""Bugs that cost time, order, or trust, and lose no result by themselves.

Each docstring says what somebody would have written, and then which promise that breaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from batchlab.jobdef import JobDef
from batchlab.manager import plans
from batchlab.manager.conductor import Conductor
from batchlab.manager.live import LiveJob, Ports
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.silence import Silence
from batchlab.model import JobId, JobState, Json, Outcome, StageCounts, StageName
from batchlab.ports import BundleRecord, Ending, Message
from batchlab.protocol import policy
from batchlab.protocol.policy import Verdict
from batchlab.worker.closing import Closing
from batchlab.worker.hand import Hand
from batchlab.worker.notices import Departure
from tests.sim.mutants.kit import Plant, planted


@planted("dead letters")
def dead_letters_dropped(plant: Plant) -> None:
    """A dead letter is logged and deleted. Its tasks wait until the reconciler finds them silent
    (dead letters)."""

    @plant.method(Reconciler, "_judge")
    async def _judge(self: Reconciler, message: Message) -> None:
        pass


@planted("I1")
def results_gathered_as_they_come(plant: Plant) -> None:
    """A gather takes results in the order in which they were committed. A handler that relies on
    the order of tasks gets another one (I1: a wrong result is committed)."""
    original = plans.successes

    @plant.everywhere(original)
    async def successes(ports: Ports, job: JobId, counts: StageCounts) -> list[BundleRecord]:
        found = await original(ports, job, counts)
        return sorted(found, key=lambda r: r.completion.ended_s if r.completion else 0.0)


@planted("I6")
def drain_keeps_what_was_prefetched(plant: Plant) -> None:
    """A draining worker finishes what it has received, begun or not. Bundles that an idle worker
    could run wait for it, and it may be killed before it begins them (I6)."""

    @plant.method(Departure, "hand_back")
    def hand_back(self: Departure) -> None:
        for hand in self._hands.values():
            if hand.running:
                hand.handle.stop = True


@planted("losses")
def losses_forgotten(plant: Plant) -> None:
    """A bundle that is sent again begins anew, without its losses. One that kills its workers is
    not suspected, and a copy of it runs although an outcome is there (losses)."""
    original = Closing.send_again

    @plant.method(Closing, "send_again")
    async def send_again(
        self: Closing,
        hand: Hand,
        job: JobDef,
        *,
        items: Sequence[Json] | None = None,
        delay_s: float = 0.0,
        watchdog: bool = False,
    ) -> None:
        hand.message = replace(hand.message, receive_count=1)
        hand.task = replace(hand.task, bundle=replace(hand.task.bundle, losses=0))
        await original(self, hand, job, items=items, delay_s=delay_s, watchdog=watchdog)


@planted("I5", "I7")
def silence_forgiven_for_ever(plant: Plant) -> None:
    """An instance that has reported once is in order until its group sees it die. A worker that
    only stops keeps its instance, and is busy for ever (I5, I7)."""

    @plant.method(Silence, "_heard")
    def _heard(self: Silence, instance: str, since_s: float) -> bool:
        return True


@planted("notifications")
def notified_before_the_end_is_committed(plant: Plant) -> None:
    """The end of a job is notified as soon as it is decided, and then committed. A leader that
    dies in between, or was deposed, has told of an end that never was (notifications)."""
    original = Conductor._finish

    @plant.method(Conductor, "_finish")
    async def _finish(
        self: Conductor,
        live: LiveJob,
        state: JobState,
        reason: str,
        closed: Mapping[StageName, int],
    ) -> None:
        if self._on_end:
            now_s = self._ports.clock.now_s()
            await self._on_end(live, Ending(state, reason, now_s, {}))
        await original(self, live, state, reason, closed)


@planted("ends")
def failure_limit_of_the_whole_job(plant: Plant) -> None:
    """A limit in percent is of all tasks of the job. A stage in which too many have failed passes
    where the others are large (ends)."""
    original = policy.judge

    @plant.everywhere(original)
    def judge(job: JobDef, stages: Sequence[StageCounts]) -> Verdict:
        if not job.max_failures_percent:
            return original(job, stages)
        failed, planned = sum(s.failed for s in stages), sum(s.planned or 0 for s in stages)
        over = failed * 100 > job.max_failures * planned
        return Verdict(over, over and job.fail_fast, f"{failed} tasks failed")


@planted("waste")
def follow_ups_of_the_silent_sent_again(plant: Plant) -> None:
    """The reconciler sends all that follows from an outcome that it finds, without a look at what
    is committed of it. What has long ended runs once more (waste)."""
    original = Reconciler.forward

    @plant.method(Reconciler, "forward")
    async def forward(self: Reconciler, job: JobDef, outcome: Outcome) -> None:
        await self._conductor.send(job, [follow.bundle for follow in outcome.follows])
        await original(self, job, outcome)
