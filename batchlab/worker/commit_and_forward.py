"""Completion of a bundle or a part of a bundle: the worker commits and forwards the outcome, or sends the bundle again.

Invariant: a worker deletes a message only in one of three cases. The three cases are: the outcome is committed and
forwarded, a copy of the message has been sent, or the job is canceled or paused. The manager knows the outstanding
tasks of a canceled or paused job. A crash between any two lines of the module does not lose a task, because the worker
deletes the message last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from batchlab.core import logs
from batchlab.core.commit import Addressed, address, commit, follow_ups, uncommitted
from batchlab.core.direct_calls import reply_to
from batchlab.core.errors import BackendError, TooNew
from batchlab.core.model import Bundle, Follow, Json, Outcome, Ran, TaskSet
from batchlab.core.port_retries import set_within
from batchlab.core.ports import MAX_BATCH, Clock, Message, Outgoing
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.messages import Duplicate
from batchlab.core.protocol.settlement import BUDGET_S
from batchlab.core.tracing import Span, Tracer, span, trace_of
from batchlab.worker.inflight_message import InflightMessage, WorkerContext

log = logging.getLogger(__name__)

# --- Spans and log lines -------------------------------------------------------------------------

TASK_SPANS = 16
"""Maximum number of task spans per bundle.

Failed tasks have priority over other tasks in a trace, and long tasks over short tasks.
"""
MAX_LOGGED_FAILURES = 10
"""Maximum number of failed tasks of a bundle that get their own log lines."""

REPLIED_S = 0.5
"""Delay in seconds of the event of a call whose client has the outcome already."""

EndedTask = tuple[Ran, float]
"""Result of a task, and its end time in seconds since the epoch."""


async def with_end_times(runs: AsyncIterator[Ran], ended: list[EndedTask], clock: Clock) -> AsyncIterator[Ran]:
    """Yield the results, and append each result with its end time to `ended`."""
    async for ran in runs:
        ended.append((ran, clock.now_s()))
        yield ran


def record_task_spans(
    tracer: Tracer, running: Span, bundle: Bundle, ended: Sequence[EndedTask], started_s: float
) -> None:
    """Record spans of tasks, and the totals of all tasks in the span `running`, which began at `started_s`."""
    failed = sum(ran.failure is not None for ran, _ in ended)
    running.note(
        succeeded=len(ended) - failed,
        failed=failed,
        run_s=sum(ran.run_s for ran, _ in ended),
        longest_s=max((ran.run_s for ran, _ in ended), default=0.0),
    )
    chosen = sorted(ended, key=lambda task: (task[0].failure is None, -task[0].run_s))[:TASK_SPANS]
    for ran, end_s in sorted(chosen, key=lambda task: task[1]):
        tracer.record(
            "task",
            running.context,
            bundle,
            # The child measures `run_s` with its own clock, so the computed start might be earlier than `started_s`.
            start_s=max(started_s, end_s - ran.run_s),
            end_s=end_s,
            error=ran.failure.kind.value if ran.failure else "",
            task=ran.task,
        )


def has_succeeded(inflight: InflightMessage) -> bool:
    """Return whether every task of the bundle has a result and none has failed."""
    return len(inflight.ran) == len(inflight.bundle.tasks) and all(ran.failure is None for ran in inflight.ran)


def set_log_fields(inflight: InflightMessage) -> None:
    """Add the ids of the bundle to all further log lines of the current asyncio task."""
    bundle = inflight.bundle
    single_task = {"task": bundle.tasks.first} if len(bundle.tasks) == 1 else {}
    logs.add_fields(
        job=bundle.job,
        stage=bundle.stage,
        bundle=bundle.id,
        attempt=bundle.attempt,
        execution=inflight.execution,
        trace=trace_of(inflight.task.trace),
        **single_task,
    )


def log_failures(outcome: Outcome) -> None:
    """Log the failed attempts of an outcome, without text from user code.

    The outcome contains the text from user code.
    """
    for failure in outcome.failed[:MAX_LOGGED_FAILURES]:
        what = f"{failure.kind}: {failure.error}" if failure.error else failure.kind
        follows = "for good" if failure.final else "and is tried again"
        log.info("the task failed (%s) %s", what, follows, extra={"task": failure.task})
    more = len(outcome.failed) - MAX_LOGGED_FAILURES
    if more > 0:
        log.info("%d more tasks failed", more)


# --- Completion ----------------------------------------------------------------------------------

OTHERS_S = 30.0
"""Delay in seconds of a message that only a newer worker can read."""


def fresh_copy(
    inflight: InflightMessage,
    now_s: float,
    *,
    items: Sequence[Json] | None = None,
    delay_s: float = 0.0,
    watchdog: bool = False,
) -> Addressed:
    """Return a new message for the bundle of an in-flight message."""
    return address(
        inflight.job,
        inflight.returned_bundle,
        inflight.key,
        items=items,
        delay_s=delay_s,
        now_s=now_s,
        watchdog=watchdog,
        trace=inflight.trace,
        expected_s=inflight.task.expected_s,
    )


class _Gathering:
    """Gathering of calls whose clients have their replies, so that one message has the events of several calls.

    Without the gathering, the work of the manager for one call would slow down the next call.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._full = asyncio.Event()

    async def wait(self) -> None:
        """Wait until `MAX_BATCH` calls wait, but at most `REPLIED_S`."""
        full = self._full
        self._waiting += 1
        if self._waiting >= MAX_BATCH or (not await set_within(full, REPLIED_S) and full is self._full):
            self._end()

    def _end(self) -> None:
        self._full.set()
        self._waiting, self._full = 0, asyncio.Event()


