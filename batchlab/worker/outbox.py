"""Group commit for everything a worker sends: calls that come together share one request.

Invariant: a caller returns only when what it handed in has been accepted by the service. While
one request is under way, what arrives waits and goes out together, so batching adds no delay. What
nobody is in a hurry for waits for another one to go with: some events for `LINGER_S`, deletes for a
moment. What nobody waits for stays here until it has been accepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Generic, Protocol, TypeVar

from batchlab.core.commit import Addressed, by_queue, send_to
from batchlab.core.model import JobId, Outcome
from batchlab.core.ports import MAX_BATCH, Outgoing, Queue
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.commit_keys import jobs_in, with_proofs
from batchlab.core.protocol.messages import Beat, Duplicate, Events, Told, Traces, events_message
from batchlab.core.protocol.seals import UNSEALED, CommitKey
from batchlab.core.request_counter import Asked, Tally
from batchlab.core.retry import STEP_BACK_S, Patience
from batchlab.worker.worker_counters import Deeds

T = TypeVar("T")

WHOLE_BYTES = 2_000
WHOLE_VALUES = 16
"""An outcome no larger than this is sent as it is, and not only counted."""
EVENT_BYTES = 200_000
"""A completion larger than this (very many follows) is sent as a key to fetch."""
TRACE_BYTES = 250
"""What a trace adds to an event, about."""
DUPLICATES_AT_ONCE = 200
"""Beside the events, as far as one message has room for them."""
MOST_DUPLICATES = 2_000
"""That wait to be told of."""

LINGER_S = 0.02

_Event = tuple[Outcome | Beat, str]


class SignsOfLife(Protocol):
    """Beats that may go along with other events."""

    def news(self) -> Beat | None:
        """A beat, where it would tell what has not been told."""

    def heard(self, beat: Beat) -> None:
        """It has been told."""


class _Group(Generic[T]):
    """Hands all that has been put in since the last flush to `flush`, one flush at a time."""

    def __init__(
        self, flush: Callable[[Sequence[T]], Awaitable[None]], linger_s: float = LINGER_S
    ) -> None:
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
    """Sends, events and deletes of one worker, coalesced."""

    def __init__(
        self,
        queue: Queue,
        patience: Patience,
        tally: Tally | None = None,
        deeds: Deeds | None = None,
        key_of: Callable[[JobId], CommitKey] = lambda _: UNSEALED,
    ) -> None:
        """`key_of` gives the commit key of a job whose messages were received. The counts of
        `tally` (the worker's requests) and of `deeds` (what it did) are sent with its beats."""
        self._queue = queue
        self._patience = patience
        self._key_of = key_of
        self._tally = tally
        self._deeds = deeds
        self._sends: dict[str, _Group[Sequence[Outgoing]]] = {}
        self._deletes: dict[str, _Group[str]] = {}
        self._duplicates: list[Duplicate] = []
        self._events: _Group[_Event] = _Group(self._flush_events)
        self.signs: SignsOfLife | None = None

    async def send(self, messages: Sequence[Addressed]) -> None:
        """Send to whatever queues they are addressed to."""
        for name, outgoing in by_queue(messages).items():
            group = self._sends.setdefault(name, _Group(partial(self._flush_sends, name)))
            await group.put(outgoing)

    async def delete(self, queue: str, receipt: str, *, hurry: bool = True) -> None:
        """Delete a message; without `hurry` a moment later, so that whoever hears of what was done
        with it goes first. A refused receipt is no error: the message is somebody else's now."""
        flush = partial(self._flush_deletes, queue)
        group = self._deletes.setdefault(queue, _Group(flush, STEP_BACK_S))
        await group.put(receipt, hurry=hurry)

    async def event(self, event: Outcome | Beat, trace: str = "", *, hurry: bool = True) -> None:
        """Tell of a committed outcome, or a beat, on the events queue. `trace` is where the trace
        of a bundle goes on. Without `hurry` it goes with the next one, if that comes soon."""
        await self._events.put((event, trace), hurry=hurry)

    def met_twice(self, duplicate: Duplicate) -> None:
        """Tell of it along with the next event; while none can be sent, of the first ones only."""
        if len(self._duplicates) < MOST_DUPLICATES:
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
        # Where the beat is: the manager believes these counts by the key in it.
        at = max((n for n, one in enumerate(packed) if one.beats), default=-1)
        if self._tally and beats and (made := self._tally.read()):
            last = beats[-1]
            asked = Asked(last.worker, last.instance, made, self._tally.is_spot)
            packed[at] = replace(packed[at], asked=(asked,))
        duplicates = self._duplicates[:DUPLICATES_AT_ONCE]
        if duplicates:
            packed[-1] = replace(packed[-1], duplicates=tuple(duplicates))
        deeds = self._deeds.news() if self._deeds and beats else {}
        if deeds:
            packed[at] = replace(packed[at], told=(Told(beats[-1].worker, deeds),))
        bodies = [
            Outgoing(with_proofs(events_message(e), jobs_in(e), self._key_of)) for e in packed
        ]
        await send_to(self._queue, object_keys.EVENTS, bodies, self._patience)
        # Only now. What is told twice counts once.
        del self._duplicates[: len(duplicates)]
        if self._deeds and deeds:
            self._deeds.told(deeds)
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
    """A single event, and about how many bytes it takes."""
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
