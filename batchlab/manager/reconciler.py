"""Recovery of lost work: silent bundles without an outcome, and dead letters.

Invariant (promise I7): a lost message, a purged queue, or a missing event delays a job by `silence_s`, and every job
ends. The manager can safely send a bundle again, because the bundle keeps its id and each commit of an outcome is
conditional.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from dataclasses import replace
from functools import partial
from heapq import heapify, heappop, heappush

from batchlab.core.commit import follow_ups, send_all, uncommitted
from batchlab.core.errors import BackendError, Malformed, NotFound, Throttled, TooNew, Unreachable
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Control, JobId, Outcome
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.ports import MAX_BATCH, Depth, Message
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.messages import read_task_message
from batchlab.manager.context import Context, Part
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.ledger_writer import LedgerWriter
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.quarantine import UnreadableObject, read_stored
from batchlab.manager.state import LiveJob, Outstanding, Superseded

log = logging.getLogger(__name__)


FULL_QUEUE_FACTOR = 10
"""Factor of the silence limit while the pool's queue has visible messages, because most silent bundles of a full queue
still wait in the queue."""

RECOVERED_AT_ONCE = 50

DEAD_LETTER_BATCHES = 5

DELIVERY_LIMIT = 50
"""Number of deliveries without an outcome after which the task of a bundle with one task is FAILED."""


MAX_BREAKPOINTS = 1000
MAX_STALE = 1000
"""Maximum number of stale heap entries of a pool, in addition to the number of outstanding bundles."""
PAUSED_CHECK_S = 30.0
"""Interval between checks of the silent bundles of a job that does not run."""


class SilenceClock:
    """Clock that measures the silence of a pool's bundles. The clock stops while the pool's silence limit is infinite.

    The clock stores at most MAX_BREAKPOINTS stops and starts, and drops the oldest ones. For the time before the oldest
    stored stop or start, the clock counts as running, so all of this time counts as silence.
    """

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s
        self._times_s = [now_s]
        """Monotonic times at which the clock stopped or continued."""
        self._counted_s = [now_s]
        """Reading of this clock at each time in `_times_s`."""
        self._runs = True
        self._checks: list[tuple[float, int, LiveJob, Outstanding]] = []
        """Heap of bundles by the reading of the clock at the start of their silence. A heartbeat does not change the
        heap: when an entry becomes due, its reading is computed again."""
        self._count = 0

    def advance(self, now_s: float, *, runs: bool) -> None:
        if runs is not self._runs:
            self._counted_s.append(self.at(self._now_s))
            self._times_s.append(self._now_s)
            self._runs = runs
            if len(self._times_s) > MAX_BREAKPOINTS:
                del self._times_s[: MAX_BREAKPOINTS // 2], self._counted_s[: MAX_BREAKPOINTS // 2]
        self._now_s = now_s

    def at(self, time_s: float) -> float:
        """Return the reading at a monotonic time. A time after the last check counts as the last check."""
        time_s = min(time_s, self._now_s)
        n = max(0, bisect_right(self._times_s, time_s) - 1)
        after_s = time_s - self._times_s[n]
        runs = self._runs if n == len(self._times_s) - 1 else self._counted_s[n + 1] > self._counted_s[n]
        return self._counted_s[n] + (after_s if runs or after_s < 0 else 0.0)

    def add(self, live: LiveJob, outstanding: Outstanding, wait_s: float = -math.inf) -> None:
        """Add a bundle to the heap, to be checked at the earliest `wait_s` after now."""
        self._count += 1
        due_s = max(self.at(outstanding.heard_s), self.at(self._now_s) + wait_s)
        heappush(self._checks, (due_s, self._count, live, outstanding))

    def remove_stale(self, lives: LiveJobs, bundles: int) -> None:
        """Rebuild the heap if it has many entries of bundles that are no longer outstanding. The pool has `bundles`
        outstanding bundles."""
        if len(self._checks) > 2 * bundles + MAX_STALE:
            self._checks = [check for check in self._checks if _is_outstanding(lives, *check[2:])]
            heapify(self._checks)

    def take_silent(self, lives: LiveJobs, limit_s: float) -> list[tuple[LiveJob, Outstanding]]:
        """Return the outstanding bundles that have been silent for more than `limit_s`."""
        now_s, silent = self.at(self._now_s), []
        while self._checks and now_s - self._checks[0][0] > limit_s:
            _, _, live, outstanding = heappop(self._checks)
            if not _is_outstanding(lives, live, outstanding):
                continue
            if now_s - self.at(outstanding.heard_s) > limit_s:
                silent.append((live, outstanding))
            else:
                self.add(live, outstanding)
        return silent


def _is_outstanding(lives: LiveJobs, live: LiveJob, outstanding: Outstanding) -> bool:
    bundle = outstanding.bundle
    return lives.get(live.id) is live and live.outstanding.get(bundle.stage, {}).get(bundle.id) is outstanding


class Reconciler(Part):
    """Reconciler that recovers lost work at each read of the queue depths."""

    def __init__(self, context: Context, ledger_writer: LedgerWriter, coordinator: JobCoordinator) -> None:
        super().__init__(context)
        self._ledger_writer = ledger_writer
        self._coordinator = coordinator
        self._clocks: dict[str, SilenceClock] = {}
        """Clock of the silence of each pool's bundles."""

    async def recover_silent(self) -> None:
        """Send the bundles again that are silent for longer than the limit of their pool."""
        now_s = self._clock.monotonic_s()
        clocks = {pool: self._clocks.setdefault(pool, SilenceClock(now_s)) for pool in self._context.depths}
        for live, outstanding in self._lives.take_sent():
            # A stage of an unknown pool does not have a silence limit, because the manager does not read the pool's
            # queue.
            if clock := clocks.get(live.job.stage(outstanding.bundle.stage).pool):
                clock.add(live, outstanding)
        silent: dict[JobId, list[Outstanding]] = {}
        for pool, depth in self._context.depths.items():
            clock, limit_s = clocks[pool], self._limit_s(pool, depth)
            # While the limit is infinite, the silence of the pool's bundles does not grow, because a worker that
            # receives a bundle needs time for its first heartbeat. The silence is not reset either, because messages of
            # follow-ups that the manager does not know yet would repeatedly reset the silence of lost bundles.
            clock.advance(now_s, runs=limit_s != math.inf)
            clock.remove_stale(self._lives, self._lives.pool(pool).bundles)
            if limit_s != math.inf:
                for live, outstanding in clock.take_silent(self._lives, limit_s):
                    if live.record.control is Control.RUN:
                        silent.setdefault(live.id, []).append(outstanding)
                        clock.add(live, outstanding)
                    else:
                        clock.add(live, outstanding, PAUSED_CHECK_S - limit_s)
        for live in sorted((self._lives[job] for job in silent), key=lambda live: live.number):
            if self._lives.get(live.id) is live and live.record.control is Control.RUN:
                await self._try_recover(live, _in_order(live, silent[live.id])[:RECOVERED_AT_ONCE])

    def _limit_s(self, pool: str, depth: Depth) -> float:
        """Return the maximum silence of a bundle of the pool. The limit is infinite while the pool's queue has at least
        one message for each outstanding bundle, because no message seems to be lost."""
        if not depth.visible:
            return self._settings.silence_s
        messages = depth.visible + depth.in_flight + depth.delayed
        if messages >= self._lives.pool(pool).bundles:
            return math.inf
        return self._settings.silence_s * FULL_QUEUE_FACTOR

    async def _try_recover(self, live: LiveJob, silent: list[Outstanding]) -> None:
        """Recover a job's silent bundles. An error of one job does not stop the recovery of other jobs."""
        try:
            await self._recover(live, silent)
            return
        except (Throttled, Unreachable, NotFound):
            raise
        except Superseded as error:
            raise_if_cancelled()
            log.info("%s", error, extra={"job": live.id})
            live.end()
        except BackendError as error:
            raise_if_cancelled()
            log.error("its silent bundles wait: %s", error, extra={"job": live.id})
            live.trouble = str(error)
        except Exception as error:
            raise_if_cancelled()
            # An unexpected error of one job must not stop the recovery of other jobs.
            log.exception("silent bundles of job %s met a bug", live.id, extra={"job": live.id})
            live.trouble = f"an error inside the manager: {error!r}; see its log"
        now_s = self._clock.monotonic_s()
        for outstanding in silent:
            outstanding.heard_s = now_s

    async def _recover(self, live: LiveJob, silent: list[Outstanding]) -> None:
        await self.follow_control(live)
        if live.record.control is not Control.RUN:
            return  # the job's bundles are silent because workers delete the messages of a paused or cancelled job
        if any(outstanding.resends for outstanding in silent) and not await self._is_defined(live):
            return
        again: list[Bundle] = []
        for outstanding in silent:
            outcome = await self._outcomes.read(live.job, outstanding.bundle)
            if outcome:
                await self.forward(live.job, outcome)
            else:
                again.append(outstanding.bundle_to_resend())
                outstanding.heard_s = self._clock.monotonic_s()
                outstanding.resends += 1
        if again:
            log.warning("%d silent bundles are sent again", len(again), extra={"job": live.id})
            await self._coordinator.send(live.job, again)

    async def _is_defined(self, live: LiveJob) -> bool:
        """Return whether the bucket has the job's definition. If the definition is missing, the job's asyncio task ends
        the job, because the end of a job takes longer than a tick."""
        key = object_keys.spec(live.id)

        def defined(data: bytes) -> None:
            job_def = json_format.job_from_json(json_format.loads(data))
            if (job_def.id, job_def.commit_hash) != (live.id, live.job.commit_hash):
                raise Malformed("It defines another job.")

        try:
            await read_stored(self._ports, key, defined)
        except UnreadableObject as error:
            live.unreadable = error
        except NotFound as error:
            live.unreadable = UnreadableObject(key, error.message)
        else:
            return True
        live.wake.set()
        return False

    async def follow_control(self, live: LiveJob) -> None:
        """Apply the command in the job's control object to the job, unless another call is writing the control object
        now."""
        if not live.control_lock.locked():
            await self._coordinator.follow_control(live)

    async def forward(self, job: JobDef, outcome: Outcome) -> None:
        """Send the uncommitted follow-ups of an outcome and fold the outcome, because the outcome's worker may have
        died after the commit."""
        key = await self._keys.key_of(job)
        follows = await uncommitted(self._objects, outcome.follows, self._patience, key)
        uncommitted_part = replace(outcome, follows=follows)
        expected_s = self._lives.expected_s(outcome.bundle)
        messages = follow_ups(job, uncommitted_part, key, now_s=self._clock.now_s(), expected_s=expected_s)
        await send_all(self._queue, messages, self._patience)
        await self._ledger_writer.fold([settlement.completion(outcome)])

    async def drain_dead_letters(self, pool: str) -> bool:
        """Convert dead letters of the pool to outcomes or new messages. Each call converts at most a few batches, so
        that many dead letters do not delay the tick. Return whether no dead letter was found."""
        name = object_keys.dead_letters(pool)
        for batch in range(DEAD_LETTER_BATCHES):
            messages = await self._patience(partial(self._queue.receive, name, max_messages=MAX_BATCH, wait_s=0))
            if not messages:
                return not batch
            for message in messages:
                await self._handle_dead_letter(message)
                await self._patience(partial(self._queue.delete, name, [message.receipt]))
        return False

    async def _handle_dead_letter(self, message: Message) -> None:
        """Convert one dead letter to an outcome or a new message. A bundle with one task returns to the workers until
        it has been delivered `DELIVERY_LIMIT` times, because outages of the bucket also raise the receive count."""
        try:
            task = read_task_message(message.body)
            bundle = task.bundle
            job = await self._job(bundle.job)
            job.stage(bundle.stage)  # raises KeyError if the job does not have this stage
            key = await self._keys.key_of(job)
        except (Malformed, TooNew, NotFound, KeyError) as error:
            size = len(message.body)
            self._quarantine.message("dead letter", message.id, size, error)
            return
        if job.commit_hash and task.key != key:
            log.error("dropped a dead letter with a wrong commit key", extra={"job": job.id})
            return
        if task.copy_s is not None:
            return  # another message of the bundle exists, so a speculative copy proves nothing about its task
        outcome = await self._outcomes.read(job, bundle)
        if outcome is None:
            outcome = await self._commit_failure(job, bundle, message)
        if outcome is not None:
            await self.forward(job, outcome)
            return
        again = replace(bundle, losses=bundle.losses + message.receive_count)
        live = self._lives.get(bundle.job)
        if live:
            await self._coordinator.send(live.job, [again])

    async def _job(self, name: JobId) -> JobDef:
        """Return the job. If the ledger has lost the job, restore the job from the bucket. Raise NotFound if the bucket
        does not have the job."""
        try:
            return (await self._ledger.job(name)).job
        except NotFound:
            job = await self._ledger_writer.job(name)
            if job is None:
                raise
            return job

    async def _commit_failure(self, job: JobDef, bundle: Bundle, message: Message) -> Outcome | None:
        now_s = self._clock.now_s()
        execution = f"dead-{message.id}"
        if len(bundle.tasks) > 1:
            draft = settlement.bisect(bundle, execution=execution, worker="manager", now_s=now_s)
        else:
            deliveries = bundle.losses + message.receive_count - 1
            if deliveries < DELIVERY_LIMIT:
                return None
            reason = (
                f"was delivered {deliveries} times, the last {message.receive_count - 1} within "
                f"{now_s - message.sent_s:.0f} s, and never came to an outcome"
            )
            draft = settlement.poisoned(bundle, reason, execution=execution, worker="manager", now_s=now_s)
        return await self._outcomes.commit(job, draft)


def _in_order(live: LiveJob, silent: list[Outstanding]) -> list[Outstanding]:
    """Return the silent bundles of the job in the order in which they became outstanding."""
    chosen = {id(outstanding) for outstanding in silent}
    return [outstanding for outstanding in live.all_outstanding() if id(outstanding) in chosen]
