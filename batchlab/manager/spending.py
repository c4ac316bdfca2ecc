"""Usage accounts of the grid and of each job, stored in the bucket.

Invariants: the accounts survive the manager. The manager stores the grid's account regularly, and a job's account after
the job's end. If two leaders counted one account, the merged account has the larger value of each count, so that usage
never decreases.
"""

from __future__ import annotations

import asyncio
import logging
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from batchlab.core.errors import BackendError, Malformed, Refused, TooNew
from batchlab.core.model import Control, GroupView, JobId
from batchlab.core.pricing.request_costs import Requests
from batchlab.core.pricing.usage import Account, Accounting, EqualParts, Meter, Shares, larger_counts
from batchlab.core.protocol import field_checks, json_format, object_keys
from batchlab.manager.context import Context, Part
from batchlab.manager.cost_caps import CostCaps
from batchlab.manager.recorded_data import RecordedData, merge_parts
from batchlab.manager.state import LiveJob
from batchlab.manager.versioned_document import UNREADABLE, VersionedDocument

log = logging.getLogger(__name__)


@dataclass(slots=True)
class GridUsage:
    """Stored usage of the grid. `own` has the numbers of the managers' requests to S3 and SQS, and `cap` is the grid's
    cost cap in USD. `caps` has the cost caps that users have set for jobs, and `jobs` has the accounts of live jobs."""

    meter: Meter = field(default_factory=Meter)
    own: Requests = field(default_factory=Requests)
    cap: float | None = None
    caps: dict[JobId, float | None] = field(default_factory=dict)
    jobs: Mapping[JobId, Account] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        doc: dict[str, Any] = {
            "v": json_format.VERSION,
            "meter": self.meter.to_json(),
            "own": list(self.own.counts),
            "cap": self.cap,
            "caps": dict(self.caps),
            "jobs": {job: account.to_json() for job, account in self.jobs.items()},
        }
        return json_format.to_bytes(doc)

    @classmethod
    def from_bytes(cls, data: bytes) -> GridUsage:
        doc = json_format.loads(data)
        return cls(
            Meter.from_json(doc["meter"]),
            Requests(*doc["own"]),
            doc["cap"],
            {JobId(job): usd for job, usd in doc["caps"].items()},
            {JobId(job): Account.from_json(account) for job, account in doc["jobs"].items()},
        )


@dataclass(slots=True)
class JobUsage:
    """Stored usage of a job, and the job's recorded data. Among the rounds that are not stored yet, `took_s` is the
    duration of the longest round."""

    account: Account
    record: RecordedData | None = None
    took_s: float = 0.0

    def to_bytes(self) -> bytes:
        doc: dict[str, Any] = {"v": json_format.VERSION, "account": self.account.to_json()}
        if self.record is not None:
            doc["record"] = self.record
        return json_format.to_bytes(doc)

    @classmethod
    def from_bytes(cls, data: bytes) -> JobUsage:
        doc = json_format.loads(data)
        return cls(Account.from_json(doc["account"]), doc.get("record"))

    def merge_stored(self, content: bytes) -> None:
        """Merge the usage that another leader, or an earlier process, has stored for the job."""
        other = JobUsage.from_bytes(content)
        self.account.merge(other.account)
        if self.record is not None and other.record is not None:
            self.record = merge_parts(other.record, self.record)
        elif self.record is None:
            self.record = other.record


SAVE_S = 60.0
"""Interval between writes of the grid's account while jobs are live. Each write of the account is billed."""
CLOSE_S = 2.0
"""Maximum time that an exiting manager waits for the write of its accounts."""
MANAGER = "manager"
"""Name that stands for the manager in the counts of requests by source."""


