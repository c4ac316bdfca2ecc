"""Batching of everything a worker sends: concurrent calls share one request.

Invariant: a call returns only when the service has accepted its entry. Entries that arrive during a
request go out together in the next one, so batching adds no delay. Entries that are not urgent wait
for others: events up to `LINGER_S`, deletes up to `STEP_BACK_S`. Reports of duplicates stay here
until the service has accepted them.

Counters of a worker since its start, sent to the manager with its heartbeats.

Invariant: a counter never decreases, so the last value received is the total.
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
from batchlab.core.pricing.request_costs import Asked, Tally
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.commit_keys import jobs_in, with_proofs
from batchlab.core.protocol.messages import Beat, Duplicate, Events, Told, Traces, events_message
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey


class WorkerCounters:
    """Counters of one worker."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._told: Mapping[str, int] = {}

    def committed(self, draft: Outcome, counts: Outcome) -> None:
        """Count a commit of `draft`. `counts` is the outcome that was committed first."""
        if counts is not draft and counts.execution != draft.execution:
            self._counts["duplicate"] += 1
            return
        for failure in draft.failed:
            self._counts[f"{'failed' if failure.final else 'retried'}.{failure.kind.value}"] += 1

    def news(self) -> Mapping[str, int]:
        """Return all counters if any changed since the last report, else {}."""
        return {} if self._counts == self._told else dict(self._counts)

    def told(self, news: Mapping[str, int]) -> None:
        """Record that these counters have been sent."""
        self._told = news


T = TypeVar("T")

WHOLE_BYTES = 2_000
WHOLE_VALUES = 16
"""Size limits of an outcome that is sent whole. A larger one is sent as a summary."""
EVENT_BYTES = 200_000
"""A completion larger than this (very many follow-ups) is sent as an object key."""
TRACE_BYTES = 250
"""Approximate size of a trace in an event."""
DUPLICATES_AT_ONCE = 200
"""Most reports of duplicates in one message, so that they fit in with the events."""
MAX_DUPLICATES = 2_000
"""Most reports of duplicates that wait to be sent."""

LINGER_S = 0.02

_Event = tuple[Outcome | Beat, str]


class HeartbeatSource(Protocol):
    """Source of heartbeats that can be sent along with other events."""

    def news(self) -> Beat | None:
        """Return a heartbeat if the state differs from the last one sent, else None."""

    def heard(self, beat: Beat) -> None:
        """Record that a heartbeat has been sent."""


