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
from batchlab.core.ports import Message, Notice, Objects
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.messages import HeldBundle
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.core.service_settings import MAX_VISIBILITY_S
from batchlab.manager.reconciler import Reconciler
from batchlab.worker.commit_and_forward import BundleFinisher
from batchlab.worker.heartbeats import Heartbeats, VisibilityHeartbeat
from batchlab.worker.inflight_message import InflightMessage
from batchlab.worker.job_cache import ControlPoller
from batchlab.worker.loop import Shutdown, Worker
from batchlab.worker.poison_detection import PoisonDetector
from tests.sim.mutants.kit import Plant, planted

# --- The commit ----------------------------------------------------------------------------------


@planted("I1", "I2", "I3", "role")
def unconditional_commit(plant: Plant) -> None:
    """An outcome is written without If-None-Match, so a later writer overwrites the outcome of an earlier writer. The
    ledger and the follow-ups use the first outcome (I3). If two executions split a bundle differently, tasks end twice.
    """

    @plant.everywhere(product.commit)
    async def commit(objects: Objects, outcome: Outcome, patience: Patience, key: CommitKey) -> Outcome:
        name = object_keys.outcome(outcome.bundle, key)
        data = json_format.to_bytes(json_format.outcome_to_json(outcome))
        await patience(lambda: objects.put(name, data))
        return outcome


@planted("I1", "I2", "I3", "step 3")
def loser_forwards_its_own_outcome(plant: Plant) -> None:
    """A worker whose commit returns status 412 continues with its own outcome. The follow-ups and the ledger then
    differ from the committed outcome (I1, I3).
    """
    original = product.commit

    @plant.everywhere(product.commit)
    async def commit(objects: Objects, outcome: Outcome, patience: Patience, key: CommitKey) -> Outcome:
        await original(objects, outcome, patience, key)
        return outcome


@planted("step 4")
def no_forwarding_on_412(plant: Plant) -> None:
    """A worker that finds an existing outcome of its bundle deletes the message and sends no follow-ups. If the worker
    that committed the outcome ended before it sent the follow-ups, the follow-ups are missing (I6).
    """
    original = BundleFinisher.finish

    @plant.method(BundleFinisher, "finish")
    async def finish(self: BundleFinisher, inflight: InflightMessage, outcome: Outcome) -> None:
        if outcome.execution == inflight.execution:
            await original(self, inflight, outcome)
        else:
            await self.delete(inflight)


@planted("step 4")
def delete_before_commit(plant: Plant) -> None:
    """A worker deletes a message after the tasks of the bundle have run, and writes the outcome afterwards. A crash of
    the worker in between leaves neither a message nor an outcome (I6).
    """
    original = BundleFinisher.commit

    @plant.method(BundleFinisher, "commit")
    async def commit(self: BundleFinisher, inflight: InflightMessage, *, cancelled: bool = False) -> Outcome:
        await self.delete(inflight)
        return await original(self, inflight, cancelled=cancelled)


@planted("step 4")
def delete_on_receive(plant: Plant) -> None:
    """A worker deletes a message as soon as it receives the message (at-most-once delivery). If the worker dies, the
    message is lost (I6), and a bundle that kills its workers is never suspected (I7).
    """
    original = Worker._process_bundle

    @plant.method(Worker, "_process_bundle")
    async def _process_bundle(self: Worker, inflight: InflightMessage) -> None:
        await self._finisher.delete(inflight)
        await original(self, inflight)


@planted("I1", "I2", "step 3")
def forward_before_commit(plant: Plant) -> None:
    """A worker sends the follow-ups and the event of a bundle as soon as the tasks have run, and writes the outcome
    afterwards. If another outcome of the bundle already exists, the follow-ups of two outcomes are sent (I1, I2).
    """
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
    """A follow-up gets its inputs by their position in the bundle, and not by their task. After a split or a failed
    task, the inputs belong to other tasks, so a wrong result is committed (I1).
    """

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
    """A worker does not extend the visibility timeout of a message while the tasks of the message run. Another worker
    receives the message again, and after several receives, a harmless task is marked as poison (I1).
    """

    @plant.method(VisibilityHeartbeat, "_extend")
    async def _extend(self: VisibilityHeartbeat) -> None:
        pass


