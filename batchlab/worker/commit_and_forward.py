"""Completion of a bundle or a part of one: commit and forward its outcome, or send it again.

Invariant: a message is deleted only in three cases. Its outcome is committed and forwarded, a fresh
copy of it has been sent, or its job is cancelled or paused (the manager then knows the outstanding
tasks). A crash between any two lines therefore loses no task.

Trace spans and log lines of a bundle.

Invariants: a bundle has at most TASK_SPANS task spans, for failed tasks first and then for the
longest ones. Totals cover all tasks. The worker's log contains no text from user code; the outcome
has it.

Handoff of the tasks that wait behind a long task, and the slots of an instance.

Invariant: the outcome of the bundle is committed and reported first. It names the part that this
worker keeps among its follow-ups. The message stays in flight until the outcome of that part is
also reported. If the worker dies, the next receiver of the message finds the first outcome and
forwards it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from batchlab.core import logs
from batchlab.core.commit import Addressed, address, commit, follow_ups, uncommitted
from batchlab.core.errors import BackendError, TooNew
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Json, Outcome, Ran, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, Message, Objects, Outgoing, Queue
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.messages import Duplicate
from batchlab.core.protocol.settlement import BUDGET_S
from batchlab.core.tracing import Span, Tracer, span, trace_of
from batchlab.worker.inflight_message import InflightMessage
from batchlab.worker.outbox import Outbox, WorkerCounters

TASK_SPANS = 16

Ended = tuple[Ran, float]
"""A result and its end time in seconds since the epoch."""


async def with_end_times(runs: AsyncIterator[Ran], ended: list[Ended], clock: Clock) -> AsyncIterator[Ran]:
    """Yield the results, and append each with its end time to `ended`."""
    async for ran in runs:
        ended.append((ran, clock.now_s()))
        yield ran


def record_task_spans(tracer: Tracer, running: Span, bundle: Bundle, ended: Sequence[Ended], started_s: float) -> None:
    """Record totals in the span `running`, which began at `started_s`, and spans of tasks."""
    failed = sum(ran.failure is not None for ran, _ in ended)
    running.note(
        succeeded=len(ended) - failed,
        failed=failed,
        run_s=sum(ran.run_s for ran, _ in ended),
        longest_s=max((ran.run_s for ran, _ in ended), default=0.0),
    )
    first = sorted(ended, key=lambda one: (one[0].failure is None, -one[0].run_s))[:TASK_SPANS]
    for ran, end_s in sorted(first, key=lambda one: one[1]):
        tracer.record(
            "task",
            running.context,
            bundle,
            # The child measured `run_s` with its own clock.
            start_s=max(started_s, end_s - ran.run_s),
            end_s=end_s,
            error=ran.failure.kind.value if ran.failure else "",
            task=ran.task,
        )


log = logging.getLogger(__name__)

FAILURES_LOGGED = 10
"""Most failed tasks of a bundle that get their own log line."""


def set_log_fields(inflight: InflightMessage) -> None:
    """Add the bundle's ids to all further log lines of this asyncio task."""
    bundle = inflight.bundle
    alone = {"task": bundle.tasks.first} if len(bundle.tasks) == 1 else {}
    logs.note(
        job=bundle.job,
        stage=bundle.stage,
        bundle=bundle.id,
        attempt=bundle.attempt,
        execution=inflight.execution,
        trace=trace_of(inflight.task.trace),
        **alone,
    )


def log_failures(outcome: Outcome) -> None:
    """Log the failed attempts of an outcome."""
    for failure in outcome.failed[:FAILURES_LOGGED]:
        what = f"{failure.kind}: {failure.error}" if failure.error else failure.kind
        follows = "for good" if failure.final else "and is tried again"
        log.info("the task failed (%s) %s", what, follows, extra={"task": failure.task})
    more = len(outcome.failed) - FAILURES_LOGGED
    if more > 0:
        log.info("%d more tasks failed", more)


OTHERS_S = 30.0
"""Delay in seconds of a message that only a newer worker can read."""


