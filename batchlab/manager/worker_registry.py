"""Registry of workers by heartbeats, keys of instances, and recovery of the messages of dead workers.

Invariants: a heartbeat counts only for an instance that the fleet describes, with the instance's pool, and with the key
of the instance's first heartbeat. A heartbeat of an unknown instance waits until the fleet describes the instance. An
instance keeps the key of its first heartbeat. Before an instance's first heartbeat, other workers cannot know the id of
the instance, because ids are random and the role of workers cannot list instances. A heartbeat with a second key does
not end the instance, because a worker could otherwise end other instances. A key's digest is in the bucket before a
heartbeat with the key counts, so the next leader binds the instance to the same key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.quarantine import Quarantine
from batchlab.manager.state import Ports, WorkerStatus
from batchlab.manager.versioned_document import VersionedDocument

log = logging.getLogger(__name__)


MAX_UNKNOWN_INSTANCES = 1000
"""Maximum number of unknown instances with waiting heartbeats. Above MAX_UNKNOWN_INSTANCES, the manager drops the
heartbeat that has waited longest."""

Waiting = tuple[Beat, Collection[JobId]]


class InstanceKeys:
    """Instances that the fleet describes, and digests of their workers' keys."""

    def __init__(self, ports: Ports, on_rejected: Callable[[str, str], None]) -> None:
        """`on_rejected` is called with the instance of each rejected heartbeat and the reason of the rejection."""
        self._document = VersionedDocument(ports, object_keys.INSTANCES, self._merge)
        self._on_rejected = on_rejected
        self._instances: Mapping[str, Instance] = {}
        self._digests: dict[str, str] = {}
        """Digest of the key of each instance, by instance. A worker of release 0.1.0 has the digest ""."""
        self._unsaved: dict[str, str] = {}
        """Digests of keys that may not be in the bucket yet, by instance."""
        self._waiting: dict[str, Waiting] = {}
        self._are_changed = False
        """Whether the stored document still contains ended instances, or the silences of instances have changed."""
        self.silences_s: dict[str, float] = {}
        """Seconds since the last heartbeat, for instances with a long silence."""
        self._saving = asyncio.Lock()

    async def bind(self, beats: Iterable[Beat]) -> None:
        """Bind each described instance to the key of its first heartbeat, and store the digests. If the bucket is
        unavailable, first heartbeats do not count yet."""
        for beat in beats:
            instance = self._instances.get(beat.instance)
            if instance is not None and instance.pool == beat.pool:
                digest = _digest(beat.key)
                stored = self._digests.get(beat.instance)
                if stored is None or (not stored and digest):
                    self._unsaved.setdefault(beat.instance, digest)
        if self._unsaved:
            await self.save()

    def admits(self, beat: Beat, trusted: Collection[JobId] = ()) -> bool:
        """Return whether the heartbeat has the key of its instance. Store the heartbeat if the fleet does not describe
        the instance yet."""
        instance = self._instances.get(beat.instance)
        stored = self._digests.get(beat.instance)
        if instance is None or (stored is None and instance.pool == beat.pool):
            self._store_waiting(beat, trusted)
            return False
        if instance.pool != beat.pool:
            self._on_rejected(beat.instance, "it names another pool than that of its instance")
            return False
        if stored is None or not hmac.compare_digest(stored, _digest(beat.key)):
            self._on_rejected(beat.instance, "it has another key than its instance")
            return False
        return True

    def _store_waiting(self, beat: Beat, trusted: Collection[JobId]) -> None:
        waiting = self._waiting.get(beat.instance)
        if waiting is None or (waiting[0].key == beat.key and waiting[0].number <= beat.number):
            self._waiting[beat.instance] = beat, trusted
        while len(self._waiting) > MAX_UNKNOWN_INSTANCES:
            del self._waiting[next(iter(self._waiting))]

    def launched_s(self, instance: str) -> float | None:
        """Return the launch time of the instance in seconds since the epoch, or None if unknown."""
        described = self._instances.get(instance)
        return described.launched_s if described else None

    def update_instances(self, instances: Mapping[str, Instance]) -> list[Waiting]:
        """Set the instances that the fleet describes, and return the heartbeats that waited for these instances."""
        for digests in (self._digests, self._unsaved):
            for instance in digests.keys() - instances.keys():
                del digests[instance]
                self._are_changed = True
        self._instances = instances
        return [self._waiting.pop(stranger) for stranger in list(self._waiting) if stranger in instances]

    def record_silences(self, quiet_s: Mapping[str, float]) -> None:
        self._are_changed = self._are_changed or self.silences_s != quiet_s
        self.silences_s = dict(quiet_s)

    async def load(self) -> None:
        """Read the digests and silences of the previous leader. Raise BackendError if the bucket is unavailable."""
        try:
            if (data := await self._document.read()) is None:
                return
            self._digests = _keys_from_bytes(data)
            # A document of release 0.1.0 does not contain the silences of instances.
            silences_s = json_format.loads(data).get("quiet_s", {})
            self.silences_s = {str(instance): float(silence_s) for instance, silence_s in silences_s.items()}
        except (Malformed, TooNew, *UNREADABLE) as error:
            log.error("the keys of instances cannot be read and are bound anew: %s", error)

    async def save(self) -> None:
        async with self._saving:
            if not self._unsaved and not self._are_changed:
                return
            self._are_changed = False
            saved = dict(self._unsaved)
            try:
                await self._document.write(self._to_bytes)
            except BackendError as error:
                self._are_changed = True
                log.warning("the keys of instances are not stored yet: %s", error)
                return
            for instance in sorted(saved.keys() & self._unsaved.keys()):
                self._digests[instance] = self._unsaved.pop(instance)

    def _to_bytes(self) -> bytes:
        keys = dict(sorted((self._digests | self._unsaved).items()))
        return json_format.to_bytes(
            {"v": json_format.VERSION, "keys": keys, "quiet_s": dict(sorted(self.silences_s.items()))}
        )

    def _merge(self, content: bytes) -> None:
        # Another leader may have accepted heartbeats with the stored keys. Some stored instances may have ended, and
        # the next tick removes their keys.
        stored = _keys_from_bytes(content)
        self._digests |= stored
        for instance in stored.keys() & self._unsaved.keys():
            del self._unsaved[instance]