@planted("heartbeat")
def expected_run_time_ends_the_extensions(plant: Plant) -> None:
    """A worker extends the visibility timeout of a message once for the expected run time, and never again. Another
    worker receives the message of a bundle that runs longer than expected (I1).
    """
    original = VisibilityHeartbeat._extend

    @plant.method(VisibilityHeartbeat, "_extend")
    async def _extend(self: VisibilityHeartbeat) -> None:
        await original(self)
        for inflight in self._context.inflight.values():
            if inflight.running and inflight.task.run_s is not None:
                inflight.extend_at_s = math.inf


@planted("waste")
def heartbeat_omits_what_is_not_committed(plant: Plant) -> None:
    """A heartbeat omits a bundle as soon as its tasks run, and not only after the commit of its outcome. The manager
    treats the bundle as lost, and sends the bundle to another worker (waste).
    """
    original = Heartbeats._held_bundles

    @plant.method(Heartbeats, "_held_bundles")
    def _held_bundles(self: Heartbeats) -> tuple[HeldBundle, ...]:
        return tuple(held for held in original(self) if not held.running)


@planted("12 h", "heartbeat")
def hand_over_after_the_cap(plant: Plant) -> None:
    """A worker hands a long bundle over to a watchdog message only after 12 hours, when the receipt of the bundle's
    message has already expired. The message becomes visible again while its task runs (I1, I6).
    """
    original = VisibilityHeartbeat._hand_over

    @plant.method(VisibilityHeartbeat, "_hand_over")
    async def _hand_over(self: VisibilityHeartbeat, inflight: InflightMessage) -> None:
        self._context.settings = replace(self._context.settings, hand_over_s=MAX_VISIBILITY_S * 1.05)
        await original(self, inflight)


@planted("I6")
def drain_forgets_what_was_prefetched(plant: Plant) -> None:
    """A draining worker exits without returning prefetched messages that it has not started. These messages stay hidden
    until their visibility timeout (I6).
    """
    original = Worker.drain

    async def forget(*_: object, **__: object) -> None:
        """Nothing is sent."""

    @plant.method(Worker, "drain")
    def drain(self: Worker, notice: Notice | None = None) -> None:
        original(self, notice)
        vars(self._finisher)["send_again"] = forget


@planted("I6")
def drain_keeps_what_was_prefetched(plant: Plant) -> None:
    """A draining worker returns each prefetched message only when a slot is free for the message. Until the return of a
    message, other workers cannot run the message (I6).
    """

    @plant.method(Shutdown, "return_waiting")
    def return_waiting(self: Shutdown) -> None:
        for inflight in list(self._context.inflight.values()):
            inflight.handle.stop = True


# --- Control -------------------------------------------------------------------------------------


@planted("I4")
def control_looked_at_once_per_bundle(plant: Plant) -> None:
    """A worker reads the control object of a job before a bundle starts, but not while the bundle runs. Later tasks of
    the bundle start after the cancellation of the job was acknowledged (I4).
    """
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
    """A worker always runs a bundle that it receives again, also from the dead-letter queue. A task that kills its
    workers kills workers forever (I7).
    """

    @plant.method(PoisonDetector, "verdict")
    async def verdict(self: PoisonDetector, inflight: InflightMessage) -> Outcome | None:
        return await product.committed(self._context.objects, inflight.bundle, self._context.patience, inflight.key)

    @plant.method(Reconciler, "_commit_failure")
    async def _condemned(self: Reconciler, job: JobDef, bundle: Bundle, message: Message) -> Outcome | None:
        return None


@planted("I7")
def start_noted_after_the_run(plant: Plant) -> None:
    """A worker writes the start marker of a suspected task only after the task has ended. A task that kills its worker
    therefore never gets a start marker (I7).
    """

    @plant.method(PoisonDetector, "begin")
    async def begin(self: PoisonDetector, inflight: InflightMessage) -> None:
        pass


@planted("I1", "I7")
def neighbours_of_poison_condemned(plant: Plant) -> None:
    """All tasks of a bundle that lost its workers are marked as FAILED. The other tasks in the bundle of a poison task
    are FAILED although they have not failed (I1).
    """

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
    """A task is marked as poison by the receive count of its message, and not by its start markers. A task that only
    waited in a dead worker or during an outage is also marked as FAILED, although the task has not failed (I1).
    """

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
    """A bundle is split so that the middle task is in both halves. The middle task ends twice (I1, I2)."""
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
