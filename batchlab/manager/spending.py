"""What the grid uses and what that costs; a cap on it stops launching.

Invariants: without a cap nothing is decided here. With one, what has been spent, what is committed
and one launch more never pass it: before anything is launched or cut, the purse must hold what it
will cost. What runs is finished. The account survives the manager, in the bucket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from batchlab.costs.cap import Budget, Purse, launch_usd, launches
from batchlab.costs.meter import Account, Accounting, Kind, Meter, Rates, most
from batchlab.costs.money import shown
from batchlab.errors import BackendError, Refused
from batchlab.manager.kept import Kept
from batchlab.manager.live import LiveJob, ManagerSettings, Ports
from batchlab.manager.registry import Registry
from batchlab.manager.used import UNREADABLE, Books, Used
from batchlab.model import Control, GroupView, JobId, LifecycleState, Pool
from batchlab.protocol import naming
from batchlab.tally import Requests

if TYPE_CHECKING:
    from batchlab.manager.recorder import Recorder

log = logging.getLogger(__name__)

SAVE_S = 60.0
"""The account is written down so often while there are jobs: each time is a request."""
CLOSE_S = 2.0
"""A manager that ends waits so long for its account to be written down."""
USED_SHARE = 0.8
"""Of a slot's time a task gets so much at the least, where bundles follow one another."""
MANAGER = "manager"
"""Among those who tell of their requests."""


