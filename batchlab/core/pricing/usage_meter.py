"""What a grid uses, as AWS would bill it, and whose job it is for: instance seconds and requests.

Invariant: pure arithmetic, and nothing that has been counted is ever taken back. Every billed
second is somebody's: of the jobs that the instance runs, else of those that it waits for, else of
nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

from batchlab.core.model import Instance, JobId, LifecycleState, Market, Pool
from batchlab.core.pricing.money import BILLED_LEAST_S
from batchlab.core.request_counter import Requests, Tally

K = TypeVar("K")

HEARD_KEPT = 20_000
"""Processes that may still tell of their requests; the longest silent is forgotten first."""
_FREE = {
    LifecycleState.TERMINATED,
    LifecycleState.WARMED_STOPPED,
    LifecycleState.WARMED_HIBERNATED,
}
"""States in which no instance hour is billed."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a price depends on; `type` is empty where machines do not differ."""

    pool: str
    type: str = ""
    market: Market = Market.ON_DEMAND


Rates = Callable[[Kind], float]
"""USD per hour of an instance."""


@dataclass(frozen=True, slots=True)
class Accounting:
    """What an account is kept with: `rates` prices instances (USD per hour), without which there
    is no cap, and `request_usd` requests; `tally` counts this process's own; `max_cost_usd` caps
    the whole grid."""

    rates: Rates | None = None
    request_usd: Callable[[Requests], float] = lambda _: 0.0
    tally: Tally = field(default_factory=Tally)
    max_cost_usd: float | None = None


@dataclass(slots=True)
class Account:
    """What one job has used. `billed_s` is of instances; `failed_s` (of attempts that failed) and
    `lost_s` (of runs whose instance died) are of slots, by pool. `is_whole` says that it was
    counted from the job's start on."""

    billed_s: dict[Kind, float] = field(default_factory=dict)
    failed_s: dict[str, float] = field(default_factory=dict)
    lost_s: dict[str, float] = field(default_factory=dict)
    requests: Requests = field(default_factory=Requests)
    bundles: int = 0
    """Outcomes."""
    is_whole: bool = True

    def bill(self, kind: Kind, seconds: float) -> None:
        self.billed_s[kind] = self.billed_s.get(kind, 0.0) + seconds

    def fail(self, pool: str, seconds: float) -> None:
        """An attempt has failed, after so many slot seconds."""
        self.failed_s[pool] = self.failed_s.get(pool, 0.0) + seconds

    def lose(self, pool: str, seconds: float) -> None:
        """What has run for so many slot seconds went with its instance."""
        self.lost_s[pool] = self.lost_s.get(pool, 0.0) + seconds

    def keep_most(self, other: Account) -> None:
        """Another one has counted too, from the same account on: of each figure the larger one."""
        _keep_most(self.billed_s, other.billed_s)
        _keep_most(self.failed_s, other.failed_s)
        _keep_most(self.lost_s, other.lost_s)
        self.requests = most(self.requests, other.requests)
        self.bundles = max(self.bundles, other.bundles)
        self.is_whole = self.is_whole and other.is_whole

    def usd(self, rates: Rates) -> float:
        """What its instances have cost so far."""
        return sum(rates(kind) * seconds / 3600 for kind, seconds in self.billed_s.items())

    def to_json(self) -> dict[str, Any]:
        return {
            "billed": [[k.pool, k.type, k.market.value, s] for k, s in self.billed_s.items()],
            "failed_s": dict(self.failed_s),
            "lost_s": dict(self.lost_s),
            "requests": list(astuple(self.requests)),
            "bundles": self.bundles,
            "is_whole": self.is_whole,
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
        )


@dataclass(slots=True)
class Life:
    """An instance that is billed. `seen_s` is monotonic, None where another process saw it."""

    kind: Kind
    age_s: float = 0.0
    billed_s: float = 0.0
    seen_s: float | None = None

    @property
    def prepaid_s(self) -> float:
        """Billed, and not lived yet."""
        return max(0.0, self.billed_s - self.age_s)


