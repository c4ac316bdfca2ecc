"""Tells whoever wants to know of a job's end, its failures, its standing still and its cap.

Invariants: at least once. What is to be told is in the bucket before the ledger says that the job
has ended, and stays there until it is delivered or given up, whichever manager leads meanwhile. A
target that is away costs nobody but itself anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from batchlab.core import notifications
from batchlab.core.errors import BackendError, NotFound
from batchlab.core.model import JobId
from batchlab.core.notification_targets import Directory
from batchlab.core.notifications import NotDelivered, Notification, Target
from batchlab.core.ports import Ending
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.retry import doubled_s, set_within
from batchlab.manager.counters import Counts
from batchlab.manager.notifications.outbox import Book
from batchlab.manager.notifications.triggers import Moments
from batchlab.manager.state import LiveJob, Ports, Seen
from batchlab.manager.versioned_document import UNREADABLE, Kept

log = logging.getLogger(__name__)

AT_ONCE = 8
AT_ONCE_TO_ONE = 2
"""So one target that hangs takes few of the others' places, however much waits for it."""
FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 900.0
"""Between two tries; each wait is twice as long as the one before."""
GIVE_UP_S = 86_400.0
SOON_S = 1.0
"""A large book is written so seldom for what was delivered, given up or has failed for the first
time, one of fewer than `SMALL` sooner,"""
SMALL = 100
LATER_S = 60.0
"""and so seldom, in the end, for what has only failed once more."""
CLOSE_S = 1.0
EXPLAINED_AT_ONCE = 5
"""Of jobs that stand still, in one tick: each asks the fleet and the ledger."""
MOST_PENDING = 2000
"""Beyond so many the oldest is given up."""

Deliver = Callable[[Target, Notification], Awaitable[None]]
"""Returns once it has been delivered; NotDelivered."""


@dataclass(frozen=True, slots=True)
class Outlets:
    """What a manager notifies by: the grid's directory as it is now, and the way to any target."""

    directory: Callable[[], Directory]
    deliver: Deliver


