"""Notifications about a job's end, failures, standstill, and cost cap.

Invariants: delivery is at least once. A notification is in the bucket before the ledger shows the
job's end, and stays there until it is delivered or given up, whichever manager leads. An
unreachable target delays only its own notifications. An id is in the outbox once, either pending or
done, and a done notification never becomes pending again.

Triggers for notifications about live jobs: failures, a cost cap, and a standstill.

Invariant: triggers read only data in memory. A job stands still only if it could make progress: not
while a worker runs it, and not while it waits for its user, its retry delay, or a cap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from batchlab.core import notifications
from batchlab.core.errors import BackendError, NotFound
from batchlab.core.model import Control, JobId, JobState
from batchlab.core.notifications import Directory, NotDelivered, Notification, Target
from batchlab.core.port_retries import doubled_s, set_within
from batchlab.core.ports import Clock, Ending
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.counters import Counters
from batchlab.manager.state import LiveJob, Ports, WorkerStatus
from batchlab.manager.versioned_document import UNREADABLE, VersionedDocument


@dataclass(slots=True)
class _LastProgress:
    """Position of a job when its last progress was seen."""

    marker: tuple[int, ...]
    since_s: float


class NotificationTriggers:
    """Triggers of the jobs that one manager conducts."""

    def __init__(
        self, clock: Clock, workers: Mapping[str, WorkerStatus], cap_of: Callable[[LiveJob], str] = lambda _: ""
    ) -> None:
        """`cap_of` names the caps of a job. A change of the name triggers again."""
        self._clock = clock
        self._workers = workers
        self._cap_of = cap_of
        self._stands: dict[JobId, _LastProgress] = {}

    def keep(self, jobs: Collection[JobId]) -> None:
        """Forget all other jobs."""
        for gone in self._stands.keys() - jobs:
            del self._stands[gone]

    def forget(self, job: JobId) -> None:
        self._stands.pop(job, None)

    def of(self, live: LiveJob, target: Target, stood_s: float) -> Iterator[tuple[str, str]]:
        """Yield what has triggered for `target`: the moment, and a key that distinguishes it from
        earlier ones of its kind. `stood_s` is the job's standstill, if the target wants it."""
        failed = sum(stage.counts.failed for stage in live.stages.values())
        if target.wants("failures") and failed >= target.failures:
            yield "failures", str(target.failures)
        if target.wants("capped") and live.capped:
            yield "capped", self._cap_of(live)
        if target.wants("stuck") and stood_s >= target.stuck_s:
            yield "stuck", ".".join(map(str, self._stands[live.id].marker))

    def stood_s(self, live: LiveJob) -> float:
        """Return the seconds since the job's last progress."""
        now_s = self._clock.monotonic_s()
        counts = [stage.counts for stage in live.stages.values()]
        marker = (
            live.round,
            sum(count.planned is not None for count in counts),
            sum(count.terminal + count.retried for count in counts),
        )
        stand = self._stands.setdefault(live.id, _LastProgress(marker, now_s))
        if stand.marker != marker or self._moves(live, now_s):
            stand.marker, stand.since_s = marker, now_s
        return now_s - stand.since_s

    def _moves(self, live: LiveJob, now_s: float) -> bool:
        """Return whether a worker runs the job, or the job waits for its user or its retry
        delay."""
        if live.record.control is not Control.RUN or live.record.state is JobState.SCHEDULED:
            return True
        if live.is_held or any(one.heard_s > now_s for one in live.all_outstanding()):
            return True
        held = (one for worker_status in self._workers.values() for one in worker_status.since_s)
        return any(one.job == live.id for one in held)


LOGGED = 200
REMEMBERED = 1000
"""Ids of done notifications, so that a new manager does not send them again."""


@dataclass(slots=True)
class Outbox:
    """Pending notifications and the results of the others, newest last, as one object in the
    bucket."""

    pending: dict[str, Notification] = field(default_factory=dict)
    log: list[Notification] = field(default_factory=list)
    done: dict[str, None] = field(default_factory=dict)

    def close(self, one: Notification) -> None:
        self.pending.pop(one.id, None)
        self.log.append(replace(one, body=""))
        del self.log[:-LOGGED]
        self.done[one.id] = None
        while len(self.done) > REMEMBERED:
            del self.done[next(iter(self.done))]

    def knows(self, id_: str) -> bool:
        return id_ in self.pending or id_ in self.done

    def merge(self, other: Outbox) -> None:
        """Take over what another manager has written."""
        for notification in other.log:
            if notification.id not in self.done:
                self.close(notification)
        for id_ in other.done:
            self.pending.pop(id_, None)
            self.done[id_] = None
        for id_, notification in other.pending.items():
            if not self.knows(id_):
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
        pending = [notifications.from_json(one) for one in doc["pending"]]
        return cls(
            {one.id: one for one in pending},
            [notifications.from_json(one) for one in doc["log"]],
            dict.fromkeys(doc["done"]),
        )