def _keys_from_bytes(data: bytes) -> dict[str, str]:
    return {str(k): str(v) for k, v in json_format.loads(data)["keys"].items()}


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest() if key else ""


MAX_DEPARTED = 1000
MAX_SPOT = 20_000
MAX_PER_S = 5_000.0
"""Maximum plausible number of requests of one kind that one worker sends per second."""
GRACE_S = 3_600.0
"""Tolerance in seconds for the age of an instance, because the clocks of machines differ."""
LOST_S = 300.0
"""Silence after which a worker counts as lost. An idle worker sends at least two heartbeats within `LOST_S`."""


@dataclass(frozen=True, slots=True)
class _DepartedWorker:
    """The last worker of an instance, after the worker left or the instance died."""

    worker: str
    """Name of the worker, or "" if the manager has not received a heartbeat of the worker."""
    has_reported_departure: bool


class WorkerRegistry:
    """Registry of workers by instance. Invariant (promise I6): a dead instance's messages return to the queue as soon
    as the fleet reports the death. If the fleet ended the instance, the manager sends the instance's bundles as new
    messages. If an instance died by itself, the manager makes its messages visible again, which increases their receive
    count. The messages of a worker that has been silent for `LOST_S` have already returned to the queue."""

    def __init__(self, ports: Ports, lives: LiveJobs, quarantine: Quarantine | None = None) -> None:
        self._ports = ports
        self._lives = lives
        self._quarantine = quarantine or Quarantine(Counters())
        self.instances = InstanceKeys(ports, self._quarantine.beat)
        self.workers: dict[str, WorkerStatus] = {}
        self.instance_by_worker: dict[str, str] = {}
        """Instance of the first worker that reported each worker name. Every worker can read worker names in outcomes,
        so a later heartbeat with the same name is not evidence."""
        self.authors: set[str] = set()
        """Workers whose outcomes the manager has counted since the last check for evidence of work."""
        self.outage_s: float | None = None
        """Monotonic time of the last outage or backlog of the events queue, or inf during an outage. The manager cannot
        receive current heartbeats during an outage or backlog."""
        self.outage: tuple[float, str] | None = None
        """Epoch time at which the current outage of the events queue began, and its first error. None without an
        outage."""
        self._ready: set[str] = set()
        """Instances whose lifecycle action is completed."""
        self.spot: dict[str, None] = {}
        """Instances that reported to be Spot Instances, sorted by the time of the report."""
        self.requests: dict[str, WorkerRequests] = {}
        self._departed: dict[str, _DepartedWorker] = {}
        """The last worker of each instance whose worker left or died recently. A late heartbeat of a departed worker
        does not count, but another worker may start on the same instance."""

    def begin_outage(self, error: BackendError) -> None:
        """Record that the events queue cannot be read, unless an outage is recorded."""
        self.outage_s = math.inf
        self.outage = self.outage or (self._ports.clock.now_s(), str(error))

    def end_outage(self) -> None:
        """Record that the events queue can be read."""
        if self.outage:
            self.outage_s = self._ports.clock.monotonic_s()
            self.outage = None

    async def receive_beat(self, beat: Beat, trusted: Collection[JobId]) -> bool:
        """Record a heartbeat. Of the held bundles in the heartbeat, only bundles of the `trusted` jobs count. The first
        heartbeat of an instance makes the instance InService, and the last heartbeat removes the worker. Return False
        if the heartbeat does not have the instance's key."""
        await self.instances.bind([beat])
        if not self.instances.admits(beat, trusted):
            return False
        beat = replace(beat, held=self._credible(beat, trusted))
        worker_status = self.workers.get(beat.instance)
        if worker_status and worker_status.beat.worker == beat.worker and worker_status.beat.number > beat.number:
            return True  # the queue may deliver an older heartbeat after a newer heartbeat
        departed = self._departed.get(beat.instance)
        if departed and departed.worker in ("", beat.worker):
            return True
        if beat.gone:
            if worker_status is None or worker_status.beat.worker == beat.worker:
                self._remove(beat.instance)
                self._departed[beat.instance] = _DepartedWorker(beat.worker, has_reported_departure=True)
            return True
        now_s = self._ports.clock.monotonic_s()
        before = worker_status.since_s if worker_status else {}
        since_s = {held: before.get(held, now_s) for held in beat.held if held.running}
        if worker_status and worker_status.beat.worker != beat.worker:
            self._forget_name(worker_status.beat)
        self.instance_by_worker.setdefault(beat.worker, beat.instance)
        self.workers[beat.instance] = WorkerStatus(beat, now_s, since_s)
        for held in since_s.keys() - before.keys():
            if live := self._lives.get(held.job):
                live.began_s.setdefault(held.stage, now_s)
        for job in sorted({held.job for held in since_s.keys() ^ before.keys()}):
            if live := self._lives.get(job):
                live.notify()
        if beat.instance not in self._ready:
            await self._report_ready(beat.instance)
        return True

    def _credible(self, beat: Beat, trusted: Collection[JobId]) -> tuple[HeldBundle, ...]:
        """Return the reported bundles that belong to stages of the worker's pool and to jobs whose commit keys the
        worker has."""
        queue = object_keys.tasks_queue(beat.pool)
        return tuple(
            held for held in beat.held if held.queue == queue and held.job in trusted and self._is_in(held, beat.pool)
        )

    def _is_in(self, held: HeldBundle, pool: str) -> bool:
        live = self._lives.get(held.job)
        stages = live.job.stages if live else ()
        return live is None or any(s.name == held.stage and s.pool == pool for s in stages)

    async def update_instances(self, views: Iterable[GroupView]) -> None:
        """Set the instances that the fleet describes, and record the heartbeats that waited for these instances."""
        instances = {instance.id: instance for view in views for instance in view.instances}
        waiting = self.instances.update_instances(instances)
        await self.instances.bind(beat for beat, _ in waiting)
        for beat, trusted in waiting:
            await self.receive_beat(beat, trusted)

    async def _report_ready(self, instance: str) -> None:
        """Complete the instance's lifecycle action. If the call of the fleet fails, the instance's next heartbeat
        repeats the call."""
        try:
            await self._ports.fleet.ready(instance)
        except (BackendError, Refused) as error:
            about = {"instance": instance}
            log.warning("the instance is not reported as ready yet: %s", error, extra=about)
        else:
            self._ready.add(instance)

    def record_requests(self, report: WorkerRequests) -> None:
        """Record the request counts of a worker if the counts are plausible."""
        launched_s = self.instances.launched_s(report.instance)
        if launched_s is None:
            return
        most = MAX_PER_S * (GRACE_S + self._ports.clock.now_s() - launched_s)
        requests = replace(report.requests, sqs_bytes=report.requests.sqs_bytes / STEP_BYTES)
        if not all(0 <= number <= most for number in requests.counts):
            why = "its worker reports more requests than it can have made"
            self._quarantine.beat(report.instance, why)
            return
        self.requests[report.worker] = report
        if report.is_spot:
            self.spot[report.instance] = None
            while len(self.spot) > MAX_SPOT:
                del self.spot[next(iter(self.spot))]

    def _forget_name(self, beat: Beat) -> None:
        if self.instance_by_worker.get(beat.worker) == beat.instance:
            del self.instance_by_worker[beat.worker]

    def _remove(self, instance: str) -> WorkerStatus | None:
        self._ready.discard(instance)
        worker_status = self.workers.pop(instance, None)
        if worker_status:
            self._forget_name(worker_status.beat)
        before = self._departed.pop(instance, _DepartedWorker("", has_reported_departure=False))
        self._departed[instance] = (
            _DepartedWorker(worker_status.beat.worker, has_reported_departure=False) if worker_status else before
        )
        while len(self._departed) > MAX_DEPARTED:
            del self._departed[next(iter(self._departed))]
        return worker_status

    def forget_vanished(self, existing: Collection[str]) -> None:
        """Remove workers that were silent for `LOST_S` on instances that no longer exist, because another leader has
        recorded the end of the instances."""
        since_s = self._ports.clock.monotonic_s() - LOST_S
        for instance, worker_status in list(self.workers.items()):
            if worker_status.heard_s < since_s and instance not in existing:
                self._remove(instance)

    def readmit(self, living: Collection[str]) -> None:
        """Accept heartbeats again from living instances that were recorded as dead, because a group may temporarily
        omit an instance. A worker that reported its departure does not return."""
        for instance in living:
            departed = self._departed.get(instance)
            if departed and not departed.has_reported_departure:
                del self._departed[instance]

    def has_reported(self, instance: str) -> bool:
        """Return whether a worker on the instance has ever sent a heartbeat."""
        departed = self._departed.get(instance)
        return instance in self.workers or bool(departed and departed.worker)

    def has_left(self, instance: str) -> bool:
        """Return whether the instance's last worker has reported its departure."""
        departed = self._departed.get(instance)
        return bool(departed and departed.has_reported_departure)

    def idle(self, pool: str) -> list[str]:
        """Return the pool's instances without a bundle. The instance that has been silent longest is first."""
        beats = [
            worker_status.beat
            for worker_status in self.workers.values()
            if worker_status.beat.pool == pool and not worker_status.beat.held and not worker_status.beat.busy
        ]
        return [beat.instance for beat in sorted(beats, key=lambda b: (b.at_s, b.instance))]

    def busy(self, pool: str) -> list[str]:
        return sorted(
            worker_status.beat.instance
            for worker_status in self.workers.values()
            if worker_status.beat.pool == pool and (worker_status.beat.held or worker_status.beat.busy)
        )

    async def release_messages(self, dead: Sequence[Instance]) -> None:
        """Make the messages of dead instances visible in their queue again, unless they are already visible."""
        for instance in dead:
            worker_status = self._remove(instance.id)
            if worker_status is None or not worker_status.beat.held:
                continue
            self._record_loss(worker_status)
            if self._ports.clock.monotonic_s() - worker_status.heard_s >= LOST_S:
                continue  # the worker's messages have returned after their visibility timeout
            was_terminated = instance.note.startswith("terminated")
            extra = {"instance": instance.id, "pool": instance.pool}
            log.info("the instance died (%s), and its messages return to the queue", instance.note, extra=extra)
            try:
                await self._return_messages(worker_status.beat.held, as_copies=was_terminated)
            except BackendError as error:
                log.warning("the messages return after their visibility timeout: %s", error, extra=extra)

    def _record_loss(self, seen: WorkerStatus) -> None:
        """Record the lost run time of the worker's bundles."""
        now_s = self._ports.clock.monotonic_s()
        for held, since_s in seen.since_s.items():
            live = self._lives.get(held.job)
            if live and live.outstanding.get(held.stage, {}).get(held.bundle):
                stage = live.job.stage(held.stage)
                live.account.lose(stage.pool, (now_s - since_s) * stage.slots)

    async def _return_messages(self, held: Sequence[HeldBundle], *, as_copies: bool) -> None:
        received = [bundle for bundle in held if bundle.receipt]
        copied = [our for our in received if as_copies and self._outstanding_bundle(our)]
        await self._send_copies(copied)
        await self._release(copied, visible=False)
        await self._release([our for our in received if our not in copied], visible=True)

    async def _release(self, held: Sequence[HeldBundle], *, visible: bool) -> None:
        """Make messages visible in their queue again, or delete messages that copies have replaced."""
        queue, patience = self._ports.queue, self._ports.patience
        receipts: dict[str, list[str]] = {}
        for bundle in held:
            if bundle.receipt:
                receipts.setdefault(bundle.queue, []).append(bundle.receipt)
        for name, all_of_it in receipts.items():
            for i in range(0, len(all_of_it), MAX_BATCH):
                batch = all_of_it[i : i + MAX_BATCH]
                if visible:
                    now = [(receipt, 0.0) for receipt in batch]
                    await patience(partial(queue.change_visibility, name, now))
                else:
                    await patience(partial(queue.delete, name, batch))

    def _outstanding_bundle(self, held: HeldBundle) -> Bundle | None:
        live = self._lives.get(held.job)
        outstanding = live.outstanding.get(held.stage, {}).get(held.bundle) if live else None
        return outstanding.bundle if outstanding else None

    async def _send_copies(self, held: Sequence[HeldBundle]) -> None:
        now_s = self._ports.clock.now_s()
        messages = [
            address(
                job, bundle, await self._ports.keys.key_of(job), now_s=now_s, expected_s=self._lives.expected_s(bundle)
            )
            for held_bundle in held
            if (bundle := self._outstanding_bundle(held_bundle))
            for job in (self._lives[held_bundle.job].job,)
        ]
        await send_all(self._ports.queue, messages, self._ports.patience)
