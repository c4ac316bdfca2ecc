"""Cost caps of the grid and of jobs, and attribution of instances to jobs.

Invariants: without a cost cap, the manager does not limit launches and cuts. With a cost cap, the sum of spent cost,
committed cost, and the cost of one more launch never exceeds the cap. Before a launch or a cut, the remaining budget
must cover the cost of the launch or the cut. Running tasks finish even if a cost cap is reached. The jobs' shares of
one instance sum to 1, unless the instance is not attributed to any job.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from batchlab.core.errors import Refused
from batchlab.core.model import GroupView, JobId, LifecycleState, Pool
from batchlab.core.pricing.price_book import shown
from batchlab.core.pricing.usage import Account, Accounting, Budget, CapBudget, Kind, Meter, Rates, launch_usd, launches
from batchlab.manager.context import Context, Part
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.state import LiveJob
from batchlab.manager.worker_registry import WorkerRegistry

log = logging.getLogger(__name__)

T = TypeVar("T")


class UsageAttribution:
    """Attribution of the use of instances to jobs, based on the last heartbeats of workers."""

    def __init__(self, lives: LiveJobs, registry: WorkerRegistry) -> None:
        self._lives = lives
        self._registry = registry

    def waiting_shares(self, view: GroupView) -> dict[JobId, float]:
        """Return equal shares for the jobs that have work for an idle instance of the pool. If no job has work and the
        pool is above its minimum size, return equal shares for the jobs that a cost cap holds back."""
        work = self._lives.pool(view.pool.name)
        jobs = work.working
        if not jobs and len(view.instances) > view.pool.min_size:
            jobs = work.held
        return dict.fromkeys(jobs, 1 / len(jobs)) if jobs else {}

    def shares_of(self, instance: str, waiting: T) -> Mapping[JobId, float] | T:
        """Return each job's share of an instance by the bundles that the instance runs or holds. For an instance that
        does not hold a bundle, return `waiting`."""
        worker_status = self._registry.workers.get(instance)
        held = worker_status.beat.held if worker_status else ()
        jobs = [h.job for h in held if h.running] or [h.job for h in held]
        jobs = [job for job in jobs if job in self._lives]
        if not jobs:
            return waiting
        shares: dict[JobId, float] = {}
        for job in jobs:
            shares[job] = shares.get(job, 0.0) + 1 / len(jobs)
        return shares


USED_SHARE = 0.8
"""Minimum share of a slot's time that tasks use while a worker runs one bundle after another."""


@dataclass(frozen=True, slots=True)
class _Prices:
    """Prices at the last count of usage, by pool."""

    slot_usd_s: Mapping[str, float]
    slots: Mapping[str, int]
    first_launch_usd: Mapping[str, float]
    """Cost of a launch in a pool without instances."""


