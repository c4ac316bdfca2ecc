"""Meter of a grid's usage as AWS would bill it, and the remaining budgets of caps on cost.

Invariants: the functions are pure arithmetic, and counts never decrease. Every billed second is attributed to the jobs
that the instance runs. The billed seconds of an idle instance are attributed to the jobs that the instance waits for,
or else to no job. A cost that is committed in a budget stays committed until a new budget is created from the actual
costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from batchlab.core.model import Instance, JobId, LifecycleState, Market, Pool
from batchlab.core.pricing.price_book import MIN_BILLED_S, shown
from batchlab.core.pricing.request_costs import RequestCounter, Requests

K = TypeVar("K")

MAX_PROCESSES = 20_000
"""Maximum number of processes whose request counts are stored.

The process whose last report is the oldest is dropped first.
"""
_FREE = {LifecycleState.TERMINATED, LifecycleState.WARMED_STOPPED, LifecycleState.WARMED_HIBERNATED}
"""States in which AWS does not bill an instance."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Properties that determine the price of an instance.

    `type` is empty if the backend does not have instance types.
    """

    pool: str
    type: str = ""
    market: Market = Market.ON_DEMAND


Rates = Callable[[Kind], float]
"""Function that returns the price per hour in USD of an instance of a kind."""


@dataclass(frozen=True, slots=True)
class Accounting:
    """Configuration of the accounts of a grid.

    `rates` returns the price of an instance in USD per hour. Without `rates`, caps on cost do not apply. `request_usd`
    returns the price of requests. `tally` counts the requests of the manager's process. `max_cost_usd` is the cap on
    the cost of the whole grid.
    """

    rates: Rates | None = None
    request_usd: Callable[[Requests], float] = lambda _: 0.0
    tally: RequestCounter = field(default_factory=RequestCounter)
    max_cost_usd: float | None = None


class EqualParts:
    """Usage that is divided into equal parts among member accounts.

    An account adds its part when a caller settles the account, so counting new usage takes the same time for one member
    and for 20,000 members.
    """

    def __init__(self) -> None:
        self.members = 0
        self.requests = Requests()
        """Total part of one member since the creation of this object."""
        self.billed_s: dict[Kind, float] = {}
        """Total instance seconds of one member since the creation of this object."""

    def bill(self, kind: Kind, seconds: float) -> None:
        """Divide the instance seconds among the members."""
        self.billed_s = {**self.billed_s, kind: self.billed_s.get(kind, 0.0) + seconds / self.members}

    def count_requests(self, requests: Requests) -> None:
        """Divide the requests among the members."""
        self.requests += requests.times(1 / self.members)


Shares = Mapping[JobId, float] | EqualParts
"""Division of usage among jobs: shares that sum to 1 or are empty, or equal parts."""


@dataclass(slots=True)
class Account:
    """Usage of one job.

    `billed_s` has instance seconds by kind. `failed_s` has the slot seconds of failed attempts by pool. `lost_s` has
    the slot seconds by pool of work that was lost because an instance died. `repeated_s` has the slot seconds by pool
    of speculative copies that were not committed, and of runs whose speculative copy was committed first. `is_whole` is
    true if all usage since the job's start was counted.
    """

    billed_s: dict[Kind, float] = field(default_factory=dict)
    failed_s: dict[str, float] = field(default_factory=dict)
    lost_s: dict[str, float] = field(default_factory=dict)
    requests: Requests = field(default_factory=Requests)
    bundles: int = 0
    """Number of outcomes of the job."""
    is_whole: bool = True
    repeated_s: dict[str, float] = field(default_factory=dict)
    _parts: dict[EqualParts, tuple[Requests, Mapping[Kind, float]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Shared usage that this account has joined, with the totals that the account has already added."""

    def join(self, parts: EqualParts) -> None:
        """Receive an equal part of the usage that `parts` counts from now on."""
        if parts not in self._parts:
            self._parts[parts] = parts.requests, parts.billed_s
            parts.members += 1

    def leave(self, parts: EqualParts) -> None:
        if parts in self._parts:
            self.settle()
            del self._parts[parts]
            parts.members -= 1

    def leave_all(self) -> None:
        for parts in list(self._parts):
            self.leave(parts)

    def settle(self) -> None:
        """Add the account's parts of shared usage. Callers that read fields of a live account call `settle` first."""
        for parts, (requests, billed_s) in self._parts.items():
            if parts.requests is not requests:
                self.requests += parts.requests - requests
            if parts.billed_s is not billed_s:
                for kind, seconds in parts.billed_s.items():
                    if unbilled_s := seconds - billed_s.get(kind, 0.0):
                        self.bill(kind, unbilled_s)
            self._parts[parts] = parts.requests, parts.billed_s

    def bill(self, kind: Kind, seconds: float) -> None:
        self.billed_s[kind] = self.billed_s.get(kind, 0.0) + seconds

    def fail(self, pool: str, seconds: float) -> None:
        """Count the slot seconds of a failed attempt."""
        self.failed_s[pool] = self.failed_s.get(pool, 0.0) + seconds

    def lose(self, pool: str, seconds: float) -> None:
        """Count the slot seconds of work that was lost because an instance died."""
        self.lost_s[pool] = self.lost_s.get(pool, 0.0) + seconds

    def repeat(self, pool: str, seconds: float) -> None:
        """Count the slot seconds of a run that lost against another run of the same tasks."""
        self.repeated_s[pool] = self.repeated_s.get(pool, 0.0) + seconds

    def merge(self, other: Account) -> None:
        """Merge the account of another process into this account. The result has the larger value of each figure."""
        self.settle()
        other.settle()
        _merge_counts(self.billed_s, other.billed_s)
        _merge_counts(self.failed_s, other.failed_s)
        _merge_counts(self.lost_s, other.lost_s)
        _merge_counts(self.repeated_s, other.repeated_s)
        self.requests = larger_counts(self.requests, other.requests)
        self.bundles = max(self.bundles, other.bundles)
        self.is_whole = self.is_whole and other.is_whole

    def usd(self, rates: Rates) -> float:
        """Return the cost of the account's instances so far."""
        self.settle()
        return sum(rates(kind) * seconds / 3600 for kind, seconds in self.billed_s.items())

    def to_json(self) -> dict[str, Any]:
        self.settle()
        repeated = {"repeated_s": dict(self.repeated_s)} if self.repeated_s else {}
        return {
            "billed": [[k.pool, k.type, k.market.value, s] for k, s in self.billed_s.items()],
            "failed_s": dict(self.failed_s),
            "lost_s": dict(self.lost_s),
            "requests": list(self.requests.counts),
            "bundles": self.bundles,
            "is_whole": self.is_whole,
            **repeated,
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Account:
        return cls(
            {Kind(pool, type_, Market(m)): s for pool, type_, m, s in doc["billed"]},
            dict(doc["failed_s"]),
            dict(doc["lost_s"]),
            Requests(*doc["requests"]),
            doc["bundles"],
            doc["is_whole"],
            dict(doc.get("repeated_s", {})),
        )


@dataclass(slots=True)
class Life:
    """A billed instance.

    `seen_s` is the monotonic time at which the instance was last billed, or None if another process last billed the
    instance.
    """

    kind: Kind
    age_s: float = 0.0
    billed_s: float = 0.0
    seen_s: float | None = None

    @property
    def prepaid_s(self) -> float:
        """Return the seconds of the instance that are billed in advance."""
        return max(0.0, self.billed_s - self.age_s)


class Meter:
    """Meter of the usage of the whole grid. `nobody` is the usage that is not attributed to a job."""

    def __init__(self) -> None:
        self.lives: dict[str, Life] = {}
        """Billed instances by instance id."""
        self.nobody = Account()
        self.total = Account()
        self._heard: dict[str, Requests] = {}
        """Last reported request counts of each process."""

    def bill_instance(
        self,
        pool: Pool,
        instance: Instance,
        *,
        now_s: float,
        monotonic_s: float,
        shares: Shares,
        accounts: Mapping[JobId, Account],
        is_spot: bool = False,
    ) -> None:
        """Bill the instance up to now, and divide the billed time among the jobs in `shares`. The shares sum to 1 or
        are empty.

        The bill of an instance begins at its launch and covers at least one minute. The Spot price applies from the
        time at which `is_spot` is known.
        """
        if instance.state in _FREE:
            self.lives.pop(instance.id, None)
            return
        machine = instance.machine
        market = Market.SPOT if is_spot else machine.market
        kind = Kind(pool.name, machine.type or pool.instance_type, market)
        life = self.lives.setdefault(instance.id, Life(kind))
        life.kind = kind
        if life.seen_s is None:
            # The wall clock may jump, so use the wall clock only when this process bills an instance for the first
            # time. Later, use the monotonic clock.
            life.age_s = max(life.age_s, now_s - instance.launched_s)
        else:
            life.age_s += monotonic_s - life.seen_s
        life.seen_s = monotonic_s
        more_s = max(MIN_BILLED_S, life.age_s) - life.billed_s
        if more_s <= 0:
            return
        life.billed_s += more_s
        self.total.bill(life.kind, more_s)
        if isinstance(shares, EqualParts):
            (shares if shares.members else self.nobody).bill(life.kind, more_s)
            return
        left = 1.0
        for job, share in shares.items():
            if account := accounts.get(job):
                account.bill(life.kind, more_s * share)
                left -= share
        if left > 1e-9:
            self.nobody.bill(life.kind, more_s * left)

    def retain(self, instances: set[str]) -> bool:
        """Remove all instances except `instances`. Return whether any instance was removed."""
        dropped = self.lives.keys() - instances
        for instance in dropped:
            del self.lives[instance]
        return bool(dropped)

    def count_requests(self, process: str, so_far: Requests, shares: Shares, accounts: Mapping[JobId, Account]) -> None:
        """Count the requests of a process, which reports its total since the start of the process.

        A report that is older than the last report of its process is ignored.
        """
        before = self._heard.get(process, Requests())
        if so_far.sqs < before.sqs or so_far.s3_gets < before.s3_gets:
            return
        more = so_far - before
        # Move the process to the end of the dict, so that processes that still report are dropped last.
        self._heard.pop(process, None)
        self._heard[process] = so_far
        while len(self._heard) > MAX_PROCESSES:
            del self._heard[next(iter(self._heard))]
        self.total.requests += more
        if isinstance(shares, EqualParts):
            if shares.members:
                shares.count_requests(more)
            else:
                self.nobody.requests += more
            return
        left = 1.0
        for job, share in shares.items():
            if account := accounts.get(job):
                account.requests += more.times(share)
                left -= share
        if left > 1e-9:
            self.nobody.requests += more.times(left)

    def merge(self, other: Meter) -> None:
        """Merge the counts of another leader into this meter. The two leaders started from the same stored counts."""
        self.nobody.merge(other.nobody)
        self.total.merge(other.total)
        for process, requests in other._heard.items():
            self._heard[process] = larger_counts(requests, self._heard.get(process, Requests()))
        for name, life in other.lives.items():
            mine = self.lives.setdefault(name, life)
            mine.billed_s = max(mine.billed_s, life.billed_s)
            if mine.age_s < life.age_s:
                # Reset `seen_s`, because the other leader has billed a part of the time since `seen_s`, and that part
                # must not be billed twice.
                mine.age_s, mine.seen_s = life.age_s, None

    def to_json(self) -> dict[str, Any]:
        return {
            "lives": {
                name: [item.kind.pool, item.kind.type, item.kind.market.value, item.age_s, item.billed_s]
                for name, item in self.lives.items()
            },
            "heard": {name: list(item.counts) for name, item in self._heard.items()},
            "nobody": self.nobody.to_json(),
            "total": self.total.to_json(),
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Meter:
        meter = cls()
        meter.lives = {
            name: Life(Kind(pool, type_, Market(market)), age_s, billed_s)
            for name, (pool, type_, market, age_s, billed_s) in doc["lives"].items()
        }
        meter._heard = {name: Requests(*counts) for name, counts in doc["heard"].items()}
        meter.nobody = Account.from_json(doc["nobody"])
        meter.total = Account.from_json(doc["total"])
        return meter


def larger_counts(a: Requests, b: Requests) -> Requests:
    """Return the larger value of each count of `a` and `b`."""
    return Requests(*map(max, a.counts, b.counts))


def _merge_counts(own: dict[K, float], other: Mapping[K, float]) -> None:
    for key, figure in other.items():
        own[key] = max(figure, own.get(key, 0.0))


PROBED_S = 3600.0
"""Assumed maximum time in seconds of a task in a stage without measurements."""


@dataclass(slots=True)
class CapBudget:
    """Remaining budget of one cap, in USD."""

    whose: str
    """Owner of the cap in a sentence, either "the grid" or "the job"."""
    cap_usd: float
    spent_usd: float = 0.0
    committed_usd: float = 0.0

    @property
    def left_usd(self) -> float:
        return self.cap_usd - self.spent_usd - self.committed_usd

    def commit(self, usd: float) -> None:
        self.committed_usd += usd

    def text(self) -> str:
        """Return a text with the cap, the cost so far, and the committed cost."""
        return (
            f"{self.whose} may cost {shown(self.cap_usd)}, has cost {shown(self.spent_usd)}, and "
            f"{shown(max(0.0, self.committed_usd))} more is committed"
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """The remaining budgets of all caps that apply to a job.

    `slot_usd_s` maps each pool to the price of a slot second, and `slots` maps each pool to the slots of an instance.
    """

    caps: tuple[CapBudget, ...]
    slot_usd_s: Mapping[str, float]
    slots: Mapping[str, int]

    @property
    def left_usd(self) -> float:
        return min(cap.left_usd for cap in self.caps)

    def commit(self, usd: float) -> None:
        for cap in self.caps:
            cap.commit(usd)

    def afford(self, sizes: Sequence[int], pool: str, task_s: float) -> list[int]:
        """Return the sizes of the first bundles in `sizes` that the budget pays for, and commit the cost of these
        bundles.

        `task_s` is the slot seconds of one task. The last returned size may be smaller than requested.
        """
        usd = self.slot_usd_s.get(pool, 0.0) * task_s
        paid: list[int] = []
        for size in sizes:
            tasks = size if usd <= 0 else min(size, _times(self.left_usd, usd))
            if not tasks:
                break
            self.commit(tasks * usd)
            paid.append(tasks)
            if tasks < size:
                break
        return paid

    def probe(self, sizes: Sequence[int], pool: str, task_s: float, out: int) -> list[int]:
        """Return the sizes of the first bundles for a stage without measurements. `out` tasks of the stage have begun.

        The new bundles have at most as many tasks as an instance runs at once or as the budget pays for, whichever
        number is larger, minus the `out` tasks. A task is assumed to take `task_s` seconds, at most an hour.
        """
        usd = self.slot_usd_s.get(pool, 0.0) * min(task_s, PROBED_S)
        paid = self.slots.get(pool, 1) if usd <= 0 else _times(self.left_usd, usd)
        room = max(paid, self.slots.get(pool, 1)) - out
        sizes_now: list[int] = []
        for size in sizes:
            if (tasks := min(size, room)) <= 0:
                break
            sizes_now.append(tasks)
            room -= tasks
        return sizes_now


def launch_usd(usd_h: float, tail_s: float = 0.0) -> float:
    """Return the cost that is due as soon as an instance is launched.

    The cost covers `tail_s` seconds from the launch, but at least one minute.
    """
    return usd_h * max(MIN_BILLED_S, tail_s) / 3600


def launches(wanted: int, each: float, caps: Sequence[CapBudget]) -> int:
    """Return how many of `wanted` launches the budgets of all `caps` pay for, and commit the cost of these launches.

    `each` is the cost of one launch in USD.
    """
    left = min((cap.left_usd for cap in caps), default=0.0)
    count = wanted if each <= 0 or not caps else min(wanted, _times(left, each))
    for cap in caps:
        cap.commit(count * each)
    return count


def _times(left_usd: float, each_usd: float) -> int:
    """Return how often `each_usd` fits into `left_usd`, with tolerance for rounding errors."""
    return int(max(0.0, left_usd) / each_usd + 1e-9)
