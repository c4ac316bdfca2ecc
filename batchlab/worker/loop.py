"""Loop of the worker: steps 1 to 4 of the protocol, from the receive of a bundle to the delete of its message.

Invariant: a received message stays in flight until its bundle is committed and forwarded, or sent again. An error
concerns either one bundle, which the worker returns to the queue, or the whole worker, which stops. All steps of the
loop share the in-flight messages and the slots, so the steps are methods of one class.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from batchlab.core import visibility_timeouts
from batchlab.core.atomic_write import of_single_call
from batchlab.core.errors import BackendError, Malformed, NotFound, TooNew
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Control
from batchlab.core.port_retries import Patience, both, raise_if_cancelled, set_within
from batchlab.core.ports import MAX_BATCH, Clock, Message, Notice, Notices, Objects, Queue, Replies
from batchlab.core.pricing.request_costs import RequestCounter
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.messages import read_task_message
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.protocol.settlement import BUDGET_S
from batchlab.core.service_settings import WorkerSettings
from batchlab.core.text import count
from batchlab.core.tracing import NO_TRACER, Tracer, span
from batchlab.worker.commit_and_forward import (
    BundleFinisher,
    EndedTask,
    collect_results,
    has_succeeded,
    record_task_spans,
    set_log_fields,
    with_end_times,
)
from batchlab.worker.heartbeats import Heartbeats, VisibilityHeartbeat
from batchlab.worker.inflight_message import Identity, InflightMessage, Runner, Slots, Work, WorkerContext
from batchlab.worker.job_cache import ControlPoller, JobCache, WrongKeyError
from batchlab.worker.leader_watch import LeaderWatch
from batchlab.worker.live_logs import LiveLogs
from batchlab.worker.outbox import Outbox
from batchlab.worker.poison_detection import PoisonDetector, RunsElsewhereError

log = logging.getLogger(__name__)

# --- Shutdown ------------------------------------------------------------------------------------

NOTICE_POLL_S = 5.0
"""Seconds between two checks for a Spot interruption notice, as AWS recommends."""

LEAVE_S = 5.0
"""Seconds before the time limit of a drain that are reserved to commit and return bundles."""


async def poll_notices(notices: Notices, on_notice: Callable[[Notice], None]) -> None:
    """Poll until a termination notice exists, then call `on_notice`.

    A failed poll is tried again. The log records the first failed poll and the recovery.
    """
    is_failing = False
    while True:
        try:
            notice = await notices.notice()
        except BackendError as error:
            raise_if_cancelled()
            if not is_failing:
                log.warning("termination notices cannot be read: %s", error)
            is_failing = True
        else:
            if is_failing:
                log.info("termination notices can be read again")
            is_failing = False
            if notice is not None:
                log.warning("leaving: %s", notice.why)
                on_notice(notice)
                return
        await asyncio.sleep(NOTICE_POLL_S)


class Shutdown:
    """Drain of a worker within the remaining time (promise I6).

    A drain returns waiting bundles immediately, and sets a time limit for running tasks.
    """

    def __init__(self, context: WorkerContext, slots: Slots) -> None:
        self._context = context
        self._slots = slots
        self._remaining_s = context.settings.drain_s
        self._due_s: float | None = None

    def set_limit(self, notice: Notice | None) -> None:
        """Set the time limit of the drain to the notice's time, or to `drain_s` without a notice.

        The earliest limit of several notices applies. For example, a SIGTERM after a two-minute Spot notice shortens
        the limit.
        """
        clock, remaining_s = self._context.clock, self._context.settings.drain_s
        if notice is not None and notice.by_s is not None:
            remaining_s = max(0.0, notice.by_s - LEAVE_S - clock.now_s())
        due_s = clock.monotonic_s() + remaining_s
        if self._due_s is None:
            self._remaining_s = remaining_s
        elif due_s < self._due_s:
            asyncio.get_running_loop().call_later(remaining_s, self._kill_tasks)
        else:
            return
        self._due_s = due_s

    def return_waiting(self) -> None:
        """Prevent further starts of tasks, and return waiting bundles to the queue."""
        for inflight in list(self._context.inflight.values()):
            inflight.handle.stop = True
            if inflight.waiting:
                self._slots.refuse(inflight.waiting)

    async def wait(self, empty: asyncio.Event) -> None:
        """Wait until no message is in flight, and kill running tasks at the time limit."""
        if not await set_within(empty, self._remaining_s):
            self._kill_tasks()
            await empty.wait()

    def _kill_tasks(self) -> None:
        for inflight in list(self._context.inflight.values()):
            inflight.handle.kill = True


# --- The loop ------------------------------------------------------------------------------------

OUTAGE_S = 1.0
"""Seconds between a failed receive and the next receive."""

MAX_COPY_AGE_S = 60.0
"""Age in seconds at which a worker drops a speculative copy, because the slot that was free for the copy may be needed.
Until then, the worker that holds the bundle returns its copy up to seven times. In a pool of two workers, this worker
receives every second message."""

GPU_WAIT_S = 15.0
"""Seconds for which a bundle waits for a GPU of its worker before the worker returns it. Another worker may have a free
GPU by then."""

HEAD_START_S = 0.01
"""Delay in seconds of the next receive after a long poll has filled every slot."""


class Worker:
    """One worker process. `run` returns when no message is in flight after a call of `drain`."""

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
        tally: RequestCounter | None = None,
        tracer: Tracer = NO_TRACER,
        replies: Replies | None = None,
        *,
        ends_without_manager: bool = False,
    ) -> None:
        """Create a worker. With `ends_without_manager`, an idle worker ends after the end of the last manager."""
        self._jobs = JobCache(objects, patience)
        outbox = Outbox(queue, patience, tally, self._jobs.key_of)
        context = WorkerContext(who, objects, queue, clock, patience, settings, outbox, tracer, replies=replies)
        self.who = who
        self.context = context
        self._clock = clock
        self._settings = settings
        self._tracer = tracer
        self._inflight = context.inflight
        self._runner = runner
        self._notices = notices
        self._leader_watch = LeaderWatch(objects, clock) if ends_without_manager else None
        self.is_orphan = False
        """Whether the worker has ended because no manager leads."""
        self._tasks_queue = object_keys.tasks_queue(who.pool)
        self._inputs = Inputs(objects, patience)
        self._slots = Slots(who.slots, who.gpus)
        self._executions = 0
        self._prefetch = 0
        self._timeout_s = settings.visibility_s
        """Visibility timeout in seconds of the next received messages."""
        self._has_room = asyncio.Event()
        self._draining = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._live_logs = LiveLogs(context)
        self._controls = ControlPoller(context, self._live_logs.follow)
        self._heartbeats = Heartbeats(context)
        self._visibility = VisibilityHeartbeat(context)
        self._finisher = BundleFinisher(context)
        self._shutdown = Shutdown(context, self._slots)
        self._poison_detector = PoisonDetector(context, self._draining)

    def drain(self, notice: Notice | None = None) -> None:
        """Stop receiving, and finish or return the in-flight messages (promise I6).

        `run` returns at the end of the drain. If the notice has a time, the drain ends before the notice's time.
        """
        self._shutdown.set_limit(notice)
        self._draining.set()
        self._heartbeats.leaving = True

    async def run(self) -> None:
        """Receive and run bundles until the worker is drained.

        An unexpected error in any part of the worker stops the whole worker.
        """
        async with asyncio.TaskGroup() as group:
            receiver = group.create_task(self._receive_messages(group), name="fetch")
            others = [
                group.create_task(self._visibility.run(), name="visibility"),
                group.create_task(self._controls.run(), name="controls"),
                group.create_task(self._heartbeats.run(), name="heartbeats"),
                group.create_task(self._poison_detector.run(), name="poison detection"),
                group.create_task(self._live_logs.run(), name="live logs"),
            ]
            if self._notices is not None:
                others.append(group.create_task(poll_notices(self._notices, self.drain), name="notices"))
            if self._leader_watch is not None:
                others.append(group.create_task(self._end_as_orphan(self._leader_watch), name="leader watch"))
            await self._draining.wait()
            receiver.cancel()
            self._shutdown.return_waiting()
            self._heartbeats.request()
            await self._shutdown.wait(self._empty)
            for other in others:
                other.cancel()
        try:
            await self._heartbeats.send_final()
        finally:
            await self._runner.close()

    async def _end_as_orphan(self, watch: LeaderWatch) -> None:
        await watch.wait_until_orphaned(lambda: not self._inflight)
        self.is_orphan = True
        self.drain()

    @property
    def free_gpus(self) -> list[int]:
        """Numbers of the GPUs that no bundle holds."""
        return self._slots.free_gpus

    # --- Receiving -------------------------------------------------------------------------------

    async def _receive_messages(self, group: asyncio.TaskGroup) -> None:
        while True:
            # The room for new messages also limits the commits that are in progress.
            unfinished = sum(not inflight.replied for inflight in self._inflight.values())
            room = min(self._slots.total + self._prefetch - self._busy_slots, 3 * self._slots.total + 1 - unfinished)
            if room <= 0:
                self._has_room.clear()
                await self._has_room.wait()
                continue
            began_s, timeout_s = self._clock.monotonic_s(), self._timeout_s
            try:
                messages = await self.context.queue.receive(
                    self._tasks_queue,
                    max_messages=min(MAX_BATCH, room),
                    wait_s=self._settings.wait_s,
                    visibility_s=timeout_s,
                )
            except BackendError as error:
                raise_if_cancelled()
                # A receive is tried again without limit, because an outage of the queue must not stop running tasks.
                log.warning("no messages can be received: %s", error)
                await asyncio.sleep(OUTAGE_S)
                continue
            # Readable messages are registered before other messages are returned, so that a drain finds the readable
            # messages.
            too_new = [
                (message, problem) for message in messages if (problem := self._accept(message, timeout_s, group))
            ]
            for message, problem in too_new:
                await self._finisher.return_too_new(self._tasks_queue, message, problem)
            waited_s = self._clock.monotonic_s() - began_s
            if messages and self._busy_slots >= self._slots.total and waited_s > HEAD_START_S:
                # The queue was empty until the receive returned, so another receive would probably find nothing and
                # delay the new bundles. A free slot ends the wait, because the next bundle for the slot may already be
                # in the queue.
                self._has_room.clear()
                await set_within(self._has_room, HEAD_START_S)

    @property
    def _busy_slots(self) -> int:
        """Number of task slots in use or requested. A bundle whose commit is in progress does not use a slot."""
        return sum(inflight.slots for inflight in self._inflight.values() if not inflight.committing)

    def _accept(self, message: Message, timeout_s: float, group: asyncio.TaskGroup) -> TooNew | None:
        """Start a task that processes the message, which was received with the visibility timeout `timeout_s`.

        Return an error if only a newer worker can read the message.
        """
        try:
            task = read_task_message(message.body)
        except TooNew as error:
            return error
        except Exception as error:  # noqa: BLE001 - a malformed body may cause any error
            # A message that is not a bundle returns until the queue moves it to the dead-letter queue, where the
            # manager reports it.
            log.error("message %s is not a bundle: %s", message.id, error)
            return None
        now_s = self._clock.monotonic_s()
        self._executions += 1
        execution = f"{self.who.worker}-{self._executions}"
        # The next messages of the pool probably belong to the same stage.
        visibility_s = self._settings.visibility_s
        self._timeout_s = visibility_timeouts.receive_s(task.run_s, visibility_s)
        extend_s = now_s + visibility_timeouts.extend_after_s(timeout_s, visibility_s)
        inflight = InflightMessage(
            self._tasks_queue, message, task, execution, now_s, extend_s, message.receipt, now_s + timeout_s
        )
        self._inflight[execution] = inflight
        self._empty.clear()
        self._heartbeats.request()
        group.create_task(self._process_traced(inflight), name=f"bundle {task.bundle.id}")
        return None

    async def _process_traced(self, inflight: InflightMessage) -> None:
        set_log_fields(inflight)
        with span(self._tracer, "receive", inflight.task.trace, inflight.bundle) as receive:
            if inflight.task.trace:
                receive.note(receives=inflight.message.receive_count, worker=self.who.worker)
                inflight.trace = receive.context
            await self._process_message(inflight)

    async def _process_message(self, inflight: InflightMessage) -> None:
        """Process a message until the message is deleted or returned, and catch the errors of services."""
        is_watched = False
        try:
            if not await self._read_job(inflight):
                await self._finisher.delete(inflight)
                return
            self._controls.watch(inflight.bundle.job)
            is_watched = True
            await self._process_bundle(inflight)
        except TooNew as error:
            await self._poison_detector.withdraw(inflight)
            # For a message without a receipt, a watchdog message or another worker has the bundle.
            if inflight.receipt is not None:
                inflight.receipt = None
                await self._finisher.return_too_new(inflight.queue, inflight.message, error)
        except BackendError as error:
            # A message returns before its visibility timeout ends, but with a short delay, so that the failing service
            # can recover.
            log.warning("the bundle is returned to the queue: %s", error)
            await self._poison_detector.withdraw(inflight)
            await self._visibility.return_later(inflight)
        finally:
            if is_watched:
                self._controls.unwatch(inflight.bundle.job)
            self._poison_detector.end(inflight)
            self._inflight.pop(inflight.execution, None)
            self._heartbeats.request()
            self._has_room.set()
            if not self._inflight:
                self._empty.set()

    # --- One bundle ------------------------------------------------------------------------------

    async def _read_job(self, inflight: InflightMessage) -> bool:
        """Read the job of a message and its control object, and check the message's commit key.

        Return False if the message must be dropped.
        """
        job, key = inflight.bundle.job, inflight.task.key
        is_cached = job in self._jobs
        read_control = partial(self._controls.current, job, is_new=not is_cached)
        try:
            if is_cached:
                definition = await self._jobs.get(job, key)
                await self.context.patience(read_control)
            else:
                definition, _ = await both(self._jobs.get(job, key), self.context.patience(read_control))
        except NotFound:
            return False  # The definition does not exist because the job has been removed.
        except (Malformed, WrongKeyError) as error:
            # The manager notices that the bundle of a dropped message does not end, and then checks the job.
            log.warning("message %s is dropped: %s", inflight.message.id, error)
            return False
        inflight.definition = definition
        inflight.key = key if definition.commit_hash else UNSEALED
        return True

    async def _process_bundle(self, inflight: InflightMessage) -> None:
        """Run the bundle, or forward its existing outcome."""
        job = inflight.job
        try:
            stage = job.stage(inflight.bundle.stage)
        except KeyError:
            log.error("message %s names a stage that its job does not have", inflight.message.id)
            return
        if await self._drop_if_stopped(inflight) or await self._postpone_if_early(inflight):
            return
        if inflight.is_copy and await self._refuse_copy(inflight):
            return
        if inflight.suspicion:
            if inflight.task.watchdog and await self._poison_detector.runs_elsewhere(inflight):
                await self._finisher.send_again(inflight, delay_s=self._settings.watchdog_s, watchdog=True)
                return
            try:
                outcome = await self._poison_detector.verdict(inflight)
            except RunsElsewhereError:
                await self._finisher.send_again(inflight, delay_s=self._settings.visibility_s)
                return
            if outcome:
                await self._finisher.forward_again(inflight, outcome)
                return
        elif inflight.bundle.attempt > 1 and (outcome := await self._poison_detector.outcome(inflight)):
            # A copy of a retry may have finished while the retry waited in the queue for its backoff.
            await self._finisher.forward_again(inflight, outcome)
            return
        try:
            inflight.items = inflight.task.items
            if inflight.items is None:
                with span(self._tracer, "fetch input", inflight.trace, inflight.bundle):
                    inflight.items = await self._inputs.resolve(job, inflight.bundle, inflight.key)
        except NotFound as error:
            if inflight.is_copy:
                # A copy only helps, so the original run reports the missing input.
                await self._finisher.delete(inflight)
                return
            inflight.ran = settlement.vanished_runs(inflight.bundle, str(error))
            await self._finisher.finish(inflight, await self._finisher.commit(inflight))
            return
        with of_single_call(job.is_single_call):
            await self._run_in_slots(inflight, stage)

    async def _run_in_slots(self, inflight: InflightMessage, stage: StageDef) -> None:
        if not await self._wait_for_slots(inflight, stage):
            # A prefetched bundle behind a long bundle is returned, because an idle worker may run it sooner.
            self._prefetch = 0
            if not await self._end_superseded(inflight):
                await self._finisher.send_again(inflight)
            return
        inflight.started_s = self._clock.now_s()
        began_s = self._clock.monotonic_s()
        copy_s = inflight.task.copy_s
        limit = None if copy_s is None else asyncio.get_running_loop().call_later(copy_s, inflight.handle.end)
        try:
            if stage.gpus and inflight.suspicion and not inflight.is_superseded:
                # The bundle may have waited for a GPU behind an earlier delivery of itself.
                inflight.is_superseded = await self._poison_detector.outcome(inflight) is not None
            if not inflight.is_superseded:
                await self._run_tasks(inflight, stage)
        finally:
            if limit is not None:
                limit.cancel()
            inflight.running = False
            inflight.committing = True
            self._slots.release(inflight.slots, inflight.gpus)
            inflight.gpus = ()
            took_s = self._clock.monotonic_s() - began_s
            self._prefetch = self._slots.total if took_s < self._settings.quick_s else 0
            self._has_room.set()
        if await self._end_superseded(inflight):
            return
        cancelled = inflight.control is Control.CANCEL
        if inflight.is_copy and not has_succeeded(inflight):
            # A copy only helps. A failure, a cancellation, or the end of its time is left to the original run.
            await self._poison_detector.withdraw(inflight)
            await self._finisher.delete(inflight)
            return
        if not inflight.ran and not cancelled:
            # A run of a bundle in which no task has ended does not have results to commit. If an outcome without tasks
            # were committed, its follow-up would be the bundle itself.
            await self._poison_detector.withdraw(inflight)
            await self._finisher.send_again(inflight)
            return
        outcome = await self._finisher.commit(inflight, cancelled=cancelled)
        if outcome.execution != inflight.execution and stage.may_be_copied and not inflight.task.reply:
            # The follow-ups of the other run must not run twice.
            await self._finisher.forward_again(inflight, outcome)
        else:
            await self._finisher.finish(inflight, outcome)

    async def _wait_for_slots(self, inflight: InflightMessage, stage: StageDef) -> bool:
        """Wait for the slots and the GPUs of the bundle, and return whether the bundle got them. Raise TooNew if the
        worker has too few GPUs."""
        slots = min(stage.slots, self._slots.total)
        if stage.gpus > self._slots.gpus:
            # The instance may be older than a change of its pool, so a newer instance may have the GPUs.
            raise TooNew(
                f"A task of stage {stage.name} needs {count(stage.gpus, 'GPU')}, and this worker "
                f"has {self._slots.gpus}."
            )
        if inflight.alone and slots < self._slots.total:
            # A poison task that runs alone cannot crash other bundles. The wait for all slots is limited, because
            # another bundle may run for half a day.
            is_alone = await self._acquire_slots(inflight, self._slots.total, stage.gpus, self._settings.visibility_s)
            # A bundle that runs together with other bundles does not need all slots, so the worker may have room again.
            self._has_room.set()
            if is_alone:
                return True
        # A bundle that needs several slots or GPUs keeps its place in the waiting list. A bundle that is sent again
        # might never get several slots. A copy uses only slots that are free.
        max_wait_s = 2 * self._settings.quick_s if slots == 1 or inflight.is_copy else None
        if stage.gpus:
            max_wait_s = max(GPU_WAIT_S, 2 * self._settings.quick_s) if slots == stage.gpus == 1 else None
        return await self._acquire_slots(inflight, slots, stage.gpus, max_wait_s)

    async def _end_superseded(self, inflight: InflightMessage) -> bool:
        """Forward the outcome of another worker if it has stopped this run. Return whether the outcome was
        forwarded."""
        if not inflight.is_superseded or (outcome := await self._poison_detector.outcome(inflight)) is None:
            return False
        await self._poison_detector.withdraw(inflight)
        await self._finisher.forward_again(inflight, outcome)
        return True

    async def _refuse_copy(self, inflight: InflightMessage) -> bool:
        """Drop a speculative copy that comes too late, or return a copy of a bundle that this worker holds.

        Return whether the copy was dropped or returned.
        """
        if self._clock.now_s() - inflight.message.sent_s > MAX_COPY_AGE_S:
            # The worker of the copy may have died between its commit and its event.
            if outcome := await self._poison_detector.outcome(inflight):
                await self._finisher.forward_again(inflight, outcome)
            else:
                await self._finisher.delete(inflight)
            return True
        bundle = inflight.bundle
        others = [other.bundle for other in self._inflight.values() if other is not inflight]
        if any((other.job, other.stage, other.id) == (bundle.job, bundle.stage, bundle.id) for other in others):
            await self._visibility.return_later(inflight)
            return True
        return False

    async def _acquire_slots(self, inflight: InflightMessage, count: int, gpus: int, max_wait_s: float | None) -> bool:
        """Wait up to `max_wait_s` for slots and GPUs, and return whether the bundle got them."""
        inflight.slots = count
        inflight.waiting = self._slots.request(count, gpus)
        if self._draining.is_set():
            self._slots.refuse(inflight.waiting)
        with suppress(TimeoutError):
            async with asyncio.timeout(max_wait_s):
                await asyncio.shield(inflight.waiting)
        self._slots.refuse(inflight.waiting)
        inflight.gpus = self._slots.take(inflight.waiting)
        return await inflight.waiting

    async def _run_tasks(self, inflight: InflightMessage, stage: StageDef) -> None:
        """Run the tasks of the bundle, and store the results in `inflight.ran`."""
        assert inflight.items is not None
        if inflight.suspicion:
            await self._poison_detector.begin(inflight)
        _, inflight.handle.until_s = await self._controls.current(inflight.bundle.job)
        inflight.running = True
        self._heartbeats.request()
        budget_s = BUDGET_S if stage.bundle is None and not inflight.is_copy else None
        work = Work(
            inflight.job,
            stage,
            inflight.bundle,
            inflight.execution,
            inflight.items,
            budget_s,
            inflight.key,
            inflight.gpus,
        )
        runs = self._runner.run(work, inflight.handle)
        with span(self._tracer, "run", inflight.trace, inflight.bundle, start_s=inflight.started_s) as run_span:
            ended: list[EndedTask] = []
            if inflight.trace:
                runs = with_end_times(runs, ended, self._clock)
            if budget_s is None or len(inflight.bundle.tasks) == 1:
                inflight.ran = [ran async for ran in runs]
            else:
                await collect_results(self._finisher, inflight, runs)
            if inflight.trace:
                record_task_spans(self._tracer, run_span, inflight.bundle, ended, inflight.started_s)

    async def _drop_if_stopped(self, inflight: InflightMessage) -> bool:
        """Delete the message if its job is canceled or paused, and return whether the message was deleted.

        The ledger has the outstanding bundles of a canceled or paused job. The manager commits CANCELLED for the
        outstanding bundles after a cancellation, and sends the bundles again on resume.
        """
        if inflight.control is Control.RUN:
            control, _ = await self._controls.current(inflight.bundle.job)
            if control is Control.RUN:
                return False
        # The control object is read again, because an outdated control command must not drop a message that `resume`
        # has just sent.
        control, _ = await self._controls.read(inflight.bundle.job)
        if control is Control.RUN:
            return False
        await self._finisher.delete(inflight)
        return True

    async def _postpone_if_early(self, inflight: InflightMessage) -> bool:
        """Send the message again with a delay if the bundle's start time is in the future.

        Return whether the message was sent again. The remaining delay until the start time may exceed SQS's maximum
        delay of a message.
        """
        wait_s = (inflight.task.not_before_s or 0.0) - self._clock.now_s()
        if wait_s <= 0.5:
            return False
        inflight.items = inflight.task.items
        await self._finisher.send_again(inflight, delay_s=wait_s, watchdog=inflight.task.watchdog)
        return True
