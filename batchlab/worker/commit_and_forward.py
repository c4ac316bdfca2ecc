"""Completion of a bundle or a part of one: commit and forward its outcome, or send it again.

Invariant: a message is deleted only in three cases. Its outcome is committed and forwarded, a fresh
copy of it has been sent, or its job is cancelled or paused (the manager then knows the outstanding
tasks). A crash between any two lines therefore loses no task.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from batchlab.core.commit import Addressed, address, commit, follow_ups, uncommitted
from batchlab.core.errors import BackendError, TooNew
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Json, Outcome, Ran, TaskSet
from batchlab.core.ports import Clock, Message, Objects, Outgoing, Queue
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.messages import Duplicate
from batchlab.core.retry import Patience
from batchlab.core.tracing import Tracer, span
from batchlab.worker import spans as lines
from batchlab.worker.inflight_message import InflightMessage
from batchlab.worker.outbox import Outbox
from batchlab.worker.worker_counters import WorkerCounters

log = logging.getLogger(__name__)

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
        self,
        inflight: InflightMessage,
        job: JobDef,
        started_s: float,
        ran: Sequence[Ran],
        *,
        cancelled: bool = False,
    ) -> Outcome:
        """Commit the results. Return the outcome that counts, which may be another worker's."""
        spans = [s for s in inflight.handle.log_spans if s[0] in inflight.bundle.tasks]
        log = inflight.handle.log, spans
        outcome = self._settled(inflight, job, started_s, ran, log, cancelled=cancelled)
        lines.log_failures(outcome)
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
        log = (
            object_keys.log(inflight.bundle, inflight.execution, inflight.key) if spans else "",
            spans,
        )
        draft = self._settled(inflight, job, started_s, ran, log, kept=kept.tasks)
        outcome = await self._commit(inflight, draft)
        if outcome != draft:
            return False
        lines.log_failures(outcome)
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
        self._outbox.met_twice(
            Duplicate(bundle.job, bundle.stage, kind, inflight.execution, slot_s)
        )

    async def finish(
        self,
        inflight: InflightMessage,
        job: JobDef,
        outcome: Outcome,
        items: Sequence[Json] | None = None,
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
                not (one.committing or one is inflight) for one in self._inflight.values()
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
