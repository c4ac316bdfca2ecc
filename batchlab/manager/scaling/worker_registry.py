"""Workers as their beats tell of them, and what becomes of the messages of those that died."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

from batchlab.core.commit import address, send_all
from batchlab.core.errors import BackendError, Refused
from batchlab.core.model import Bundle, GroupView, Instance, JobId
from batchlab.core.ports import MAX_BATCH
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import Beat, Held
from batchlab.core.request_counter import STEP_BYTES, Asked
from batchlab.manager.counters import Counts
from batchlab.manager.events.quarantine import Quarantine
from batchlab.manager.scaling.instances import Instances
from batchlab.manager.state import LiveJob, Ports, Seen
from batchlab.manager.versioned_document import Kept

log = logging.getLogger(__name__)

GONE_KEPT = 1000
SPOT_KEPT = 20_000
MOST_PER_S = 5_000.0
"""Requests of one kind. No worker makes so many."""
GRACE_S = 3_600.0
"""Added to the age of an instance, since clocks differ."""
LOST_S = 300.0
"""An idle worker beats five times meanwhile."""


@dataclass(frozen=True, slots=True)
class _Gone:
    """An instance that left or died."""

    worker: str
    """The last one heard of on it; "" where none was."""
    told: bool
    """Its worker said so itself."""


class Registry:
    """Invariant (I6): a dead instance's messages are given back as soon as the fleet sees it die.

    Where the fleet ended it, its bundles go out as fresh messages and nobody is blamed; where it
    died by itself, its messages are made visible again, which counts a receive. Where nothing was
    heard of it for `LOST_S`, they are back already.
    """

    def __init__(
        self,
        ports: Ports,
        lives: Mapping[JobId, LiveJob],
        quarantine: Quarantine | None = None,
    ) -> None:
        self._ports = ports
        self._lives = lives
        self._quarantine = quarantine or Quarantine(Counts())
        self.instances = Instances(Kept(ports, object_keys.INSTANCES), self._quarantine.beat)
        self.workers: dict[str, Seen] = {}
        """By instance."""
        self.named: dict[str, str] = {}
        """The instance whose worker has reported a name first. Names are in outcomes, which every
        worker may read, so a later claim of a name is no evidence."""
        self.deaf_s: float | None = None
        """When nobody could be heard last, or not what they say now: the events were out of reach,
        or there was a backlog of them (monotonic); inf while they are out of reach."""
        self._ready: set[str] = set()
        """Those of which their group has been told."""
        self.spot: dict[str, None] = {}
        """Instances that have told that they are Spot ones, in order."""
        self.requests: dict[str, Asked] = {}
        """What each worker has told last of its requests of S3 and SQS."""
        self._gone: dict[str, _Gone] = {}
        """The last instances that left or died, in order: a late beat must not revive one, but
        another worker may come up on it."""

    async def hear(self, beat: Beat, trusted: Collection[JobId]) -> bool:
        """Take a beat; the first of an instance makes it InService, the last one removes it. It may
        hold bundles of the `trusted` jobs. False if it has not the key of its instance."""
        await self.instances.bind([beat])
        if not self.instances.admits(beat, trusted):
            return False
        beat = replace(beat, held=self._believed(beat, trusted))
        known = self.workers.get(beat.instance)
        if known and known.beat.worker == beat.worker and known.beat.number > beat.number:
            return True  # the queue may deliver an older beat after a newer one
        gone = self._gone.get(beat.instance)
        if gone and gone.worker in ("", beat.worker):
            return True
        if beat.gone:
            if known is None or known.beat.worker == beat.worker:
                self._leave(beat.instance)
                self._gone[beat.instance] = _Gone(beat.worker, told=True)
            return True
        now_s = self._ports.clock.monotonic_s()
        before = known.since_s if known else {}
        since_s = {one: before.get(one, now_s) for one in beat.held if one.running}
        if known and known.beat.worker != beat.worker:
            self._unname(known.beat)
        self.named.setdefault(beat.worker, beat.instance)
        self.workers[beat.instance] = Seen(beat, now_s, since_s)
        for one in since_s.keys() - before.keys():
            if live := self._lives.get(one.job):
                live.began_s.setdefault(one.stage, now_s)
        for job in sorted({one.job for one in since_s.keys() ^ before.keys()}):
            if live := self._lives.get(job):
                live.changed()
        if beat.instance not in self._ready:
            await self._told_ready(beat.instance)
        return True

    def _believed(self, beat: Beat, trusted: Collection[JobId]) -> tuple[Held, ...]:
        """The bundles that the worker can hold: of jobs whose commit keys it has, in stages of its
        pool. Their receipts are used on the task queue of that pool and no other."""
        queue = object_keys.tasks_queue(beat.pool)
        return tuple(
            one
            for one in beat.held
            if one.queue == queue and one.job in trusted and self._is_in(one, beat.pool)
        )

    def _is_in(self, held: Held, pool: str) -> bool:
        live = self._lives.get(held.job)
        stages = live.job.stages if live else ()
        return live is None or any(s.name == held.stage and s.pool == pool for s in stages)

    async def see(self, views: Iterable[GroupView]) -> None:
        """Note which instances there are, and hear those that began to beat before that."""
        there = {one.id: one for view in views for one in view.instances}
        waiting = self.instances.see(there)
        await self.instances.bind(beat for beat, _ in waiting)
        for beat, trusted in waiting:
            await self.hear(beat, trusted)

    async def _told_ready(self, instance: str) -> None:
        """Tell the group; where it cannot be told, with the next beat, and what came along with
        this one does not wait for that."""
        try:
            await self._ports.fleet.ready(instance)
        except (BackendError, Refused) as error:
            about = {"instance": instance}
            log.warning("its group is not told yet that it works: %s", error, extra=about)
        else:
            self._ready.add(instance)

    def told(self, asked: Asked) -> None:
        """Take what a worker tells of its requests, if it can have made so many."""
        launched_s = self.instances.launched_s(asked.instance)
        if launched_s is None:
            return
        most = MOST_PER_S * (GRACE_S + self._ports.clock.now_s() - launched_s)
        made = replace(asked.requests, sqs_bytes=asked.requests.sqs_bytes / STEP_BYTES)
        if not all(0 <= one <= most for one in astuple(made)):
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

    def _leave(self, instance: str) -> Seen | None:
        self._ready.discard(instance)
        seen = self.workers.pop(instance, None)
        if seen:
            self._unname(seen.beat)
        before = self._gone.pop(instance, _Gone("", told=False))
        self._gone[instance] = _Gone(seen.beat.worker, told=False) if seen else before
        while len(self._gone) > GONE_KEPT:
            del self._gone[next(iter(self._gone))]
        return seen

    def keep(self, there: Collection[str]) -> None:
        """Forget workers that have been silent for `LOST_S` and are on none of these instances: the
        end of theirs was told to another leader."""
        since_s = self._ports.clock.monotonic_s() - LOST_S
        for instance, seen in list(self.workers.items()):
            if seen.heard_s < since_s and instance not in there:
                self._leave(instance)

    def back(self, living: Collection[str]) -> None:
        """Listen again to the workers of those of these instances that had been thought dead: a
        group may have missed one, even while it boots, or taken it back. Who said itself that it
        goes says no more."""
        for instance in living:
            gone = self._gone.get(instance)
            if gone and not gone.told:
                del self._gone[instance]

    def has_reported(self, instance: str) -> bool:
        """Whether a worker on it has told of itself, be it gone since."""
        gone = self._gone.get(instance)
        return instance in self.workers or bool(gone and gone.worker)

    def said_goodbye(self, instance: str) -> bool:
        """Whether the last worker of the instance has reported that it leaves."""
        gone = self._gone.get(instance)
        return bool(gone and gone.told)

    def idle(self, pool: str) -> list[str]:
        """Instances of the pool that hold nothing, longest silent first."""
        found = [
            seen.beat
            for seen in self.workers.values()
            if seen.beat.pool == pool and not seen.beat.held and not seen.beat.busy
        ]
        return [beat.instance for beat in sorted(found, key=lambda b: (b.at_s, b.instance))]

    def busy(self, pool: str) -> list[str]:
        """Instances of the pool that hold something."""
        return sorted(
            seen.beat.instance
            for seen in self.workers.values()
            if seen.beat.pool == pool and (seen.beat.held or seen.beat.busy)
        )

    async def bury(self, dead: Sequence[Instance]) -> None:
        """Give back what these instances held, where it is not long ago that they said so."""
        for instance in dead:
            seen = self._leave(instance.id)
            if seen is None or not seen.beat.held:
                continue
            self._lost(seen)
            if self._ports.clock.monotonic_s() - seen.heard_s >= LOST_S:
                continue  # they have come back by themselves, and others have them
            explained = instance.note.startswith("terminated")
            about = {"instance": instance.id, "pool": instance.pool}
            log.info("died (%s): its messages are given back", instance.note, extra=about)
            try:
                await self._give_back(seen.beat.held, explained=explained)
            except BackendError as error:
                log.warning("they return when their visibility runs out: %s", error, extra=about)

    def _lost(self, seen: Seen) -> None:
        """Note what had run on it, for nothing."""
        now_s = self._ports.clock.monotonic_s()
        for one, since_s in seen.since_s.items():
            live = self._lives.get(one.job)
            if live and live.outstanding.get(one.stage, {}).get(one.bundle):
                stage = live.job.stage(one.stage)
                live.account.lose(stage.pool, (now_s - since_s) * stage.slots)

    async def _give_back(self, held: Sequence[Held], *, explained: bool) -> None:
        ours = [one for one in held if one.receipt]
        copied = [one for one in ours if explained and self._waiting(one)]
        await self._send_copies(copied)
        await self._return(copied, visible=False)
        await self._return([one for one in ours if one not in copied], visible=True)

    async def _return(self, held: Sequence[Held], *, visible: bool) -> None:
        """Make messages visible again, or delete those of which a copy was sent."""
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

    def _waiting(self, held: Held) -> Bundle | None:
        live = self._lives.get(held.job)
        one = live.outstanding.get(held.stage, {}).get(held.bundle) if live else None
        return one.bundle if one else None

    async def _send_copies(self, held: Sequence[Held]) -> None:
        now_s = self._ports.clock.now_s()
        messages = [
            address(job, bundle, await self._ports.keys.of(job), now_s=now_s)
            for one in held
            if (bundle := self._waiting(one))
            for job in (self._lives[one.job].job,)
        ]
        await send_all(self._ports.queue, messages, self._ports.patience)
