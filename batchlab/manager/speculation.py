"""Speculative copies of stragglers: a second execution of a bundle on another worker.

The first commit wins, because a copy has the id of its bundle and each commit of an outcome is conditional. The manager
stops the loser by the deletion of its message: the loser's next extension of the visibility timeout is refused, and the
loser then finds the outcome.

Invariants: the manager stores nothing about copies. A new leader sends at most one more copy of a bundle. A copy uses a
slot that no other work waits for, and does not count as work of its pool, so it never launches an instance. A copy may
run only as long as its bundle had run when the manager sent the copy. A task whose input takes long therefore costs at
most this time once more, and a task on a slow worker ends soon.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from batchlab.core.errors import BackendError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Control, JobId, LifecycleState, StageCounts, StageName
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.protocol.messages import HeldBundle
from batchlab.core.visibility_timeouts import MIN_SAMPLES
from batchlab.manager.context import Context, Part
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.ledger_writer import BundleKey
from batchlab.manager.state import LiveJob, Outstanding, WorkerStatus

log = logging.getLogger(__name__)

MIN_ENDED = 5
"""Number of tasks of a stage that must have succeeded before the stage's other tasks can be stragglers."""
MAX_LEFT = 0.25
"""Largest share of a stage's tasks that may still be open when the manager sends a copy."""
MAX_COPIES = 0.1
"""Largest number of copies of a stage, as a share of the stage's tasks. One copy is always possible."""
FACTOR = 2.0
"""A straggler has run for FACTOR times the typical duration."""
TYPICAL = 0.75
"""Quantile of the recent run times that counts as the typical duration."""
STOP_S = 60.0
"""Time after the end of a copied bundle in which the manager stops losers."""

MAX_STAGES = 10_000
"""Maximum number of stages whose number of copies is stored."""

COPY, ORIGINAL = "copy", "original"
"""Kinds of duplicates in reports: a copy that was not committed, and an original run whose copy was committed."""


def is_near_end(counts: StageCounts, uncut: int) -> bool:
    """Return whether only the last tasks of a stage are open. `uncut` is the number of tasks that are in no bundle."""
    if counts.planned is None or uncut or counts.succeeded < MIN_ENDED:
        return False
    return 0 < counts.planned - counts.terminal <= max(1.0, MAX_LEFT * counts.planned)


def quota(planned: int, sent: int) -> int:
    """Return the number of further copies of a stage with `planned` tasks, of which `sent` copies were sent."""
    return max(1, int(MAX_COPIES * planned)) - sent


