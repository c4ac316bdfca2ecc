"""Notifications about a job's end, failures, standstill, and cost cap.

Invariants: the manager delivers each notification at least once. A notification is in the bucket before the ledger
shows the job's end, and stays in the bucket until a leader delivers the notification or gives up. An unreachable target
delays only its own notifications. The outbox has each notification id once, either pending or done, and a done
notification never becomes pending again.

Notification triggers read only data in memory. A job without progress is at a standstill if no worker runs the job, and
the job does not wait for its user, a retry delay, or a cap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from batchlab.core import notifications
from batchlab.core.errors import BackendError, NotFound
from batchlab.core.model import Control, JobId
from batchlab.core.notifications import NotDelivered, Notification, NotificationSettings, Target
from batchlab.core.port_retries import doubled_s, set_within
from batchlab.core.ports import Ending
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.context import Context, NotificationChannels, Part
from batchlab.manager.cost_caps import CostCaps
from batchlab.manager.live_jobs import Rotation
from batchlab.manager.state import LiveJob
from batchlab.manager.versioned_document import VersionedDocument

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _LastProgress:
    """A job's progress marker, and the time at which the marker last changed."""

    marker: tuple[int, ...]
    since_s: float


class NotificationTriggers(Part):
    """Notification triggers of the live jobs of one manager. The cost caps in `caps` become part of the keys of
    notifications."""

    def __init__(self, context: Context, caps: CostCaps | None) -> None:
        super().__init__(context)
        self._caps = caps
        self._progress: dict[JobId, _LastProgress] = {}

    def forget(self, job: JobId) -> None:
        self._progress.pop(job, None)

    def fired_triggers(self, live: LiveJob, target: Target, standstill_s: float) -> Iterator[tuple[str, str]]:
        """Yield the name of each trigger that has fired for `target`, such as "stuck", and a key that distinguishes
        repeated triggers. `standstill_s` is the time since the job's last progress."""
        failed = sum(counts.failed for counts in live.counts)
        if target.wants("failures") and failed >= target.failures:
            yield "failures", str(target.failures)
        if target.wants("capped") and live.capped:
            yield "capped", f"{self._caps.cap_of(live)}/{self._caps.max_cost_usd}" if self._caps else ""
        # The progress is forgotten if the job ends while the manager explains its standstill to another target.
        progress = self._progress.get(live.id)
        if target.wants("stuck") and standstill_s >= target.stuck_s and progress:
            yield "stuck", ".".join(map(str, progress.marker))

    def standstill_s(self, live: LiveJob) -> float:
        """Return the seconds since the job's last progress."""
        now_s = self._clock.monotonic_s()
        marker = (
            live.round,
            sum(counts.planned is not None for counts in live.counts),
            sum(counts.terminal + counts.retried for counts in live.counts),
        )
        progress = self._progress.setdefault(live.id, _LastProgress(marker, now_s))
        if progress.marker != marker or self._is_active(live, now_s):
            progress.marker, progress.since_s = marker, now_s
        return now_s - progress.since_s

    def _is_active(self, live: LiveJob, now_s: float) -> bool:
        """Return whether a worker runs the job, or the job waits for its user, its start, a retry delay, or a
        cap."""
        if live.record.control is not Control.RUN or live.must_wait:
            return True
        if live.is_held or any(outstanding.heard_s > now_s for outstanding in live.all_outstanding()):
            return True
        return any(held.job == live.id for worker in self._registry.workers.values() for held in worker.since_s)


MAX_LOG = 200
MAX_DONE_IDS = 1000
"""Maximum number of stored ids of done notifications, because a new manager must not send a done notification again."""