class Notifying:
    """One manager's. `explain` says why a job does not go on."""

    def __init__(
        self,
        ports: Ports,
        lives: Mapping[JobId, LiveJob],
        workers: Mapping[str, Seen],
        outlets: Outlets,
        counts: Counts,
        cap_of: Callable[[LiveJob], str] = lambda _: "",
    ) -> None:
        """`cap_of`: see Moments."""
        self._ports = ports
        self._lives = lives
        self._outlets = outlets
        self._counts = counts
        self.explain: Callable[[JobId], Awaitable[str]] | None = None
        self.book = Book()
        self._kept = Kept(ports, object_keys.NOTIFICATIONS)
        self._changes = 0
        self._saved = 0
        self._lock = asyncio.Lock()
        self._write_s: float | None = None
        """Monotonic; when what has come of tries is to be written down, None where it is."""
        self._written_s = float("-inf")
        """Monotonic; when it was."""
        self._unwritten = asyncio.Event()
        self._due = asyncio.Event()
        self._sending: dict[str, str] = {}
        """Where to, by id."""
        self._moments = Moments(ports.clock, workers, cap_of)
        self._told_of: dict[JobId, set[str]] = {}
        """Moments of live jobs that are in the book, or were: it forgets, and they last."""

    def directory(self) -> Directory:
        """Whom the grid tells, and what it lets the targets of jobs do, as it is now."""
        return self._outlets.directory()

    # --- Moments ---------------------------------------------------------------------------------

    async def ended(self, live: LiveJob, ending: Ending) -> None:
        """The job's end is committed. BackendError where that cannot be told of yet."""
        moment = ending.state.value.lower()
        every = [*self.directory().targets, *notifications.targets_of(live.job)]
        wanted = [one for one in every if one.wants(moment)]
        self._moments.forget(live.id)
        if not wanted:
            return
        state, reason, at_s = ending.state, ending.reason, ending.ended_s
        record = replace(live.record, state=state, reason=reason, ended_s=at_s, round=live.round)
        body = notifications.body_of(record, list(live.stages.values()))
        await self._add(
            [
                notifications.made(one, live.job, live.round, moment, body, at_s=at_s)
                for one in wanted
            ]
        )

    async def observe(self) -> None:
        """See which jobs have come to a moment that somebody waits for."""
        self._moments.keep(self._lives.keys())
        for gone in self._told_of.keys() - self._lives.keys():
            del self._told_of[gone]
        explained = 0
        found: list[Notification] = []
        everybodys = self.directory().targets
        for live in list(self._lives.values()):
            targets = [*everybodys, *notifications.targets_of(live.job)]
            if not targets or live.ended.is_set():
                continue
            # It looks at all that runs anywhere: only for somebody.
            waits = any(target.wants("stuck") for target in targets)
            stood_s = self._moments.stood_s(live) if waits else 0.0
            told_of = self._told_of.setdefault(live.id, set())
            for target in targets:
                for moment, key in self._moments.of(live, target, stood_s):
                    id_ = notifications.derived_id(target, live.id, live.round, moment, key)
                    if id_ in told_of or self.book.knows(id_):
                        continue
                    explained += moment == "stuck"
                    if moment == "stuck" and explained > EXPLAINED_AT_ONCE:
                        continue  # the tick waits for each, and the next one comes soon
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
                # A bug, met by one job's facts: it must not end the manager's tick.
                log.exception("why job %s stands still could not be told", live.id)
        body = notifications.body_of(live.record, list(live.stages.values()), why=why)
        at_s = self._ports.clock.now_s()
        return notifications.made(target, live.job, live.round, moment, body, at_s=at_s, key=key)

    # --- The bucket ------------------------------------------------------------------------------

    async def load(self) -> None:
        """Take over what the manager before us has not delivered. It is left where it is while the
        bucket does not answer: writing meets what is there anyway."""
        try:
            data = await self._kept.read()
        except BackendError as error:
            log.warning("what is to be notified cannot be read yet: %s", error)
            return
        if data is not None:
            self._meet(data)

    def _meet(self, there: bytes) -> bool:
        """Take over what another manager has written."""
        try:
            self.book.merge(Book.from_bytes(there))
        except UNREADABLE as error:
            # One that a later release has written must not keep anybody from leading.
            log.error("what is to be notified cannot be read, and begins anew: %r", error)
        self._due.set()
        return True

    async def _add(self, some: Sequence[Notification]) -> None:
        fresh = [one for one in some if not self.book.knows(one.id)]
        if not fresh and self._saved >= self._changes:
            return  # else one who was here before has not got it into the bucket
        for one in fresh:
            self.book.pending[one.id] = one
        while len(self.book.pending) > MOST_PENDING:
            self._close(next(iter(self.book.pending.values())), "given up", "there are too many")
        try:
            await self._save()
        finally:
            self._due.set()

    async def _save(self) -> None:
        """Write the book down; those who come together share one write."""
        self._changes += 1
        mine = self._changes
        async with self._lock:
            if self._saved >= mine:
                return
            writing, due_s = self._changes, self._write_s
            self._write_s = None  # what comes of tries meanwhile is written the next time
            try:
                await self._kept.write(self.book.to_bytes, self._meet)
                self._saved, due_s = writing, None
                self._written_s = self._ports.clock.monotonic_s()
            finally:
                if due_s is not None:
                    self._write_s = min(due_s, self._write_s or due_s)

    # --- Delivery --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Deliver for ever what is due."""
        try:
            await self._run()
        finally:
            if self._write_s is not None:
                with suppress(TimeoutError, BackendError):  # then the next manager tries it sooner
                    async with asyncio.timeout(CLOSE_S):
                        await self._save()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write_down(), name="write down what came of notifications")
            while True:
                self._due.clear()
                now_s = self._ports.clock.now_s()
                waits_s = LONGEST_WAIT_S
                for one in list(self.book.pending.values()):
                    if one.id in self._sending:
                        continue
                    if one.due_s > now_s:
                        waits_s = min(waits_s, one.due_s - now_s)
                    elif self._has_room(_place(one)):
                        self._sending[one.id] = _place(one)
                        group.create_task(self._deliver(one), name=f"notification {one.id}")
                await set_within(self._due, waits_s)

    def _has_room(self, place: str) -> bool:
        busy = list(self._sending.values())
        return len(busy) < AT_ONCE and busy.count(place) < AT_ONCE_TO_ONE

    async def tried(self, within_s: float) -> None:
        """Return once everything has been tried, or after so long: for who is about to end."""
        until_s = self._ports.clock.monotonic_s() + within_s
        while any(not one.attempts for one in self.book.pending.values()):
            if self._ports.clock.monotonic_s() >= until_s:
                return
            await asyncio.sleep(0.02)

    async def _write_down(self) -> None:
        """Write down, for ever, what has come of tries: the whole book each time, so seldom."""
        pause_s = SOON_S
        while True:
            await self._unwritten.wait()
            self._unwritten.clear()
            if self._write_s is None:
                continue  # somebody else has, along with something new
            wait_s = self._write_s - self._ports.clock.monotonic_s()
            if wait_s > 0:
                await set_within(self._unwritten, wait_s)
                self._unwritten.set()
                continue  # it may be another time by now, or none
            try:
                await self._save()
                pause_s = SOON_S
            except BackendError as error:
                log.warning("what came of notifications is not written down yet: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = doubled_s(pause_s, LATER_S)
            self._unwritten.set()

    def _wants_writing(self, within_s: float) -> None:
        """Something has come of a try: write it down so long after the last time."""
        due_s = max(self._ports.clock.monotonic_s(), self._written_s + within_s)
        if self._write_s is None or due_s < self._write_s:
            self._write_s = due_s
            self._unwritten.set()

    async def _deliver(self, one: Notification) -> None:
        try:
            await self._try(one)
        finally:
            # Who dies before it is written tells it twice, or tries it sooner.
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
            # Again: the operator may have changed it since, and others may write the bucket.
            if one.own and (wrong := self.directory().refusal(one.own)):
                raise NotDelivered(wrong, final=True)
            await self._outlets.deliver(target, one)
        except NotDelivered as error:
            self._failed(one, target, error)
        except Exception as error:
            # A bug, met by one notification: it must not take the manager with it.
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
        if one.id in self.book.pending:  # else another leader has told them meanwhile
            self.book.pending[one.id] = replace(tried, due_s=now_s + wait_s)
        log.warning(
            "a notification to %s is tried again in %.0f s: %s",
            shown,
            wait_s,
            error.message,
            extra=about,
        )

    def _close(self, one: Notification, state: str, error: str) -> None:
        ended_s = self._ports.clock.now_s()
        self.book.close(replace(one, state=state, error=error, ended_s=ended_s))

    def _target(self, one: Notification) -> Target | None:
        if one.own is not None:
            number = int(one.target.rpartition("#")[2])
            return self.directory().own(one.job, number, one.own)
        return self.directory().named(one.target)

    async def test(self, name: str) -> str:
        """Tell one of the grid's targets that this is a test, once; what went wrong, or ""."""
        target = self.directory().named(name)
        if target is None:
            names = ", ".join(t.name for t in self.directory().targets) or "none"
            raise NotFound(f"The grid has no target {name!r}.", remedy=f"Its targets are: {names}.")
        at_s = self._ports.clock.now_s()
        id_ = notifications.derived_id(target, "", 0, "test", self._ports.ids.fresh("test"))
        text = {"v": json_format.VERSION, "id": id_, "moment": "test", "at_s": at_s}
        one = Notification(id_, "test", "", name, None, json_format.dumps(text), at_s)
        try:
            await self._outlets.deliver(target, one)
        except NotDelivered as error:
            self._close(replace(one, attempts=1), "given up", error.message)
            return error.message
        else:
            self._close(replace(one, attempts=1), "delivered", "")
            return ""
        finally:
            with suppress(BackendError):  # it is in the log of this manager at least
                await self._save()

    def trouble(self, job: str) -> str:
        """What keeps the job's notifications, as a clause; "" where nothing does."""
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
    """From its last try to the next."""
    return doubled_s(FIRST_WAIT_S, LONGEST_WAIT_S, tried.attempts - 1)


def _place(one: Notification) -> str:
    """Where it goes, whichever job names that."""
    return one.own.to if one.own else one.target
