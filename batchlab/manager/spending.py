"""Accounts of the usage of the grid and of each job, stored in the bucket.

Invariants: the accounts survive the manager. The grid's account is stored regularly, and a job's
account after its end, merged with the stored one of another leader. If two leaders continued the
same account, the larger of each figure counts, so usage never decreases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import BackendError
from batchlab.core.model import Control, GroupView, JobId, Pool
from batchlab.core.pricing.request_costs import Requests
from batchlab.core.pricing.usage import Account, Accounting, Meter, larger_counts
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.cost_caps import CostCaps, UsageAttribution
from batchlab.manager.recorded_data import RecordedData, merge_parts
from batchlab.manager.state import LiveJob, ManagerSettings, Ports
from batchlab.manager.versioned_document import UNREADABLE, VersionedDocument
from batchlab.manager.worker_registry import WorkerRegistry

if TYPE_CHECKING:
    from batchlab.manager.recorder import Recorder

log = logging.getLogger(__name__)


@dataclass(slots=True)
class GridUsage:
    """Usage of the grid. `own` has the managers' requests to S3 and SQS, `cap` (USD) is the grid's
    cap, `caps` are user-set caps of jobs, and `jobs` has the accounts of jobs that had not ended.
    """

    meter: Meter = field(default_factory=Meter)
    own: Requests = field(default_factory=Requests)
    cap: float | None = None
    caps: dict[JobId, float | None] = field(default_factory=dict)
    jobs: Mapping[JobId, Account] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        doc: dict[str, Any] = {
            "v": json_format.VERSION,
            "meter": self.meter.to_json(),
            "own": list(astuple(self.own)),
            "cap": self.cap,
            "caps": dict(self.caps),
            "jobs": {job: account.to_json() for job, account in self.jobs.items()},
        }
        return json_format.to_bytes(doc)

    @classmethod
    def from_bytes(cls, data: bytes) -> GridUsage | None:
        """Return the usage, or log and return None if it cannot be read."""
        try:
            doc = json_format.loads(data)
            return cls(
                Meter.from_json(doc["meter"]),
                Requests(*doc["own"]),
                doc["cap"],
                {JobId(job): usd for job, usd in doc["caps"].items()},
                {JobId(job): Account.from_json(one) for job, one in doc["jobs"].items()},
            )
        except UNREADABLE as error:
            log.warning("the grid's account cannot be read and begins anew: %r", error)
            return None


@dataclass(slots=True)
class JobUsage:
    """Usage of a job, and its recorded data. `took_s` is the duration of its last round, or of an
    earlier round that is not stored yet."""

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
        """Return the usage. Raises one of UNREADABLE."""
        doc = json_format.loads(data)
        return cls(Account.from_json(doc["account"]), doc.get("record"))

    def take_in(self, other: JobUsage) -> None:
        """Merge what another leader has stored for the job."""
        self.account.merge(other.account)
        if self.record is not None and other.record is not None:
            self.record = merge_parts(other.record, self.record)
        elif self.record is None:
            self.record = other.record


SAVE_S = 60.0
"""Interval between writes of the account while there are jobs. Each write is a request."""
CLOSE_S = 2.0
"""Maximum time that an exiting manager waits to store its account."""
MANAGER = "manager"
"""The manager's name among the sources of requests."""


