"""The account of what the grid and each of its jobs have used, counted and kept in the bucket.

Invariant: it survives the manager. The grid's is written down now and then, a job's once that has
ended; what is there by then of another leader, or of our own from before, is taken in first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from batchlab.core.errors import BackendError
from batchlab.core.model import Control, GroupView, JobId, Pool
from batchlab.core.pricing.usage_meter import Account, Accounting, Meter, most
from batchlab.core.protocol import object_keys
from batchlab.core.request_counter import Requests
from batchlab.manager.scaling.worker_registry import Registry
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob, Ports
from batchlab.manager.usage.caps import Caps
from batchlab.manager.usage.usage_attribution import Shares
from batchlab.manager.usage.usage_records import Books, Used
from batchlab.manager.versioned_document import UNREADABLE, Kept

if TYPE_CHECKING:
    from batchlab.manager.recording.recorder import Recorder

log = logging.getLogger(__name__)

SAVE_S = 60.0
"""The account is written down so often while there are jobs: each time is a request."""
CLOSE_S = 2.0
"""A manager that ends waits so long for its account to be written down."""
MANAGER = "manager"
"""Among those who tell of their requests."""


class Spending:
    """The leader's books, and the caps that go by them."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        registry: Registry,
        pools: Mapping[str, Pool],
        accounting: Accounting,
        recorder: Recorder | None = None,
        on_written: Callable[[JobId, float], None] = lambda *_: None,
    ) -> None:
        """What `recorder` has seen of a job is kept along with its account; `on_written` hears of
        each job that has ended once both are in the bucket, and how many seconds it was there."""
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._registry = registry
        self._tally = accounting.tally
        self._earlier = Requests()
        """Of the managers before this one, which counted for themselves."""
        self.meter = Meter()
        self._shares = Shares(lives, registry)
        self.caps = Caps(ports.clock, settings, lives, pools, accounting, self._shares)
        self._views: Sequence[GroupView] = ()
        self._closed: dict[JobId, Used] = {}
        """Of jobs that have ended, to be written down; where one runs again by then, with its next
        end."""
        self._recorder = recorder
        self._on_written = on_written
        self._known: dict[JobId, Account] = {}
        self._others: dict[JobId, Account] = {}
        """Of jobs that another leader has counted for, and that are not known here."""
        self._kept: dict[JobId, Kept] = {}
        """What is in the bucket of live jobs that have ended before."""
        self._books = Kept(ports, object_keys.USE)
        self._saved_s: float | None = None
        self._is_due = False

    # --- What is used ----------------------------------------------------------------------------

    def observe(self, views: Sequence[GroupView]) -> None:
        """Count up to now, and see what the caps leave."""
        self._views = views
        clock = self._ports.clock
        now_s, monotonic_s = clock.now_s(), clock.monotonic_s()
        self.notice_ends()
        there: set[str] = set()
        for view in views:
            waiting = self._shares.waiting(view)
            for instance in view.instances:
                there.add(instance.id)
                known = len(self.meter.lives)
                self.meter.see(
                    view.pool,
                    instance,
                    now_s=now_s,
                    monotonic_s=monotonic_s,
                    shares=self._shares.of(instance.id, waiting),
                    accounts=self._known,
                    is_spot=instance.id in self._registry.spot,
                )
                self._is_due |= len(self.meter.lives) != known
        self._is_due |= self.meter.keep(there)
        self._count_requests()
        self.refill()

    def notice_ends(self) -> None:
        """Close the accounts of jobs that have ended, with what was recorded of them."""
        ended = self._known.keys() - self._lives.keys()
        if ended:
            # What they have asked for since the last tick: of a short job it may be all there was.
            self._count_requests()
        gone = {job: self._known[job] for job in ended}
        recorded = self._recorder.close(gone) if self._recorder and gone else {}
        for job, account in gone.items():
            took_s, part = recorded.get(job, (0.0, None))
            if before := self._closed.get(job):
                took_s = max(took_s, before.took_s)
            self._closed[job] = Used(account, part, took_s)
            self.caps.by_hand.pop(job, None)
        self._is_due |= bool(gone)
        self._known = {job: live.account for job, live in self._lives.items()}

    def _count_requests(self) -> None:
        # Those that have just ended too, and those that have just begun.
        accounts = {**self._known, **{job: one.account for job, one in self._lives.items()}}
        paused = {job for job, one in self._lives.items() if one.record.control is not Control.RUN}
        busy = [job for job in accounts if job not in paused]
        everybody = dict.fromkeys(busy, 1 / len(busy)) if busy else {}
        self.meter.hear(MANAGER, self._own(), everybody, accounts)
        for worker, asked in self._registry.requests.items():
            shares: Mapping[JobId, float] = everybody
            if asked.instance in self._registry.workers:
                shares = self._shares.of(asked.instance, everybody)
            self.meter.hear(worker, asked.requests, shares, accounts)
        self._registry.requests.clear()

    # --- Caps ------------------------------------------------------------------------------------

    def cap_of(self, live: LiveJob) -> float | None:
        """The job's own cap in USD, None where it has none."""
        return self.caps.of(live)

    def set_cap(self, job: JobId | None, usd: float | None) -> None:
        """Cap a job's cost, or with None for it the grid's; Refused where nothing has a price."""
        self.caps.set(job, usd)
        self._is_due = True
        self._saved_s = None
        self.refill()

    def refill(self) -> None:
        """See anew what the caps leave, for what has just changed."""
        self.caps.refill(self.meter, self._views)

    def spent_usd(self) -> float | None:
        """What the grid has cost so far, None where nothing has a price."""
        return self.caps.spent_usd(self.meter.total)

    # --- The bucket ------------------------------------------------------------------------------

    async def load(self) -> None:
        """Take over what the manager before us has written down."""
        try:
            data = await self._books.read()
        except BackendError as error:
            # Jobs must go on; what was spent before is not known to the caps then.
            log.warning("the grid's account cannot be read and begins anew: %s", error)
            return
        if data is None or not (books := Books.from_bytes(data)):
            return
        self.meter = books.meter
        # What this process has counted so far may be in there: it has led before.
        self._earlier = books.own - self._tally.read()
        if books.cap is not None:
            self.caps.max_cost_usd = books.cap
        self.caps.by_hand = books.caps
        self._known = dict(books.jobs)

    async def reread(self) -> None:
        """Others have led meanwhile: what they have counted, and been told of caps, holds."""
        data = await self._books.read()
        if data is not None and (books := Books.from_bytes(data)):
            self._take_in(books)
            self.caps.max_cost_usd = books.cap
            self.caps.by_hand |= books.caps

    def _take_in(self, books: Books) -> None:
        self.meter.take_in(books.meter)
        self._earlier = most(books.own, self._own()) - self._tally.read()
        self._others = {}
        for job, account in books.jobs.items():
            live = self._lives.get(job)
            if mine := live.account if live else self._known.get(job):
                mine.keep_most(account)
            elif job not in self._closed:
                self._others[job] = account
        self.caps.by_hand = {**books.caps, **self.caps.by_hand}

    def _own(self) -> Requests:
        return self._earlier + self._tally.read()

    async def open(self, live: LiveJob, *, is_new: bool) -> None:
        """Find the job's account, or begin it."""
        closed = self._closed.get(live.id)
        known = self._known.get(live.id) or (closed.account if closed else None)
        if closed and self._recorder and closed.record is not None:
            self._recorder.reopened(live.id, closed.record)
        if known is None and not is_new:
            known = await self._reopened(live.id)
        if known:
            live.account = known

    async def _reopened(self, job: JobId) -> Account:
        other = self._others.pop(job, None)
        kept = Kept(self._ports, object_keys.used(job))
        try:
            data = await kept.read()
            used = Used.from_bytes(data) if data is not None else None
        except UNREADABLE:
            used = None
        if used is None:
            # It has run where nobody counted, or nobody can say.
            return other or Account(is_whole=False)
        if other:
            used.account.keep_most(other)
        if self._recorder and used.record is not None:
            self._recorder.reopened(job, used.record)
        self._kept[job] = kept
        return used.account

    async def account(self, job: JobId) -> Account | None:
        """What a job has used, None where nobody has counted."""
        live = self._lives.get(job)
        if live:
            return live.account
        if known := self._known.get(job):
            return known
        if closed := self._closed.get(job):
            return closed.account
        data = await Kept(self._ports, object_keys.used(job)).read()
        return Used.from_bytes(data).account if data is not None else None

    async def close(self) -> None:
        """Write down what there is, if the bucket takes it soon."""
        self.observe(self._views)
        self._is_due, self._saved_s = True, None
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.save()

    async def save(self) -> None:
        """Write the account down, where something has changed or some time has passed."""
        now_s = self._ports.clock.monotonic_s()
        age_s = None if self._saved_s is None else now_s - self._saved_s
        # What lives without a job is billed from its launch on, whoever counts it.
        is_old = self._known and self.meter.lives and (age_s is None or age_s >= SAVE_S)
        is_due = self._is_due and (age_s is None or age_s >= self._settings.idle_s)
        if not (is_old or is_due):
            return
        self._saved_s, self._is_due = now_s, False
        try:
            for job, used in list(self._closed.items()):
                if job not in self._lives:
                    await self._write_down(job, used)
                    self._closed.pop(job, None)
            await self._books.write(self._to_bytes, self._meet)
        except BackendError as error:
            log.warning("the grid's account is not written down yet: %s", error)
            self._is_due = True

    async def _write_down(self, job: JobId, used: Used) -> None:
        """What a job has used, over what is there of it by now: it may be another leader's, or our
        own from before we were killed, and know more."""

        def meet(there: bytes) -> bool:
            try:
                used.take_in(Used.from_bytes(there))
            except UNREADABLE as error:
                log.warning("what %s has used is there, and cannot be read: %r", job, error)
                return False
            return True

        kept = self._kept.pop(job, None) or Kept(self._ports, object_keys.used(job))
        await kept.write(used.to_bytes, meet)
        self._on_written(job, used.took_s)

    def _meet(self, there: bytes) -> bool:
        if books := Books.from_bytes(there):
            self._take_in(books)
        return True

    def _to_bytes(self) -> bytes:
        jobs, caps = {**self._others, **self._known}, self.caps
        return Books(self.meter, self._own(), caps.max_cost_usd, caps.by_hand, jobs).to_bytes()
