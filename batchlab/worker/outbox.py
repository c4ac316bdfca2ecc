"""Batches of the messages, events, and deletes of a worker: concurrent calls share one request.

Invariant: a call returns only when the service has accepted the call's entry. Entries that arrive during a request are
sent together in the next request, so batching adds no delay. An entry that is not urgent waits for other entries: an
event up to `LINGER_S`, and a delete up to `STEP_BACK_S`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Generic, Protocol, TypeVar

from batchlab.core.commit import Addressed, by_queue, send_to
from batchlab.core.model import JobId, Outcome
from batchlab.core.port_retries import STEP_BACK_S, Patience
from batchlab.core.ports import MAX_BATCH, Outgoing, Queue
from batchlab.core.pricing.request_costs import RequestCounter, WorkerRequests
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.commit_keys import jobs_in, with_proofs
from batchlab.core.protocol.messages import Beat, CounterReport, Duplicate, Events, Traces, events_message
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey

T = TypeVar("T")

MAX_INLINE_BYTES = 2_000
MAX_INLINE_VALUES = 16
"""Maximum size in bytes, and maximum number of values, of an outcome that is sent whole.

A larger outcome is sent as a completion without values.
"""
MAX_EVENT_BYTES = 200_000
"""Maximum size in bytes of a completion in an event.

A larger completion, with very many follow-ups, is sent as an object key.
"""
TRACE_BYTES = 250
"""Approximate size in bytes of a trace in an event."""
DUPLICATES_AT_ONCE = 200
"""Maximum number of duplicate reports in one message, which leaves space for the events."""
MAX_DUPLICATES = 2_000
"""Maximum number of duplicate reports that wait to be sent."""

LINGER_S = 0.02

Event = tuple[Outcome | Beat, str]
"""Event to send, and the trace context of the event's bundle."""


class WorkerCounters:
    """Counters of one worker since the worker's start. Heartbeats carry the counters to the manager.

    Invariant: a counter never decreases, so the last value that the manager received is the total.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._sent: Mapping[str, int] = {}

    def count_commit(self, draft: Outcome, committed: Outcome) -> None:
        """Count a commit of the outcome `draft`. `committed` is the outcome that was committed first."""
        if committed is not draft and committed.execution != draft.execution:
            self._counts["duplicate"] += 1
            return
        for failure in draft.failed:
            self._counts[f"{'failed' if failure.final else 'retried'}.{failure.kind.value}"] += 1

    def unsent(self) -> Mapping[str, int]:
        """Return all counters if any counter has changed since the last send, else {}."""
        return {} if self._counts == self._sent else dict(self._counts)

    def mark_sent(self, counts: Mapping[str, int]) -> None:
        self._sent = counts


class HeartbeatSource(Protocol):
    """Source of heartbeats, which the outbox adds to messages that it sends anyway."""

    def unsent_beat(self) -> Beat | None:
        """Return a heartbeat if the worker's state differs from the most recent heartbeat, else None."""

    def mark_sent(self, beat: Beat) -> None:
        """Record that a heartbeat has been sent."""


class _Batcher(Generic[T]):
    """Batches of entries of one kind.

    `flush` is called with all entries since the previous flush, and only one flush runs at a time.
    """

    def __init__(self, flush: Callable[[Sequence[T]], Awaitable[None]], linger_s: float = LINGER_S) -> None:
        self._flush = flush
        self._linger_s = linger_s
        self._waiting: list[tuple[T, asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._urgent = asyncio.Event()

    async def put(self, entry: T, *, urgent: bool = True) -> None:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, done))
        if urgent:
            self._urgent.set()
        if self._worker is None:
            self._worker = asyncio.create_task(self._run())
        await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                if not self._urgent.is_set():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._linger_s):
                            await self._urgent.wait()
                self._urgent.clear()
                batch, self._waiting = self._waiting, []
                try:
                    await self._flush([entry for entry, _ in batch])
                except Exception as error:  # noqa: BLE001 - passed on to every caller
                    for _, done in batch:
                        if not done.done():
                            done.set_exception(error)
                else:
                    for _, done in batch:
                        if not done.done():
                            done.set_result(None)
        finally:
            self._worker = None


