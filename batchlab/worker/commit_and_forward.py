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
from batchlab.worker.inflight_message import Hand
from batchlab.worker.outbox import Outbox
from batchlab.worker.worker_counters import Deeds

log = logging.getLogger(__name__)

OTHERS_S = 30.0
"""Delay in seconds of a message that only a newer worker can read."""


class Closing:
    """Commits, forwards, and returns bundles of one worker. `hands` has its in-flight messages."""

    def __init__(
        self,
        worker: str,
        hands: Mapping[str, Hand],
        objects: Objects,
        queue: Queue,
        clock: Clock,
        patience: Patience,
        outbox: Outbox,
        deeds: Deeds,
        tracer: Tracer,
    ) -> None:
        self._worker = worker
        self._hands = hands
        self._objects = objects
        self._queue = queue
        self._clock = clock
        self._patience = patience
        self._outbox = outbox
        self._deeds = deeds
        self._tracer = tracer

    async def commit(
        self,
        hand: Hand,
        job: JobDef,
        started_s: float,
        ran: Sequence[Ran],
        *,
        cancelled: bool = False,
    ) -> Outcome:
        """Commit the results. Return the outcome that counts, which may be another worker's."""
        spans = [s for s in hand.handle.log_spans if s[0] in hand.bundle.tasks]
        log = hand.handle.log, spans
        outcome = self._settled(hand, job, started_s, ran, log, cancelled=cancelled)
        lines.failures(outcome)
        committed = await self._commit(hand, outcome)
        if committed.execution != hand.execution:
            took_s = outcome.ended_s - outcome.started_s
            self._met_twice(hand, "execution", took_s * job.stage(hand.bundle.stage).slots)
        return committed

    async def shed(
        self,
        hand: Hand,
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
        spans = [s for s in hand.handle.log_spans if s[0] not in kept.tasks]
        # The log itself is stored when the run has ended.
        log = object_keys.log(hand.bundle, hand.execution, hand.key) if spans else "", spans
        draft = self._settled(hand, job, started_s, ran, log, kept=kept.tasks)
        outcome = await self._commit(hand, draft)
        if outcome != draft:
            return False
        lines.failures(outcome)
        # The kept part needs no message, because this worker runs it.
        others = tuple(follow for follow in outcome.follows if follow.bundle != kept)
        await self._forward(hand, job, outcome, replace(outcome, follows=others), items)
        return True

    def _settled(
        self,
        hand: Hand,
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
            hand.bundle,
            ran,
            execution=hand.execution,
            worker=self._worker,
            started_s=started_s or now_s,
            ended_s=max(started_s, now_s),
            cancelled=cancelled,
            kept=kept,
            log=log[0],
            log_spans=log[1],
        )
        return json_format.fitting(settled)

    async def _commit(self, hand: Hand, draft: Outcome) -> Outcome:
        with span(self._tracer, "commit", hand.trace, hand.bundle):
            committed = await commit(self._objects, draft, self._patience, hand.key)
        self._deeds.committed(draft, committed)
        return committed

    def _met_twice(self, hand: Hand, kind: str, slot_s: float) -> None:
        bundle = hand.bundle
        self._outbox.met_twice(Duplicate(bundle.job, bundle.stage, kind, hand.execution, slot_s))

    async def finish(
        self, hand: Hand, job: JobDef, outcome: Outcome, items: Sequence[Json] | None = None
    ) -> None:
        """Forward the committed outcome, which may be another worker's, and delete the message."""
        await self._forward(hand, job, outcome, outcome, items, goes_along=True)
        await self.delete(hand)

    async def forward_again(self, hand: Hand, job: JobDef, outcome: Outcome) -> None:
        """Forward an outcome that was committed earlier, and delete the message.

        Follow-ups that have a committed outcome are not sent again.
        """
        if outcome.execution != hand.execution:
            self._met_twice(hand, "message", 0.0)
        follows = await uncommitted(self._objects, outcome.follows, self._patience, hand.key)
        await self._forward(hand, job, outcome, replace(outcome, follows=follows))
        await self.delete(hand)

    async def _forward(
        self,
        hand: Hand,
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
            known = dict(zip(hand.bundle.tasks, items, strict=True))
        with span(self._tracer, "forward", hand.trace, hand.bundle) as forward:
            now_s, trace = self._clock.now_s(), forward.context
            messages = follow_ups(job, left, hand.key, now_s=now_s, items=known, trace=trace)
            # Follow-ups are sent before the event. The manager may end a stage only when its
            # follow-ups have been sent, and it learns of them from this event.
            await self._outbox.send(messages)
            # Another running bundle causes a heartbeat soon, which can carry the event.
            others = goes_along and any(
                not (one.committing or one is hand) for one in self._hands.values()
            )
            await self._outbox.event(outcome, trace, hurry=not others)

    # --- Left to others ---------------------------------------------------------------------------

    async def send_again(
        self,
        hand: Hand,
        job: JobDef,
        *,
        items: Sequence[Json] | None = None,
        delay_s: float = 0.0,
        watchdog: bool = False,
    ) -> None:
        """Return the bundle to the queue as a fresh message, then delete this one.

        Making this message visible would increase its receive count, which suggests a poison task.
        """
        losses = hand.bundle.losses + hand.message.receive_count - 1
        bundle = replace(hand.bundle, losses=losses)
        message = address(
            job,
            bundle,
            hand.key,
            items=items,
            delay_s=delay_s,
            now_s=self._clock.now_s(),
            watchdog=watchdog,
            trace=hand.trace,
        )
        await self._outbox.send([message])
        await self.delete(hand)

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

    async def delete(self, hand: Hand) -> None:
        """Delete the message unless this worker no longer holds its receipt."""
        if hand.receipt is not None:
            receipt, hand.receipt = hand.receipt, None
            # If this worker has no other message, events and follow-ups are sent before deletes.
            await self._outbox.delete(hand.queue, receipt, hurry=len(self._hands) > 1)