@dataclass(slots=True)
class Outbox:
    """Pending notifications, and the results of done notifications, sorted from oldest to newest. One object in the
    bucket stores the outbox."""

    pending: dict[str, Notification] = field(default_factory=dict)
    log: list[Notification] = field(default_factory=list)
    done: dict[str, None] = field(default_factory=dict)

    def finish(self, notification: Notification) -> None:
        self.pending.pop(notification.id, None)
        self.log.append(replace(notification, body=""))
        del self.log[:-MAX_LOG]
        self.done[notification.id] = None
        while len(self.done) > MAX_DONE_IDS:
            del self.done[next(iter(self.done))]

    def has(self, id_: str) -> bool:
        return id_ in self.pending or id_ in self.done

    def merge(self, other: Outbox) -> None:
        """Add the notifications of an outbox that another manager has written."""
        for notification in other.log:
            if notification.id not in self.done:
                self.finish(notification)
        for id_ in other.done:
            self.pending.pop(id_, None)
            self.done[id_] = None
        for id_, notification in other.pending.items():
            if not self.has(id_):
                self.pending[id_] = notification

    def to_bytes(self) -> bytes:
        return json_format.to_bytes(
            {
                "v": json_format.VERSION,
                "pending": [notifications.to_json(notification) for notification in self.pending.values()],
                "log": [notifications.to_json(notification) for notification in self.log],
                "done": list(self.done),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Outbox:
        doc = json_format.loads(data)
        pending, log = ([notifications.from_json(value) for value in doc[key]] for key in ("pending", "log"))
        return cls({notification.id: notification for notification in pending}, log, dict.fromkeys(doc["done"]))


MAX_DELIVERIES = 8
MAX_DELIVERIES_PER_TARGET = 2
"""Maximum number of concurrent deliveries to one target, so that a slow target does not block other targets."""
FIRST_WAIT_S = 2.0
MAX_WAIT_S = 900.0
"""Maximum wait between two delivery attempts. Each wait between two delivery attempts is twice as long as the previous
wait."""
GIVE_UP_S = 86_400.0
SOON_S = 1.0
"""Minimum interval between writes of a large outbox after a delivery or a first failure. An outbox with fewer than
`SMALL` notifications has a shorter interval."""
SMALL = 100
LATER_S = 60.0
"""Maximum interval between writes of the outbox after repeated failures."""
CLOSE_S = 1.0
CHECK_S = 10.0
"""Maximum interval between checks of an unchanged job. With at most MIN_CHECKED jobs, each tick checks all jobs."""
MIN_CHECKED = 100
"""Minimum number of jobs that each tick checks."""
MAX_EXPLANATIONS = 5
"""Maximum number of stuck jobs explained per tick. Each explanation of a stuck job reads the fleet and the ledger."""
MAX_PENDING = 2000
"""Maximum number of pending notifications. Above MAX_PENDING, the manager gives up the oldest pending notification."""


class Notifier(Part):
    """Notifier of one manager. The function `explain` returns the reason why a job makes no progress."""

    def __init__(self, context: Context, channels: NotificationChannels, caps: CostCaps | None) -> None:
        super().__init__(context)
        self._channels = channels
        self.explain: Callable[[JobId], Awaitable[str]] | None = None
        self.outbox = Outbox()
        self._document = VersionedDocument(context.ports, object_keys.NOTIFICATIONS, self._merge)
        self._version = 0
        self._saved_version = 0
        self._lock = asyncio.Lock()
        self._write_due_s: float | None = None
        """Monotonic time of the next write of delivery results to the bucket, or None if no write is due."""
        self._written_s = float("-inf")
        self._unwritten = asyncio.Event()
        self._due = asyncio.Event()
        self._sending: dict[str, str] = {}
        """Destination of each notification in delivery, by id."""
        self._triggers = NotificationTriggers(context, caps)
        self._journal = context.lives.journal()
        self._rotation = Rotation(CHECK_S, MIN_CHECKED)
        self._with_targets: dict[JobId, LiveJob] = {}
        """Live jobs whose definition has notification targets."""
        self._known_ids: dict[JobId, set[str]] = {}
        """Ids of all notifications about live jobs that were ever in the outbox, because the outbox forgets old ids."""

    def directory(self) -> NotificationSettings:
        """Return the grid's notification targets, and the rules for notification targets of jobs."""
        return self._channels.directory()

    async def ended(self, live: LiveJob, ending: Ending) -> None:
        """Add notifications about the committed end of a job. Raise BackendError if the bucket cannot store the
        notifications yet."""
        moment = ending.state.value.lower()
        targets = [*self.directory().targets, *notifications.targets_of(live.job)]
        wanted = [target for target in targets if target.wants(moment)]
        self._triggers.forget(live.id)
        if not wanted:
            return
        at_s = ending.ended_s
        record = replace(live.record, state=ending.state, reason=ending.reason, ended_s=at_s, round=live.round)
        body = notifications.body_of(record, list(live.stages.values()))
        await self._add(
            [notifications.make_notification(t, live.job, live.round, moment, body, at_s=at_s) for t in wanted]
        )

    async def observe(self) -> None:
        """Add notifications for live jobs whose triggers have fired."""
        explained = 0
        fired: list[Notification] = []
        grid_targets = self.directory().targets
        for live in self._next_jobs(has_grid_targets=bool(grid_targets)):
            targets = [*grid_targets, *notifications.targets_of(live.job)]
            if not targets or live.ended.is_set():
                continue
            # The standstill check reads all workers, so the check runs only if a target wants "stuck" notifications.
            is_wanted = any(target.wants("stuck") for target in targets)
            standstill_s = self._triggers.standstill_s(live) if is_wanted else 0.0
            known_ids = self._known_ids.setdefault(live.id, set())
            for target in targets:
                for moment, key in self._triggers.fired_triggers(live, target, standstill_s):
                    id_ = notifications.derive_id(target, live.id, live.round, moment, key)
                    if id_ in known_ids or self.outbox.has(id_):
                        continue
                    explained += moment == "stuck"
                    if moment == "stuck" and explained > MAX_EXPLANATIONS:
                        # The tick waits for each explanation of a stuck job, so a later check explains the remaining
                        # stuck jobs.
                        continue
                    known_ids.add(id_)
                    fired.append(await self._notification(live, target, moment, key))
        try:
            await self._add(fired)
        except BackendError as error:
            log.warning("notifications are not stored yet: %s", error)

    def _next_jobs(self, *, has_grid_targets: bool) -> list[LiveJob]:
        """Return the jobs to check now: jobs with a change, and the next of the other jobs."""
        self._lives.refresh()
        for job in self._journal.removed:
            self._triggers.forget(job)
            self._known_ids.pop(job, None)
            self._with_targets.pop(job, None)
        changed = self._journal.changed
        self._with_targets |= {job: live for job, live in changed.items() if live.job.notify}
        jobs: Mapping[JobId, LiveJob] = self._lives if has_grid_targets else self._with_targets
        chosen = {job: live for job, live in changed.items() if job in jobs}
        chosen |= self._rotation.next(jobs, self._clock.monotonic_s())
        self._journal.clear()
        return sorted(chosen.values(), key=lambda live: live.number)

    async def _notification(self, live: LiveJob, target: Target, moment: str, key: str) -> Notification:
        why = live.capped
        if moment == "stuck" and self.explain:
            try:
                why = await self.explain(live.id)
            except BackendError as error:
                why = f"The backend does not answer: {error}"
            except Exception:
                # An unexpected error of one job's explanation must not end the tick.
                log.exception("the standstill of job %s could not be explained", live.id)
        body = notifications.body_of(live.record, list(live.stages.values()), why=why)
        at_s = self._clock.now_s()
        return notifications.make_notification(target, live.job, live.round, moment, body, at_s=at_s, key=key)

    async def load(self) -> None:
        """Read the pending notifications of the previous manager. If the bucket is unavailable, the first write of the
        outbox merges the pending notifications."""
        try:
            await self._document.load()
        except BackendError as error:
            log.warning("the pending notifications cannot be read yet: %s", error)

    def _merge(self, content: bytes) -> None:
        self.outbox.merge(Outbox.from_bytes(content))
        self._due.set()

    async def _add(self, new: Sequence[Notification]) -> None:
        new = [notification for notification in new if not self.outbox.has(notification.id)]
        if not new and self._saved_version >= self._version:
            return  # the bucket already has every change of the outbox
        for notification in new:
            self.outbox.pending[notification.id] = notification
        while len(self.outbox.pending) > MAX_PENDING:
            self._close(next(iter(self.outbox.pending.values())), "given up", "there are too many")
        try:
            await self._save()
        finally:
            self._due.set()

    async def _save(self) -> None:
        """Write the outbox to the bucket. Concurrent callers share one write of the outbox."""
        self._version += 1
        required = self._version
        async with self._lock:
            if self._saved_version >= required:
                return
            version, due_s = self._version, self._write_due_s
            self._write_due_s = None  # the next write of the outbox stores results that arrive during this write
            try:
                await self._document.write(self.outbox.to_bytes)
                self._saved_version, due_s = version, None
                self._written_s = self._clock.monotonic_s()
            finally:
                if due_s is not None:
                    self._write_due_s = min(due_s, self._write_due_s or due_s)

    async def run(self) -> None:
        try:
            await self._run()
        finally:
            if self._write_due_s is not None:
                # The final write lets the next manager continue with the results of this manager's attempts.
                with suppress(TimeoutError, BackendError):
                    async with asyncio.timeout(CLOSE_S):
                        await self._save()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write_results(), name="write notification results")
            while True:
                self._due.clear()
                now_s = self._clock.now_s()
                waits_s = MAX_WAIT_S
                for notification in list(self.outbox.pending.values()):
                    if notification.id in self._sending:
                        continue
                    if notification.due_s > now_s:
                        waits_s = min(waits_s, notification.due_s - now_s)
                        continue
                    destination, busy = _destination(notification), list(self._sending.values())
                    if len(busy) < MAX_DELIVERIES and busy.count(destination) < MAX_DELIVERIES_PER_TARGET:
                        self._sending[notification.id] = destination
                        group.create_task(self._deliver(notification), name=f"notification {notification.id}")
                await set_within(self._due, waits_s)

    async def wait_for_attempts(self, within_s: float) -> None:
        """Wait until the manager has attempted every notification, at most `within_s`, before the manager exits."""
        until_s = self._clock.monotonic_s() + within_s
        while any(not notification.attempts for notification in self.outbox.pending.values()):
            if self._clock.monotonic_s() >= until_s:
                return
            await asyncio.sleep(0.02)

    async def _write_results(self) -> None:
        """Write the results of delivery attempts in an endless loop. Each write contains the whole outbox, so the loop
        writes the outbox rarely."""
        pause_s = SOON_S
        while True:
            await self._unwritten.wait()
            self._unwritten.clear()
            if self._write_due_s is None:
                continue  # another call has written the results of the attempts
            wait_s = self._write_due_s - self._clock.monotonic_s()
            if wait_s > 0:
                await set_within(self._unwritten, wait_s)
                self._unwritten.set()
                continue  # during the wait, the due time may have changed, or another call may have written the outbox
            try:
                await self._save()
                pause_s = SOON_S
            except BackendError as error:
                log.warning("the results of notifications are not stored yet: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = doubled_s(pause_s, LATER_S)
            self._unwritten.set()

    def _schedule_write(self, within_s: float) -> None:
        """Schedule a write of delivery results for `within_s` after the last write."""
        due_s = max(self._clock.monotonic_s(), self._written_s + within_s)
        if self._write_due_s is None or due_s < self._write_due_s:
            self._write_due_s = due_s
            self._unwritten.set()

    async def _deliver(self, notification: Notification) -> None:
        try:
            await self._try(notification)
        finally:
            # If the manager dies before the write of the delivery result, the next manager sends the notification again
            # or sooner.
            pending = self.outbox.pending.get(notification.id)
            within_s = min(SOON_S, len(self.outbox.pending) / SMALL)
            if pending and pending.attempts > 1:
                within_s = min(LATER_S, _pause_s(pending) / 2)
            self._schedule_write(within_s)
            del self._sending[notification.id]
            self._due.set()

    async def _try(self, notification: Notification) -> None:
        target = None
        try:
            target = self._target(notification)
            if target is None:
                self._close(notification, "given up", f"the grid has no target {notification.target!r} any more")
                return
            # The delivery checks the target again, because the operator may have changed the directory, and other
            # programs may write to the bucket.
            if notification.own and (wrong := self.directory().refusal(notification.own)):
                raise NotDelivered(wrong, final=True)
            await self._channels.deliver(target, notification)
        except NotDelivered as error:
            self._on_failure(notification, target, error)
        except Exception as error:
            # An unexpected error of one notification must not end the manager.
            log.exception("an unexpected error stopped the delivery of a notification", extra={"job": notification.job})
            self._on_failure(notification, target, NotDelivered(f"There is an error in the manager: {error!r}."))
        else:
            self._counts.deliveries[target.kind, "delivered"] += 1
            self._close(replace(notification, attempts=notification.attempts + 1), "delivered", "")
            log.info(
                "sent a notification to %s: %s", target.shown, notification.moment, extra={"job": notification.job}
            )

    def _on_failure(self, notification: Notification, target: Target | None, error: NotDelivered) -> None:
        kind, shown = (target.kind, target.shown) if target else ("unknown", notification.target)
        extra, now_s = {"job": notification.job}, self._clock.now_s()
        tried = replace(notification, attempts=notification.attempts + 1, error=error.message)
        if error.final or now_s - notification.at_s >= GIVE_UP_S:
            self._counts.deliveries[kind, "given_up"] += 1
            self._close(tried, "given up", error.message)
            log.warning("a notification to %s is given up: %s", shown, error, extra=extra)
            return
        self._counts.deliveries[kind, "failed"] += 1
        wait_s = _pause_s(tried)
        if notification.id in self.outbox.pending:  # another leader may have removed the pending notification
            self.outbox.pending[notification.id] = replace(tried, due_s=now_s + wait_s)
        log.warning("a notification to %s is tried again in %.0f s: %s", shown, wait_s, error.message, extra=extra)

    def _close(self, notification: Notification, state: str, error: str) -> None:
        ended_s = self._clock.now_s()
        self.outbox.finish(replace(notification, state=state, error=error, ended_s=ended_s))

    def _target(self, notification: Notification) -> Target | None:
        if notification.own is not None:
            number = int(notification.target.rpartition("#")[2])
            return self.directory().own(notification.job, number, notification.own)
        return self.directory().find_target(notification.target)

    async def test(self, name: str) -> str:
        """Send a test notification to one target without retries. Return the delivery error, or "" after a successful
        delivery."""
        target = self.directory().find_target(name)
        if target is None:
            names = ", ".join(t.name for t in self.directory().targets) or "none"
            raise NotFound(f"The grid does not have a target {name!r}.", remedy=f"Its targets are: {names}.")
        at_s = self._clock.now_s()
        id_ = notifications.derive_id(target, "", 0, "test", self._ids.fresh("test"))
        text = {"v": json_format.VERSION, "id": id_, "moment": "test", "at_s": at_s}
        notification = Notification(id_, "test", "", name, None, json_format.dumps(text), at_s)
        try:
            await self._channels.deliver(target, notification)
        except NotDelivered as error:
            self._close(replace(notification, attempts=1), "given up", error.message)
            return error.message
        else:
            self._close(replace(notification, attempts=1), "delivered", "")
            return ""
        finally:
            with suppress(BackendError):  # the result of the test stays in this manager's memory
                await self._save()

    def trouble(self, job: str) -> str:
        """Return a phrase about undelivered notifications of the job, or "" if every attempt succeeded."""
        waiting = [n for n in self.outbox.pending.values() if n.job == job and n.attempts]
        if not waiting:
            return ""
        last = max(waiting, key=lambda notification: notification.attempts)
        target = self._target(last)
        where = target.shown if target else last.target
        return (
            f"a notification about the job to {where} was not delivered, attempts: {last.attempts}, "
            f"last error: {last.error.rstrip('.')}"
        )


def _pause_s(notification: Notification) -> float:
    return doubled_s(FIRST_WAIT_S, MAX_WAIT_S, notification.attempts - 1)


def _destination(notification: Notification) -> str:
    """Return the address of a job's own notification target, or the name of a notification target of the grid."""
    return notification.own.to if notification.own else notification.target