class Spending(Part):
    """Accounts of the leader, and the cost caps based on the accounts."""

    def __init__(self, context: Context, accounting: Accounting) -> None:
        super().__init__(context)
        self._tally = accounting.tally
        self._earlier_requests = Requests()
        self.meter = Meter()
        self.caps = CostCaps(context, accounting)
        self._views: Sequence[GroupView] = ()
        self._ended: dict[JobId, JobUsage] = {}
        """Usage of ended jobs that is not in the bucket yet. The usage of a job that runs again is stored after the
        job's next end."""
        self._accounts: dict[JobId, Account] = {}
        """Accounts of the jobs that were live at the last count of usage, or when the previous manager stopped."""
        self._new_accounts: dict[JobId, Account] = {}
        """Accounts of the jobs that became live since the last count of usage."""
        self._unclaimed: set[JobId] = set()
        """Jobs in the previous leader's accounts that this manager has possibly not adopted."""
        self._journal = context.lives.journal()
        self._running = EqualParts()
        """Requests without a single job as their cause, divided among the jobs that are not paused."""
        self._waiting: dict[str, EqualParts] = {}
        """Time of idle instances by pool, divided among the jobs with work for the pool."""
        self._foreign_accounts: dict[JobId, Account] = {}
        """Accounts of jobs that another leader has counted and that this manager has not adopted."""
        self._job_documents: dict[JobId, VersionedDocument] = {}
        """Documents with the stored usage of live jobs that ended in an earlier round."""
        self._document = VersionedDocument(context.ports, object_keys.USE, self._merge)
        self._saved_s: float | None = None
        self._is_changed = False
        self._save_lock = asyncio.Lock()
        """Lock of the writes of the accounts of ended jobs."""

    def observe(self, views: Sequence[GroupView]) -> None:
        """Count the usage since the last call, and recompute the budgets."""
        self._views = views
        now_s, monotonic_s = self._clock.now_s(), self._clock.monotonic_s()
        self.close_ended()
        accounts = ChainMap(self._new_accounts, self._accounts)
        for view in views:
            waiting = self._waiting_shares(view)
            for instance in view.instances:
                count = len(self.meter.lives)
                self.meter.bill_instance(
                    view.pool,
                    instance,
                    now_s=now_s,
                    monotonic_s=monotonic_s,
                    shares=self.caps.shares.shares_of(instance.id, waiting),
                    accounts=accounts,
                    is_spot=instance.id in self._registry.spot,
                )
                self._is_changed |= len(self.meter.lives) != count
        self._is_changed |= self.meter.retain({instance.id for view in views for instance in view.instances})
        self._count_requests()
        self.update_budgets()

    def close_ended(self) -> None:
        """Close the accounts of ended jobs together with the jobs' recorded data."""
        self._follow_jobs()
        removed = dict.fromkeys((*self._unclaimed, *self._journal.removed))
        ended_jobs = [job for job in removed if job in self._accounts and job not in self._lives]
        if ended_jobs:
            # The count adds the requests since the last tick, which may be all requests of a short job.
            self._count_requests()
        ended = {job: self._accounts.pop(job) for job in ended_jobs}
        for account in ended.values():
            account.leave_all()
        recorded = self._recorder.close(ended) if self._recorder and ended else {}
        for job, account in ended.items():
            took_s, part = recorded.get(job, (0.0, None))
            if earlier := self._ended.get(job):
                took_s = max(took_s, earlier.took_s)
            self._ended[job] = JobUsage(account, part, took_s)
            self.caps.user_caps.pop(job, None)
        self._is_changed |= bool(ended)
        self._accounts |= self._new_accounts
        self._new_accounts.clear()
        self._journal.removed.clear()
        self._unclaimed.clear()

    def _follow_jobs(self) -> None:
        """Update the accounts and their parts of shared usage after changes of live jobs."""
        self._lives.refresh()
        for job, live in self._journal.removed.items():
            if account := self._new_accounts.pop(job, None):
                account.leave_all()  # no usage of the job was counted
            if live.account is not self._accounts.get(job):
                live.account.leave_all()
        for job, live in self._journal.changed.items():
            before = self._accounts.get(job) or self._new_accounts.get(job)
            if before is not live.account:
                if before is not None:
                    before.leave_all()
                self._accounts.pop(job, None)
                self._new_accounts[job] = live.account
            _set_member(live.account, self._running, is_member=live.record.control is Control.RUN)
            for pool in {stage.pool for stage in live.job.stages}:
                waiting = self._waiting.setdefault(pool, EqualParts())
                _set_member(live.account, waiting, is_member=live.has_work(pool))
        self._journal.changed.clear()

    def _waiting_shares(self, view: GroupView) -> Shares:
        """Return the division of the time of the pool's idle instances."""
        waiting = self._waiting.get(view.pool.name)
        return waiting if waiting is not None and waiting.members else self.caps.shares.waiting_shares(view)

    def _count_requests(self) -> None:
        # The accounts include jobs that have just ended or just started.
        self._follow_jobs()
        accounts = ChainMap(self._new_accounts, self._accounts)
        self.meter.count_requests(MANAGER, self._manager_requests(), self._running, accounts)
        for worker, report in self._registry.requests.items():
            shares: Shares = self._running
            if report.instance in self._registry.workers:
                shares = self.caps.shares.shares_of(report.instance, self._running)
            self.meter.count_requests(worker, report.requests, shares, accounts)
        self._registry.requests.clear()

    def set_cap(self, job: JobId | None, usd: float | None) -> None:
        """Set the cost cap of a job, or of the grid if `job` is None. Raise Refused if the grid does not have
        prices."""
        self.caps.set_cap(job, usd)
        self._is_changed = True
        self._saved_s = None
        self.update_budgets()

    def update_budgets(self) -> None:
        self.caps.update_budgets(self.meter, self._views)

    def add_budget(self, live: LiveJob) -> None:
        """Set the budget of a job that has become live. The next tick recomputes all budgets."""
        self.caps.add_budget(live, self.meter, self._views)

    def spent_usd(self) -> float | None:
        """Return the cost of the grid so far, or None if the grid does not have prices."""
        return self.caps.spent_usd(self.meter.total)

    async def load(self) -> None:
        """Read the stored usage and caps. Raise BackendError if the bucket does not respond."""
        if (usage := await self._stored_usage()) is None:
            return
        self.meter = usage.meter
        # The account may include counts of this process from its earlier time as the leader.
        self._earlier_requests = usage.own - self._tally.read()
        if usage.cap is not None:
            self.caps.max_cost_usd = usage.cap
        self.caps.user_caps = usage.caps
        self._accounts = dict(usage.jobs)
        self._unclaimed = set(usage.jobs)
        for account in self._accounts.values():
            account.join(self._running)

    async def reread(self) -> None:
        """Merge the usage and caps that other leaders have stored. Raise BackendError if the bucket does not
        respond."""
        if (usage := await self._stored_usage()) is None:
            return
        self._merge_usage(usage)
        self.caps.max_cost_usd = usage.cap
        self.caps.user_caps |= usage.caps

    async def _stored_usage(self) -> GridUsage | None:
        """Return the stored usage, or None if it does not exist or cannot be read."""
        try:
            data = await self._document.read()
            return GridUsage.from_bytes(data) if data is not None else None
        except (Malformed, TooNew, *field_checks.UNREADABLE) as error:
            # Jobs must continue after a loss of the grid's account, although cost caps then do not include earlier
            # cost.
            log.warning("the grid's account cannot be read and begins again at 0: %r", error)
            return None

    def _merge(self, content: bytes) -> None:
        self._merge_usage(GridUsage.from_bytes(content))

    def _merge_usage(self, usage: GridUsage) -> None:
        self.meter.merge(usage.meter)
        self._earlier_requests = larger_counts(usage.own, self._manager_requests()) - self._tally.read()
        self._foreign_accounts = {}
        for job, account in usage.jobs.items():
            live = self._lives.get(job)
            if own_account := live.account if live else self._accounts.get(job):
                own_account.merge(account)
            elif job not in self._ended:
                self._foreign_accounts[job] = account
        self.caps.user_caps = {**usage.caps, **self.caps.user_caps}

    def _manager_requests(self) -> Requests:
        return self._earlier_requests + self._tally.read()

    async def open_account(self, live: LiveJob, *, is_new: bool) -> None:
        """Give the live job the account of its earlier rounds. If no earlier account exists, the live job keeps its new
        account."""
        ended = self._ended.get(live.id)
        account = self._accounts.get(live.id) or (ended.account if ended else None)
        if ended and self._recorder and ended.record is not None:
            self._recorder.add_earlier_rounds(live.id, ended.record)
        if account is None and not is_new:
            account = await self._read_account(live.id)
        if account:
            live.account = account

    async def _read_account(self, job: JobId) -> Account:
        """Return the account of a job's earlier rounds, from the stored usage and from another leader's count."""
        foreign = self._foreign_accounts.pop(job, None)
        document = self._job_document(job)
        try:
            data = await document.read()
            usage = JobUsage.from_bytes(data) if data is not None else None
        except UNREADABLE:
            usage = None
        if usage is None:
            # The account is marked as incomplete, because the usage of earlier rounds is unknown.
            return foreign or Account(is_whole=False)
        if foreign:
            usage.account.merge(foreign)
        if self._recorder and usage.record is not None:
            self._recorder.add_earlier_rounds(job, usage.record)
        self._job_documents[job] = document
        return usage.account

    def _job_document(self, job: JobId) -> VersionedDocument:
        return VersionedDocument(self._ports, object_keys.reference_key(job), lambda _: None, keeps_unreadable=True)

    async def account(self, job: JobId) -> Account | None:
        """Return the usage of a job, or None if the usage was not recorded."""
        live = self._lives.get(job)
        if account := live.account if live else self._accounts.get(job):
            account.settle()
            return account
        if ended := self._ended.get(job):
            return ended.account
        data = await self._job_document(job).read()
        return JobUsage.from_bytes(data).account if data is not None else None

    async def close(self) -> None:
        self.observe(self._views)
        self._is_changed, self._saved_s = True, None
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.save()

    async def save(self) -> None:
        """Store the accounts if they have changed, and regularly while jobs use instances."""
        now_s = self._clock.monotonic_s()
        age_s = None if self._saved_s is None else now_s - self._saved_s
        # Without live jobs, regular writes of the account are unnecessary, because any manager can count the usage of
        # instances without a job from their launch.
        is_old = self._accounts and self.meter.lives and (age_s is None or age_s >= SAVE_S)
        is_due = self._is_changed and (age_s is None or age_s >= self._settings.idle_s)
        if not (is_old or is_due):
            return
        self._saved_s, self._is_changed = now_s, False
        try:
            async with self._save_lock:
                await self._save_ended()
            await self._document.write(self._to_bytes)
        except BackendError as error:
            log.warning("the grid's account is not stored yet: %s", error)
            self._is_changed = True

    async def _save_ended(self) -> None:
        for job, usage in list(self._ended.items()):
            if job not in self._lives:
                document = self._job_documents.pop(job, None) or self._job_document(job)
                document.merge = usage.merge_stored
                # The stored usage may be of a later release, which then keeps it.
                with suppress(Refused):
                    await document.write(usage.to_bytes)
                self._context.reports.add(job, usage.took_s)
                self._ended.pop(job, None)

    async def forget(self, job: JobId) -> None:
        """Discard the usage of a deleted job that is not in the bucket yet. The grid's usage still includes it."""
        async with self._save_lock:  # a running write would store the usage after the deletion
            self.close_ended()
            self._ended.pop(job, None)
            self._job_documents.pop(job, None)
            self._foreign_accounts.pop(job, None)
            self.caps.user_caps.pop(job, None)

    def _to_bytes(self) -> bytes:
        jobs, caps = {**self._foreign_accounts, **self._accounts, **self._new_accounts}, self.caps
        return GridUsage(self.meter, self._manager_requests(), caps.max_cost_usd, caps.user_caps, jobs).to_bytes()


def _set_member(account: Account, parts: EqualParts, *, is_member: bool) -> None:
    if is_member:
        account.join(parts)
    else:
        account.leave(parts)
