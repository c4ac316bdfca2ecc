"""Consumer of the events queue: completions go to the ledger, beats to the worker registry.

Invariants: a fact about a sealed job counts only with the proof that the sender has the job's
commit key. A job of release 0.1.0 has no commit key, and its facts count without proof. No fact of
a job counts while the job's submission is still writing the job to the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

from batchlab.core.commit import read_outcome
from batchlab.core.errors import BackendError, Malformed, NotFound, Throttled, TooNew, Unreachable
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Completion, Follow, JobId, Outcome
from batchlab.core.port_retries import STEP_BACK_S, raise_if_cancelled, set_within
from batchlab.core.ports import MAX_BATCH, Message, QueueSpec
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.commit_keys import jobs_in, split
from batchlab.core.protocol.field_checks import UNREADABLE
from batchlab.core.protocol.json_format import brief
from batchlab.core.protocol.messages import Beat, Duplicate, Events, read_events_message
from batchlab.core.protocol.object_keys import UNSEALED, proves, summary
from batchlab.manager.counters import Counters
from batchlab.manager.ledger_writer import BundleKey, LedgerWriter
from batchlab.manager.quarantine import Quarantine
from batchlab.manager.state import LiveJob, ManagerSettings, Ports, RetainedOutcome, RetainedOutcomes
from batchlab.manager.worker_registry import WorkerRegistry


class PendingSubmissions:
    """Jobs whose first bundles are sent before the ledger has the job."""

    def __init__(self) -> None:
        self._arriving: dict[JobId, asyncio.Event] = {}

    @contextmanager
    def of(self, job: JobId) -> Iterator[None]:
        """Mark `job` as being submitted until the end of the block."""
        arrived = self._arriving[job] = asyncio.Event()
        try:
            yield
        finally:
            arrived.set()
            # A bucket that lost objects may have let another request create the same job meanwhile.
            if self._arriving.get(job) is arrived:
                del self._arriving[job]

    async def ended(self, jobs: Iterable[JobId]) -> None:
        """Wait until none of these jobs is being submitted."""
        if not self._arriving:
            return
        for job in jobs:
            if arrived := self._arriving.get(job):
                await arrived.wait()


class EventVerifier:
    """Check of the proofs in event messages. `job_of` returns the definition of a job that the
    message does not prove."""

    def __init__(
        self,
        ports: Ports,
        pending_submissions: PendingSubmissions,
        job_of: Callable[[JobId], Awaitable[JobDef | None]],
        quarantine: Quarantine,
    ) -> None:
        self._ports = ports
        self._pending_submissions = pending_submissions
        self._job_of = job_of
        self._quarantine = quarantine

    async def sift(self, events: Events, text: str, proofs: Mapping[str, str], id_: str) -> tuple[Events, set[JobId]]:
        """Return the facts in message `id_` that its sender may assert, and the trusted jobs."""
        jobs = jobs_in(events)
        if not jobs:
            return events, jobs
        trusted = await self._proven(jobs, text, proofs)
        if trusted == jobs and not events.committed:
            return events, trusted  # the parser rejects follow-ups of another job
        genuine = set(trusted)  # an outcome key is checked by its seal
        untrue: set[JobId] = set()
        for job in sorted(jobs - trusted):
            await self._pending_submissions.ended({job})
            job_def = await self._job_of(job)
            if job_def and not job_def.commit_hash:
                trusted.add(job)
            elif job_def:
                untrue.add(job)
        sifted = replace(
            events,
            completions=tuple(
                completion
                for completion in events.completions
                if _is_one_job(trusted, completion.bundle, completion.follows)
            ),
            outcomes=tuple(
                outcome for outcome in events.outcomes if _is_one_job(trusted, outcome.bundle, outcome.follows)
            ),
            committed=tuple([one for one in events.committed if await self._is_genuine(one, trusted, genuine)]),
            duplicates=tuple(duplicate for duplicate in events.duplicates if duplicate.job in trusted),
            traces=tuple(trace for trace in events.traces if trace[0] in trusted),
        )
        if dropped := _count(events) - _count(sifted):
            self._quarantine.unproven(id_, dropped, untrue)
        return sifted, trusted

    async def _proven(self, jobs: set[JobId], text: str, proofs: Mapping[str, str]) -> set[JobId]:
        if not proofs:
            return set()
        of_text = summary(text)
        return {
            job
            for job in sorted(jobs)
            if (given := proofs.get(job)) and proves(await self._ports.keys.new(job), of_text, given)
        }

    async def _is_genuine(self, name: str, trusted: set[JobId], proven: set[JobId]) -> bool:
        outcome_key = object_keys.outcome_key(name)
        if outcome_key is None or outcome_key.job not in trusted:
            return False
        key = await self._ports.keys.new(outcome_key.job) if outcome_key.job in proven else UNSEALED
        return object_keys.is_genuine(name, key)


def _is_one_job(trusted: set[JobId], bundle: Bundle, follows: tuple[Follow, ...]) -> bool:
    return bundle.job in trusted and all(follow.bundle.job == bundle.job for follow in follows)


def _count(events: Events) -> int:
    parts = (events.completions, events.outcomes, events.committed, events.duplicates)
    return sum(map(len, parts)) + len(events.traces)


log = logging.getLogger(__name__)

DELETE_DELAY_S = 0.5
"""How long messages of folded events wait to be deleted in one request, unless they fill a request.
"""

FOLD_BYTES = 32 * 1024
"""Messages of a backlog are folded in batches of this size, about 100 completions. A transaction
per receive costs three times as much per completion."""

MAX_NAMES = 3
"""Job names in an unreadable event that are looked up to find the job of the event."""
_JOB = re.compile(r'"(?:j|job)" ?: ?"([A-Za-z0-9][A-Za-z0-9_.-]{0,99})"')


def events_queue(settings: ManagerSettings) -> QueueSpec:
    """Return the specification of the queue of completions and beats."""
    return QueueSpec(object_keys.EVENTS, visibility_s=settings.visibility_s)


def _read(body: str) -> tuple[Events, str, Mapping[str, str]]:
    """Return the facts in a message, its text without proofs, and the proofs."""
    try:
        text, proofs = split(body)
    except UNREADABLE as error:
        raise Malformed(f"The proofs of an event cannot be read: {brief(error)}.") from error
    return read_events_message(text), text, proofs


class Collector:
    """The only consumer of the events queue."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        ledger_writer: LedgerWriter,
        registry: WorkerRegistry,
        ledger_lock: asyncio.Lock,
        pending_submissions: PendingSubmissions,
        on_duplicates: Callable[[Sequence[Duplicate]], None] = lambda _: None,
        counts: Counters | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        """`ledger_lock` is held while the ledger must not change. `on_duplicates` is called with
        the messages that workers received twice."""
        self._on_duplicates = on_duplicates
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._ledger_writer = ledger_writer
        self._registry = registry
        self._ledger_lock = ledger_lock
        self._pending_submissions = pending_submissions
        self._counts = counts or Counters()
        self._memory = RetainedOutcomes()
        self._quarantine = quarantine or Quarantine(self._counts)
        self._trust = EventVerifier(ports, pending_submissions, ledger_writer.job, self._quarantine)
        self._folded: list[str] = []
        """Receipts of messages to delete."""
        self._is_folded = asyncio.Event()
        self._fills_a_request = asyncio.Event()

    async def collect(self) -> None:
        """Receive, fold, and delete messages forever. A message is deleted after its fold. A crash
        repeats the fold, which counts nothing twice."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._delete(), name="delete events")
            await self._collect()

    async def _collect(self) -> None:
        while True:
            try:
                await self._collect_once()
            except BackendError as error:
                raise_if_cancelled()
                self._registry.outage_s = math.inf
                if isinstance(error, (Throttled, Unreachable)):
                    self._excuse_all()
                # Received messages return after their visibility timeout.
                log.warning("events wait for the backend: %s", error)
                await asyncio.sleep(self._settings.tick_s)
                if isinstance(error, NotFound):
                    await self._make_queue()

    async def _make_queue(self) -> None:
        """Create the events queue again after it was deleted."""
        try:
            await self._ports.queue.ensure(events_queue(self._settings))
        except BackendError as error:
            log.warning("the events queue does not exist and cannot be created yet: %s", error)

    async def _collect_once(self) -> None:
        messages = await self._received()
        now_s = self._ports.clock.now_s()
        self._counts.events += len(messages)
        self._counts.lag_s = max([0.0, *(now_s - message.sent_s for message in messages)])
        if messages:
            async with self._ledger_lock:
                await self._take(messages)
            self._folded += [m.receipt for m in messages]
            self._is_folded.set()
            if len(self._folded) >= MAX_BATCH:
                self._fills_a_request.set()
            if len(messages) < MAX_BATCH:  # a backlog is folded without a pause
                await asyncio.sleep(STEP_BACK_S)
        if self._registry.outage_s == math.inf:
            self._registry.outage_s = self._ports.clock.monotonic_s()

    async def _received(self) -> list[Message]:
        """Return the messages of one fold: one receive, and more receives while there is a
        backlog."""
        messages = list(await self._ports.patience(partial(self._receive, self._settings.wait_s)))
        size = sum(len(message.body) for message in messages)
        last = len(messages)
        while last == MAX_BATCH and size < FOLD_BYTES:
            try:
                more = await self._receive(0.0)
            except BackendError:
                raise_if_cancelled()
                break  # the next receive reports the error, and these messages must not wait for it
            messages += more
            size += sum(len(one.body) for one in more)
            last = len(more)
        oldest_s = min((message.sent_s for message in messages), default=math.inf)
        if last == MAX_BATCH and self._ports.clock.now_s() - oldest_s > self._settings.tick_s:
            # There is still a backlog, so the latest beats are not received yet.
            self._registry.outage_s = self._ports.clock.monotonic_s()
        return messages

    async def _receive(self, wait_s: float) -> Sequence[Message]:
        try:
            return await self._ports.queue.receive(
                object_keys.EVENTS, max_messages=MAX_BATCH, wait_s=wait_s, visibility_s=self._settings.visibility_s
            )
        except BackendError:
            # Set at once, because the retries of `patience` may take minutes.
            self._registry.outage_s = math.inf
            raise

    async def _delete(self) -> None:
        """Delete messages of folded events, several in one request."""
        while True:
            await self._is_folded.wait()
            await set_within(self._fills_a_request, DELETE_DELAY_S)
            self._is_folded.clear()
            self._fills_a_request.clear()
            while receipts := self._folded[:MAX_BATCH]:
                del self._folded[:MAX_BATCH]
                delete = partial(self._ports.queue.delete, object_keys.EVENTS, receipts)
                try:
                    await self._ports.patience(delete)
                except BackendError as error:
                    # The messages return, are folded without effect, and are deleted then.
                    log.warning("events are not deleted: %s", error)

    async def _take(self, messages: Sequence[Message]) -> None:
        taken: list[tuple[Events, set[JobId]]] = []
        completions: list[Completion] = []
        whole: dict[BundleKey, RetainedOutcome] = {}
        for message in messages:
            try:
                events, text, proofs = _read(message.body)
            except (Malformed, TooNew) as error:
                about = self._subject(message.body)
                self._quarantine.message("event", message.id, len(message.body), error, job=about)
                continue
            events, trusted = await self._trust.sift(events, text, proofs, message.id)
            done = [settlement.completion(outcome) for outcome in events.outcomes]
            for key in events.committed:
                done += await self._fetched(key)
            taken.append((events, trusted))
            completions += events.completions
            completions += done
            whole |= self._retained(events.outcomes, len(message.body))
        await self._pending_submissions.ended({completion.bundle.job for completion in completions})
        if self._tell(whole.values()):
            # A fold takes as long as all other steps together.
            await asyncio.sleep(STEP_BACK_S)
        await self._registry.instances.bind(beat for events, _ in taken for beat in events.beats)
        traces: dict[BundleKey, str] = {}
        for events, trusted in taken:
            traces |= {(job, stage, bundle): t for job, stage, bundle, t in events.traces}
            await self._hear(events, trusted)
        await self._ledger_writer.fold(completions, whole, traces)

    async def _hear(self, events: Events, trusted: Collection[JobId]) -> None:
        """Process beats, worker counts, and duplicates. Counts are trusted by the key of the beat
        in the same message."""
        if events.duplicates:
            self._on_duplicates(events.duplicates)
        heard: dict[str, str] = {}
        for beat in events.beats:
            if await self._registry.hear(beat, trusted):
                heard[beat.worker] = beat.instance
                self._named(beat, trusted)
        for told in events.told:
            if told.worker in heard:
                self._counts.told(told)
        for asked in events.asked:
            if heard.get(asked.worker) == asked.instance:
                self._registry.told(asked)

    def _retained(self, outcomes: Sequence[Outcome], size_bytes: int) -> dict[BundleKey, RetainedOutcome]:
        """Retain the outcomes of a message in memory for waiting clients."""
        share_bytes = size_bytes // max(1, len(outcomes))
        return {
            (outcome.bundle.job, outcome.bundle.stage, outcome.bundle.id): self._memory.add(outcome, share_bytes)
            for outcome in outcomes
        }

    def _tell(self, outcomes: Iterable[RetainedOutcome]) -> bool:
        """Pass outcomes to clients that wait for the first outcomes of a job, and return whether a
        client waits. The outcomes are committed. The fold that follows updates only the counters.
        """
        heard = False
        for outcome in outcomes:
            live = self._lives.get(outcome.outcome.bundle.job) if outcome.outcome else None
            heard = bool(live and live.tell(outcome)) or heard
        return heard

    def _subject(self, body: str) -> JobId | None:
        """Return the first live job named in the text of a message, or None."""
        named = islice(_JOB.finditer(body), MAX_NAMES)
        return next((job for match in named if (job := JobId(match[1])) in self._lives), None)

    async def _fetched(self, name: str) -> list[Completion]:
        """Return the completion of a committed outcome, or nothing if it does not belong to a known
        job."""
        outcome_key = object_keys.outcome_key(name)
        job = await self._ledger_writer.job(outcome_key.job) if outcome_key else None
        if job is None or not object_keys.is_genuine(name, await self._ports.keys.key_of(job)):
            return []  # its job was removed, or the key is forged
        try:
            outcome = await read_outcome(self._ports.objects, name, self._ports.patience)
            return [settlement.completion(outcome)]
        except NotFound:
            return []
        except Malformed as error:
            # The reconciler replaces the outcome after its bundle has been silent for long enough.
            self._quarantine.object(name, error, job.id)
            return []

    def _excuse_all(self) -> None:
        """Reset the silence of all bundles during an outage of the events queue, so that running
        bundles are not sent again."""
        now_s = self._ports.clock.monotonic_s()
        for live in self._lives.values():
            for outstanding in live.all_outstanding():
                outstanding.heard_s = max(outstanding.heard_s, now_s)

    def _named(self, beat: Beat, trusted: Collection[JobId]) -> None:
        """Reset the silence of the bundles that a worker holds."""
        now_s = self._ports.clock.monotonic_s()
        for held in beat.held:
            live = self._lives.get(held.job) if held.job in trusted else None
            waiting = live.outstanding.get(held.stage, {}) if live else {}
            outstanding = waiting.get(held.bundle)
            if outstanding:
                outstanding.heard_s = max(outstanding.heard_s, now_s)