log = logging.getLogger(__name__)

AT_ONCE = 8
AT_ONCE_TO_ONE = 2
"""Deliveries to one target at once, so that a slow target leaves room for the others."""
FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 900.0
"""Waits between two attempts. Each wait is twice as long as the one before."""
GIVE_UP_S = 86_400.0
SOON_S = 1.0
"""Minimum interval between writes of a large outbox after a delivery or a first failure. The
interval is shorter for an outbox of fewer than `SMALL` notifications."""
SMALL = 100
LATER_S = 60.0
"""Longest interval between writes after repeated failures."""
CLOSE_S = 1.0
EXPLAINED_AT_ONCE = 5
"""Stuck jobs explained per tick. Each explanation reads the fleet and the ledger."""
MAX_PENDING = 2000
"""If more notifications are pending, the oldest is given up."""

Deliver = Callable[[Target, Notification], Awaitable[None]]
"""Function that delivers a notification, or raises NotDelivered."""


@dataclass(frozen=True, slots=True)
class NotificationChannels:
    """The grid's current target directory, and the delivery function."""

    directory: Callable[[], Directory]
    deliver: Deliver


class Notifier:
    """Notifications of one manager. `explain` returns why a job makes no progress."""

    def __init__(
        self,
        ports: Ports,
        lives: Mapping[JobId, LiveJob],
        workers: Mapping[str, WorkerStatus],
        outlets: NotificationChannels,
        counts: Counters,
        cap_of: Callable[[LiveJob], str] = lambda _: "",
    ) -> None:
        """`cap_of`: see NotificationTriggers."""
        self._ports = ports
        self._lives = lives
        self._outlets = outlets
        self._counts = counts
        self.explain: Callable[[JobId], Awaitable[str]] | None = None
        self.book = Outbox()
        self._kept = VersionedDocument(ports, object_keys.NOTIFICATIONS)
        self._changes = 0
        self._saved = 0
        self._lock = asyncio.Lock()
        self._write_s: float | None = None
        """Monotonic time when the results of attempts are to be written, or None."""
        self._written_s = float("-inf")
        """Monotonic time of the last write."""
        self._unwritten = asyncio.Event()
        self._due = asyncio.Event()
        self._sending: dict[str, str] = {}
        """Destination of each notification in delivery, by id."""
        self._triggers = NotificationTriggers(ports.clock, workers, cap_of)
        self._told_of: dict[JobId, set[str]] = {}
        """Notifications of live jobs that were ever in the outbox. The outbox forgets old ids."""

    def directory(self) -> Directory:
        """Return the grid's targets, and the rules for targets of jobs."""
        return self._outlets.directory()

    # --- Triggers ---------------------------------------------------------------------------------

    async def ended(self, live: LiveJob, ending: Ending) -> None:
        """Add notifications about the committed end of a job. Raises BackendError if they cannot be
        stored yet."""
        moment = ending.state.value.lower()
        every = [*self.directory().targets, *notifications.targets_of(live.job)]
        wanted = [target for target in every if target.wants(moment)]
        self._triggers.forget(live.id)
        if not wanted:
            return
        state, reason, at_s = ending.state, ending.reason, ending.ended_s
        record = replace(live.record, state=state, reason=reason, ended_s=at_s, round=live.round)
        body = notifications.body_of(record, list(live.stages.values()))
        await self._add(
            [
                notifications.make_notification(target, live.job, live.round, moment, body, at_s=at_s)
                for target in wanted
            ]
        )

    async def observe(self) -> None:
        """Add notifications for live jobs whose triggers have fired."""
        self._triggers.keep(self._lives.keys())
        for gone in self._told_of.keys() - self._lives.keys():
            del self._told_of[gone]
        explained = 0
        found: list[Notification] = []
        everybodys = self.directory().targets
        for live in list(self._lives.values()):
            targets = [*everybodys, *notifications.targets_of(live.job)]
            if not targets or live.ended.is_set():
                continue
            # The check reads all workers, so it runs only for targets that want it.
            waits = any(target.wants("stuck") for target in targets)
            stood_s = self._triggers.stood_s(live) if waits else 0.0
            told_of = self._told_of.setdefault(live.id, set())
            for target in targets:
                for moment, key in self._triggers.of(live, target, stood_s):
                    id_ = notifications.derived_id(target, live.id, live.round, moment, key)
                    if id_ in told_of or self.book.knows(id_):
                        continue
                    explained += moment == "stuck"
                    if moment == "stuck" and explained > EXPLAINED_AT_ONCE:
                        # the tick waits for each explanation, and the next tick comes soon
                        continue
                    told_of.add(id_)
                    found.append(await self._told(live, target, moment, key))
        try:
            await self._add(found)
        except BackendError as error:
            log.warning("notifications are not written down yet: %s", error)

    async def _told(self, live: LiveJob, target: Target, moment: str, key: str) -> Notification:
        why = live.capped
        if moment == "stuck" and self.explain:
            try:
                why = await self.explain(live.id)
            except BackendError as error:
                why = f"The backend does not answer: {error}"
            except Exception:
                # A bug that concerns one job must not end the tick.
                log.exception("the standstill of job %s could not be explained", live.id)
        body = notifications.body_of(live.record, list(live.stages.values()), why=why)
        at_s = self._ports.clock.now_s()
        return notifications.make_notification(target, live.job, live.round, moment, body, at_s=at_s, key=key)

    # --- The bucket ------------------------------------------------------------------------------

    async def load(self) -> None:
        """Take over the pending notifications of the previous manager. If the bucket does not
        answer, the first write merges them."""
        try:
            data = await self._kept.read()
        except BackendError as error:
            log.warning("what is to be notified cannot be read yet: %s", error)
            return
        if data is not None:
            self._meet(data)

    def _meet(self, there: bytes) -> bool:
        """Merge the outbox that another manager has written."""
        try:
            self.book.merge(Outbox.from_bytes(there))
        except UNREADABLE as error:
            # An outbox of a later release must not keep a manager from leading.
            log.error("what is to be notified cannot be read, and begins anew: %r", error)
        self._due.set()
        return True

    async def _add(self, some: Sequence[Notification]) -> None:
        fresh = [notification for notification in some if not self.book.knows(notification.id)]
        if not fresh and self._saved >= self._changes:
            return  # otherwise an earlier change is not in the bucket yet
        for notification in fresh:
            self.book.pending[notification.id] = notification
        while len(self.book.pending) > MAX_PENDING:
            self._close(next(iter(self.book.pending.values())), "given up", "there are too many")
        try:
            await self._save()
        finally:
            self._due.set()

    async def _save(self) -> None:
        """Write the outbox. Concurrent callers share one write."""
        self._changes += 1
        mine = self._changes
        async with self._lock:
            if self._saved >= mine:
                return
            writing, due_s = self._changes, self._write_s
            self._write_s = None  # results that arrive meanwhile are written next time
            try:
                await self._kept.write(self.book.to_bytes, self._meet)
                self._saved, due_s = writing, None
                self._written_s = self._ports.clock.monotonic_s()
            finally:
                if due_s is not None:
                    self._write_s = min(due_s, self._write_s or due_s)

    # --- Delivery --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Deliver due notifications forever."""
        try:
            await self._run()
        finally:
            if self._write_s is not None:
                # then the next manager tries them sooner
                with suppress(TimeoutError, BackendError):
                    async with asyncio.timeout(CLOSE_S):
                        await self._save()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write_down(), name="write down what came of notifications")
            while True:
                self._due.clear()
                now_s = self._ports.clock.now_s()
                waits_s = LONGEST_WAIT_S
                for notification in list(self.book.pending.values()):
                    if notification.id in self._sending:
                        continue
                    if notification.due_s > now_s:
                        waits_s = min(waits_s, notification.due_s - now_s)
                    elif self._has_room(_place(notification)):
                        self._sending[notification.id] = _place(notification)
                        group.create_task(self._deliver(notification), name=f"notification {notification.id}")
                await set_within(self._due, waits_s)

    def _has_room(self, place: str) -> bool:
        busy = list(self._sending.values())
        return len(busy) < AT_ONCE and busy.count(place) < AT_ONCE_TO_ONE

    async def tried(self, within_s: float) -> None:
        """Return when every notification was tried, or after `within_s`. For a manager that is
        about to exit."""
        until_s = self._ports.clock.monotonic_s() + within_s
        while any(not notification.attempts for notification in self.book.pending.values()):
            if self._ports.clock.monotonic_s() >= until_s:
                return
            await asyncio.sleep(0.02)

    async def _write_down(self) -> None:
        """Write the results of attempts, forever. Each write has the whole outbox, so writes are
        rare."""
        pause_s = SOON_S
        while True:
            await self._unwritten.wait()
            self._unwritten.clear()
            if self._write_s is None:
                continue  # another call has written them
            wait_s = self._write_s - self._ports.clock.monotonic_s()
            if wait_s > 0:
                await set_within(self._unwritten, wait_s)
                self._unwritten.set()
                continue  # the time may have changed, or the write may be done
            try:
                await self._save()
                pause_s = SOON_S
            except BackendError as error:
                log.warning("what came of notifications is not written down yet: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = doubled_s(pause_s, LATER_S)
            self._unwritten.set()

    def _wants_writing(self, within_s: float) -> None:
        """Schedule a write of results for `within_s` after the last write."""
        due_s = max(self._ports.clock.monotonic_s(), self._written_s + within_s)
        if self._write_s is None or due_s < self._write_s:
            self._write_s = due_s
            self._unwritten.set()

    async def _deliver(self, one: Notification) -> None:
        try:
            await self._try(one)
        finally:
            # If the manager dies before the write, the next one sends the notification twice or
            # sooner.
            left = self.book.pending.get(one.id)
            within_s = min(SOON_S, len(self.book.pending) / SMALL)
            if left and left.attempts > 1:
                within_s = min(LATER_S, _pause_s(left) / 2)
            self._wants_writing(within_s)
            del self._sending[one.id]
            self._due.set()

    async def _try(self, one: Notification) -> None:
        target = None
        try:
            target = self._target(one)
            if target is None:
                self._close(one, "given up", f"the grid has no target {one.target!r} any more")
                return
            # Checked again, because the operator may have changed the directory, and others may
            # write the bucket.
            if one.own and (wrong := self.directory().refusal(one.own)):
                raise NotDelivered(wrong, final=True)
            await self._outlets.deliver(target, one)
        except NotDelivered as error:
            self._failed(one, target, error)
        except Exception as error:
            # A bug that concerns one notification must not end the manager.
            log.exception("a notification met a bug", extra={"job": one.job})
            self._failed(one, target, NotDelivered(f"There is an error in the manager: {error!r}."))
        else:
            self._counts.deliveries[target.kind, "delivered"] += 1
            self._close(replace(one, attempts=one.attempts + 1), "delivered", "")
            log.info("told %s that it is %s", target.shown, one.moment, extra={"job": one.job})

    def _failed(self, one: Notification, target: Target | None, error: NotDelivered) -> None:
        kind, shown = (target.kind, target.shown) if target else ("unknown", one.target)
        about, now_s = {"job": one.job}, self._ports.clock.now_s()
        tried = replace(one, attempts=one.attempts + 1, error=error.message)
        if error.final or now_s - one.at_s >= GIVE_UP_S:
            self._counts.deliveries[kind, "given_up"] += 1
            self._close(tried, "given up", error.message)
            log.warning("a notification to %s is given up: %s", shown, error, extra=about)
            return
        self._counts.deliveries[kind, "failed"] += 1
        wait_s = _pause_s(tried)
        if one.id in self.book.pending:  # otherwise another leader has delivered it
            self.book.pending[one.id] = replace(tried, due_s=now_s + wait_s)
        log.warning("a notification to %s is tried again in %.0f s: %s", shown, wait_s, error.message, extra=about)

    def _close(self, one: Notification, state: str, error: str) -> None:
        ended_s = self._ports.clock.now_s()
        self.book.close(replace(one, state=state, error=error, ended_s=ended_s))

    def _target(self, one: Notification) -> Target | None:
        if one.own is not None:
            number = int(one.target.rpartition("#")[2])
            return self.directory().own(one.job, number, one.own)
        return self.directory().named(one.target)

    async def test(self, name: str) -> str:
        """Send a test notification to one target, once. Return the error, or ""."""
        target = self.directory().named(name)
        if target is None:
            names = ", ".join(t.name for t in self.directory().targets) or "none"
            raise NotFound(f"The grid has no target {name!r}.", remedy=f"Its targets are: {names}.")
        at_s = self._ports.clock.now_s()
        id_ = notifications.derived_id(target, "", 0, "test", self._ports.ids.fresh("test"))
        text = {"v": json_format.VERSION, "id": id_, "moment": "test", "at_s": at_s}
        notification = Notification(id_, "test", "", name, None, json_format.dumps(text), at_s)
        try:
            await self._outlets.deliver(target, notification)
        except NotDelivered as error:
            self._close(replace(notification, attempts=1), "given up", error.message)
            return error.message
        else:
            self._close(replace(notification, attempts=1), "delivered", "")
            return ""
        finally:
            with suppress(BackendError):  # the result is at least in this manager's log
                await self._save()

    def trouble(self, job: str) -> str:
        """Return a clause about undelivered notifications of the job, or ""."""
        waiting = [one for one in self.book.pending.values() if one.job == job and one.attempts]
        if not waiting:
            return ""
        last = max(waiting, key=lambda one: one.attempts)
        target = self._target(last)
        where = target.shown if target else last.target
        return (
            f"a notification of it to {where} has not arrived, tries so far: {last.attempts}, the "
            f"last: {last.error.rstrip('.')}"
        )


def _pause_s(tried: Notification) -> float:
    """Return the wait after the last attempt."""
    return doubled_s(FIRST_WAIT_S, LONGEST_WAIT_S, tried.attempts - 1)


def _place(one: Notification) -> str:
    """Return the destination, whichever job names it."""
    return one.own.to if one.own else one.target
