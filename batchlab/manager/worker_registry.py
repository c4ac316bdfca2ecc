"""Workers by their beats, the keys of their instances, and recovery of the messages of dead
workers.

Invariants: a beat counts only for an instance that the fleet describes, in that instance's pool,
and with the key of its first beat. A beat of another instance waits until the fleet describes it.
The first key wins: no worker can know another instance's id before its first beat, because ids are
random and the role of workers lists no instances. A rule by which a second key ends the instance
would let a worker end others whose ids it learns later. The digest of a key is in the bucket before
a beat with that key counts, so the next leader binds the same key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

from batchlab.core.commit import address, send_all
from batchlab.core.errors import BackendError, Malformed, Refused, TooNew
from batchlab.core.model import Bundle, GroupView, Instance, JobId
from batchlab.core.ports import MAX_BATCH
from batchlab.core.pricing.request_costs import STEP_BYTES, WorkerRequests
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE
from batchlab.core.protocol.messages import Beat, HeldBundle
from batchlab.manager.counters import Counters
from batchlab.manager.quarantine import Quarantine
from batchlab.manager.state import LiveJob, Ports, WorkerStatus
from batchlab.manager.versioned_document import VersionedDocument

log = logging.getLogger(__name__)

MAX_UNKNOWN_INSTANCES = 1000
"""Instances whose beats wait until the fleet describes them. The oldest is forgotten first."""

Waiting = tuple[Beat, Collection[JobId]]


class InstanceKeys:
    """The described instances, and digests of their workers' keys."""

    def __init__(self, kept: VersionedDocument, refused: Callable[[str, str], None]) -> None:
        """`refused` is called with the instance of each rejected beat, and the reason."""
        self._kept = kept
        self._refused = refused
        self._there: Mapping[str, Instance] = {}
        self._digests: dict[str, str] = {}
        """Digest of each instance's key, "" for a worker of release 0.1.0."""
        self._unsaved: dict[str, str] = {}
        """Digests of first beats that may not be in the bucket yet."""
        self._strangers: dict[str, Waiting] = {}
        self._are_changed = False
        """Whether the stored document has ended instances, or silences have grown."""
        self.quiet_s: dict[str, float] = {}
        """Seconds of silence, for instances with a long silence."""
        self._saving = asyncio.Lock()

    async def bind(self, beats: Iterable[Beat]) -> None:
        """Bind each described instance to the key of its first beat, and store the digests. If
        storing fails, these beats do not count yet."""
        for beat in beats:
            instance = self._there.get(beat.instance)
            if instance is not None and instance.pool == beat.pool:
                digest = _digest(beat.key)
                known = self._digests.get(beat.instance)
                if known is None or (not known and digest):
                    self._unsaved.setdefault(beat.instance, digest)
        if self._unsaved:
            await self.save()

    def admits(self, beat: Beat, trusted: Collection[JobId] = ()) -> bool:
        """Return whether the beat has the key of its instance. Keep it if the instance is not
        described yet."""
        instance = self._there.get(beat.instance)
        known = self._digests.get(beat.instance)
        if instance is None or (known is None and instance.pool == beat.pool):
            self._keep(beat, trusted)
            return False
        if instance.pool != beat.pool:
            self._refused(beat.instance, "it names another pool than that of its instance")
            return False
        if known is None or not hmac.compare_digest(known, _digest(beat.key)):
            self._refused(beat.instance, "it has another key than its instance")
            return False
        return True

    def _keep(self, beat: Beat, trusted: Collection[JobId]) -> None:
        known = self._strangers.get(beat.instance)
        if known is None or (known[0].key == beat.key and known[0].number <= beat.number):
            self._strangers[beat.instance] = beat, trusted
        while len(self._strangers) > MAX_UNKNOWN_INSTANCES:
            del self._strangers[next(iter(self._strangers))]

    def launched_s(self, instance: str) -> float | None:
        """Return when the instance was launched (seconds since the epoch), or None."""
        known = self._there.get(instance)
        return known.launched_s if known else None

    def see(self, there: Mapping[str, Instance]) -> list[Waiting]:
        """Take the instances that the fleet describes, and return the beats that waited for
        them."""
        for digests in (self._digests, self._unsaved):
            for instance in digests.keys() - there.keys():
                del digests[instance]
                self._are_changed = True
        self._there = there
        return [self._strangers.pop(stranger) for stranger in list(self._strangers) if stranger in there]

    def note_quiet(self, quiet_s: Mapping[str, float]) -> None:
        """Take the silences for the next leader, and store them soon."""
        self._are_changed = self._are_changed or self.quiet_s != quiet_s
        self.quiet_s = dict(quiet_s)

    async def load(self) -> None:
        """Read the digests and silences of the previous leader. Raises BackendError."""
        try:
            data = await self._kept.read()
            self._digests = {} if data is None else _keys_from_bytes(data)
            self.quiet_s = {} if data is None else _silences_from_bytes(data)
        except (Malformed, TooNew, *UNREADABLE) as error:
            log.error("the keys of instances cannot be read and are bound anew: %s", error)

    async def save(self) -> None:
        """Store the digests if they have changed."""
        async with self._saving:
            if not self._unsaved and not self._are_changed:
                return
            self._are_changed = False
            saved = dict(self._unsaved)
            try:
                await self._kept.write(self._to_bytes, self._take_in)
            except BackendError as error:
                self._are_changed = True
                log.warning("the keys of instances are not stored yet: %s", error)
                return
            for instance in sorted(saved.keys() & self._unsaved.keys()):
                self._digests[instance] = self._unsaved.pop(instance)

    def _to_bytes(self) -> bytes:
        keys = dict(sorted((self._digests | self._unsaved).items()))
        return json_format.to_bytes(
            {"v": json_format.VERSION, "keys": keys, "quiet_s": dict(sorted(self.quiet_s.items()))}
        )

    def _take_in(self, there: bytes) -> bool:
        # Another leader may have accepted beats with these keys. Some instances may have ended,
        # which the next tick corrects.
        try:
            stored = _keys_from_bytes(there)
        except (Malformed, TooNew, *UNREADABLE) as error:
            log.error("the keys of instances cannot be read and are replaced: %s", error)
            return True
        self._digests |= stored
        for instance in stored.keys() & self._unsaved.keys():
            del self._unsaved[instance]
        return True


