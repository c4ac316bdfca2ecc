"""Caps on cost: what they leave, and that nothing is launched or cut beyond it.

Invariants: without a cap nothing is decided here. With one, what has been spent, what is committed
and one launch more never pass it: before anything is launched or cut, the purse must hold what it
will cost. What runs is finished.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from batchlab.core.errors import Refused
from batchlab.core.model import GroupView, JobId, LifecycleState, Pool
from batchlab.core.ports import Clock
from batchlab.core.pricing.cap import Budget, Purse, launch_usd, launches
from batchlab.core.pricing.money import shown
from batchlab.core.pricing.usage_meter import Account, Accounting, Kind, Meter, Rates
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob
from batchlab.manager.usage.usage_attribution import Shares

log = logging.getLogger(__name__)

USED_SHARE = 0.8
"""Of a slot's time a task gets so much at the least, where bundles follow one another."""


class Caps:
    """Those of the grid and of its jobs."""

    def __init__(
        self,
        clock: Clock,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        pools: Mapping[str, Pool],
        accounting: Accounting,
        shares: Shares,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._lives = lives
        self._pools = pools
        self._rates = accounting.rates
        self._request_usd = accounting.request_usd
        self._shares = shares
        self._meter = Meter()
        self.max_cost_usd = accounting.max_cost_usd
        """Of the whole grid, since its account was opened."""
        self.by_hand: dict[JobId, float | None] = {}
        """Set for a job in place of what it says itself."""
        self.capped: dict[str, str] = {}
        """By pool, why no more is launched in it, where a cap says so."""
        self._grid: Purse | None = None

    def of(self, live: LiveJob) -> float | None:
        """The job's own cap in USD, None where it has none."""
        return self.by_hand.get(live.id, live.job.max_cost_usd)

    def set(self, job: JobId | None, usd: float | None) -> None:
        """Cap a job's cost, or with None for it the grid's; Refused where nothing has a price."""
        if usd is not None and self._rates is None:
            raise Refused(
                "This grid knows no prices, so no cost can be capped.",
                remedy="`batchlab prices show` says what is wrong with the price book.",
            )
        if job is None:
            self.max_cost_usd = usd
        else:
            self.by_hand[job] = usd
        for live in self._lives.values():
            if live.capped and job in (None, live.id):
                live.capped = ""  # by the cap before this one
                live.changed()

    def refill(self, meter: Meter, views: Sequence[GroupView]) -> None:
        """See anew what the caps leave, of what `meter` has counted by now."""
        self._meter = meter
        caps = (self.of(live) for live in self._lives.values())
        if self._rates and (self.max_cost_usd is not None or any(c is not None for c in caps)):
            self._fill_purses(self._rates, views)
            return
        self._grid = None
        for live in self._lives.values():
            live.budget = None
            self._hold(live, 0.0, 0.0)

    def _fill_purses(self, rates: Rates, views: Sequence[GroupView]) -> None:
        slot_usd_s = {
            pool.name: self._pool_usd_h(pool) / 3600 / max(1, pool.slots) / USED_SHARE
            for pool in self._pools.values()
        }
        slots = {name: max(1, pool.slots) for name, pool in self._pools.items()}
        owed = {job: self._work_usd(live, slot_usd_s) for job, live in self._lives.items()}
        all_owed = sum(owed.values())
        for view in views:
            waiting = self._shares.waiting(view)
            tail_s = self._tail_s(view.pool.name)
            for instance in view.instances:
                if life := self._meter.lives.get(instance.id):
                    # Until it is let go once nothing is left to do; what is billed already pays for
                    # work too, unless it boots meanwhile.
                    still_s = tail_s - life.prepaid_s
                    if instance.state is not LifecycleState.IN_SERVICE:
                        still_s = max(0.0, still_s + view.pool.boot_s)
                    usd = rates(life.kind) * still_s / 3600
                    all_owed += usd
                    for job, share in self._shares.of(instance.id, waiting).items():
                        owed[job] += usd * share
        self._grid = None
        if self.max_cost_usd is not None:
            spent = self._spent_usd(self._meter.total, rates)
            self._grid = Purse("the grid", self.max_cost_usd, spent, max(0.0, all_owed))
        for job, live in self._lives.items():
            purses = [self._grid] if self._grid else []
            if (cap := self.of(live)) is not None:
                spent = self._spent_usd(live.account, rates)
                purses.append(Purse("it", cap, spent, max(0.0, owed[job])))
            live.budget = Budget(tuple(purses), slot_usd_s, slots) if purses else None
            self._hold(live, self._next_usd(live, slot_usd_s), self._uncut_usd(live, slot_usd_s))

    def spent_usd(self, account: Account) -> float | None:
        """What that has cost, None where nothing has a price."""
        return self._spent_usd(account, self._rates) if self._rates else None

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
        now_s, found = self._clock.monotonic_s(), []
        for stage in live.job.stages:
            record = live.stages[stage.name]
            is_next = record.left or (record.counts.planned is None and not stage.after)
            if stage.pool not in self._pools or not is_next:
                continue
            # Before one is measured, a task costs nothing that is known.
            known = record.counts.mean_s is not None
            usd = slot_usd_s.get(stage.pool, 0.0) * live.task_s(stage, now_s) * known
            if not any(life.kind.pool == stage.pool for life in self._meter.lives.values()):
                usd += self._launch_usd(self._pools[stage.pool])
            found.append(usd)
        return min(found, default=0.0)

    def _work_usd(self, live: LiveJob, slot_usd_s: Mapping[str, float]) -> float:
        """What the bundles cost that are cut and not done."""
        now_s = self._clock.monotonic_s()
        return sum(
            live.cut_tasks(stage.name) * live.task_s(stage, now_s) * slot_usd_s.get(stage.pool, 0.0)
            for stage in live.job.stages
        )

    def _uncut_usd(self, live: LiveJob, slot_usd_s: Mapping[str, float]) -> float:
        """What the tasks cost that are planned and in no bundle yet."""
        now_s = self._clock.monotonic_s()
        return sum(
            len(live.stages[stage.name].left)
            * live.task_s(stage, now_s)
            * slot_usd_s.get(stage.pool, 0.0)
            for stage in live.job.stages
        )

    def _tail_s(self, pool: str) -> float:
        """How long an instance may be there beyond its work: until others have finished their last
        task, and the policy lets it go."""
        settings, now_s = self._settings, self._clock.monotonic_s()
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
        kinds |= {one.kind for one in self._meter.lives.values() if one.kind.pool == pool.name}
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