class BundleFinisher:
    """Commit, forwarding, and return of the bundles of one worker."""

    def __init__(
        self,
        worker: str,
        inflight_messages: Mapping[str, InflightMessage],
        objects: Objects,
        queue: Queue,
        clock: Clock,
        patience: Patience,
        outbox: Outbox,
        counters: WorkerCounters,
        tracer: Tracer,
    ) -> None:
        self._worker = worker
        self._inflight = inflight_messages
        self._objects = objects
        self._queue = queue
        self._clock = clock
        self._patience = patience
        self._outbox = outbox
        self._counters = counters
        self._tracer = tracer

    async def commit(
        self, inflight: InflightMessage, job: JobDef, started_s: float, ran: Sequence[Ran], *, cancelled: bool = False
    ) -> Outcome:
        """Commit the results. Return the outcome that counts, which may be another worker's."""
        spans = [s for s in inflight.handle.log_spans if s[0] in inflight.bundle.tasks]
        log = inflight.handle.log, spans
        outcome = self._settled(inflight, job, started_s, ran, log, cancelled=cancelled)
        log_failures(outcome)
        committed = await self._commit(inflight, outcome)
        if committed.execution != inflight.execution:
            took_s = outcome.ended_s - outcome.started_s
            self._met_twice(inflight, "execution", took_s * job.stage(inflight.bundle.stage).slots)
        return committed

    async def shed(
        self,
        inflight: InflightMessage,
        job: JobDef,
        started_s: float,
        ran: Sequence[Ran],
        items: Sequence[Json],
        kept: Bundle,
    ) -> bool:
        """Commit and forward a bundle except the part `kept`, which still runs.

        The message stays in flight. Return False if another worker's outcome counts; the run finds
        that outcome at its end.
        """
        spans = [s for s in inflight.handle.log_spans if s[0] not in kept.tasks]
        # The log itself is stored when the run has ended.
        log = (object_keys.log(inflight.bundle, inflight.execution, inflight.key) if spans else "", spans)
        draft = self._settled(inflight, job, started_s, ran, log, kept=kept.tasks)
        outcome = await self._commit(inflight, draft)
        if outcome != draft:
            return False
        log_failures(outcome)
        # The kept part needs no message, because this worker runs it.
        others = tuple(follow for follow in outcome.follows if follow.bundle != kept)
        await self._forward(inflight, job, outcome, replace(outcome, follows=others), items)
        return True

    def _settled(
        self,
        inflight: InflightMessage,
        job: JobDef,
        started_s: float,
        ran: Sequence[Ran],
        log: tuple[str, Sequence[tuple[int, int, int]]],
        *,
        cancelled: bool = False,
        kept: TaskSet = TaskSet(),
    ) -> Outcome:
        now_s = self._clock.now_s()
        settled = settlement.settle(
            job,
            inflight.bundle,
            ran,
            execution=inflight.execution,
            worker=self._worker,
            started_s=started_s or now_s,
            ended_s=max(started_s, now_s),
            cancelled=cancelled,
            kept=kept,
            log=log[0],
            log_spans=log[1],
        )
        return json_format.fitting(settled)

    async def _commit(self, inflight: InflightMessage, draft: Outcome) -> Outcome:
        with span(self._tracer, "commit", inflight.trace, inflight.bundle):
            committed = await commit(self._objects, draft, self._patience, inflight.key)
        self._counters.committed(draft, committed)
        return committed

    def _met_twice(self, inflight: InflightMessage, kind: str, slot_s: float) -> None:
        bundle = inflight.bundle
        self._outbox.met_twice(Duplicate(bundle.job, bundle.stage, kind, inflight.execution, slot_s))

    async def finish(
        self, inflight: InflightMessage, job: JobDef, outcome: Outcome, items: Sequence[Json] | None = None
    ) -> None:
        """Forward the committed outcome, which may be another worker's, and delete the message."""
        await self._forward(inflight, job, outcome, outcome, items, goes_along=True)
        await self.delete(inflight)

    async def forward_again(self, inflight: InflightMessage, job: JobDef, outcome: Outcome) -> None:
        """Forward an outcome that was committed earlier, and delete the message.

        Follow-ups that have a committed outcome are not sent again.
        """
        if outcome.execution != inflight.execution:
            self._met_twice(inflight, "message", 0.0)
        follows = await uncommitted(self._objects, outcome.follows, self._patience, inflight.key)
        await self._forward(inflight, job, outcome, replace(outcome, follows=follows))
        await self.delete(inflight)

    async def _forward(
        self,
        inflight: InflightMessage,
        job: JobDef,
        outcome: Outcome,
        left: Outcome,
        items: Sequence[Json] | None = None,
        *,
        goes_along: bool = False,
    ) -> None:
        """Send the follow-ups in `left`, then the event of `outcome`.

        With `goes_along`, the event may wait for a heartbeat while other bundles run here.
        """
        known = None
        if items is not None and left.follows:
            known = dict(zip(inflight.bundle.tasks, items, strict=True))
        with span(self._tracer, "forward", inflight.trace, inflight.bundle) as forward:
            now_s, trace = self._clock.now_s(), forward.context
            messages = follow_ups(job, left, inflight.key, now_s=now_s, items=known, trace=trace)
            # Follow-ups are sent before the event. The manager may end a stage only when its
            # follow-ups have been sent, and it learns of them from this event.
            await self._outbox.send(messages)
            # Another running bundle causes a heartbeat soon, which can carry the event.
            others = goes_along and any(
                not (inflight_message.committing or inflight_message is inflight)
                for inflight_message in self._inflight.values()
            )
            await self._outbox.event(outcome, trace, hurry=not others)

    # --- Left to others ---------------------------------------------------------------------------

    async def send_again(
        self,
        inflight: InflightMessage,
        job: JobDef,
        *,
        items: Sequence[Json] | None = None,
        delay_s: float = 0.0,
        watchdog: bool = False,
    ) -> None:
        """Return the bundle to the queue as a fresh message, then delete this one.

        Making this message visible would increase its receive count, which suggests a poison task.
        """
        losses = inflight.bundle.losses + inflight.message.receive_count - 1
        bundle = replace(inflight.bundle, losses=losses)
        message = address(
            job,
            bundle,
            inflight.key,
            items=items,
            delay_s=delay_s,
            now_s=self._clock.now_s(),
            watchdog=watchdog,
            trace=inflight.trace,
        )
        await self._outbox.send([message])
        await self.delete(inflight)

    async def leave_to_others(self, queue: str, message: Message, error: TooNew) -> None:
        """Leave a message of a newer batchlab version to a worker that can read it.

        A message received for the first time is sent again unchanged, because a higher receive
        count suggests a poison task. Any other message becomes visible later and keeps its count.
        """
        log.warning("message %s is left for a newer worker: %s", message.id, error)
        try:
            if message.receive_count > 1:
                wait = [(message.receipt, OTHERS_S)]
                await self._queue.change_visibility(queue, wait)
                return
            copy = Outgoing(message.body, OTHERS_S)
            await self._outbox.send([Addressed(queue, copy)])
            await self._outbox.delete(queue, message.receipt)
        except BackendError as problem:
            log.warning("the message returns when its visibility timeout ends: %s", problem)

    async def delete(self, inflight: InflightMessage) -> None:
        """Delete the message unless this worker no longer holds its receipt."""
        if inflight.receipt is not None:
            receipt, inflight.receipt = inflight.receipt, None
            # If this worker has no other message, events and follow-ups are sent before deletes.
            await self._outbox.delete(inflight.queue, receipt, hurry=len(self._inflight) > 1)