class CostCaps(Part):
    def __init__(self, context: Context, accounting: Accounting) -> None:
        super().__init__(context)
        self._pools = context.pools
        self._rates = accounting.rates
        self._request_usd = accounting.request_usd
        self.shares = UsageAttribution(context.lives, context.registry)
        self._meter = Meter()
        self.max_cost_usd = accounting.max_cost_usd
        """Cost cap of the whole grid in USD, since the start of the grid's account."""
        self.user_caps: dict[JobId, float | None] = {}
        """Cost caps set by users, which replace the cost caps of job definitions."""
        self.capped: dict[str, str] = {}
        """Reason why a cost cap stops launches, by pool."""
        self._grid: CapBudget | None = None
        self._prices: _Prices | None = None
        self._are_filled = False
        """Whether the last call of `update_budgets` set budgets. If it did, and no cap is left at the next call, that
        call removes the budgets."""

    def cap_of(self, live: LiveJob) -> float | None:
        return self.user_caps.get(live.id, live.job.max_cost_usd)

    def set_cap(self, job: JobId | None, usd: float | None) -> None:
        """Set the cost cap of a job, or of the grid if `job` is None. Raise Refused if the grid does not have
        prices."""
        if usd is not None and self._rates is None:
            raise Refused(
                "This grid does not have prices, so costs cannot be capped.",
                remedy="`batchlab cost prices` shows the problem with the price book.",
            )
        if job is None:
            self.max_cost_usd = usd
        else:
            self.user_caps[job] = usd
        for live in self._lives.values():
            if live.capped and job in (None, live.id):
                live.capped = ""
                live.notify()

    def update_budgets(self, meter: Meter, views: Sequence[GroupView]) -> None:
        """Recompute the budgets from the usage in `meter`."""
        self._meter = meter
        if self._rates and (self.max_cost_usd is not None or self._caps_a_job()):
            self._fill_budgets(self._rates, views)
            self._are_filled = True
            return
        self._grid = self._prices = None
        if not self._are_filled:
            return
        self._are_filled = False
        for live in self._lives.values():
            live.budget = None
            live.mark()
            self._hold(live, 0.0, 0.0)

    def add_budget(self, live: LiveJob, meter: Meter, views: Sequence[GroupView]) -> None:
        """Set the budget of a job that has become live, and commit the cost of its outstanding bundles, without a count
        of all other jobs."""
        if self._rates is None:
            return
        if self._prices is None or (self._grid is None and self.max_cost_usd is not None):
            self.update_budgets(meter, views)
        elif self._grid or self.cap_of(live) is not None:
            owed_usd = self._work_usd(live, self._prices.slot_usd_s)
            if self._grid:
                self._grid.commit(owed_usd)
            self._set_budget(live, self._prices, owed_usd, self._rates)
            self._are_filled = True

    def _caps_a_job(self) -> bool:
        if any(usd is not None and job in self._lives for job, usd in self.user_caps.items()):
            return True
        return self._lives.has_caps and any(self.cap_of(live) is not None for live in self._lives.values())

    def _fill_budgets(self, rates: Rates, views: Sequence[GroupView]) -> None:
        prices = self._prices = self._current_prices()
        owed = {job: self._work_usd(live, prices.slot_usd_s) for job, live in self._lives.items()}
        all_owed = sum(owed.values())
        for view in views:
            waiting = self.shares.waiting_shares(view)
            tail_s = self._tail_s(view.pool.name)
            for instance in view.instances:
                if life := self._meter.lives.get(instance.id):
                    # The tail is the time between an instance's work and its termination. Time that is already billed
                    # reduces the tail, unless the instance still boots.
                    still_s = tail_s - life.prepaid_s
                    if instance.state is not LifecycleState.IN_SERVICE:
                        still_s = max(0.0, still_s + view.pool.boot_s)
                    usd = rates(life.kind) * still_s / 3600
                    all_owed += usd
                    for job, share in self.shares.shares_of(instance.id, waiting).items():
                        owed[job] += usd * share
        self._grid = None
        if self.max_cost_usd is not None:
            spent = self._spent_usd(self._meter.total, rates)
            self._grid = CapBudget("the grid", self.max_cost_usd, spent, max(0.0, all_owed))
        for job, live in self._lives.items():
            self._set_budget(live, prices, owed[job], rates)

    def _current_prices(self) -> _Prices:
        used = {life.kind.pool for life in self._meter.lives.values()}
        return _Prices(
            {
                pool.name: self._pool_usd_h(pool) / 3600 / max(1, pool.slots) / USED_SHARE
                for pool in self._pools.values()
            },
            {name: max(1, pool.slots) for name, pool in self._pools.items()},
            {name: self._launch_usd(pool) for name, pool in self._pools.items() if name not in used},
        )

    def _set_budget(self, live: LiveJob, prices: _Prices, owed_usd: float, rates: Rates) -> None:
        budgets = [self._grid] if self._grid else []
        if (cap := self.cap_of(live)) is not None:
            spent = self._spent_usd(live.account, rates)
            budgets.append(CapBudget("it", cap, spent, max(0.0, owed_usd)))
        had_budget = live.budget is not None
        live.budget = Budget(tuple(budgets), prices.slot_usd_s, prices.slots) if budgets else None
        if had_budget != bool(budgets):
            live.mark()
        self._hold(live, self._next_usd(live, prices), self._uncut_usd(live, prices.slot_usd_s))

    def spent_usd(self, account: Account) -> float | None:
        """Return the cost of an account, or None without prices."""
        return self._spent_usd(account, self._rates) if self._rates else None

    def _spent_usd(self, account: Account, rates: Rates) -> float:
        return account.usd(rates) + self._request_usd(account.requests)

    def _hold(self, live: LiveJob, next_usd: float, uncut_usd: float) -> None:
        """Hold the job back if a budget does not cover the job's next task. The job counts as capped until the budgets
        cover all its uncut tasks."""
        budgets = live.budget.caps if live.budget else ()
        empty = next((p for p in budgets if p.left_usd <= 0 or p.left_usd < next_usd), None)
        if live.is_held != bool(empty):
            live.is_held = bool(empty)
            live.mark()
            live.wake.set()
        budget = empty
        if live.capped and not empty:
            # The job stays capped while a budget does not cover the job's uncut tasks, because a bundle that cost less
            # than estimated frees a part of the budget.
            budget = next((p for p in budgets if p.left_usd < uncut_usd), None)
        text = f"its cost is capped: {budget.text()}" if budget else ""
        if empty and empty.left_usd > 0:
            text += f", while its next task takes {shown(next_usd)}"
        if bool(text) != bool(live.capped):
            said = text or "a cap no longer holds it back"
            log.info("%s", said, extra={"job": live.id})
            live.notify()
        live.capped = text

    def _next_usd(self, live: LiveJob, prices: _Prices) -> float:
        """Return the minimum cost of the job's next task, including a launch if the task's pool is empty."""
        now_s, costs_usd = self._clock.monotonic_s(), []
        for stage in live.job.stages:
            record = live.stages[stage.name]
            is_next = record.left or (record.counts.planned is None and not stage.after)
            if stage.pool not in self._pools or not is_next:
                continue
            # Before the first measurement, the cost of a task is unknown and counts as 0.
            is_measured = record.counts.mean_s is not None
            usd = prices.slot_usd_s.get(stage.pool, 0.0) * live.task_s(stage, now_s) * is_measured
            costs_usd.append(usd + prices.first_launch_usd.get(stage.pool, 0.0))
        return min(costs_usd, default=0.0)

    def _work_usd(self, live: LiveJob, slot_usd_s: Mapping[str, float]) -> float:
        now_s = self._clock.monotonic_s()
        return sum(
            live.cut_tasks(stage.name) * live.task_s(stage, now_s) * slot_usd_s.get(stage.pool, 0.0)
            for stage in live.job.stages
        )

    def _uncut_usd(self, live: LiveJob, slot_usd_s: Mapping[str, float]) -> float:
        """Return the estimated cost of the job's planned tasks that are not cut yet."""
        now_s = self._clock.monotonic_s()
        return sum(
            len(live.stages[stage.name].left) * live.task_s(stage, now_s) * slot_usd_s.get(stage.pool, 0.0)
            for stage in live.job.stages
        )

    def _tail_s(self, pool: str) -> float:
        """Return the maximum time that an instance may run after its work, until the scaling policy terminates the
        instance."""
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
        return launch_usd(self._pool_usd_h(pool), pool.boot_s + self._tail_s(pool.name))

    def warm_usd(self, pool: Pool, hold_s: float) -> tuple[float, float]:
        """Return the cost of launching an instance `hold_s` early, and the cost of keeping an existing instance for
        `hold_s`. Both costs are 0 without prices."""
        if self._rates is None:
            return 0.0, 0.0
        usd_h = self._pool_usd_h(pool)
        tail_s = pool.boot_s + hold_s + self._tail_s(pool.name)
        return launch_usd(usd_h, tail_s), usd_h * hold_s / 3600

    def remaining_usd(self) -> float | None:
        """Return the remaining budget of the grid, or None without a cost cap of the grid."""
        return self._grid.left_usd if self._grid else None

    def _pool_usd_h(self, pool: Pool) -> float:
        """Return the hourly price of the most expensive instance that the pool has or would launch."""
        assert self._rates is not None
        kinds = {Kind(pool.name, pool.instance_type)}
        kinds |= {live.kind for live in self._meter.lives.values() if live.kind.pool == pool.name}
        return max(self._rates(kind) for kind in kinds)

    def limit_launches(self, view: GroupView, desired: int, why: str) -> tuple[int, str]:
        """Return the desired capacity that the cost caps allow, at most `desired`, and the reason."""
        pool = view.pool
        was = self.capped.pop(pool.name, "")
        wanted = desired - max(view.desired, pool.min_size)
        budgets = self._budgets(pool.name) if wanted > 0 else []
        if not budgets:
            return desired, why
        each = self._launch_usd(pool)
        count = launches(wanted, each, budgets)
        if count == wanted:
            return desired, why
        dry = min(budgets, key=lambda budget: budget.left_usd)
        reason = f"{why}; but a cap on cost allows {count} more, each for {shown(each)} at least: {dry.text()}"
        self.capped[pool.name] = reason
        if not was:
            log.info("%s", reason, extra={"pool": pool.name})
        return desired - wanted + count, reason

    def _budgets(self, pool: str) -> list[CapBudget]:
        """Return the budgets that pay for a launch in the pool. The list has the grid's budget, and the jobs' budgets
        if every job with work for the pool has a cost cap."""
        budgets = [self._grid] if self._grid else []
        working = list(self._lives.pool(pool).working.values())
        own = [p for live in working if live.budget for p in live.budget.caps]
        own = [budget for budget in own if budget is not self._grid]
        if working and len(own) == len(working):
            left_usd = sum(max(0.0, budget.left_usd) for budget in own)
            budgets.append(own[0] if len(own) == 1 else CapBudget("what its jobs", left_usd))
        return budgets