class Spending:
    """The grid's account, and what caps leave of it."""

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
        self._pools = pools
        self._rates = accounting.rates
        self._request_usd = accounting.request_usd
        self._tally = accounting.tally
        self._earlier = Requests()
        """Of the managers before this one, which counted for themselves."""
        self.meter = Meter()
        self.max_cost_usd = accounting.max_cost_usd
        """Of the whole grid, since its account was opened."""
        self.caps: dict[JobId, float | None] = {}
        """Set by hand, in place of what the job itself says."""
        self.capped: dict[str, str] = {}
        """By pool, why no more is launched in it, where a cap says so."""
        self._grid: Purse | None = None
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
        self._books = Kept(ports, naming.USE)
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
            waiting = self._waiting(view)
            for instance in view.instances:
                there.add(instance.id)
                known = len(self.meter.lives)
                self.meter.see(
                    view.pool,
                    instance,
                    now_s=now_s,
                    monotonic_s=monotonic_s,
                    shares=self._shares(instance.id, waiting),
                    accounts=self._known,
                    is_spot=instance.id in self._registry.spot,
                )
                self._is_due |= len(self.meter.lives) != known
        self._is_due |= self.meter.keep(there)
        self._count_requests()
        self.refill()

    def notice_ends(self) -> None:
        """Close the accounts of jobs that have ended, with what was recorded of them."""
        gone = {job: self._known[job] for job in self._known.keys() - self._lives.keys()}
        recorded = self._recorder.close(gone) if self._recorder and gone else {}
        for job, account in gone.items():
            took_s, part = recorded.get(job, (0.0, None))
            if before := self._closed.get(job):
                took_s = max(took_s, before.took_s)
            self._closed[job] = Used(account, part, took_s)
            self.caps.pop(job, None)
        self._is_due |= bool(gone)
        self._known = {job: live.account for job, live in self._lives.items()}

    def _waiting(self, view: GroupView) -> dict[JobId, float]:
        """Jobs that an idle instance of the pool waits for, in equal shares; where there are none,
        those that a cap holds back, for which there were more instances than the least."""
        pool = view.pool
        found = [live.id for live in self._lives.values() if live.has_work(pool.name)]
        if not found and len(view.instances) > pool.min_size:
            stages = ((live, s) for live in self._lives.values() for s in live.job.stages)
            found = list({one.id: 0 for one, s in stages if one.is_held and s.pool == pool.name})
        return dict.fromkeys(found, 1 / len(found)) if found else {}

    def _shares(self, instance: str, waiting: Mapping[JobId, float]) -> Mapping[JobId, float]:
        """Whom the instance works for: by the bundles that it runs, or has."""
        seen = self._registry.workers.get(instance)
        held = seen.beat.held if seen else ()
        jobs = [h.job for h in held if h.running] or [h.job for h in held]
        jobs = [job for job in jobs if job in self._lives]
        if not jobs:
            return waiting
        found: dict[JobId, float] = {}
        for job in jobs:
            found[job] = found.get(job, 0.0) + 1 / len(jobs)
        return found

    def _count_requests(self) -> None:
        live = [job for job, one in self._lives.items() if one.record.control is Control.RUN]
        everybody = dict.fromkeys(live, 1 / len(live)) if live else {}
        self.meter.hear(MANAGER, self._own(), everybody, self._known)
        for worker, asked in self._registry.requests.items():
            shares: Mapping[JobId, float] = everybody
            if asked.instance in self._registry.workers:
                shares = self._shares(asked.instance, everybody)
            self.meter.hear(worker, asked.requests, shares, self._known)
        self._registry.requests.clear()

    # --- Caps ------------------------------------------------------------------------------------

    def cap_of(self, live: LiveJob) -> float | None:
        """The job's own cap in USD, None where it has none."""
        return self.caps.get(live.id, live.job.max_cost_usd)

    def set_cap(self, job: JobId | None, usd: float | None) -> None:
        """Cap a job's cost, or with None for it the grid's; Refused where nothing has a price."""
        if usd is not None and self._rates is None:
            raise Refused(
                "This grid knows no prices, so no cost can be capped.",
                remedy="`batchlab prices show` says what is wrong with the price book.",
            )
        if job is None:
            self.max_cost_usd = usd
        else:
            self.caps[job] = usd
        self._is_due = True
        self._saved_s = None
        for live in self._lives.values():
            if live.capped and job in (None, live.id):
                live.capped = ""  # by the cap before this one
                live.changed()
        self.refill()

    def refill(self) -> None:
        """See anew what the caps leave, for what has just changed."""
        caps = (self.cap_of(live) for live in self._lives.values())
        if self._rates and (self.max_cost_usd is not None or any(c is not None for c in caps)):
            self._fill_purses(self._rates)
            return
        self._grid = None
        for live in self._lives.values():
            live.budget = None
            self._hold(live, 0.0, 0.0)

    def _fill_purses(self, rates: Rates) -> None:
        slot_usd_s = {
            pool.name: self._pool_usd_h(pool) / 3600 / max(1, pool.slots) / USED_SHARE
            for pool in self._pools.values()
        }
        slots = {name: max(1, pool.slots) for name, pool in self._pools.items()}
        owed = {job: self._work_usd(live, slot_usd_s) for job, live in self._lives.items()}
        all_owed = sum(owed.values())
        for view in self._views:
            waiting = self._waiting(view)
            tail_s = self._tail_s(view.pool.name)
            for instance in view.instances:
                if life := self.meter.lives.get(instance.id):
                    # Until it is let go once nothing is left to do; what is billed already pays for
                    # work too, unless it boots meanwhile.
                    still_s = tail_s - life.prepaid_s
                    if instance.state is not LifecycleState.IN_SERVICE:
                        still_s = max(0.0, still_s + view.pool.boot_s)
                    usd = rates(life.kind) * still_s / 3600
                    all_owed += usd
                    for job, share in self._shares(instance.id, waiting).items():
                        owed[job] += usd * share
        self._grid = None
        if self.max_cost_usd is not None:
            spent = self._spent_usd(self.meter.total, rates)
            self._grid = Purse("the grid", self.max_cost_usd, spent, max(0.0, all_owed))
        for job, live in self._lives.items():
            purses = [self._grid] if self._grid else []
            if (cap := self.cap_of(live)) is not None:
                spent = self._spent_usd(live.account, rates)
                purses.append(Purse("it", cap, spent, max(0.0, owed[job])))
            live.budget = Budget(tuple(purses), slot_usd_s, slots) if purses else None
            self._hold(live, self._next_usd(live, slot_usd_s), self._uncut_usd(live, slot_usd_s))

    def spent_usd(self) -> float | None:
        """What the grid has cost so far, None where nothing has a price."""
        return self._spent_usd(self.meter.total, self._rates) if self._rates else None

    def _spent_usd(self, account: Account, rates: Rates) -> float:
        return account.usd(rates) + self._request_usd(account.requests)

    def _hold(self, live: LiveJob, next_usd: float, uncut_usd: float) -> None:
        """Hold the job back where a purse does not even hold what its next task costs; from then on
        it is called capped until they hold what all costs that is not cut."""
        purses = live.budget.purses if live.budget else ()
        empty = next((p for p in purses if p.left_usd <= 0 or p.left_usd < next_usd), None)
        if live.is_held != bool(empty):
            live.is_held = bool(empty)
            live.poke.set()
        told = empty
        if live.capped and not empty:
            # Each bundle that was cheaper than reckoned pays for a bit more.
            told = next((p for p in purses if p.left_usd < uncut_usd), None)
        text = f"its cost is capped: {told.text()}" if told else ""
        if empty and empty.left_usd > 0:
            text += f", while its next task takes {shown(next_usd)}"
        if bool(text) != bool(live.capped):
            said = text or "a cap no longer holds it back"
            log.info("%s", said, extra={"job": live.id})
            live.changed()
        live.capped = text

    def _next_usd(self, live: LiveJob, slot_usd_s: Mapping[str, float]) -> float:
        """The least that the next task of the job costs, with an instance where there is none."""
        now_s, found = self._ports.clock.monotonic_s(), []
        for stage in live.job.stages:
            record = live.stages[stage.name]
            is_next = record.left or (record.counts.planned is None and not stage.after)
            if stage.pool not in self._pools or not is_next:
                continue
            # Before one is measured, a task costs nothing that is known.
            known = record.counts.mean_s is not None
            usd = slot_usd_s.get(stage.pool, 0.0) * live.task_s(stage, now_s) * known
            if not any(life.kind.pool == stage.pool for life in self.meter.lives.values()):
                usd += self._launch_usd(self._pools[stage.pool])
            found.append(usd)
        return min(found, default=0.0)

    def _work_usd(self, live: LiveJob, slot_usd_s: Mapping[str, float]) -> float:
        """What the bundles cost that are cut and not done."""
        now_s = self._ports.clock.monotonic_s()
        return sum(
            live.cut_tasks(stage.name) * live.task_s(stage, now_s) * slot_usd_s.get(stage.pool, 0.0)
            for stage in live.job.stages
        )

    def _uncut_usd(self, live: LiveJob, slot_usd_s: Mapping[str, float]) -> float:
        """What the tasks cost that are planned and in no bundle yet."""
        now_s = self._ports.clock.monotonic_s()
        return sum(
            len(live.stages[stage.name].left)
            * live.task_s(stage, now_s)
            * slot_usd_s.get(stage.pool, 0.0)
            for stage in live.job.stages
        )

    def _tail_s(self, pool: str) -> float:
        """How long an instance may be there beyond its work: until others have finished their last
        task, and the policy lets it go."""
        settings, now_s = self._settings, self._ports.clock.monotonic_s()
        longest_s = max(
            (
                live.task_s(stage, now_s)
                for live in self._lives.values()
                for stage in live.job.stages
                if stage.pool == pool and live.cut_tasks(stage.name)
            ),
            default=0.0,
        )
        return longest_s + settings.idle_s + settings.cooldown_in_s + 2 * settings.tick_s

    def _launch_usd(self, pool: Pool) -> float:
        """What one more instance of the pool costs at the least."""
        return launch_usd(self._pool_usd_h(pool), pool.boot_s + self._tail_s(pool.name))

    def warm_usd(self, pool: Pool, hold_s: float) -> tuple[float, float]:
        """What it costs to have an instance of the pool `hold_s` early: one that is launched for
        that, and one that is there. Nothing has a price where there are none."""
        if self._rates is None:
            return 0.0, 0.0
        usd_h = self._pool_usd_h(pool)
        tail_s = pool.boot_s + hold_s + self._tail_s(pool.name)
        return launch_usd(usd_h, tail_s), usd_h * hold_s / 3600

    def left_usd(self) -> float | None:
        """What the grid's cap leaves, None where there is none."""
        return self._grid.left_usd if self._grid else None

    def _pool_usd_h(self, pool: Pool) -> float:
        """The dearest instance that the pool has, or would launch."""
        assert self._rates is not None
        kinds = {Kind(pool.name, pool.instance_type)}
        kinds |= {one.kind for one in self.meter.lives.values() if one.kind.pool == pool.name}
        return max(self._rates(kind) for kind in kinds)

    def launches(self, view: GroupView, desired: int, why: str) -> tuple[int, str]:
        """How far desired capacity may be raised to `desired`, and why."""
        pool = view.pool
        was = self.capped.pop(pool.name, "")
        wanted = desired - max(view.desired, pool.min_size)
        purses = self._purses(pool.name) if wanted > 0 else []
        if not purses:
            return desired, why
        each = self._launch_usd(pool)
        count = launches(wanted, each, purses)
        if count == wanted:
            return desired, why
        dry = min(purses, key=lambda purse: purse.left_usd)
        told = (
            f"{why}; but a cap on cost allows {count} more, each for {shown(each)} "
            f"at least: {dry.text()}"
        )
        self.capped[pool.name] = told
        if not was:
            log.info("%s", told, extra={"pool": pool.name})
        return desired - wanted + count, told

    def _purses(self, pool: str) -> list[Purse]:
        """Those that pay for a launch in the pool: the grid's, and where all jobs with work for it
        have caps, theirs."""
        found = [self._grid] if self._grid else []
        working = [live for live in self._lives.values() if live.has_work(pool)]
        own = [p for live in working if live.budget for p in live.budget.purses]
        own = [purse for purse in own if purse is not self._grid]
        if working and len(own) == len(working):
            left = sum(max(0.0, purse.left_usd) for purse in own)
            found.append(own[0] if len(own) == 1 else Purse("what its jobs", left))
        return found

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
            self.max_cost_usd = books.cap
        self.caps = books.caps
        self._known = dict(books.jobs)

    async def reread(self) -> None:
        """Others have led meanwhile: what they have counted, and been told of caps, holds."""
        data = await self._books.read()
        if data is not None and (books := Books.from_bytes(data)):
            self._take_in(books)
            self.max_cost_usd = books.cap
            self.caps |= books.caps

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
        self.caps = {**books.caps, **self.caps}

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
        kept = Kept(self._ports, naming.used(job))
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
        data = await Kept(self._ports, naming.used(job)).read()
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

        kept = self._kept.pop(job, None) or Kept(self._ports, naming.used(job))
        await kept.write(used.to_bytes, meet)
        self._on_written(job, used.took_s)

    def _meet(self, there: bytes) -> bool:
        if books := Books.from_bytes(there):
            self._take_in(books)
        return True

    def _to_bytes(self) -> bytes:
        jobs = {**self._others, **self._known}
        return Books(self.meter, self._own(), self.max_cost_usd, self.caps, jobs).to_bytes()