LOOK_S = 0.1
"""Seconds until the next check if no task is running at the moment."""


class WorkHandoff:
    """Handoff of waiting tasks by one worker."""

    def __init__(self, finisher: BundleFinisher) -> None:
        self._finisher = finisher

    async def run(
        self, inflight: InflightMessage, job: JobDef, items: Sequence[Json], started_s: float, runs: AsyncIterator[Ran]
    ) -> list[Ran]:
        """Collect the results of the tasks that stay here: all tasks, or those of `inflight.part`.

        Raise BackendError if a committed outcome could not be forwarded.
        """
        ran: list[Ran] = []
        watching = self._watch(inflight, job, items, ran, started_s)
        watch = asyncio.create_task(watching, name=f"handoff {inflight.bundle.id}")
        try:
            async for one in runs:
                ran.append(one)  # noqa: PERF401 - `_watch` reads the list while it grows
        finally:
            if not inflight.shedding:
                watch.cancel()
            # Wait for a commit that is in progress.
            await asyncio.wait({watch})
        if inflight.shedding:
            watch.result()
        return [one for one in ran if one.task in inflight.bundle.tasks]

    async def _watch(
        self, inflight: InflightMessage, job: JobDef, items: Sequence[Json], ran: Sequence[Ran], started_s: float
    ) -> None:
        """Hand off the tasks behind the running one once the budget is used up."""
        await asyncio.sleep(BUDGET_S)
        while (running := inflight.handle.running) is None or not _after(inflight, ran, running):
            if inflight.handle.stop or len(ran) >= len(inflight.bundle.tasks):
                return
            await asyncio.sleep(LOOK_S)
        if inflight.handle.stop:
            return
        inflight.shedding = True
        inflight.handle.stop = True
        await self._shed(inflight, job, items, list(ran), _after(inflight, ran, running), started_s)

    async def _shed(
        self,
        inflight: InflightMessage,
        job: JobDef,
        items: Sequence[Json],
        ran: Sequence[Ran],
        rest: TaskSet,
        started_s: float,
    ) -> None:
        bundle = inflight.bundle
        kept = replace(bundle, tasks=bundle.tasks - TaskSet.of(r.task for r in ran) - rest)
        if await self._finisher.shed(inflight, job, started_s, ran, items, kept):
            # Set only after the commit: once a heartbeat names the part, the manager no longer
            # needs the message. If another worker's outcome counts, this run finds it at its end.
            inflight.part = kept


def _after(inflight: InflightMessage, ran: Sequence[Ran], running: int) -> TaskSet:
    """Return the tasks that have not started. Tasks start in order."""
    left = inflight.bundle.tasks - TaskSet.of(r.task for r in ran)
    return left - TaskSet.span(0, running + 1)


class Slots:
    """Task slots of one instance, served first come, first served.

    A later waiter that needs fewer slots does not go first. Otherwise, a stage that needs all slots
    would starve.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._waiters: deque[tuple[int, asyncio.Future[bool]]] = deque()

    def ask(self, count: int) -> asyncio.Future[bool]:
        """Return a future that becomes True when the caller has `count` slots, at most `total`."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.append((min(count, self.total), future))
        self._serve()
        return future

    def release(self, count: int) -> None:
        self.free += min(count, self.total)
        self._serve()

    def refuse(self, waiter: asyncio.Future[bool]) -> None:
        """Resolve a waiter with False. A waiter that has its slots keeps them."""
        if not waiter.done():
            waiter.set_result(False)
            self._serve()

    def _serve(self) -> None:
        while self._waiters:
            count, future = self._waiters[0]
            if future.done():  # It was refused.
                self._waiters.popleft()
                continue
            if count > self.free:
                return
            self._waiters.popleft()
            self.free -= count
            future.set_result(True)
