"""Planted bugs in a worker: the commit, the forwarding, the delete, and the handling of messages.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from batchlab.core import commit as product
from batchlab.core.commit import Addressed, follow_ups
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Control, Follow, JobId, Json, Outcome, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import MAX_VISIBILITY_S, Message, Notice, Objects
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.manager.reconciler import Reconciler
from batchlab.worker.commit_and_forward import BundleFinisher
from batchlab.worker.heartbeats import VisibilityHeartbeat
from batchlab.worker.inflight_message import InflightMessage
from batchlab.worker.job_cache import ControlPoller
from batchlab.worker.loop import Shutdown, Worker
from batchlab.worker.poison_detection import PoisonDetector
from tests.sim.mutants.kit import Plant, planted

# --- The commit ----------------------------------------------------------------------------------


@planted("I1", "I2", "I3", "role")
def unconditional_commit(plant: Plant) -> None:
    """The outcome is written without If-None-Match, so the last writer wins. The ledger and the
    follow-ups use the first outcome (I3). If two executions split differently, tasks end twice."""

    @plant.everywhere(product.commit)
    async def commit(objects: Objects, outcome: Outcome, patience: Patience, key: CommitKey) -> Outcome:
        name = object_keys.outcome(outcome.bundle, key)
        data = json_format.to_bytes(json_format.outcome_to_json(outcome))
        await patience(lambda: objects.put(name, data))
        return outcome


@planted("I1", "I2", "I3", "step 3")
def loser_forwards_its_own_outcome(plant: Plant) -> None:
    """After a 412, the worker continues with its own outcome. The follow-ups and the ledger then
    differ from the committed outcome (I1, I3)."""
    original = product.commit

    @plant.everywhere(product.commit)
    async def commit(objects: Objects, outcome: Outcome, patience: Patience, key: CommitKey) -> Outcome:
        await original(objects, outcome, patience, key)
        return outcome


@planted("step 4")
def no_forwarding_on_412(plant: Plant) -> None:
    """A worker that finds an existing outcome considers the bundle done and deletes the message. If
    the worker that committed it ended before it forwarded, the follow-ups are missing (I6)."""
    original = BundleFinisher.finish

    @plant.method(BundleFinisher, "finish")
    async def finish(self: BundleFinisher, inflight: InflightMessage, outcome: Outcome) -> None:
        if outcome.execution == inflight.execution:
            await original(self, inflight, outcome)
        else:
            await self.delete(inflight)


@planted("step 4")
def delete_before_commit(plant: Plant) -> None:
    """The message is deleted when its tasks have run, and the outcome is written afterwards. A
    crash in between leaves neither a message nor an outcome (I6)."""
    original = BundleFinisher.commit

    @plant.method(BundleFinisher, "commit")
    async def commit(self: BundleFinisher, inflight: InflightMessage, *, cancelled: bool = False) -> Outcome:
        await self.delete(inflight)
        return await original(self, inflight, cancelled=cancelled)


@planted("step 4")
def delete_on_receive(plant: Plant) -> None:
    """The message is deleted as soon as it is received (at most once). If the worker dies, the
    message is lost (I6), and a bundle that kills its workers is never suspected (I7)."""
    original = Worker._process_bundle

    @plant.method(Worker, "_process_bundle")
    async def _process_bundle(self: Worker, inflight: InflightMessage) -> None:
        await self._finisher.delete(inflight)
        await original(self, inflight)


@planted("I1", "I2", "step 3")
def forward_before_commit(plant: Plant) -> None:
    """Follow-ups and the event are sent as soon as the tasks have run, and the outcome is written
    afterwards. If another outcome exists already, both were forwarded (I1, I2)."""
    original = BundleFinisher.commit

    @plant.method(BundleFinisher, "commit")
    async def commit(self: BundleFinisher, inflight: InflightMessage, *, cancelled: bool = False) -> Outcome:
        context = self._context
        now_s = context.clock.now_s()
        draft = settlement.settle(
            inflight.job,
            inflight.bundle,
            inflight.ran,
            execution=inflight.execution,
            worker=context.who.worker,
            started_s=inflight.started_s or now_s,
            ended_s=max(inflight.started_s, now_s),
            cancelled=cancelled,
        )
        await context.outbox.send(follow_ups(inflight.job, draft, inflight.key, now_s=now_s))
        await context.outbox.send_event(draft)
        return await original(self, inflight, cancelled=cancelled)


@planted("I1", "ValueError")
def inputs_by_position(plant: Plant) -> None:
    """A follow-up gets its inputs by their position in the bundle, not by task. After a split or a
    failed task, the inputs belong to other tasks (I1: a wrong result is committed)."""

    @plant.everywhere(product.follow_ups)
    def follow_ups(
        job: JobDef,
        outcome: Outcome,
        key: CommitKey,
        *,
        now_s: float,
        items: dict[int, Json] | None = None,
        trace: str = "",
    ) -> list[Addressed]:
        def inputs(stage: str, count: int) -> Sequence[Json] | None:
            known = outcome.values if stage != outcome.bundle.stage else [*(items or {}).values()]
            return known[:count] if len(known) >= count else None

        return [
            product.address(
                job, f.bundle, key, items=inputs(f.bundle.stage, len(f.bundle.tasks)), delay_s=f.delay_s, now_s=now_s
            )
            for f in outcome.follows
        ]


# --- Messages ------------------------------------------------------------------------------------


@planted("heartbeat")
def no_heartbeat(plant: Plant) -> None:
    """The worker does not extend the visibility timeout of a message while its tasks run. The
    message is received again; after several receives, an innocent task is marked as poison (I1)."""

    @plant.method(VisibilityHeartbeat, "_extend")
    async def _extend(self: VisibilityHeartbeat) -> None:
        pass


@planted("12 h", "heartbeat")
def hand_over_after_the_cap(plant: Plant) -> None:
    """The worker hands the bundle over to the watchdog after 12 hours, when SQS has already expired
    the receipt. The message returns while its task runs (I1, I6)."""
    original = VisibilityHeartbeat._hand_over

    @plant.method(VisibilityHeartbeat, "_hand_over")
    async def _hand_over(self: VisibilityHeartbeat, inflight: InflightMessage) -> None:
        self._context.settings = replace(self._context.settings, hand_over_s=MAX_VISIBILITY_S * 1.05)
        await original(self, inflight)


@planted("I6")
def drain_forgets_what_was_prefetched(plant: Plant) -> None:
    """A draining worker exits with prefetched messages that it has not started. They wait for their
    visibility timeout (I6)."""
    original = Worker.drain

    async def forget(*_: object, **__: object) -> None:
        """Nothing is sent."""

    @plant.method(Worker, "drain")
    def drain(self: Worker, notice: Notice | None = None) -> None:
        original(self, notice)
        vars(self._finisher)["send_again"] = forget


@planted("I6")
def drain_keeps_what_was_prefetched(plant: Plant) -> None:
    """A draining worker returns each prefetched message only when a slot is free for it. Until
    then, other workers cannot run it (I6)."""

    @plant.method(Shutdown, "return_waiting")
    def return_waiting(self: Shutdown) -> None:
        for inflight in list(self._context.inflight.values()):
            inflight.handle.stop = True


# --- Control -------------------------------------------------------------------------------------


@planted("I4")
def control_looked_at_once_per_bundle(plant: Plant) -> None:
    """The control object is read before a bundle starts, and not again while it runs. Later tasks
    of the bundle start after the cancellation was acknowledged (I4)."""
    current = ControlPoller.current

    @plant.method(ControlPoller, "current")
    async def _current(self: ControlPoller, job: JobId, *, is_new: bool = False) -> tuple[Control, float]:
        return (await current(self, job, is_new=is_new))[0], math.inf

    @plant.method(ControlPoller, "run")
    async def run(self: ControlPoller) -> None:
        await asyncio.get_running_loop().create_future()


# --- Poison detection ----------------------------------------------------------------------------


@planted("I7")
def poison_without_a_limit(plant: Plant) -> None:
    """A bundle that is received again always runs again, also from the dead letters. A task that
    kills its workers does so for ever (I7)."""

    @plant.method(PoisonDetector, "verdict")
    async def verdict(self: PoisonDetector, inflight: InflightMessage) -> Outcome | None:
        return await product.committed(self._context.objects, inflight.bundle, self._context.patience, inflight.key)

    @plant.method(Reconciler, "_commit_failure")
    async def _condemned(self: Reconciler, job: JobDef, bundle: Bundle, message: Message) -> Outcome | None:
        return None


@planted("I7")
def start_noted_after_the_run(plant: Plant) -> None:
    """The start of a suspect task is recorded only after it has ended. The important starts are
    those of tasks that end their worker (I7)."""

    @plant.method(PoisonDetector, "begin")
    async def begin(self: PoisonDetector, inflight: InflightMessage) -> None:
        pass


@planted("I1", "I7")
def neighbours_of_poison_condemned(plant: Plant) -> None:
    """A bundle that lost its workers is FAILED completely. The other tasks of the bundle are lost
    with the poison task (I1: FAILED without having failed)."""

    @plant.method(PoisonDetector, "verdict")
    async def verdict(self: PoisonDetector, inflight: InflightMessage) -> Outcome | None:
        done = await product.committed(self._context.objects, inflight.bundle, self._context.patience, inflight.key)
        if done or inflight.suspicion < settlement.LOSS_LIMIT:
            return done
        judged = settlement.poisoned(
            inflight.bundle,
            "killed its workers",
            execution=inflight.execution,
            worker=self._worker,
            now_s=self._context.clock.now_s(),
        )
        return await product.commit(self._context.objects, judged, self._context.patience, inflight.key)


@planted("I1", "I7")
def receives_counted_as_starts(plant: Plant) -> None:
    """A task is marked as poison by the receive count of its message. A task that was prefetched by
    workers that died, or that waited during an outage, is marked too (I1: FAILED without having
    failed)."""

    @plant.method(PoisonDetector, "verdict")
    async def verdict(self: PoisonDetector, inflight: InflightMessage) -> Outcome | None:
        done = await product.committed(self._context.objects, inflight.bundle, self._context.patience, inflight.key)
        if done or inflight.suspicion < settlement.LOSS_LIMIT:
            return done
        condemn = partial(settlement.poisoned, reason="it was received too often")
        judge = settlement.bisect if len(inflight.bundle.tasks) > 1 else condemn
        now_s = self._context.clock.now_s()
        judged = judge(inflight.bundle, execution=inflight.execution, worker=self._worker, now_s=now_s)
        return await product.commit(self._context.objects, judged, self._context.patience, inflight.key)


@planted("I1", "I2", "I3", "I7")
def halves_that_overlap(plant: Plant) -> None:
    """A bundle is split so that the middle task is in both halves. That task ends twice (I1,
    I2)."""
    plant.unchecked_parts()
    original = settlement.bisect

    @plant.everywhere(settlement.bisect)
    def bisect(bundle: Bundle, *, execution: str, worker: str, now_s: float) -> Outcome:
        made = original(bundle, execution=execution, worker=worker, now_s=now_s)
        first, second = made.follows
        if len(first.bundle.tasks) == 1:
            return made
        middle = TaskSet.span(first.bundle.tasks.last, first.bundle.tasks.last + 1)
        wider = TaskSet.union([middle, second.bundle.tasks])
        return replace(made, follows=(first, Follow(replace(second.bundle, tasks=wider))))