class _Batcher(Generic[T]):
    """Batches of entries. `flush` gets all entries since the last flush, one flush at a time."""

    def __init__(self, flush: Callable[[Sequence[T]], Awaitable[None]], linger_s: float = LINGER_S) -> None:
        self._flush = flush
        self._linger_s = linger_s
        self._waiting: list[tuple[T, asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    async def put(self, entry: T, *, hurry: bool = True) -> None:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, done))
        if hurry:
            self._hurry.set()
        if self._worker is None:
            self._worker = asyncio.create_task(self._run())
        await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                if not self._hurry.is_set():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._linger_s):
                            await self._hurry.wait()
                self._hurry.clear()
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
    """Batched sends, events, and deletes of one worker."""

    def __init__(
        self,
        queue: Queue,
        patience: Patience,
        tally: Tally | None = None,
        counters: WorkerCounters | None = None,
        key_of: Callable[[JobId], CommitKey] = lambda _: UNSEALED,
    ) -> None:
        """Set the sources of an event's content.

        `key_of` returns the commit key of a job whose messages were received. Heartbeats carry the
        counts of `tally` (the worker's requests) and `counters` (the worker's results).
        """
        self._queue = queue
        self._patience = patience
        self._key_of = key_of
        self._tally = tally
        self._counters = counters
        self._sends: dict[str, _Batcher[Sequence[Outgoing]]] = {}
        self._deletes: dict[str, _Batcher[str]] = {}
        self._duplicates: list[Duplicate] = []
        self._events: _Batcher[_Event] = _Batcher(self._flush_events)
        self.signs: HeartbeatSource | None = None

    async def send(self, messages: Sequence[Addressed]) -> None:
        """Send each message to the queue it is addressed to."""
        for name, outgoing in by_queue(messages).items():
            group = self._sends.setdefault(name, _Batcher(partial(self._flush_sends, name)))
            await group.put(outgoing)

    async def delete(self, queue: str, receipt: str, *, hurry: bool = True) -> None:
        """Delete a message. Without `hurry`, wait a moment, so that its event is sent first.

        A refused receipt is not an error, because another worker may have the message now.
        """
        flush = partial(self._flush_deletes, queue)
        group = self._deletes.setdefault(queue, _Batcher(flush, STEP_BACK_S))
        await group.put(receipt, hurry=hurry)

    async def event(self, event: Outcome | Beat, trace: str = "", *, hurry: bool = True) -> None:
        """Send a committed outcome or a heartbeat to the events queue.

        `trace` is the parent of further spans of the bundle. Without `hurry`, wait up to `LINGER_S`
        for another event.
        """
        await self._events.put((event, trace), hurry=hurry)

    def met_twice(self, duplicate: Duplicate) -> None:
        """Report a duplicate with the next event. Drop it if too many reports are waiting."""
        if len(self._duplicates) < MAX_DUPLICATES:
            self._duplicates.append(duplicate)

    async def _flush_sends(self, queue: str, groups: Sequence[Sequence[Outgoing]]) -> None:
        messages = [m for group in groups for m in group]
        await send_to(self._queue, queue, messages, self._patience)

    async def _flush_deletes(self, queue: str, receipts: Sequence[str]) -> None:
        for i in range(0, len(receipts), MAX_BATCH):
            await self._patience(partial(self._queue.delete, queue, receipts[i : i + MAX_BATCH]))

    async def _flush_events(self, events: Sequence[_Event]) -> None:
        beats = [one for one, _ in events if isinstance(one, Beat)]
        along = self.signs.news() if self.signs and not beats else None
        if along:
            events, beats = [*events, (along, "")], [along]
        packed = _pack(events, self._key_of)
        # The counts go with the heartbeat, because its key lets the manager trust them.
        at = max((n for n, one in enumerate(packed) if one.beats), default=-1)
        if self._tally and beats and (requests := self._tally.read()):
            last = beats[-1]
            asked = Asked(last.worker, last.instance, requests, self._tally.is_spot)
            packed[at] = replace(packed[at], asked=(asked,))
        duplicates = self._duplicates[:DUPLICATES_AT_ONCE]
        if duplicates:
            packed[-1] = replace(packed[-1], duplicates=tuple(duplicates))
        counters = self._counters.news() if self._counters and beats else {}
        if counters:
            packed[at] = replace(packed[at], told=(Told(beats[-1].worker, counters),))
        bodies = [Outgoing(with_proofs(events_message(e), jobs_in(e), self._key_of)) for e in packed]
        await send_to(self._queue, object_keys.EVENTS, bodies, self._patience)
        # Removed only after the send. The manager counts a repeated report once.
        del self._duplicates[: len(duplicates)]
        if self._counters and counters:
            self._counters.told(counters)
        if along and self.signs:
            self.signs.heard(along)


def _pack(events: Sequence[_Event], key_of: Callable[[JobId], CommitKey]) -> list[Events]:
    packed: list[Events] = []
    size = EVENT_BYTES
    for event, trace in events:
        one, length = _one(event, key_of)
        traces: Traces = ()
        if trace and isinstance(event, Outcome):
            bundle = event.bundle
            traces = ((bundle.job, bundle.stage, bundle.id, trace),)
            length += TRACE_BYTES
        if size + length > EVENT_BYTES:
            packed.append(Events())
            size = 0
        size += length
        last = packed[-1]
        packed[-1] = Events(
            last.completions + one.completions,
            last.committed + one.committed,
            last.beats + one.beats,
            last.outcomes + one.outcomes,
            traces=last.traces + traces,
        )
    return packed


def _one(event: Outcome | Beat, key_of: Callable[[JobId], CommitKey]) -> tuple[Events, int]:
    """Return a single event and its approximate size in bytes."""
    if isinstance(event, Beat):
        held = sum(200 + len(one.receipt or "") for one in event.held)
        return Events(beats=(event,)), 200 + held
    if len(event.values) <= WHOLE_VALUES:
        length = len(json_format.outcome_text(event))
        if length <= WHOLE_BYTES:
            return Events(outcomes=(event,)), length
    completion = settlement.completion(event)
    length = len(json_format.dumps(json_format.completion_to_json(completion)))
    if length <= EVENT_BYTES:
        return Events(completions=(completion,)), length
    return Events(committed=(object_keys.outcome(event.bundle, key_of(event.bundle.job)),)), 200
