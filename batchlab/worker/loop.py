"""The worker's loop: steps 1 to 4 of the protocol, from the receive of a bundle to its delete.

Invariant: a received message stays in flight until its bundle is committed and forwarded, or sent
again. An error either concerns one bundle, which is then returned to the queue, or stops the whole
worker. All steps share the in-flight messages and the slots, so they are one class.

Shutdown of a worker: termination notices, and the drain within the remaining time (I6).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from batchlab.core.atomic_write import of_single_call
from batchlab.core.errors import BackendError, Malformed, NotFound, TooNew
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Control, JobId, Json, Ran
from batchlab.core.port_retries import Patience, both, heed_cancellation, set_within
from batchlab.core.ports import MAX_BATCH, Clock, Message, Notice, Notices, Objects, Queue
from batchlab.core.pricing.request_costs import Tally
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.messages import read_task_message
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.protocol.settlement import BUDGET_S
from batchlab.core.tracing import NOBODY, Tracer, span
from batchlab.worker import commit_and_forward
from batchlab.worker.commit_and_forward import (
    BundleFinisher,
    Ended,
    Slots,
    WorkHandoff,
    record_task_spans,
    with_end_times,
)
from batchlab.worker.heartbeats import Heartbeats, Identity, VisibilityHeartbeat
from batchlab.worker.inflight_message import InflightMessage, Runner, Work, WorkerSettings
from batchlab.worker.job_cache import ControlPoller, JobCache, WrongKeyError
from batchlab.worker.live_logs import LiveLogs
from batchlab.worker.outbox import Outbox, WorkerCounters
from batchlab.worker.poison_detection import PoisonDetector, RunsElsewhereError

log = logging.getLogger(__name__)

POLL_S = 5.0
"""Seconds between two checks for a Spot interruption notice, as AWS recommends."""

LEAVE_S = 5.0
"""Seconds reserved to commit and return bundles after the last task has ended."""


async def poll_notices(notices: Notices, leave: Callable[[Notice], None]) -> None:
    """Poll until there is a notice, then call `leave`.

    A failed poll is repeated. The log records the first failure and the recovery.
    """
    silent = False
    while True:
        try:
            notice = await notices.notice()
        except BackendError as error:
            heed_cancellation()
            if not silent:
                log.warning("termination notices cannot be read: %s", error)
            silent = True
        else:
            if silent:
                log.info("termination notices can be read again")
            silent = False
            if notice is not None:
                log.warning("leaving: %s", notice.why)
                leave(notice)
                return
        await asyncio.sleep(POLL_S)


class Shutdown:
    """Drain of a worker. Waiting bundles are returned at once, and running tasks get a time limit.

    The worker's loop shares `inflight_messages`.
    """

    def __init__(
        self, clock: Clock, drain_s: float, inflight_messages: Mapping[str, InflightMessage], slots: Slots
    ) -> None:
        self._clock = clock
        self._drain_s = drain_s
        self._inflight = inflight_messages
        self._slots = slots
        self._left_s = drain_s
        self._due_s: float | None = None

    def told(self, notice: Notice | None) -> None:
        """Set the time limit: the notice's time, or `drain_s` if there is none.

        The earliest limit of several notices applies. For example, a SIGTERM after a two-minute
        Spot notice shortens the limit.
        """
        left_s = self._drain_s
        if notice is not None and notice.by_s is not None:
            left_s = max(0.0, notice.by_s - LEAVE_S - self._clock.now_s())
        due_s = self._clock.monotonic_s() + left_s
        if self._due_s is None:
            self._left_s = left_s
        elif due_s < self._due_s:
            asyncio.get_running_loop().call_later(left_s, self._end)
        else:
            return
        self._due_s = due_s

    def hand_back(self) -> None:
        """Prevent further starts of tasks, and return waiting bundles."""
        for inflight in list(self._inflight.values()):
            inflight.handle.stop = True
            if inflight.waiting:
                self._slots.refuse(inflight.waiting)

    async def over(self, empty: asyncio.Event) -> None:
        """Wait until no message is in flight. Kill running tasks when the time is up."""
        if not await set_within(empty, self._left_s):
            self._end()
            await empty.wait()

    def _end(self) -> None:
        for inflight in list(self._inflight.values()):
            inflight.handle.kill = True


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
        self._counters = WorkerCounters()
        self._jobs = JobCache(objects, patience)
        self._outbox = Outbox(queue, patience, tally, self._counters, self._jobs.key_of)
        self._inputs = Inputs(objects, patience)
        self._inflight: dict[str, InflightMessage] = {}
        self._live_logs = LiveLogs(who.worker, self._inflight, objects, clock, every_s=settings.control_lease_s)
        self._controls = ControlPoller(
            objects=objects,
            clock=clock,
            lease_s=settings.control_lease_s,
            on_look=self._looked,
            on_tail=self._live_logs.asked,
        )
        self._slots = Slots(who.slots)
        self._heartbeats = Heartbeats(who, self._inflight, self._outbox, clock, settings)
        self._shutdown = Shutdown(clock, settings.drain_s, self._inflight, self._slots)
        self._visibility = VisibilityHeartbeat(self._inflight, queue, objects, clock, self._outbox, settings)
        self._finisher = BundleFinisher(
            worker=who.worker,
            inflight_messages=self._inflight,
            objects=objects,
            queue=queue,
            clock=clock,
            patience=patience,
            outbox=self._outbox,
            counters=self._counters,
            tracer=tracer,
        )
        self._handoff = WorkHandoff(self._finisher)
        self._executions = 0
        self._prefetch = 0
        self._room = asyncio.Event()
        self._draining = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._poison_detector = PoisonDetector(
            objects, clock, patience, who.worker, settings.visibility_s, self._draining
        )

    def drain(self, notice: Notice | None = None) -> None:
        """Stop receiving, and finish or return the in-flight messages. Then `run` returns (I6).

        The time of the notice, if it has one, limits how long this may take.
        """
        self._shutdown.told(notice)
        self._draining.set()
        self._heartbeats.leaving = True

    async def run(self) -> None:
        """Work until drained. An unexpected error in any part stops the whole worker."""
        async with asyncio.TaskGroup() as group:
            fetcher = group.create_task(self._fetch(group), name="fetch")
            others = [
                group.create_task(self._visibility.keep(self._jobs.of), name="visibility"),
                group.create_task(self._controls.poll(), name="controls"),
                group.create_task(self._heartbeats.keep(), name="heartbeats"),
                group.create_task(self._poison_detector.keep(), name="poison detection"),
                group.create_task(self._live_logs.keep(), name="live logs"),
            ]
            if self._notices is not None:
                others.append(group.create_task(poll_notices(self._notices, self.drain), name="notices"))
            await self._draining.wait()
            fetcher.cancel()
            await self._leave()
            for other in others:
                other.cancel()
        try:
            await self._heartbeats.last()
        finally:
            await self._runner.close()

    async def _leave(self) -> None:
        self._shutdown.hand_back()
        self._heartbeats.due()
        await self._shutdown.over(self._empty)

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
                await self._finisher.leave_to_others(self._tasks_queue, message, why)
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
        return sum(inflight.slots for inflight in self._inflight.values() if not inflight.committing)

    def _free_hands(self) -> int:
        """Return how many more messages may be received. Commits in progress are limited too."""
        wanted = self._slots.total + self._prefetch - self._busy
        return min(wanted, 3 * self._slots.total + 1 - len(self._inflight))

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
        inflight = InflightMessage(self._tasks_queue, message, task, execution, now_s, now_s, message.receipt)
        self._inflight[execution] = inflight
        self._empty.clear()
        self._heartbeats.due()
        group.create_task(self._hold(inflight), name=f"bundle {task.bundle.id}")
        return None

    async def _hold(self, inflight: InflightMessage) -> None:
        commit_and_forward.set_log_fields(inflight)
        if not inflight.task.trace:
            await self._handle(inflight)
            return
        with span(self._tracer, "receive", inflight.task.trace, inflight.bundle) as received:
            received.note(receives=inflight.message.receive_count, worker=self.who.worker)
            inflight.trace = received.context
            await self._handle(inflight)

    async def _handle(self, inflight: InflightMessage) -> None:
        watched = False
        try:
            job = await self._admitted(inflight)
            if job is None:
                await self._finisher.delete(inflight)
                return
            self._controls.watch(inflight.bundle.job)
            watched = True
            await self._serve(inflight, job)
        except TooNew as error:
            await self._poison_detector.withdraw(inflight)
            if inflight.receipt is not None:  # None: a watchdog or another worker has the bundle.
                inflight.receipt = None
                await self._finisher.leave_to_others(inflight.queue, inflight.message, error)
        except BackendError as error:
            # The message returns before its visibility timeout ends, but with a short delay, so
            # that the failing service can recover.
            log.warning("the bundle is returned to the queue: %s", error)
            await self._poison_detector.withdraw(inflight)
            await self._visibility.give_back_later(inflight)
        finally:
            if watched:
                self._controls.unwatch(inflight.bundle.job)
            self._poison_detector.end(inflight)
            self._inflight.pop(inflight.execution, None)
            self._heartbeats.due()
            self._room.set()
            if not self._inflight:
                self._empty.set()

    # --- One bundle ------------------------------------------------------------------------------

    async def _admitted(self, inflight: InflightMessage) -> JobDef | None:
        """Return the job of a message after checking its commit key and reading its control object.

        Return None if the message must be dropped.
        """
        name, key = inflight.bundle.job, inflight.task.key
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
            log.warning("message %s is dropped: %s", inflight.message.id, error)
            return None
        inflight.key = key if job.commit_hash else UNSEALED
        return job

    async def _serve(self, inflight: InflightMessage, job: JobDef) -> None:
        try:
            stage = job.stage(inflight.bundle.stage)
        except KeyError:
            log.error("message %s names a stage that its job does not have", inflight.message.id)
            return
        if await self._not_wanted(inflight) or await self._too_early(inflight, job):
            return
        if inflight.suspicion:
            if inflight.task.watchdog and await self._poison_detector.runs_elsewhere(
                inflight, self._settings.marker_stale_s
            ):
                await self._finisher.send_again(inflight, job, delay_s=self._settings.watchdog_s, watchdog=True)
                return
            try:
                done = await self._poison_detector.verdict(inflight)
            except RunsElsewhereError:
                await self._finisher.send_again(inflight, job, delay_s=self._settings.visibility_s)
                return
            if done:
                await self._finisher.forward_again(inflight, job, done)
                return
        elif inflight.bundle.attempt > 1 and (done := await self._poison_detector.outcome(inflight)):
            # A retry waits in the queue for its backoff. A copy of it may have finished meanwhile.
            await self._finisher.forward_again(inflight, job, done)
            return
        items: Sequence[Json]
        try:
            items = await self._items(inflight, job)
        except NotFound as error:
            gone = settlement.vanished(inflight.bundle, str(error))
            outcome = await self._finisher.commit(inflight, job, 0.0, gone)
            await self._finisher.finish(inflight, job, outcome)
            return
        with of_single_call(job.is_single_call):
            await self._in_slots(inflight, job, stage, items)

    async def _items(self, inflight: InflightMessage, job: JobDef) -> Sequence[Json]:
        if inflight.task.items is not None:
            return inflight.task.items
        with span(self._tracer, "fetch input", inflight.trace, inflight.bundle):
            return await self._inputs.resolve(job, inflight.bundle, inflight.key)

    async def _in_slots(self, inflight: InflightMessage, job: JobDef, stage: StageDef, items: Sequence[Json]) -> None:
        beside = min(stage.slots, self._slots.total)
        is_apart = False
        if inflight.alone and beside < self._slots.total:
            # A poison task that runs alone cannot crash other bundles. The wait for all slots is
            # limited, because another bundle may run for half a day.
            is_apart = await self._ask(inflight, self._slots.total, self._settings.visibility_s)
            self._room.set()  # Its slot demand may have decreased.
        if not is_apart:
            # A bundle that needs several slots keeps its place in the waiting list. If it were sent
            # again, it might never get them.
            longest_s = 2 * self._settings.quick_s if beside == 1 else None
            if not await self._ask(inflight, beside, longest_s):
                # The bundle was prefetched behind a long one. An idle worker may run it sooner.
                self._prefetch = 0
                await self._finisher.send_again(inflight, job, items=items)
                return
        started_s = self._clock.now_s()
        begun_s = self._clock.monotonic_s()
        try:
            ran = await self._run(inflight, job, stage, items, started_s)
        finally:
            inflight.running = False
            inflight.committing = True
            self._slots.release(inflight.slots)
            took_s = self._clock.monotonic_s() - begun_s
            self._prefetch = self._slots.total if took_s < self._settings.quick_s else 0
            self._room.set()
        if inflight.part:
            told = zip(inflight.task.bundle.tasks, items, strict=True)
            items = [item for task, item in told if task in inflight.part.tasks]
        cancelled = inflight.control is Control.CANCEL
        if not ran and not cancelled:
            # No task has ended, so there is nothing to commit. The follow-up of an outcome without
            # tasks would be the bundle itself.
            await self._poison_detector.withdraw(inflight)
            await self._finisher.send_again(inflight, job, items=items)
            return
        outcome = await self._finisher.commit(inflight, job, started_s, ran, cancelled=cancelled)
        await self._finisher.finish(inflight, job, outcome, items)

    async def _ask(self, inflight: InflightMessage, slots: int, longest_s: float | None) -> bool:
        """Wait up to `longest_s` for slots. Return whether the bundle got them."""
        inflight.slots = slots
        inflight.waiting = self._slots.ask(slots)
        if self._draining.is_set():
            self._slots.refuse(inflight.waiting)
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await asyncio.shield(inflight.waiting)
        self._slots.refuse(inflight.waiting)
        return await inflight.waiting

    async def _run(
        self, inflight: InflightMessage, job: JobDef, stage: StageDef, items: Sequence[Json], started_s: float
    ) -> list[Ran]:
        if inflight.suspicion:
            await self._poison_detector.begin(inflight)
        _, inflight.handle.until_s = await self._controls.current(job.id)
        inflight.running = True
        self._heartbeats.due()
        budget_s = BUDGET_S if stage.bundle is None else None
        work = Work(job, stage, inflight.bundle, inflight.execution, items, budget_s, inflight.key)
        runs = self._runner.run(work, inflight.handle)
        if not inflight.trace:
            return await self._ran(inflight, job, items, started_s, runs, budget_s)
        with span(self._tracer, "run", inflight.trace, inflight.bundle, start_s=started_s) as running:
            ended: list[Ended] = []
            runs = with_end_times(runs, ended, self._clock)
            ran = await self._ran(inflight, job, items, started_s, runs, budget_s)
            record_task_spans(self._tracer, running, inflight.bundle, ended, started_s)
            return ran

    async def _ran(
        self,
        inflight: InflightMessage,
        job: JobDef,
        items: Sequence[Json],
        started_s: float,
        runs: AsyncIterator[Ran],
        budget_s: float | None,
    ) -> list[Ran]:
        if budget_s is None or len(inflight.bundle.tasks) == 1:
            return [ran async for ran in runs]
        return await self._handoff.run(inflight, job, items, started_s, runs)

    async def _not_wanted(self, inflight: InflightMessage) -> bool:
        """Drop the message if its job is cancelled or paused, and return whether it was dropped.

        The ledger has the outstanding bundles. The manager seals them, or sends them again on
        resume.
        """
        if inflight.control is Control.RUN:
            control, _ = await self._controls.current(inflight.bundle.job)
            if control is Control.RUN:
                return False
        # Read again: an outdated control word must not drop a message that `resume` has just sent.
        control, _ = await self._controls.look(inflight.bundle.job)
        if control is Control.RUN:
            return False
        await self._finisher.delete(inflight)
        return True

    async def _too_early(self, inflight: InflightMessage, job: JobDef) -> bool:
        """Send the message again with a delay if its start time has not come, and return whether
        it was sent. A wait may exceed SQS's maximum delay."""
        wait_s = (inflight.task.not_before_s or 0.0) - self._clock.now_s()
        if wait_s <= 0.5:
            return False
        await self._finisher.send_again(
            inflight, job, items=inflight.task.items, delay_s=wait_s, watchdog=inflight.task.watchdog
        )
        return True

    # --- The control object ----------------------------------------------------------------------

    def _looked(self, job: JobId, control: Control, until_s: float) -> None:
        for inflight in self._inflight.values():
            if inflight.task.bundle.job != job:
                continue
            inflight.control = control
            inflight.handle.until_s = until_s
            if control is not Control.RUN:
                inflight.handle.stop = True
            if control is Control.CANCEL:
                inflight.handle.kill = True