class BundleFinisher:
    """Commit, forwarding, and return of the bundles of one worker."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._replied = _Gathering()

    async def commit(self, inflight: InflightMessage, *, cancelled: bool = False) -> Outcome:
        """Commit the results of the bundle.

        `commit` returns the committed outcome, which may be another worker's outcome.
        """
        spans = [span for span in inflight.handle.log_spans if span[0] in inflight.bundle.tasks]
        draft = self._draft(inflight, inflight.handle.log, spans, cancelled=cancelled)
        log_failures(draft)
        committed = await self._commit(inflight, draft)
        if committed.execution != inflight.execution and not inflight.is_copy:
            took_s = draft.ended_s - draft.started_s
            self._report_duplicate(inflight, "execution", took_s * inflight.job.stage(inflight.bundle.stage).slots)
        return committed

    async def hand_off(self, inflight: InflightMessage, part: Bundle) -> bool:
        """Commit and forward all tasks of a bundle except `part`, which still runs.

        The message of the bundle stays in flight after the hand-off. Return False if another worker's outcome is the
        committed outcome. The run finds another worker's committed outcome at the end of the run.
        """
        spans = [span for span in inflight.handle.log_spans if span[0] not in part.tasks]
        # The worker stores the execution's log after the end of the run.
        key = object_keys.log(inflight.bundle, inflight.execution, inflight.key) if spans else ""
        draft = self._draft(inflight, key, spans, part=part.tasks)
        outcome = await self._commit(inflight, draft)
        if outcome != draft:
            return False
        log_failures(outcome)
        # The remaining part of the bundle does not need a message, because this worker runs the part.
        others = tuple(follow for follow in outcome.follows if follow.bundle != part)
        await self._forward(inflight, outcome, replace(outcome, follows=others))
        return True

    def _draft(
        self,
        inflight: InflightMessage,
        log_key: str,
        log_spans: Sequence[tuple[int, int, int]],
        *,
        cancelled: bool = False,
        part: TaskSet = TaskSet(),
    ) -> Outcome:
        now_s = self._context.clock.now_s()
        settled = settlement.settle(
            inflight.job,
            inflight.bundle,
            inflight.ran,
            execution=inflight.execution,
            worker=self._context.who.worker,
            started_s=inflight.started_s or now_s,
            ended_s=max(inflight.started_s, now_s),
            cancelled=cancelled,
            kept=part,
            log=log_key,
            log_spans=log_spans,
        )
        return json_format.fitting(settled)

    async def _commit(self, inflight: InflightMessage, draft: Outcome) -> Outcome:
        with span(self._context.tracer, "commit", inflight.trace, inflight.bundle):
            committed = await commit(self._context.objects, draft, self._context.patience, inflight.key)
        self._context.outbox.counters.count_commit(draft, committed)
        return committed

    def _report_duplicate(self, inflight: InflightMessage, kind: str, slot_s: float) -> None:
        bundle = inflight.bundle
        self._context.outbox.report_duplicate(Duplicate(bundle.job, bundle.stage, kind, inflight.execution, slot_s))

    async def finish(self, inflight: InflightMessage, outcome: Outcome) -> None:
        """Reply to a waiting client, forward the committed outcome, which may be another worker's outcome, and delete
        the message."""
        if (name := inflight.task.reply) and self._context.replies:
            inflight.replied = self._context.replies.send(name, reply_to(outcome, inflight.key))
            if inflight.replied and not outcome.follows:
                await self._replied.wait()
        await self._forward(inflight, outcome, outcome, may_wait=True)
        await self.delete(inflight)

    async def forward_again(self, inflight: InflightMessage, outcome: Outcome) -> None:
        """Forward an outcome that was committed earlier, and delete the message.

        A follow-up with a committed outcome is not sent again. The loser of a bundle with a speculative copy sends no
        follow-ups, because the winner has sent them and they may still run. The manager recovers lost follow-ups.
        """
        is_other = outcome.execution != inflight.execution
        # The manager counts the runs of bundles with speculative copies.
        if is_other and not (inflight.is_copy or inflight.is_superseded):
            self._report_duplicate(inflight, "message", 0.0)
        follows: tuple[Follow, ...] = ()
        if not (is_other and (inflight.is_copy or inflight.is_superseded or inflight.started_s)):
            follows = await uncommitted(self._context.objects, outcome.follows, self._context.patience, inflight.key)
        await self._forward(inflight, outcome, replace(outcome, follows=follows))
        await self.delete(inflight)

    async def _forward(
        self, inflight: InflightMessage, outcome: Outcome, unsent: Outcome, *, may_wait: bool = False
    ) -> None:
        """Send the follow-ups in `unsent`, then the event of `outcome`.

        With `may_wait`, the event may wait for a heartbeat while other bundles run on the worker.
        """
        items = None
        if inflight.items is not None and unsent.follows:
            items = dict(zip(inflight.bundle.tasks, inflight.items, strict=True))
        with span(self._context.tracer, "forward", inflight.trace, inflight.bundle) as forward:
            now_s, trace = self._context.clock.now_s(), forward.context
            messages = follow_ups(
                inflight.job,
                unsent,
                inflight.key,
                now_s=now_s,
                items=items,
                trace=trace,
                expected_s=inflight.task.expected_s,
            )
            # Follow-ups are sent before the event of their outcome. The event tells the manager that all follow-ups
            # have been sent, so that the manager may end the stage.
            await self._context.outbox.send(messages)
            # Another running bundle causes a heartbeat soon, and the heartbeat can carry the event.
            others = may_wait and any(
                not (other.committing or other is inflight) for other in self._context.inflight.values()
            )
            # The heartbeat in the same message as the event of a whole bundle does not list the bundle.
            inflight.reported = not inflight.running
            await self._context.outbox.send_event(outcome, trace, urgent=not others)

    # --- Return to the queue ---------------------------------------------------------------------

    async def send_again(self, inflight: InflightMessage, *, delay_s: float = 0.0, watchdog: bool = False) -> None:
        """Return the bundle to the queue as a fresh message, then delete the old message.

        A change of the old message's visibility would lead to a higher receive count, which suggests a poison task. A
        speculative copy is deleted, because another worker has the bundle. A message whose visibility timeout has ended
        is not sent again, because the queue delivers it again, and counts this delivery.
        """
        if inflight.is_copy:
            await self.delete(inflight)
            return
        if inflight.has_lapsed(self._context.clock.monotonic_s()):
            inflight.receipt = None
            return
        now_s, items = self._context.clock.now_s(), inflight.items
        copy = fresh_copy(inflight, now_s, items=items, delay_s=delay_s, watchdog=watchdog)
        await self._context.outbox.send([copy])
        await self.delete(inflight)

    async def return_too_new(self, queue: str, message: Message, error: TooNew) -> None:
        """Return a message of a newer batchlab version to the queue for a newer worker.

        A message at its first receive is sent again unchanged, because a higher receive count suggests a poison task. A
        message that was received more than once becomes visible after a delay and keeps its receive count.
        """
        log.warning("message %s is left for a newer worker: %s", message.id, error)
        try:
            if message.receive_count > 1:
                await self._context.queue.change_visibility(queue, [(message.receipt, OTHERS_S)])
                return
            await self._context.outbox.send([Addressed(queue, Outgoing(message.body, OTHERS_S))])
            await self._context.outbox.delete(queue, message.receipt)
        except BackendError as problem:
            log.warning("the message returns when its visibility timeout ends: %s", problem)

    async def delete(self, inflight: InflightMessage) -> None:
        """Delete the message if the worker still has its receipt."""
        if inflight.receipt is not None:
            receipt, inflight.receipt = inflight.receipt, None
            # If no other message is in flight, the delete waits until events and follow-ups have been sent.
            await self._context.outbox.delete(inflight.queue, receipt, urgent=len(self._context.inflight) > 1)


# --- Hand-off of the tasks behind a long task ---------------------------------------------------------

HANDOFF_CHECK_S = 0.1
"""Seconds until the next hand-off check if no task is running."""


async def collect_results(finisher: BundleFinisher, inflight: InflightMessage, runs: AsyncIterator[Ran]) -> None:
    """Collect the results in `inflight.ran`, and hand off the tasks that wait behind a long task.

    The outcome of the handed-off tasks is committed and reported while the remaining part of the bundle still runs. The
    follow-ups of the handed-off tasks' outcome include the remaining part. The message stays in flight until the
    outcome of the remaining part is also reported. If the worker dies, the next receiver of the message finds the
    outcome of the handed-off tasks and forwards the outcome again.

    A committed outcome that cannot be forwarded raises BackendError.
    """
    watch = asyncio.create_task(_hand_off_when_due(finisher, inflight), name=f"handoff {inflight.bundle.id}")
    try:
        async for ran in runs:
            inflight.ran.append(ran)
    finally:
        if not inflight.shedding:
            watch.cancel()
        # A commit of handed-off tasks may still be in progress.
        await asyncio.wait({watch})
    if inflight.shedding:
        watch.result()
        inflight.ran = [ran for ran in inflight.ran if ran.task in inflight.bundle.tasks]


async def _hand_off_when_due(finisher: BundleFinisher, inflight: InflightMessage) -> None:
    """Hand off the tasks behind the running task when the time budget is used up."""
    await asyncio.sleep(BUDGET_S)
    while (running := inflight.handle.running) is None or not _waiting_tasks(inflight, running):
        if inflight.handle.stop or len(inflight.ran) >= len(inflight.bundle.tasks):
            return
        await asyncio.sleep(HANDOFF_CHECK_S)
    if inflight.handle.stop:
        return
    inflight.shedding = True
    inflight.handle.stop = True
    ended = TaskSet.from_indices(ran.task for ran in inflight.ran)
    bundle = inflight.bundle
    part = replace(bundle, tasks=bundle.tasks - ended - _waiting_tasks(inflight, running))
    if await finisher.hand_off(inflight, part):
        # The remaining part is set after the commit, because the manager no longer needs the bundle's message once a
        # heartbeat reports the part. If another worker's outcome is the committed outcome, the run finds the outcome at
        # its end.
        inflight.narrow(part)


def _waiting_tasks(inflight: InflightMessage, running: int) -> TaskSet:
    """Return the tasks of the bundle that have not started. Tasks start in the order of the bundle."""
    unfinished = inflight.bundle.tasks - TaskSet.from_indices(ran.task for ran in inflight.ran)
    return unfinished - TaskSet.span(0, running + 1)
