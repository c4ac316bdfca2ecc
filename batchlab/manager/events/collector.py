"""Receives events: completions go to the ledger, beats to the registry of workers."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice

from batchlab.core.commit import read_outcome
from batchlab.core.errors import BackendError, Malformed, NotFound, Throttled, TooNew, Unreachable
from batchlab.core.model import Completion, JobId, Outcome
from batchlab.core.ports import MAX_BATCH, Message, QueueSpec
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.commit_keys import split
from batchlab.core.protocol.field_checks import UNREADABLE
from batchlab.core.protocol.json_format import brief
from batchlab.core.protocol.messages import Beat, Duplicate, Events, read_events_message
from batchlab.core.retry import STEP_BACK_S, heed_cancellation, set_within
from batchlab.manager.counters import Counts
from batchlab.manager.events.folding import Folder, Key
from batchlab.manager.events.quarantine import Quarantine
from batchlab.manager.events.retained_outcomes import Retained, RetainedOutcomes
from batchlab.manager.events.trust import Trust
from batchlab.manager.jobs.early_events import Arrivals
from batchlab.manager.scaling.worker_registry import Registry
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob, Ports

log = logging.getLogger(__name__)

GATHER_S = 0.5
"""So long the messages of events that have been folded wait to be deleted together, unless they
fill a request."""

FOLD_BYTES = 32 * 1024
"""Where messages lie in wait, a fold takes so much at once, about 100 completions: a transaction
for each receive costs three times as much for each completion."""

MOST_NAMED = 3
"""Names of jobs in an unreadable event that are looked at, to say whose it is."""
_JOB = re.compile(r'"(?:j|job)" ?: ?"([A-Za-z0-9][A-Za-z0-9_.-]{0,99})"')


def events_queue(settings: ManagerSettings) -> QueueSpec:
    """The queue of completions and beats, as it is to be."""
    return QueueSpec(object_keys.EVENTS, visibility_s=settings.visibility_s)


def _read(body: str) -> tuple[Events, str, Mapping[str, str]]:
    """Return the facts in a message, its text without proofs, and the proofs."""
    try:
        text, proofs = split(body)
    except UNREADABLE as error:
        raise Malformed(f"The proofs of an event cannot be read: {brief(error)}.") from error
    return read_events_message(text), text, proofs


class Collector:
    """The events queue's only consumer."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        folder: Folder,
        registry: Registry,
        quiet: asyncio.Lock,
        arrivals: Arrivals,
        met_twice: Callable[[Sequence[Duplicate]], None] = lambda _: None,
        counts: Counts | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        """`quiet` is held while the ledger must not change under somebody's hands; `met_twice`
        hears of what workers have met twice."""
        self._met_twice = met_twice
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._folder = folder
        self._registry = registry
        self._quiet = quiet
        self._arrivals = arrivals
        self._counts = counts or Counts()
        self._memory = RetainedOutcomes()
        self._quarantine = quarantine or Quarantine(self._counts)
        self._trust = Trust(ports, arrivals, folder.job, self._quarantine)
        self._folded: list[str] = []
        """Receipts of messages to delete."""
        self._is_folded = asyncio.Event()
        self._fills_a_request = asyncio.Event()

    async def collect(self) -> None:
        """Receive, fold, delete, for ever. Deleted only once folded: a crash repeats the fold,
        which counts nothing twice."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._delete(), name="delete events")
            await self._collect()

    async def _collect(self) -> None:
        while True:
            try:
                await self._collect_once()
            except BackendError as error:
                heed_cancellation()
                self._registry.deaf_s = math.inf
                if isinstance(error, (Throttled, Unreachable)):
                    self._excuse_all()
                # What was received comes again when its visibility runs out.
                log.warning("events wait for the backend: %s", error)
                await asyncio.sleep(self._settings.tick_s)
                if isinstance(error, NotFound):
                    await self._make_queue()

    async def _make_queue(self) -> None:
        """Nobody else would notice that the events queue is gone."""
        try:
            await self._ports.queue.ensure(events_queue(self._settings))
        except BackendError as error:
            log.warning("the events queue is not there and cannot be made yet: %s", error)

    async def _collect_once(self) -> None:
        messages = await self._received()
        now_s = self._ports.clock.now_s()
        self._counts.events += len(messages)
        self._counts.lag_s = max([0.0, *(now_s - one.sent_s for one in messages)])
        if messages:
            async with self._quiet:
                await self._take(messages)
            self._folded += [m.receipt for m in messages]
            self._is_folded.set()
            if len(self._folded) >= MAX_BATCH:
                self._fills_a_request.set()
            if len(messages) < MAX_BATCH:  # a backlog waits for nobody
                await asyncio.sleep(STEP_BACK_S)
        if self._registry.deaf_s == math.inf:
            self._registry.deaf_s = self._ports.clock.monotonic_s()

    async def _received(self) -> list[Message]:
        """What one fold is to take: a receive, and while there is a backlog, further ones."""
        messages = list(await self._ports.patience(partial(self._receive, self._settings.wait_s)))
        size = sum(len(one.body) for one in messages)
        last = len(messages)
        while last == MAX_BATCH and size < FOLD_BYTES:
            try:
                more = await self._receive(0.0)
            except BackendError:
                heed_cancellation()
                break  # the next receive meets it too, and these must not wait for that
            messages += more
            size += sum(len(one.body) for one in more)
            last = len(more)
        oldest_s = min((one.sent_s for one in messages), default=math.inf)
        if last == MAX_BATCH and self._ports.clock.now_s() - oldest_s > self._settings.tick_s:
            # There is a backlog still: what workers say now is behind it.
            self._registry.deaf_s = self._ports.clock.monotonic_s()
        return messages

    async def _receive(self, wait_s: float) -> Sequence[Message]:
        try:
            return await self._ports.queue.receive(
                object_keys.EVENTS,
                max_messages=MAX_BATCH,
                wait_s=wait_s,
                visibility_s=self._settings.visibility_s,
            )
        except BackendError:
            # At once: patience may wait for minutes before anybody else hears of it.
            self._registry.deaf_s = math.inf
            raise

    async def _delete(self) -> None:
        """Delete what has been folded, several messages with one request."""
        while True:
            await self._is_folded.wait()
            await set_within(self._fills_a_request, GATHER_S)
            self._is_folded.clear()
            self._fills_a_request.clear()
            while receipts := self._folded[:MAX_BATCH]:
                del self._folded[:MAX_BATCH]
                delete = partial(self._ports.queue.delete, object_keys.EVENTS, receipts)
                try:
                    await self._ports.patience(delete)
                except BackendError as error:
                    # They come again, are folded for nothing, and are deleted then.
                    log.warning("events are not deleted: %s", error)

    async def _take(self, messages: Sequence[Message]) -> None:
        taken: list[tuple[Events, set[JobId]]] = []
        completions: list[Completion] = []
        whole: dict[Key, Retained] = {}
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
        await self._arrivals.ended({one.bundle.job for one in completions})
        if self._tell(whole.values()):
            # A fold takes as long as all the rest here.
            await asyncio.sleep(STEP_BACK_S)
        await self._registry.instances.bind(beat for events, _ in taken for beat in events.beats)
        traces: dict[Key, str] = {}
        for events, trusted in taken:
            traces |= {(job, stage, bundle): t for job, stage, bundle, t in events.traces}
            await self._hear(events, trusted)
        await self._folder.fold(completions, whole, traces)

    async def _hear(self, events: Events, trusted: Collection[JobId]) -> None:
        """What workers say besides what has ended. Their counts are believed by the key of the
        beat that they come with."""
        if events.duplicates:
            self._met_twice(events.duplicates)
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

    def _retained(self, outcomes: Sequence[Outcome], size_bytes: int) -> dict[Key, Retained]:
        """Keep in memory the outcomes of a message of that size, for clients that wait for them."""
        share_bytes = size_bytes // max(1, len(outcomes))
        return {
            (one.bundle.job, one.bundle.stage, one.bundle.id): self._memory.add(one, share_bytes)
            for one in outcomes
        }

    def _tell(self, outcomes: Iterable[Retained]) -> bool:
        """Tell who waits for the first outcomes of a job, whether anybody does: they are committed,
        and what is counted later is only how far the job has come."""
        heard = False
        for one in outcomes:
            live = self._lives.get(one.outcome.bundle.job) if one.outcome else None
            heard = bool(live and live.tell(one)) or heard
        return heard

    def _subject(self, body: str) -> JobId | None:
        """Return the first live job that the text of a message names, None if it names none."""
        named = islice(_JOB.finditer(body), MOST_NAMED)
        return next((job for one in named if (job := JobId(one[1])) in self._lives), None)

    async def _fetched(self, name: str) -> list[Completion]:
        """The completion of a committed outcome, none if it is not one of a known job."""
        named = object_keys.outcome_key(name)
        job = await self._folder.job(named.job) if named else None
        if job is None or not object_keys.is_genuine(name, await self._ports.keys.of(job)):
            return []  # its job has been removed meanwhile, or it is forged
        try:
            outcome = await read_outcome(self._ports.objects, name, self._ports.patience)
            return [settlement.completion(outcome)]
        except NotFound:
            return []
        except Malformed as error:
            # The reconciler replaces the outcome once its bundle has been silent for long enough.
            self._quarantine.object(name, error, job.id)
            return []

    def _excuse_all(self) -> None:
        """While nobody can be heard, nobody is silent: what runs is not to be sent again."""
        now_s = self._ports.clock.monotonic_s()
        for live in self._lives.values():
            for one in live.all_outstanding():
                one.heard_s = max(one.heard_s, now_s)

    def _named(self, beat: Beat, trusted: Collection[JobId]) -> None:
        """What a worker holds is not silent."""
        now_s = self._ports.clock.monotonic_s()
        for held in beat.held:
            live = self._lives.get(held.job) if held.job in trusted else None
            waiting = live.outstanding.get(held.stage, {}) if live else {}
            one = waiting.get(held.bundle)
            if one:
                one.heard_s = max(one.heard_s, now_s)