class Meter:
    """Counts for the whole grid. `nobody` has what no job used."""

    def __init__(self) -> None:
        self.lives: dict[str, Life] = {}
        """By instance."""
        self.nobody = Account()
        self.total = Account()
        self._heard: dict[str, Requests] = {}
        """What each process has told last of its requests."""

    def see(
        self,
        pool: Pool,
        instance: Instance,
        *,
        now_s: float,
        monotonic_s: float,
        shares: Mapping[JobId, float],
        accounts: Mapping[JobId, Account],
        is_spot: bool = False,
    ) -> None:
        """Bill the instance up to now, by these shares (sum 1, or none at all). It counts from its
        launch, and for a minute at the least; as Spot from when that is known (`is_spot`)."""
        if instance.state in _FREE:
            self.lives.pop(instance.id, None)
            return
        machine = instance.machine
        market = Market.SPOT if is_spot else machine.market
        kind = Kind(pool.name, machine.type or pool.instance_type, market)
        life = self.lives.setdefault(instance.id, Life(kind))
        life.kind = kind
        if life.seen_s is None:
            # By the calendar, which may jump: once, and then by the watch.
            life.age_s = max(life.age_s, now_s - instance.launched_s)
        else:
            life.age_s += monotonic_s - life.seen_s
        life.seen_s = monotonic_s
        more_s = max(BILLED_LEAST_S, life.age_s) - life.billed_s
        if more_s <= 0:
            return
        life.billed_s += more_s
        self.total.bill(life.kind, more_s)
        left = 1.0
        for job, share in shares.items():
            if account := accounts.get(job):
                account.bill(life.kind, more_s * share)
                left -= share
        if left > 1e-9:
            self.nobody.bill(life.kind, more_s * left)

    def keep(self, instances: set[str]) -> bool:
        """Forget all others, which are gone; whether there were any."""
        gone = self.lives.keys() - instances
        for one in gone:
            del self.lives[one]
        return bool(gone)

    def hear(
        self,
        process: str,
        so_far: Requests,
        shares: Mapping[JobId, float],
        accounts: Mapping[JobId, Account],
    ) -> None:
        """A process tells what it has asked for since its start; older news changes nothing."""
        before = self._heard.get(process, Requests())
        if so_far.sqs < before.sqs or so_far.s3_gets < before.s3_gets:
            return
        more = so_far - before
        self._heard.pop(process, None)  # to the end: one that still tells must not be forgotten
        self._heard[process] = so_far
        while len(self._heard) > HEARD_KEPT:
            del self._heard[next(iter(self._heard))]
        self.total.requests += more
        left = 1.0
        for job, share in shares.items():
            if account := accounts.get(job):
                account.requests += more.times(share)
                left -= share
        if left > 1e-9:
            self.nobody.requests += more.times(left)

    def take_in(self, other: Meter) -> None:
        """Another leader has counted too, from the same books on."""
        self.nobody.keep_most(other.nobody)
        self.total.keep_most(other.total)
        for process, requests in other._heard.items():
            self._heard[process] = most(requests, self._heard.get(process, Requests()))
        for name, life in other.lives.items():
            mine = self.lives.setdefault(name, life)
            mine.billed_s = max(mine.billed_s, life.billed_s)
            if mine.age_s < life.age_s:
                # Our watch has run since before it was so old: its time would be billed once more.
                mine.age_s, mine.seen_s = life.age_s, None

    def to_json(self) -> dict[str, Any]:
        return {
            "lives": {
                name: [one.kind.pool, one.kind.type, one.kind.market.value, one.age_s, one.billed_s]
                for name, one in self.lives.items()
            },
            "heard": {name: list(astuple(one)) for name, one in self._heard.items()},
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
        meter._heard = {name: Requests(*one) for name, one in doc["heard"].items()}
        meter.nobody = Account.from_json(doc["nobody"])
        meter.total = Account.from_json(doc["total"])
        return meter


def most(a: Requests, b: Requests) -> Requests:
    """Of each count the larger one."""
    return Requests(*(max(x, y) for x, y in zip(astuple(a), astuple(b), strict=True)))


def _keep_most(mine: dict[K, float], other: Mapping[K, float]) -> None:
    for key, figure in other.items():
        mine[key] = max(figure, mine.get(key, 0.0))
