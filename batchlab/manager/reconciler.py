"""Recovery of lost work: silent bundles without an outcome, and dead letters.

Invariant (I7): a lost message, a purged queue, or a missing event costs `silence_s` but no task, so
a job always ends. Sending a bundle again is safe, because ids are derived and the commit is
conditional.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from batchlab.core.commit import follow_ups, send_all, uncommitted
from batchlab.core.errors import BackendError, Malformed, NotFound, Throttled, TooNew, Unreachable
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Control, JobId, Outcome
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.ports import MAX_BATCH, Depth, Message
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.messages import read_task_message
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.ledger_writer import LedgerWriter
from batchlab.manager.quarantine import OutcomeStore, Quarantine, UnreadableObject, read_stored
from batchlab.manager.state import LiveJob, ManagerSettings, Outstanding, Ports, Superseded, outstanding_in_pool

log = logging.getLogger(__name__)

FULL_QUEUE_FACTOR = 10
"""Longer limit for silent bundles while the pool's queue has visible messages, because most of them
still wait there."""

RECOVERED_AT_ONCE = 50

DEAD_LETTER_BATCHES = 5

DELIVERY_LIMIT = 50
"""Deliveries of a single task without an outcome before the manager gives it up."""


class Reconciler:
    """Runs at each read of the queue depths. Does nothing while no bundle is silent."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        ledger_writer: LedgerWriter,
        coordinator: JobCoordinator,
        quarantine: Quarantine,
    ) -> None:
        self._quarantine = quarantine
        self._outcomes = OutcomeStore(ports, quarantine)
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._ledger_writer = ledger_writer
        self._coordinator = coordinator
        self._looked_s: float | None = None
        """Monotonic time of the last search for silent bundles."""

    async def look_for_the_silent(self, depths: Mapping[str, Depth]) -> None:
        """Recover silent bundles. `depths` has each pool's queue depth."""
        limits_s = {pool: self._limit_s(pool, depth) for pool, depth in depths.items()}
        now_s = self._ports.clock.monotonic_s()
        step_s, self._looked_s = now_s - (self._looked_s or now_s), now_s
        for live in list(self._lives.values()):
            if live.record.control is not Control.RUN:
                continue
            silent: list[Outstanding] = []
            for stage, waiting in live.outstanding.items():
                # Other pools have queues that this manager does not read.
                limit_s = limits_s.get(live.job.stage(stage).pool)
                if limit_s == math.inf:
                    # The silence does not grow, because the next worker needs time for its first
                    # beat. The silence so far stays: the manager may send follow-ups before it
                    # learns of their bundle, which would reset the silence of lost bundles
                    # repeatedly.
                    for outstanding in waiting.values():
                        outstanding.heard_s = max(outstanding.heard_s, min(now_s, outstanding.heard_s + step_s))
                elif limit_s is not None:
                    silent += [outstanding for outstanding in waiting.values() if now_s - outstanding.heard_s > limit_s]
            if silent:
                await self._recover_alone(live, silent[:RECOVERED_AT_ONCE])

    def _limit_s(self, pool: str, depth: Depth) -> float:
        """Return how long a bundle of this pool may be silent. The limit is infinite while the
        queue has at least as many messages as there are bundles: then none is lost."""
        if not depth.visible:
            return self._settings.silence_s
        messages = depth.visible + depth.in_flight + depth.delayed
        if messages >= outstanding_in_pool(self._lives, pool):
            return math.inf
        return self._settings.silence_s * FULL_QUEUE_FACTOR

    async def _recover_alone(self, live: LiveJob, silent: list[Outstanding]) -> None:
        """Recover a job's silent bundles. An error of this job does not end the tick of the
        others."""
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
            # A bug that concerns one job must not end the tick of the others.
            log.exception("silent bundles of job %s met a bug", live.id, extra={"job": live.id})
            live.trouble = f"an error inside the manager: {error!r}; see its log"
        now_s = self._ports.clock.monotonic_s()
        for outstanding in silent:
            outstanding.heard_s = now_s

    async def _recover(self, live: LiveJob, silent: list[Outstanding]) -> None:
        await self.heed(live)
        if live.record.control is not Control.RUN:
            return  # workers drop the messages of such a job, so its bundles are silent
        if any(outstanding.copies for outstanding in silent) and not await self._is_defined(live):
            return
        again: list[Bundle] = []
        for outstanding in silent:
            outcome = await self._outcomes.of(live.job, outstanding.bundle)
            if outcome:
                await self.forward(live.job, outcome)
            else:
                # As a copy, for which the worker looks for an outcome before it runs it.
                again.append(replace(outstanding.bundle, losses=max(1, outstanding.bundle.losses)))
                outstanding.heard_s = self._ports.clock.monotonic_s()
                outstanding.copies += 1
        if again:
            log.warning("%d silent bundles are sent again", len(again), extra={"job": live.id})
            await self._coordinator.send(live.job, again)

    async def _is_defined(self, live: LiveJob) -> bool:
        """Return whether the bucket has the job's definition. Workers drop messages of a job
        without one, so the job's own task ends the job. That takes longer than a tick may."""
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
        live.poke.set()
        return False

    async def heed(self, live: LiveJob) -> None:
        """Act on the control word like JobCoordinator.heed, unless a control word is being written
        now."""
        if not live.control_lock.locked():
            await self._coordinator.heed(live)

    async def forward(self, job: JobDef, outcome: Outcome) -> None:
        """Repeat steps 3 and 4 for an outcome whose worker may have died before them. Committed
        follow-ups are not sent again."""
        key = await self._ports.keys.key_of(job)
        objects, patience = self._ports.objects, self._ports.patience
        follows = await uncommitted(objects, outcome.follows, patience, key)
        left = replace(outcome, follows=follows)
        messages = follow_ups(job, left, key, now_s=self._ports.clock.now_s())
        await send_all(self._ports.queue, messages, self._ports.patience)
        await self._ledger_writer.fold([settlement.completion(outcome)])

    # --- Dead letters ----------------------------------------------------------------------------

    async def drain_dead_letters(self, pool: str) -> None:
        """Turn dead letters of the pool into outcomes or new messages.

        Each call handles a few batches, so that many dead letters do not delay the tick.
        """
        name = object_keys.dead_letters(pool)
        queue, patience = self._ports.queue, self._ports.patience
        for _ in range(DEAD_LETTER_BATCHES):
            messages = await patience(partial(queue.receive, name, max_messages=MAX_BATCH, wait_s=0))
            if not messages:
                return
            for message in messages:
                await self._judge(message)
                await patience(partial(queue.delete, name, [message.receipt]))

    async def _judge(self, message: Message) -> None:
        """Handle one dead letter. A high receive count alone proves nothing, because outages of the
        bucket raise it too. So a single task goes back to the workers, which record the cause of a
        death."""
        try:
            task = read_task_message(message.body)
            bundle = task.bundle
            job = await self._job(bundle.job)
            job.stage(bundle.stage)  # KeyError if the job has no such stage
            key = await self._ports.keys.key_of(job)
        except (Malformed, TooNew, NotFound, KeyError) as error:
            size = len(message.body)
            self._quarantine.message("dead letter", message.id, size, error)
            return
        if job.commit_hash and task.key != key:
            log.error("dropped a dead letter with a wrong commit key", extra={"job": job.id})
            return
        outcome = await self._outcomes.of(job, bundle)
        if outcome is None:
            outcome = await self._condemned(job, bundle, message)
        if outcome is not None:
            await self.forward(job, outcome)
            return
        again = replace(bundle, losses=bundle.losses + message.receive_count)
        live = self._lives.get(bundle.job)
        if live:
            await self._coordinator.send(live.job, [again])

    async def _job(self, name: JobId) -> JobDef:
        """Return the job, restored from the bucket if the ledger has lost it. Raises NotFound."""
        try:
            return (await self._ports.ledger.job(name)).job
        except NotFound:
            job = await self._ledger_writer.job(name)
            if job is None:
                raise
            return job

    async def _condemned(self, job: JobDef, bundle: Bundle, message: Message) -> Outcome | None:
        now_s = self._ports.clock.now_s()
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
