"""The worker's loop: steps 1 to 4 of the protocol, from the receive of a bundle to its delete.

Invariant: a received message stays in flight until its bundle is committed and forwarded, or sent
again. An error either concerns one bundle, which is then returned to the queue, or stops the whole
worker. All steps share the in-flight messages and the slots, so they are one class.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

from batchlab.core.atomic_write import of_single_call
from batchlab.core.errors import BackendError, Malformed, NotFound, TooNew
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Control, JobId, Json, Ran
from batchlab.core.ports import MAX_BATCH, Clock, Message, Notice, Notices, Objects, Queue
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.bundle_size import BUDGET_S
from batchlab.core.protocol.messages import read_task_message
from batchlab.core.protocol.seals import UNSEALED
from batchlab.core.request_counter import Tally
from batchlab.core.retry import Patience, both, heed_cancellation, set_within
from batchlab.core.tracing import NOBODY, Tracer, span
from batchlab.worker import spans
from batchlab.worker.commit_and_forward import Closing
from batchlab.worker.heartbeats import Beats, Identity
from batchlab.worker.inflight_message import Hand
from batchlab.worker.job_cache import Controls, Jobs, WrongKeyError
from batchlab.worker.live_logs import Tails
from batchlab.worker.outbox import Outbox
from batchlab.worker.poison_detection import RunsElsewhereError, Suspects
from batchlab.worker.runner import Runner, Work
from batchlab.worker.settings import WorkerSettings
from batchlab.worker.shutdown import Departure, heed
from batchlab.worker.spans import Ended, noted, tell
from batchlab.worker.visibility_heartbeat import Tenure
from batchlab.worker.work_handoff import Shedding, Slots
from batchlab.worker.worker_counters import Deeds

log = logging.getLogger(__name__)

OUTAGE_S = 1.0
"""Seconds between a failed receive and the next try."""

HEAD_START_S = 0.01
"""Delay in seconds of the next receive after a long poll has filled every slot."""


class Worker:
    """One worker process. `run` returns after `drain`, when no message is in flight."""

    def __init__(
        self,
        who: Identity,
        objects: Objects,
        queue: Queue,
        clock: Clock,
        runner: Runner,
        patience: Patience,
        settings: WorkerSettings,
        notices: Notices | None = None,
        tally: Tally | None = None,
        tracer: Tracer = NOBODY,
    ) -> None:
        self.who = who
        self._tracer = tracer
        self._objects = objects
        self._queue = queue
        self._clock = clock
        self._runner = runner
        self._patience = patience
        self._settings = settings
        self._notices = notices
        self._tasks_queue = object_keys.tasks_queue(who.pool)
        self._deeds = Deeds()
        self._jobs = Jobs(objects, patience)
        self._outbox = Outbox(queue, patience, tally, self._deeds, self._jobs.key_of)
        self._inputs = Inputs(objects, patience)
        self._hands: dict[str, Hand] = {}
        self._tails = Tails(
            who.worker, self._hands, objects, clock, every_s=settings.control_lease_s
        )
        self._controls = Controls(
            objects=objects,
            clock=clock,
            lease_s=settings.control_lease_s,
            on_look=self._looked,
            on_tail=self._tails.asked,
        )
        self._slots = Slots(who.slots)
        self._beats = Beats(who, self._hands, self._outbox, clock, settings)
        self._departure = Departure(clock, settings.drain_s, self._hands, self._slots)
        self._tenure = Tenure(self._hands, queue, objects, clock, self._outbox, settings)
        self._closing = Closing(
            worker=who.worker,
            hands=self._hands,
            objects=objects,
            queue=queue,
            clock=clock,
            patience=patience,
            outbox=self._outbox,
            deeds=self._deeds,
            tracer=tracer,
        )
        self._shedding = Shedding(self._closing)
        self._executions = 0
        self._prefetch = 0
        self._room = asyncio.Event()
        self._draining = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._suspects = Suspects(
            objects, clock, patience, who.worker, settings.visibility_s, self._draining
        )

    def drain(self, notice: Notice | None = None) -> None:
        """Stop receiving, and finish or return the in-flight messages. Then `run` returns (I6).

        The time of the notice, if it has one, limits how long this may take.
        """
        self._departure.told(notice)
        self._draining.set()
        self._beats.leaving = True

    async def run(self) -> None:
        """Work until drained. An unexpected error in any part stops the whole worker."""
        async with asyncio.TaskGroup() as group:
            fetcher = group.create_task(self._fetch(group), name="fetch")
            others = [
                group.create_task(self._tenure.keep(self._jobs.of), name="tenure"),
                group.create_task(self._controls.poll(), name="controls"),
                group.create_task(self._beats.keep(), name="beats"),
                group.create_task(self._suspects.keep(), name="suspects"),
                group.create_task(self._tails.keep(), name="tails"),
            ]
            if self._notices is not None:
                others.append(group.create_task(heed(self._notices, self.drain), name="notices"))
            await self._draining.wait()
            fetcher.cancel()
            await self._leave()
            for other in others:
                other.cancel()
        try:
            await self._beats.last()
        finally:
            await self._runner.close()

    async def _leave(self) -> None:
        self._departure.hand_back()
        self._beats.due()
        await self._departure.over(self._empty)

    # --- Receiving -------------------------------------------------------------------------------

    async def _fetch(self, group: asyncio.TaskGroup) -> None:
        while True:
            room = self._free_hands()
            if room <= 0:
                self._room.clear()
                await self._room.wait()
                continue
            asked_s = self._clock.monotonic_s()
            try:
                messages = await self._queue.receive(
                    self._tasks_queue,
                    max_messages=min(MAX_BATCH, room),
                    wait_s=self._settings.wait_s,
                    visibility_s=self._settings.visibility_s,
                )
            except BackendError as error:
                heed_cancellation()
                # Retried without limit: an outage of the queue must not stop running tasks.
                log.warning("no messages can be received: %s", error)
                await asyncio.sleep(OUTAGE_S)
                continue
            # Readable messages are registered first, so that a drain finds them.
            newer = [(one, why) for one in messages if (why := self._take(one, group))]
            for message, why in newer:
                await self._closing.leave_to_others(self._tasks_queue, message, why)
            waited_s = self._clock.monotonic_s() - asked_s
            if messages and self._busy >= self._slots.total and waited_s > HEAD_START_S:
                # The queue was empty until now, so another receive would probably find nothing and
                # delay the new bundles. A free slot ends this wait, because its next bundle may
                # already be in the queue.
                self._room.clear()
                await set_within(self._room, HEAD_START_S)

    @property
    def _busy(self) -> int:
        """Number of slots in use or requested. A bundle that is being committed uses no slot."""
        return sum(hand.slots for hand in self._hands.values() if not hand.committing)

    def _free_hands(self) -> int:
        """Return how many more messages may be received. Commits in progress are limited too."""
        wanted = self._slots.total + self._prefetch - self._busy
        return min(wanted, 3 * self._slots.total + 1 - len(self._hands))

    def _take(self, message: Message, group: asyncio.TaskGroup) -> TooNew | None:
        """Start to process a message. Return the error if only a newer worker can read it."""
        try:
            task = read_task_message(message.body)
        except TooNew as error:
            return error
        except Exception as error:  # noqa: BLE001 - a malformed body may cause any error
            # The message returns until the queue moves it to the dead-letter queue, where the
            # manager reports it.
            log.error("message %s is not a bundle: %s", message.id, error)
            return None
        now_s = self._clock.monotonic_s()
        self._executions += 1
        execution = f"{self.who.worker}-{self._executions}"
        hand = Hand(self._tasks_queue, message, task, execution, now_s, now_s, message.receipt)
        self._hands[execution] = hand
        self._empty.clear()
        self._beats.due()
        group.create_task(self._hold(hand), name=f"bundle {task.bundle.id}")
        return None

    async def _hold(self, hand: Hand) -> None:
        spans.about(hand)
        if not hand.task.trace:
            await self._handle(hand)
            return
        with span(self._tracer, "receive", hand.task.trace, hand.bundle) as received:
            received.note(receives=hand.message.receive_count, worker=self.who.worker)
            hand.trace = received.context
            await self._handle(hand)

    async def _handle(self, hand: Hand) -> None:
        watched = False
        try:
            job = await self._admitted(hand)
            if job is None:
                await self._closing.delete(hand)
                return
            self._controls.watch(hand.bundle.job)
            watched = True
            await self._serve(hand, job)
        except TooNew as error:
            await self._suspects.withdraw(hand)
            if hand.receipt is not None:  # None: a watchdog or another worker has the bundle.
                hand.receipt = None
                await self._closing.leave_to_others(hand.queue, hand.message, error)
        except BackendError as error:
            # The message returns before its visibility timeout ends, but with a short delay, so
            # that the failing service can recover.
            log.warning("the bundle is returned to the queue: %s", error)
            await self._suspects.withdraw(hand)
            await self._tenure.give_back_later(hand)
        finally:
            if watched:
                self._controls.unwatch(hand.bundle.job)
            self._suspects.end(hand)
            self._hands.pop(hand.execution, None)
            self._beats.due()
            self._room.set()
            if not self._hands:
                self._empty.set()

    # --- One bundle ------------------------------------------------------------------------------

    async def _admitted(self, hand: Hand) -> JobDef | None:
        """Return the job of a message after checking its commit key and reading its control object.

        Return None if the message must be dropped.
        """
        name, key = hand.bundle.job, hand.task.key
        look = partial(self._controls.current, name, is_new=not self._jobs.knows(name))
        try:
            if self._jobs.knows(name):
                job = await self._jobs.of(name, key)
                await self._patience(look)
            else:
                job, _ = await both(self._jobs.of(name, key), self._patience(look))
        except NotFound:
            return None  # The job has been removed.
        except (Malformed, WrongKeyError) as error:
            # The manager notices that the bundle does not end, and then checks the job.
            log.warning("message %s is dropped: %s", hand.message.id, error)
            return None
        hand.key = key if job.commit_hash else UNSEALED
        return job

    async def _serve(self, hand: Hand, job: JobDef) -> None:
        try:
            stage = job.stage(hand.bundle.stage)
        except KeyError:
            log.error("message %s names a stage that its job does not have", hand.message.id)
            return
        if await self._not_wanted(hand) or await self._too_early(hand, job):
            return
        if hand.suspicion:
            if hand.task.watchdog and await self._suspects.runs_elsewhere(
                hand, self._settings.marker_stale_s
            ):
                await self._closing.send_again(
                    hand, job, delay_s=self._settings.watchdog_s, watchdog=True
                )
                return
            try:
                done = await self._suspects.verdict(hand)
            except RunsElsewhereError:
                await self._closing.send_again(hand, job, delay_s=self._settings.visibility_s)
                return
            if done:
                await self._closing.forward_again(hand, job, done)
                return
        elif hand.bundle.attempt > 1 and (done := await self._suspects.outcome(hand)):
            # A retry waits in the queue for its backoff. A copy of it may have finished meanwhile.
            await self._closing.forward_again(hand, job, done)
            return
        items: Sequence[Json]
        try:
            items = await self._items(hand, job)
        except NotFound as error:
            gone = settlement.vanished(hand.bundle, str(error))
            outcome = await self._closing.commit(hand, job, 0.0, gone)
            await self._closing.finish(hand, job, outcome)
            return
        with of_single_call(job.is_single_call):
            await self._in_slots(hand, job, stage, items)

    async def _items(self, hand: Hand, job: JobDef) -> Sequence[Json]:
        if hand.task.items is not None:
            return hand.task.items
        with span(self._tracer, "fetch input", hand.trace, hand.bundle):
            return await self._inputs.resolve(job, hand.bundle, hand.key)

    async def _in_slots(
        self, hand: Hand, job: JobDef, stage: StageDef, items: Sequence[Json]
    ) -> None:
        beside = min(stage.slots, self._slots.total)
        is_apart = False
        if hand.alone and beside < self._slots.total:
            # A poison task that runs alone cannot crash other bundles. The wait for all slots is
            # limited, because another bundle may run for half a day.
            is_apart = await self._ask(hand, self._slots.total, self._settings.visibility_s)
            self._room.set()  # Its slot demand may have decreased.
        if not is_apart:
            # A bundle that needs several slots keeps its place in the waiting list. If it were sent
            # again, it might never get them.
            longest_s = 2 * self._settings.quick_s if beside == 1 else None
            if not await self._ask(hand, beside, longest_s):
                # The bundle was prefetched behind a long one. An idle worker may run it sooner.
                self._prefetch = 0
                await self._closing.send_again(hand, job, items=items)
                return
        started_s = self._clock.now_s()
        begun_s = self._clock.monotonic_s()
        try:
            ran = await self._run(hand, job, stage, items, started_s)
        finally:
            hand.running = False
            hand.committing = True
            self._slots.release(hand.slots)
            took_s = self._clock.monotonic_s() - begun_s
            self._prefetch = self._slots.total if took_s < self._settings.quick_s else 0
            self._room.set()
        if hand.part:
            told = zip(hand.task.bundle.tasks, items, strict=True)
            items = [item for task, item in told if task in hand.part.tasks]
        cancelled = hand.control is Control.CANCEL
        if not ran and not cancelled:
            # No task has ended, so there is nothing to commit. The follow-up of an outcome without
            # tasks would be the bundle itself.
            await self._suspects.withdraw(hand)
            await self._closing.send_again(hand, job, items=items)
            return
        outcome = await self._closing.commit(hand, job, started_s, ran, cancelled=cancelled)
        await self._closing.finish(hand, job, outcome, items)

    async def _ask(self, hand: Hand, slots: int, longest_s: float | None) -> bool:
        """Wait up to `longest_s` for slots. Return whether the bundle got them."""
        hand.slots = slots
        hand.waiting = self._slots.ask(slots)
        if self._draining.is_set():
            self._slots.refuse(hand.waiting)
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await asyncio.shield(hand.waiting)
        self._slots.refuse(hand.waiting)
        return await hand.waiting

    async def _run(
        self, hand: Hand, job: JobDef, stage: StageDef, items: Sequence[Json], started_s: float
    ) -> list[Ran]:
        if hand.suspicion:
            await self._suspects.begin(hand)
        _, hand.handle.until_s = await self._controls.current(job.id)
        hand.running = True
        self._beats.due()
        budget_s = BUDGET_S if stage.bundle is None else None
        work = Work(job, stage, hand.bundle, hand.execution, items, budget_s, hand.key)
        runs = self._runner.run(work, hand.handle)
        if not hand.trace:
            return await self._ran(hand, job, items, started_s, runs, budget_s)
        with span(self._tracer, "run", hand.trace, hand.bundle, start_s=started_s) as running:
            ended: list[Ended] = []
            runs = noted(runs, ended, self._clock)
            ran = await self._ran(hand, job, items, started_s, runs, budget_s)
            tell(self._tracer, running, hand.bundle, ended, started_s)
            return ran

    async def _ran(
        self,
        hand: Hand,
        job: JobDef,
        items: Sequence[Json],
        started_s: float,
        runs: AsyncIterator[Ran],
        budget_s: float | None,
    ) -> list[Ran]:
        if budget_s is None or len(hand.bundle.tasks) == 1:
            return [ran async for ran in runs]
        return await self._shedding.run(hand, job, items, started_s, runs)

    async def _not_wanted(self, hand: Hand) -> bool:
        """Drop the message if its job is cancelled or paused, and return whether it was dropped.

        The ledger has the outstanding bundles. The manager seals them, or sends them again on
        resume.
        """
        if hand.control is Control.RUN:
            control, _ = await self._controls.current(hand.bundle.job)
            if control is Control.RUN:
                return False
        # Read again: an outdated control word must not drop a message that `resume` has just sent.
        control, _ = await self._controls.look(hand.bundle.job)
        if control is Control.RUN:
            return False
        await self._closing.delete(hand)
        return True

    async def _too_early(self, hand: Hand, job: JobDef) -> bool:
        """Send the message again with a delay if its start time has not come, and return whether
        it was sent. A wait may exceed SQS's maximum delay."""
        wait_s = (hand.task.not_before_s or 0.0) - self._clock.now_s()
        if wait_s <= 0.5:
            return False
        await self._closing.send_again(
            hand, job, items=hand.task.items, delay_s=wait_s, watchdog=hand.task.watchdog
        )
        return True

    # --- The control object ----------------------------------------------------------------------

    def _looked(self, job: JobId, control: Control, until_s: float) -> None:
        for hand in self._hands.values():
            if hand.task.bundle.job != job:
                continue
            hand.control = control
            hand.handle.until_s = until_s
            if control is not Control.RUN:
                hand.handle.stop = True
            if control is Control.CANCEL:
                hand.handle.kill = True
