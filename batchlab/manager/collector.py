"""Consumer of the events queue: completions go to the ledger, and heartbeats go to the worker registry.

Invariants: a fact about a job with a commit key counts only if the sender proves that it has the commit key. A job of
release 0.1.0 does not have a commit key, so facts about a job of release 0.1.0 count without proof. Facts about a job
wait until the submission has written the job to the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from batchlab.core.commit import read_outcome
from batchlab.core.errors import BackendError, Malformed, NotFound, Throttled, TooNew, Unreachable
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Completion, Follow, JobId, Outcome
from batchlab.core.port_retries import STEP_BACK_S, raise_if_cancelled, set_after
from batchlab.core.ports import MAX_BATCH, Message, QueueSpec
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.commit_keys import jobs_in, split
from batchlab.core.protocol.field_checks import UNREADABLE
from batchlab.core.protocol.json_format import brief
from batchlab.core.protocol.messages import Beat, Events, read_events_message
from batchlab.core.protocol.object_keys import UNSEALED, proves, summary
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager.context import Context, Part
from batchlab.manager.ledger_writer import BundleKey, LedgerWriter
from batchlab.manager.state import RetainedOutcome, RetainedOutcomes

log = logging.getLogger(__name__)


class EventVerifier(Part):
    """Verifier of the proofs in event messages. `job_of` returns the definition of a job whose proof is missing in the
    message."""

    def __init__(self, context: Context, job_of: Callable[[JobId], Awaitable[JobDef | None]]) -> None:
        super().__init__(context)
        self._job_of = job_of

    async def verify(self, events: Events, text: str, proofs: Mapping[str, str], id_: str) -> tuple[Events, set[JobId]]:
        """Return the facts of message `id_` that the sender may assert, and the jobs whose facts are trusted."""
        jobs = jobs_in(events)
        if not jobs:
            return events, jobs
        trusted = await self._proven_jobs(jobs, text, proofs)
        if trusted == jobs and not events.committed:
            return events, trusted  # all facts are trusted, because the parser rejects follow-ups of another job
        proven = set(trusted)  # outcome keys of a job in `proven` must have a valid seal
        unproven: set[JobId] = set()
        for job in sorted(jobs - trusted):
            await self._context.pending_submissions.ended({job})
            job_def = await self._job_of(job)
            if job_def and not job_def.commit_hash:
                trusted.add(job)
            elif job_def:
                unproven.add(job)
        verified = replace(
            events,
            completions=tuple(c for c in events.completions if _is_trusted(trusted, c.bundle, c.follows)),
            outcomes=tuple(o for o in events.outcomes if _is_trusted(trusted, o.bundle, o.follows)),
            committed=tuple([key for key in events.committed if await self._is_genuine(key, trusted, proven)]),
            duplicates=tuple(duplicate for duplicate in events.duplicates if duplicate.job in trusted),
            traces=tuple(trace for trace in events.traces if trace[0] in trusted),
        )
        if dropped := _count(events) - _count(verified):
            self._quarantine.unproven(id_, dropped, unproven)
        return verified, trusted

    async def _proven_jobs(self, jobs: set[JobId], text: str, proofs: Mapping[str, str]) -> set[JobId]:
        if not proofs:
            return set()
        digest = summary(text)
        return {
            job
            for job in sorted(jobs)
            if (proof := proofs.get(job)) and proves(await self._keys.new(job), digest, proof)
        }

    async def _is_genuine(self, name: str, trusted: set[JobId], proven: set[JobId]) -> bool:
        outcome_key = object_keys.outcome_key(name)
        if outcome_key is None or outcome_key.job not in trusted:
            return False
        key = await self._keys.new(outcome_key.job) if outcome_key.job in proven else UNSEALED
        return object_keys.is_genuine(name, key)


def _is_trusted(trusted: set[JobId], bundle: Bundle, follows: tuple[Follow, ...]) -> bool:
    return bundle.job in trusted and all(follow.bundle.job == bundle.job for follow in follows)


def _count(events: Events) -> int:
    parts = (events.completions, events.outcomes, events.committed, events.duplicates, events.traces)
    return sum(map(len, parts))


DELETE_DELAY_S = 5.0
"""Longest delay in seconds of the deletion of folded messages, so that one request deletes several messages. The delay
is at most a third of the visibility timeout."""

FOLD_BYTES = 32 * 1024
"""Size in bytes of the batches in which waiting event messages are folded. A batch contains about 100 completions. A
fold after each receive call would cost three times as much per completion."""

MAX_NAMES = 3
"""Maximum number of job names that the collector looks up in an unreadable event."""
_JOB = re.compile(r'"(?:j|job)" ?: ?"([A-Za-z0-9][A-Za-z0-9_.-]{0,99})"')


def events_queue(settings: ManagerSettings) -> QueueSpec:
    """Return the specification of the queue of completions and heartbeats."""
    return QueueSpec(object_keys.EVENTS, visibility_s=settings.visibility_s)


def _read(body: str) -> tuple[Events, str, Mapping[str, str]]:
    """Return the facts of a message, the message text without proofs, and the proofs."""
    try:
        text, proofs = split(body)
    except UNREADABLE as error:
        raise Malformed(f"The proofs of an event cannot be read: {brief(error)}.") from error
    return read_events_message(text), text, proofs


class Collector(Part):
    """Consumer of the events queue. A grid has only one running collector at a time."""

    def __init__(self, context: Context, ledger_writer: LedgerWriter) -> None:
        super().__init__(context)
        self._ledger_writer = ledger_writer
        self._retained_outcomes = RetainedOutcomes()
        self._verifier = EventVerifier(context, ledger_writer.job)
        self._folded: list[str] = []
        self._is_folded = asyncio.Event()
        self._is_request_full = asyncio.Event()

    async def collect(self) -> None:
        """Receive, fold, and delete messages in an endless loop. A message is deleted only after its fold. After a
        crash, a repeated fold of the same message does not count any completion twice."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._delete(), name="delete events")
            await self._collect()

    async def _collect(self) -> None:
        while True:
            try:
                await self._collect_once()
            except BackendError as error:
                raise_if_cancelled()
                self._registry.begin_outage(error)
                if isinstance(error, (Throttled, Unreachable)):
                    self._reset_silences()
                # Received messages return to the queue after their visibility timeout.
                log.warning("events wait for the backend: %s", error)
                await asyncio.sleep(self._settings.tick_s)
                if isinstance(error, NotFound):  # the events queue was deleted
                    try:
                        await self._queue.ensure(events_queue(self._settings))
                    except BackendError as later:
                        log.warning("the events queue cannot be created yet: %s", later)

    async def _collect_once(self) -> None:
        messages = await self._receive_batch()
        now_s = self._clock.now_s()
        self._counts.events += len(messages)
        self._counts.lag_s = max([0.0, *(now_s - message.sent_s for message in messages)])
        if messages:
            async with self._context.ledger_lock:
                await self._process(messages)
            self._folded += [message.receipt for message in messages]
            self._is_folded.set()
            if len(self._folded) >= MAX_BATCH:
                self._is_request_full.set()
            if len(messages) < MAX_BATCH:  # the loop continues without a pause only after a full batch
                await asyncio.sleep(STEP_BACK_S)
        self._registry.end_outage()

    async def _receive_batch(self) -> list[Message]:
        """Return the messages for one fold. While many messages wait in the queue, several receive calls supply the
        messages of one fold."""
        messages = list(await self._patience(partial(self._receive, self._settings.wait_s)))
        size = sum(len(message.body) for message in messages)
        last = len(messages)
        while last == MAX_BATCH and size < FOLD_BYTES:
            try:
                more = await self._receive(0.0)
            except BackendError:
                raise_if_cancelled()
                break  # the next receive reports the error, because the messages received so far must not wait
            messages += more
            size += sum(len(message.body) for message in more)
            last = len(more)
        oldest_s = min((message.sent_s for message in messages), default=math.inf)
        if last == MAX_BATCH and self._clock.now_s() - oldest_s > self._settings.tick_s:
            # While older messages wait in the events queue, the manager has not received the latest heartbeats.
            self._registry.outage_s = self._clock.monotonic_s()
        return messages

    async def _receive(self, wait_s: float) -> Sequence[Message]:
        try:
            return await self._queue.receive(
                object_keys.EVENTS, max_messages=MAX_BATCH, wait_s=wait_s, visibility_s=self._settings.visibility_s
            )
        except BackendError as error:
            # The outage is recorded before `patience` retries the receive call, because the retries may take minutes.
            self._registry.begin_outage(error)
            raise

    async def _delete(self) -> None:
        while True:
            await self._is_folded.wait()
            await set_after(self._is_request_full, min(DELETE_DELAY_S, self._settings.visibility_s / 3))
            self._is_folded.clear()
            self._is_request_full.clear()
            while receipts := self._folded[:MAX_BATCH]:
                del self._folded[:MAX_BATCH]
                delete = partial(self._queue.delete, object_keys.EVENTS, receipts)
                try:
                    await self._patience(delete)
                except BackendError as error:
                    # Messages that are not deleted return to the queue, and a second fold of a message does not change
                    # the ledger.
                    log.warning("events are not deleted: %s", error)

    async def _process(self, messages: Sequence[Message]) -> None:
        verified: list[tuple[Events, set[JobId]]] = []
        completions: list[Completion] = []
        whole: dict[BundleKey, RetainedOutcome] = {}
        for message in messages:
            try:
                events, text, proofs = _read(message.body)
            except (Malformed, TooNew) as error:
                job = self._subject(message.body)
                self._quarantine.message("event", message.id, len(message.body), error, job=job)
                continue
            events, trusted = await self._verifier.verify(events, text, proofs, message.id)
            completions += events.completions
            completions += [settlement.completion(outcome) for outcome in events.outcomes]
            for key in events.committed:
                completions += await self._fetch(key)
            verified.append((events, trusted))
            whole |= self._retain(events.outcomes, len(message.body))
        await self._context.pending_submissions.ended({completion.bundle.job for completion in completions})
        if self._notify_clients(whole.values()):
            # The pause lets the waiting clients run before the completions are folded. A fold takes as long as all
            # other steps of the collector together.
            await asyncio.sleep(STEP_BACK_S)
        await self._registry.instances.bind(beat for events, _ in verified for beat in events.beats)
        traces: dict[BundleKey, str] = {}
        for events, trusted in verified:
            traces |= {(job, stage, bundle): t for job, stage, bundle, t in events.traces}
            await self._process_reports(events, trusted)
        await self._ledger_writer.fold(completions, whole, traces)

    async def _process_reports(self, events: Events, trusted: Collection[JobId]) -> None:
        """Record heartbeats, worker counts, request counts, and duplicates. Worker counts and request counts require a
        valid heartbeat in the same message."""
        if events.duplicates and self._recorder:
            self._recorder.record_duplicates(events.duplicates)
        instances: dict[str, str] = {}
        for beat in events.beats:
            if await self._registry.receive_beat(beat, trusted):
                instances[beat.worker] = beat.instance
                self._reset_silence(beat, trusted)
        for counts in events.counters:
            if counts.worker in instances:
                self._counts.record_worker_counts(counts)
        for requests in events.requests:
            if instances.get(requests.worker) == requests.instance:
                self._registry.record_requests(requests)

    def _retain(self, outcomes: Sequence[Outcome], size_bytes: int) -> dict[BundleKey, RetainedOutcome]:
        share_bytes = size_bytes // max(1, len(outcomes))
        return {
            (outcome.bundle.job, outcome.bundle.stage, outcome.bundle.id): self._retained_outcomes.add(
                outcome, share_bytes
            )
            for outcome in outcomes
        }

    def _notify_clients(self, outcomes: Iterable[RetainedOutcome]) -> bool:
        """Pass committed outcomes to clients that wait for the first outcomes of a job. Return whether a client waits
        for one of the outcomes."""
        is_awaited = False
        for outcome in outcomes:
            live = self._lives.get(outcome.outcome.bundle.job) if outcome.outcome else None
            is_awaited |= bool(live and live.add_early_outcome(outcome))
        return is_awaited

    def _subject(self, body: str) -> JobId | None:
        matches = islice(_JOB.finditer(body), MAX_NAMES)
        return next((job for match in matches if (job := JobId(match[1])) in self._lives), None)

    async def _fetch(self, name: str) -> list[Completion]:
        """Return the completion of a committed outcome, or an empty list if the outcome is unreadable, unknown, or
        forged."""
        outcome_key = object_keys.outcome_key(name)
        job = await self._ledger_writer.job(outcome_key.job) if outcome_key else None
        if job is None or not object_keys.is_genuine(name, await self._keys.key_of(job)):
            return []  # the job of the outcome was removed, or the outcome key is forged
        try:
            outcome = await read_outcome(self._objects, name, self._patience)
            return [settlement.completion(outcome)]
        except NotFound:
            return []
        except Malformed as error:
            # The reconciler replaces an unreadable outcome after its bundle has been silent for `silence_s`.
            self._quarantine.object(name, error, job.id)
            return []

    def _reset_silences(self) -> None:
        """Reset the silence of all bundles during an outage of the events queue, so that the reconciler does not send
        the bundles again."""
        now_s = self._clock.monotonic_s()
        for live in self._lives.values():
            for outstanding in live.all_outstanding():
                outstanding.hear(now_s)

    def _reset_silence(self, beat: Beat, trusted: Collection[JobId]) -> None:
        """Reset the silence of each bundle that a worker's heartbeat lists."""
        now_s = self._clock.monotonic_s()
        for held in beat.held:
            live = self._lives.get(held.job) if held.job in trusted else None
            if live and (outstanding := live.outstanding.get(held.stage, {}).get(held.bundle)):
                outstanding.hear(now_s)