def limit_s(run_times_s: Sequence[float], mean_s: float | None, tasks: int, least_s: float) -> float | None:
    """Return the run time in seconds above which a bundle of `tasks` tasks is a straggler.

    `run_times_s` are recent run times of the stage's tasks, one for each bundle. A stage with few bundles has only the
    mean `mean_s` of its tasks. Return None if the typical duration is unknown.
    """
    if len(run_times_s) >= MIN_SAMPLES:
        typical_s = sorted(run_times_s)[int(TYPICAL * (len(run_times_s) - 1))]
    elif mean_s is not None:
        typical_s = mean_s
    else:
        return None
    return max(least_s, FACTOR * typical_s * tasks)


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that holds a bundle. `held_s` is the time in seconds for which the worker has held it."""

    status: WorkerStatus
    held: HeldBundle
    held_s: float


@dataclass(frozen=True, slots=True)
class Straggler:
    live: LiveJob
    stage: StageDef
    outstanding: Outstanding
    holder: Holder
    copy_s: float
    """Maximum run time of the copy."""

    @property
    def owner(self) -> tuple[JobId, int, StageName]:
        """Return the job, the round, and the stage of the bundle."""
        return self.live.id, self.live.round, self.stage.name


@dataclass(slots=True)
class CopiedBundle:
    """A bundle with a speculative copy. `run_s` has the run time in seconds of the bundle by worker."""

    live: LiveJob
    outstanding: Outstanding
    run_s: dict[str, float] = field(default_factory=dict)


class Speculation(Part):
    """Sender of speculative copies, and stopper of the executions that lose."""

    def __init__(self, context: Context, coordinator: JobCoordinator) -> None:
        super().__init__(context)
        self._coordinator = coordinator
        self._copied: dict[BundleKey, CopiedBundle] = {}
        """Bundles with a copy whose outcome the manager has not folded."""
        self._stopping: dict[BundleKey, float] = {}
        """Copied bundles that have ended, with the monotonic time until which the manager stops their losers."""
        self._stopped: dict[str, BundleKey] = {}
        """Receipts of deleted messages of losers, which a late heartbeat may still contain."""
        self._sent: dict[tuple[JobId, int, StageName], int] = {}
        """Number of copies by job, round, and stage. The live job is another object after a rebuild of the ledger."""
        if self._recorder:
            self._recorder.before_close = self.settle
        self._seen_s: dict[tuple[str, BundleKey], float] = {}
        """Monotonic time when this manager first saw that a worker holds a bundle, by instance and bundle."""

    async def step(self) -> None:
        """Stop the losers of bundles that have ended, and send copies of stragglers. Each tick calls `step`."""
        drained = [pool for pool in self._context.pools if self._lives and self._is_drained(pool)]
        if not (drained or self._copied or self._stopping):
            self._seen_s.clear()
            return
        holders = self._holders()
        self._settle(holders)
        await self._stop(holders)
        for pool in drained:
            await self._copy_stragglers(pool, holders)

    def settle(self) -> None:
        """Count the losers of bundles that have ended. A job may end after `step`, and its last bundle may have a copy,
        so the recorder calls `settle` just before it closes the data of ended jobs."""
        if self._copied:
            self._settle(self._holders())

    # --- Stragglers ------------------------------------------------------------------------------

    def _is_drained(self, pool: str) -> bool:
        """Return whether no work of the pool waits for a slot."""
        depth, work = self._context.depths.get(pool), self._lives.pool(pool)
        return depth is not None and not depth.visible and work.bundles > 0 and not work.uncut

    def _holders(self) -> dict[BundleKey, list[Holder]]:
        now_s = self._clock.monotonic_s()
        holders: dict[BundleKey, list[Holder]] = {}
        seen_s: dict[tuple[str, BundleKey], float] = {}
        for instance, status in self._registry.workers.items():
            for held in status.beat.held:
                key = held.job, held.stage, held.bundle
                seen_s[instance, key] = self._seen_s.get((instance, key), now_s)
                # A healthy worker soon starts or returns a bundle, so a bundle that a worker only holds counts as well.
                since_s = status.since_s.get(held, seen_s[instance, key])
                holders.setdefault(key, []).append(Holder(status, held, now_s - since_s))
        self._seen_s = seen_s
        return holders

    async def _copy_stragglers(self, pool: str, holders: Mapping[BundleKey, Sequence[Holder]]) -> None:
        """Send copies of the pool's stragglers to free slots. The straggler that has run for the longest time is
        first."""
        found = [
            straggler
            for key, places in holders.items()
            if len(places) == 1 and (straggler := self._straggler(pool, key, places[0]))
        ]
        if not found:
            return
        free = self._free_slots(pool)
        # The slots of copies that no worker has reported yet are not free.
        for key, copied in self._copied.items():
            stage = copied.live.job.stage(key[1])
            if stage.pool == pool and len(copied.run_s) < 2:
                _reserve_slots(free, stage.slots, excluded_worker=copied.outstanding.copied_from)
        for straggler in sorted(found, key=lambda one: -one.holder.held_s):
            planned = straggler.live.stages[straggler.stage.name].counts.planned or 0
            worker = straggler.holder.status.beat.worker
            has_quota = quota(planned, self._sent.get(straggler.owner, 0)) > 0
            if has_quota and _reserve_slots(free, straggler.stage.slots, excluded_worker=worker):
                await self._send(straggler)

    def _straggler(self, pool: str, key: BundleKey, holder: Holder) -> Straggler | None:
        job, stage_name, bundle = key
        live = self._lives.get(job)
        outstanding = live.outstanding.get(stage_name, {}).get(bundle) if live else None
        if live is None or outstanding is None or outstanding.copied_from or not self._may_copy(live):
            return None
        stage = live.job.stage(stage_name)
        record = live.stages[stage_name]
        if stage.pool != pool or not stage.may_be_copied or not is_near_end(record.counts, len(record.left)):
            return None
        least_s, tasks = self._settings.copy_after_s, len(outstanding.bundle.tasks)
        after_s = limit_s(live.samples_s(stage_name), record.counts.mean_s, tasks, least_s)
        if after_s is None or holder.held_s < after_s:
            return None
        return Straggler(live, stage, outstanding, holder, round(holder.held_s, 3))

    def _may_copy(self, live: LiveJob) -> bool:
        """Return whether the job may start work that its user did not request. The cost of a copy is not part of the
        forecast that a cost cap uses."""
        return live.record.control is Control.RUN and not live.must_read_control and live.job.max_cost_usd is None

    def _free_slots(self, pool: str) -> dict[str, int]:
        """Return the number of free slots of each worker that is in service."""
        view = self._context.groups.get(pool)
        in_service = {i.id for i in view.instances if i.state is LifecycleState.IN_SERVICE} if view else set()
        free: dict[str, int] = {}
        for instance, status in self._registry.workers.items():
            if instance in in_service and status.beat.pool == pool and not status.beat.leaving:
                free[status.beat.worker] = status.beat.slots - sum(map(self._lives.slots_of, status.beat.held))
        return free

    async def _send(self, straggler: Straggler) -> None:
        live, outstanding, holder = straggler.live, straggler.outstanding, straggler.holder
        bundle = outstanding.bundle
        # The manager records the copy before the send, because a failed send may have succeeded.
        outstanding.copied_from = holder.status.beat.worker
        self._copied[live.id, bundle.stage, bundle.id] = CopiedBundle(live, outstanding)
        sent = self._sent.pop(straggler.owner, 0) + 1
        self._sent[straggler.owner] = sent
        while len(self._sent) > MAX_STAGES:
            del self._sent[next(iter(self._sent))]
        self._counts.copies += 1
        live.notify()
        log.info(
            "the bundle runs for %.1f s, so a copy is sent",
            holder.held_s,
            extra={"job": live.id, "stage": bundle.stage, "bundle": bundle.id},
        )
        try:
            await self._coordinator.send(live.job, [outstanding.bundle_to_resend()], copy_s=straggler.copy_s)
        except BackendError as error:
            raise_if_cancelled()
            # The straggler ends without a copy. A copy must not delay the rest of the manager's tick.
            log.warning("a copy could not be sent: %s", error, extra={"job": live.id, "stage": bundle.stage})

    # --- Losers ----------------------------------------------------------------------------------

    def _settle(self, holders: Mapping[BundleKey, Sequence[Holder]]) -> None:
        """Measure the runs of copied bundles, and count the run time of the losers of bundles that have ended."""
        for key, copied in list(self._copied.items()):
            live, outstanding = copied.live, copied.outstanding
            for holder in holders.get(key, ()):
                copied.run_s[holder.status.beat.worker] = holder.held_s if holder.held.running else 0.0
            current = self._lives.get(live.id)
            if not outstanding.winner and current is live and not live.ended.is_set():
                continue
            if not outstanding.winner and current and (again := current.outstanding.get(key[1], {}).get(key[2])):
                # Another leader or a rebuild of the ledger has replaced the job's state.
                again.copied_from = outstanding.copied_from
                copied.live, copied.outstanding = current, again
                continue
            del self._copied[key]
            if not outstanding.winner:
                continue
            self._stopping[key] = self._clock.monotonic_s() + STOP_S
            # The manager commits outcomes of dead letters. A short copy may win before a heartbeat reports its run.
            won = outstanding.winner not in (outstanding.copied_from, "manager")
            if won:
                self._counts.copies_won += 1
            losers = {worker: run_s for worker, run_s in copied.run_s.items() if worker != outstanding.winner}
            stage = live.job.stage(key[1])
            lost_slot_s = sum(losers.values()) * stage.slots
            live.account.repeat(stage.pool, lost_slot_s)
            if self._recorder:
                self._recorder.record_losers(live.id, stage.name, ORIGINAL if won else COPY, lost_slot_s, losers)

    async def _stop(self, holders: Mapping[BundleKey, Iterable[Holder]]) -> None:
        """Delete the messages of losers, so that their workers stop."""
        now_s = self._clock.monotonic_s()
        for key, until_s in list(self._stopping.items()):
            if until_s < now_s:
                del self._stopping[key]
                self._stopped = {receipt: other for receipt, other in self._stopped.items() if other != key}
                continue
            for holder in holders.get(key, ()):
                receipt = holder.held.receipt
                if receipt and receipt not in self._stopped:
                    try:
                        await self._patience(partial(self._queue.delete, holder.held.queue, [receipt]))
                    except BackendError as error:
                        raise_if_cancelled()
                        log.warning("the loser of a copy is not stopped yet: %s", error, extra={"job": key[0]})
                        continue
                    self._stopped[receipt] = key


def _reserve_slots(free: dict[str, int], slots: int, *, excluded_worker: str) -> bool:
    """Subtract `slots` from the free slots of the worker with the most free slots, except `excluded_worker`. Return
    False if no other worker has enough free slots."""
    others = [worker for worker in free if worker != excluded_worker]
    worker = max(others, key=lambda one: free[one], default=None)
    if worker is None or free[worker] < slots:
        return False
    free[worker] -= slots
    return True