class Outbox:
    """Batched sends, events, and deletes of one worker.

    `key_of` returns the commit key of a job whose messages were received. Heartbeats carry the request counts in
    `tally` and the result counts in `counters`.
    """

    def __init__(
        self,
        queue: Queue,
        patience: Patience,
        tally: RequestCounter | None = None,
        key_of: Callable[[JobId], CommitKey] = lambda _: UNSEALED,
    ) -> None:
        self._queue = queue
        self._patience = patience
        self._key_of = key_of
        self._tally = tally
        self._sends: dict[str, _Batcher[Sequence[Outgoing]]] = {}
        self._deletes: dict[str, _Batcher[str]] = {}
        self._duplicates: list[Duplicate] = []
        self._events: _Batcher[Event] = _Batcher(self._flush_events)
        self.counters = WorkerCounters()
        self.heartbeats: HeartbeatSource | None = None

    async def send(self, messages: Sequence[Addressed]) -> None:
        """Send each message to the queue in its address."""
        for name, outgoing in by_queue(messages).items():
            batcher = self._sends.setdefault(name, _Batcher(partial(self._flush_sends, name)))
            await batcher.put(outgoing)

    async def delete(self, queue: str, receipt: str, *, urgent: bool = True) -> None:
        """Delete a message. A delete that is not urgent waits a moment, so that the event of its bundle is sent first.

        A refused receipt is not an error, because another worker may have the message now.
        """
        flush = partial(self._flush_deletes, queue)
        batcher = self._deletes.setdefault(queue, _Batcher(flush, STEP_BACK_S))
        await batcher.put(receipt, urgent=urgent)

    async def send_event(self, event: Outcome | Beat, trace: str = "", *, urgent: bool = True) -> None:
        """Send a committed outcome or a heartbeat to the events queue.

        `trace` is the parent of further spans of the bundle.
        """
        await self._events.put((event, trace), urgent=urgent)

    def report_duplicate(self, duplicate: Duplicate) -> None:
        """Report a duplicate with the next event. The report is dropped if too many reports are waiting."""
        if len(self._duplicates) < MAX_DUPLICATES:
            self._duplicates.append(duplicate)

    async def _flush_sends(self, queue: str, batches: Sequence[Sequence[Outgoing]]) -> None:
        messages = [message for batch in batches for message in batch]
        await send_to(self._queue, queue, messages, self._patience)

    async def _flush_deletes(self, queue: str, receipts: Sequence[str]) -> None:
        for i in range(0, len(receipts), MAX_BATCH):
            await self._patience(partial(self._queue.delete, queue, receipts[i : i + MAX_BATCH]))

    async def _flush_events(self, events: Sequence[Event]) -> None:
        beats = [event for event, _ in events if isinstance(event, Beat)]
        extra_beat = self.heartbeats.unsent_beat() if self.heartbeats and not beats else None
        if extra_beat:
            events, beats = [*events, (extra_beat, "")], [extra_beat]
        packed = _pack(events, self._key_of)
        # The counts are sent with a heartbeat, because the key in the heartbeat lets the manager trust the counts.
        last = max((n for n, message in enumerate(packed) if message.beats), default=-1)
        counts: Mapping[str, int] = {}
        if beats:
            worker, instance = beats[-1].worker, beats[-1].instance
            if self._tally and (requests := self._tally.read()):
                asked = WorkerRequests(worker, instance, requests, self._tally.is_spot)
                packed[last] = replace(packed[last], requests=(asked,))
            if counts := self.counters.unsent():
                packed[last] = replace(packed[last], counters=(CounterReport(worker, counts),))
        duplicates = self._duplicates[:DUPLICATES_AT_ONCE]
        if duplicates:
            packed[-1] = replace(packed[-1], duplicates=tuple(duplicates))
        bodies = [Outgoing(with_proofs(events_message(message), jobs_in(message), self._key_of)) for message in packed]
        await send_to(self._queue, object_keys.EVENTS, bodies, self._patience)
        # Duplicate reports are removed only after the send, because the manager counts a repeated report once.
        del self._duplicates[: len(duplicates)]
        if counts:
            self.counters.mark_sent(counts)
        if extra_beat and self.heartbeats:
            self.heartbeats.mark_sent(extra_beat)


def _pack(events: Sequence[Event], key_of: Callable[[JobId], CommitKey]) -> list[Events]:
    """Pack events into as few messages as their sizes allow."""
    packed: list[Events] = []
    size = MAX_EVENT_BYTES
    for event, trace in events:
        single, length = _pack_one(event, key_of)
        traces: Traces = ()
        if trace and isinstance(event, Outcome):
            bundle = event.bundle
            traces = ((bundle.job, bundle.stage, bundle.id, trace),)
            length += TRACE_BYTES
        if size + length > MAX_EVENT_BYTES:
            packed.append(Events())
            size = 0
        size += length
        last = packed[-1]
        packed[-1] = Events(
            last.completions + single.completions,
            last.committed + single.committed,
            last.beats + single.beats,
            last.outcomes + single.outcomes,
            traces=last.traces + traces,
        )
    return packed


def _pack_one(event: Outcome | Beat, key_of: Callable[[JobId], CommitKey]) -> tuple[Events, int]:
    """Return a message with a single event, and the approximate size of the message in bytes."""
    if isinstance(event, Beat):
        return Events(beats=(event,)), 200 + sum(200 + len(held.receipt or "") for held in event.held)
    if len(event.values) <= MAX_INLINE_VALUES:
        length = len(json_format.outcome_text(event))
        if length <= MAX_INLINE_BYTES:
            return Events(outcomes=(event,)), length
    completion = settlement.completion(event)
    length = len(json_format.dumps(json_format.completion_to_json(completion)))
    if length <= MAX_EVENT_BYTES:
        return Events(completions=(completion,)), length
    return Events(committed=(object_keys.outcome(event.bundle, key_of(event.bundle.job)),)), 200