def _keys_from_bytes(data: bytes) -> dict[str, str]:
    return {str(k): str(v) for k, v in json_format.loads(data)["keys"].items()}


def _silences_from_bytes(data: bytes) -> dict[str, float]:
    # A manager of release 0.1.0 stored none.
    return {str(k): float(v) for k, v in json_format.loads(data).get("quiet_s", {}).items()}


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest() if key else ""


DEPARTED_KEPT = 1000
SPOT_KEPT = 20_000
MAX_PER_S = 5_000.0
"""Limit of requests of one kind per second. No worker makes so many."""
GRACE_S = 3_600.0
"""Added to the age of an instance, because clocks differ."""
LOST_S = 300.0
"""An idle worker sends five beats in this time."""


@dataclass(frozen=True, slots=True)
class _DepartedWorker:
    """The last worker of an instance that left or died."""

    worker: str
    """Name of the worker, "" if no beat was received."""
    told: bool
    """Whether the worker reported that it leaves."""


class WorkerRegistry:
    """Workers by instance.

    Invariant (I6): a dead instance's messages return as soon as the fleet reports its death. If the
    fleet ended the instance, its bundles are sent as new messages. If it died by itself, its
    messages become visible again, which counts a receive. After a silence of `LOST_S` they have
    returned already.
    """

    def __init__(self, ports: Ports, lives: Mapping[JobId, LiveJob], quarantine: Quarantine | None = None) -> None:
        self._ports = ports
        self._lives = lives
        self._quarantine = quarantine or Quarantine(Counters())
        self.instances = InstanceKeys(VersionedDocument(ports, object_keys.INSTANCES), self._quarantine.beat)
        self.workers: dict[str, WorkerStatus] = {}
        """Last beat by instance."""
        self.named: dict[str, str] = {}
        """Instance whose worker reported a name first. Outcomes contain names, and every worker may
        read them, so a later claim of a name is not evidence."""
        self.outage_s: float | None = None
        """Monotonic time when current beats could last not be received, because of an outage or a
        backlog. inf during an outage."""
        self._ready: set[str] = set()
        """Instances reported as ready to their group."""
        self.spot: dict[str, None] = {}
        """Instances that reported to be Spot Instances, in order."""
        self.requests: dict[str, WorkerRequests] = {}
        """Last request counts of each worker."""
        self._gone: dict[str, _DepartedWorker] = {}
        """The last instances that left or died, in order. A late beat must not revive one, but
        another worker may start on it."""

    async def hear(self, beat: Beat, trusted: Collection[JobId]) -> bool:
        """Process a beat, which may hold bundles of the `trusted` jobs. The first beat of an
        instance makes it InService, the last one removes it. Return False if the beat does not have
        the instance's key."""
        await self.instances.bind([beat])
        if not self.instances.admits(beat, trusted):
            return False
        beat = replace(beat, held=self._believed(beat, trusted))
        worker_status = self.workers.get(beat.instance)
        if worker_status and worker_status.beat.worker == beat.worker and worker_status.beat.number > beat.number:
            return True  # the queue may deliver beats out of order
        gone = self._gone.get(beat.instance)
        if gone and gone.worker in ("", beat.worker):
            return True
        if beat.gone:
            if worker_status is None or worker_status.beat.worker == beat.worker:
                self._leave(beat.instance)
                self._gone[beat.instance] = _DepartedWorker(beat.worker, told=True)
            return True
        now_s = self._ports.clock.monotonic_s()
        before = worker_status.since_s if worker_status else {}
        since_s = {held: before.get(held, now_s) for held in beat.held if held.running}
        if worker_status and worker_status.beat.worker != beat.worker:
            self._unname(worker_status.beat)
        self.named.setdefault(beat.worker, beat.instance)
        self.workers[beat.instance] = WorkerStatus(beat, now_s, since_s)
        for held in since_s.keys() - before.keys():
            if live := self._lives.get(held.job):
                live.began_s.setdefault(held.stage, now_s)
        for job in sorted({held.job for held in since_s.keys() ^ before.keys()}):
            if live := self._lives.get(job):
                live.changed()
        if beat.instance not in self._ready:
            await self._told_ready(beat.instance)
        return True

    def _believed(self, beat: Beat, trusted: Collection[JobId]) -> tuple[HeldBundle, ...]:
        """Return the bundles that the worker can hold: of jobs whose commit keys it has, in stages
        of its pool. Their receipts are used only on that pool's task queue."""
        queue = object_keys.tasks_queue(beat.pool)
        return tuple(
            held for held in beat.held if held.queue == queue and held.job in trusted and self._is_in(held, beat.pool)
        )

    def _is_in(self, held: HeldBundle, pool: str) -> bool:
        live = self._lives.get(held.job)
        stages = live.job.stages if live else ()
        return live is None or any(s.name == held.stage and s.pool == pool for s in stages)

    async def see(self, views: Iterable[GroupView]) -> None:
        """Take the described instances, and process the beats that waited for them."""
        there = {instance.id: instance for view in views for instance in view.instances}
        waiting = self.instances.see(there)
        await self.instances.bind(beat for beat, _ in waiting)
        for beat, trusted in waiting:
            await self.hear(beat, trusted)

    async def _told_ready(self, instance: str) -> None:
        """Complete the instance's lifecycle action. If that fails, the next beat tries again."""
        try:
            await self._ports.fleet.ready(instance)
        except (BackendError, Refused) as error:
            about = {"instance": instance}
            log.warning("the instance is not reported as ready yet: %s", error, extra=about)
        else:
            self._ready.add(instance)

    def told(self, asked: WorkerRequests) -> None:
        """Record the request counts of a worker, if they are plausible."""
        launched_s = self.instances.launched_s(asked.instance)
        if launched_s is None:
            return
        most = MAX_PER_S * (GRACE_S + self._ports.clock.now_s() - launched_s)
        requests = replace(asked.requests, sqs_bytes=asked.requests.sqs_bytes / STEP_BYTES)
        if not all(0 <= one <= most for one in astuple(requests)):
            why = "its worker reports more requests than it can have made"
            self._quarantine.beat(asked.instance, why)
            return
        self.requests[asked.worker] = asked
        if asked.is_spot:
            self.spot[asked.instance] = None
            while len(self.spot) > SPOT_KEPT:
                del self.spot[next(iter(self.spot))]

    def _unname(self, beat: Beat) -> None:
        if self.named.get(beat.worker) == beat.instance:
            del self.named[beat.worker]

    def _leave(self, instance: str) -> WorkerStatus | None:
        self._ready.discard(instance)
        worker_status = self.workers.pop(instance, None)
        if worker_status:
            self._unname(worker_status.beat)
        before = self._gone.pop(instance, _DepartedWorker("", told=False))
        self._gone[instance] = _DepartedWorker(worker_status.beat.worker, told=False) if worker_status else before
        while len(self._gone) > DEPARTED_KEPT:
            del self._gone[next(iter(self._gone))]
        return worker_status

    def keep(self, there: Collection[str]) -> None:
        """Forget workers that were silent for `LOST_S` on instances that do not exist: another
        leader was informed of their end."""
        since_s = self._ports.clock.monotonic_s() - LOST_S
        for instance, worker_status in list(self.workers.items()):
            if worker_status.heard_s < since_s and instance not in there:
                self._leave(instance)

    def back(self, living: Collection[str]) -> None:
        """Accept beats again from living instances that were considered dead: a group may omit an
        instance for a while. A worker that reported its departure stays away."""
        for instance in living:
            gone = self._gone.get(instance)
            if gone and not gone.told:
                del self._gone[instance]

    def has_reported(self, instance: str) -> bool:
        """Return whether a worker on the instance has ever sent a beat."""
        gone = self._gone.get(instance)
        return instance in self.workers or bool(gone and gone.worker)

    def has_left(self, instance: str) -> bool:
        """Return whether the last worker of the instance has reported that it leaves."""
        gone = self._gone.get(instance)
        return bool(gone and gone.told)

    def idle(self, pool: str) -> list[str]:
        """Return the pool's instances that hold nothing, longest silent first."""
        beats = [
            worker_status.beat
            for worker_status in self.workers.values()
            if worker_status.beat.pool == pool and not worker_status.beat.held and not worker_status.beat.busy
        ]
        return [beat.instance for beat in sorted(beats, key=lambda b: (b.at_s, b.instance))]

    def busy(self, pool: str) -> list[str]:
        """Return the pool's instances that hold a bundle."""
        return sorted(
            worker_status.beat.instance
            for worker_status in self.workers.values()
            if worker_status.beat.pool == pool and (worker_status.beat.held or worker_status.beat.busy)
        )

    async def bury(self, dead: Sequence[Instance]) -> None:
        """Return the messages of dead instances to the queue, unless they have returned already."""
        for instance in dead:
            worker_status = self._leave(instance.id)
            if worker_status is None or not worker_status.beat.held:
                continue
            self._lost(worker_status)
            if self._ports.clock.monotonic_s() - worker_status.heard_s >= LOST_S:
                continue  # the messages have returned by themselves, and other workers have them
            explained = instance.note.startswith("terminated")
            about = {"instance": instance.id, "pool": instance.pool}
            log.info("died (%s): its messages are given back", instance.note, extra=about)
            try:
                await self._give_back(worker_status.beat.held, explained=explained)
            except BackendError as error:
                log.warning("they return when their visibility runs out: %s", error, extra=about)

    def _lost(self, seen: WorkerStatus) -> None:
        """Record the lost run time of the worker's bundles."""
        now_s = self._ports.clock.monotonic_s()
        for held, since_s in seen.since_s.items():
            live = self._lives.get(held.job)
            if live and live.outstanding.get(held.stage, {}).get(held.bundle):
                stage = live.job.stage(held.stage)
                live.account.lose(stage.pool, (now_s - since_s) * stage.slots)

    async def _give_back(self, held: Sequence[HeldBundle], *, explained: bool) -> None:
        ours = [one for one in held if one.receipt]
        copied = [our for our in ours if explained and self._waiting(our)]
        await self._send_copies(copied)
        await self._return(copied, visible=False)
        await self._return([our for our in ours if our not in copied], visible=True)

    async def _return(self, held: Sequence[HeldBundle], *, visible: bool) -> None:
        """Make messages visible again, or delete messages that were replaced by copies."""
        queue, patience = self._ports.queue, self._ports.patience
        receipts: dict[str, list[str]] = {}
        for one in held:
            if one.receipt:
                receipts.setdefault(one.queue, []).append(one.receipt)
        for name, all_of_it in receipts.items():
            for i in range(0, len(all_of_it), MAX_BATCH):
                batch = all_of_it[i : i + MAX_BATCH]
                if visible:
                    now = [(receipt, 0.0) for receipt in batch]
                    await patience(partial(queue.change_visibility, name, now))
                else:
                    await patience(partial(queue.delete, name, batch))

    def _waiting(self, held: HeldBundle) -> Bundle | None:
        live = self._lives.get(held.job)
        outstanding = live.outstanding.get(held.stage, {}).get(held.bundle) if live else None
        return outstanding.bundle if outstanding else None

    async def _send_copies(self, held: Sequence[HeldBundle]) -> None:
        now_s = self._ports.clock.now_s()
        messages = [
            address(job, bundle, await self._ports.keys.key_of(job), now_s=now_s)
            for one in held
            if (bundle := self._waiting(one))
            for job in (self._lives[one.job].job,)
        ]
        await send_all(self._ports.queue, messages, self._ports.patience)