class Spending:
    """The leader's accounts, and the cost caps based on them."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        registry: WorkerRegistry,
        pools: Mapping[str, Pool],
        accounting: Accounting,
        recorder: Recorder | None = None,
        on_written: Callable[[JobId, float], None] = lambda *_: None,
    ) -> None:
        """Data of `recorder` is stored with a job's account. `on_written` is called with each ended
        job, once both are in the bucket, and with the seconds it took."""
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._registry = registry
        self._tally = accounting.tally
        self._earlier = Requests()
        """Requests of earlier managers."""
        self.meter = Meter()
        self._shares = UsageAttribution(lives, registry)
        self.caps = CostCaps(ports.clock, settings, lives, pools, accounting, self._shares)
        self._views: Sequence[GroupView] = ()
        self._closed: dict[JobId, JobUsage] = {}
        """Usage of ended jobs that is not stored yet. A job that runs again is stored after its
        next end."""
        self._recorder = recorder
        self._on_written = on_written
        self._known: dict[JobId, Account] = {}
        self._others: dict[JobId, Account] = {}
        """Accounts of jobs that only another leader has counted."""
        self._kept: dict[JobId, VersionedDocument] = {}
        """Stored documents of live jobs that have ended before."""
        self._books = VersionedDocument(ports, object_keys.USE)
        self._saved_s: float | None = None
        self._is_due = False

    # --- Usage ------------------------------------------------------------------------------------

    def observe(self, views: Sequence[GroupView]) -> None:
        """Count usage up to now, and recompute the budgets."""
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
                self.meter.bill_instance(
                    view.pool,
                    instance,
                    now_s=now_s,
                    monotonic_s=monotonic_s,
                    shares=self._shares.of(instance.id, waiting),
                    accounts=self._known,
                    is_spot=instance.id in self._registry.spot,
                )
                self._is_due |= len(self.meter.lives) != known
        self._is_due |= self.meter.retain(there)
        self._count_requests()
        self.refill()

    def notice_ends(self) -> None:
        """Close the accounts of ended jobs, with their recorded data."""
        ended = self._known.keys() - self._lives.keys()
        if ended:
            # Includes requests since the last tick, which may be all requests of a short job.
            self._count_requests()
        gone = {job: self._known[job] for job in ended}
        recorded = self._recorder.close(gone) if self._recorder and gone else {}
        for job, account in gone.items():
            took_s, part = recorded.get(job, (0.0, None))
            if before := self._closed.get(job):
                took_s = max(took_s, before.took_s)
            self._closed[job] = JobUsage(account, part, took_s)
            self.caps.by_hand.pop(job, None)
        self._is_due |= bool(gone)
        self._known = {job: live.account for job, live in self._lives.items()}

    def _count_requests(self) -> None:
        # Includes jobs that have just ended or started.
        accounts = {**self._known, **{job: live_job.account for job, live_job in self._lives.items()}}
        paused = {job for job, live_job in self._lives.items() if live_job.record.control is not Control.RUN}
        busy = [job for job in accounts if job not in paused]
        everybody = dict.fromkeys(busy, 1 / len(busy)) if busy else {}
        self.meter.count_requests(MANAGER, self._own(), everybody, accounts)
        for worker, asked in self._registry.requests.items():
            shares: Mapping[JobId, float] = everybody
            if asked.instance in self._registry.workers:
                shares = self._shares.of(asked.instance, everybody)
            self.meter.count_requests(worker, asked.requests, shares, accounts)
        self._registry.requests.clear()

    # --- Caps ------------------------------------------------------------------------------------

    def cap_of(self, live: LiveJob) -> float | None:
        """Return the job's cap in USD, or None."""
        return self.caps.of(live)

    def set_cap(self, job: JobId | None, usd: float | None) -> None:
        """Set the cap of a job, or of the grid with None as `job`. Refused if the grid has no
        prices."""
        self.caps.set(job, usd)
        self._is_due = True
        self._saved_s = None
        self.refill()

    def refill(self) -> None:
        """Recompute the budgets after a change."""
        self.caps.refill(self.meter, self._views)

    def spent_usd(self) -> float | None:
        """Return the cost of the grid so far, or None without prices."""
        return self.caps.spent_usd(self.meter.total)

    # --- The bucket ------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the account of the previous manager."""
        try:
            data = await self._books.read()
        except BackendError as error:
            # Jobs must continue, although the caps then do not include earlier cost.
            log.warning("the grid's account cannot be read and begins anew: %s", error)
            return
        if data is None or not (books := GridUsage.from_bytes(data)):
            return
        self.meter = books.meter
        # The account may include counts of this process from an earlier lead.
        self._earlier = books.own - self._tally.read()
        if books.cap is not None:
            self.caps.max_cost_usd = books.cap
        self.caps.by_hand = books.caps
        self._known = dict(books.jobs)

    async def reread(self) -> None:
        """Merge the usage and caps of leaders in between."""
        data = await self._books.read()
        if data is not None and (books := GridUsage.from_bytes(data)):
            self._take_in(books)
            self.caps.max_cost_usd = books.cap
            self.caps.by_hand |= books.caps

    def _take_in(self, books: GridUsage) -> None:
        self.meter.merge(books.meter)
        self._earlier = larger_counts(books.own, self._own()) - self._tally.read()
        self._others = {}
        for job, account in books.jobs.items():
            live = self._lives.get(job)
            if mine := live.account if live else self._known.get(job):
                mine.merge(account)
            elif job not in self._closed:
                self._others[job] = account
        self.caps.by_hand = {**books.caps, **self.caps.by_hand}

    def _own(self) -> Requests:
        return self._earlier + self._tally.read()

    async def open(self, live: LiveJob, *, is_new: bool) -> None:
        """Find or begin the job's account."""
        closed = self._closed.get(live.id)
        account = self._known.get(live.id) or (closed.account if closed else None)
        if closed and self._recorder and closed.record is not None:
            self._recorder.reopened(live.id, closed.record)
        if account is None and not is_new:
            account = await self._reopened(live.id)
        if account:
            live.account = account

    async def _reopened(self, job: JobId) -> Account:
        other = self._others.pop(job, None)
        versioned_document = VersionedDocument(self._ports, object_keys.used(job))
        try:
            data = await versioned_document.read()
            used = JobUsage.from_bytes(data) if data is not None else None
        except UNREADABLE:
            used = None
        if used is None:
            # The usage of earlier rounds is unknown.
            return other or Account(is_whole=False)
        if other:
            used.account.merge(other)
        if self._recorder and used.record is not None:
            self._recorder.reopened(job, used.record)
        self._kept[job] = versioned_document
        return used.account

    async def account(self, job: JobId) -> Account | None:
        """Return the usage of a job, or None if it was not recorded."""
        live = self._lives.get(job)
        if live:
            return live.account
        if account := self._known.get(job):
            return account
        if closed := self._closed.get(job):
            return closed.account
        data = await VersionedDocument(self._ports, object_keys.used(job)).read()
        return JobUsage.from_bytes(data).account if data is not None else None

    async def close(self) -> None:
        """Store the account within `CLOSE_S`."""
        self.observe(self._views)
        self._is_due, self._saved_s = True, None
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.save()

    async def save(self) -> None:
        """Store the account if it has changed, or regularly."""
        now_s = self._ports.clock.monotonic_s()
        age_s = None if self._saved_s is None else now_s - self._saved_s
        # Instances without a job are billed from their launch, whichever manager counts them.
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
            log.warning("the grid's account is not stored yet: %s", error)
            self._is_due = True

    async def _write_down(self, job: JobId, used: JobUsage) -> None:
        """Store a job's usage, merged with the stored usage of another leader or of an earlier
        process."""

        def meet(there: bytes) -> bool:
            try:
                used.take_in(JobUsage.from_bytes(there))
            except UNREADABLE as error:
                log.warning("the stored usage of %s cannot be read: %r", job, error)
                return False
            return True

        versioned_document = self._kept.pop(job, None) or VersionedDocument(self._ports, object_keys.used(job))
        await versioned_document.write(used.to_bytes, meet)
        self._on_written(job, used.took_s)

    def _meet(self, there: bytes) -> bool:
        if books := GridUsage.from_bytes(there):
            self._take_in(books)
        return True

    def _to_bytes(self) -> bytes:
        jobs, caps = {**self._others, **self._known}, self.caps
        return GridUsage(self.meter, self._own(), caps.max_cost_usd, caps.by_hand, jobs).to_bytes()
