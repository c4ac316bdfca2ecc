"""Fair-share policy of a grid, in the terms of AWS Batch's fair-share scheduling policy, as pure functions.

Jobs name a share by its share identifier. The policy gives each share a weight factor, and a lower weight factor means
a larger share. The use of a share is the number of slot seconds that its bundles took, and use decays with time. The
manager divides the outstanding bundles of a pool among the shares by their weighted use (see `places`).

Invariant: the functions depend only on their arguments. If all shares have work, their uses converge to the inverse
ratio of their weight factors.
"""

from __future__ import annotations

import heapq
import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import UsageError
from batchlab.core.protocol.field_checks import figure, flag, list_items, text, whole
from batchlab.core.text import count

if TYPE_CHECKING:
    from batchlab.core.job_definition import JobDef

DEFAULT_SHARE = "default"
"""Share of the jobs that do not name a share."""
MIN_WEIGHT, MAX_WEIGHT = 0.0001, 999.9999
DEFAULT_DECAY_S = 600.0
"""Decay of a policy that does not set the decay. AWS Batch has the same default."""
MAX_DECAY_S = 604_800.0
MAX_RESERVATION = 99
MAX_ENTRIES = 500
"""Maximum number of entries of a policy, and of shares whose use is counted in a pool."""
MAX_SLOTS = 10**9
MAX_IDENTIFIER = 255

_IDENTIFIER = re.compile(rf"[A-Za-z0-9]{{1,{MAX_IDENTIFIER}}}")


def share_of(job: JobDef) -> str:
    """Return the share to which the job belongs."""
    return job.share or DEFAULT_SHARE


def is_identifier(share: str) -> bool:
    """Return whether the text is a share identifier."""
    return _IDENTIFIER.fullmatch(share) is not None


def check_identifier(share: str) -> str:
    """Return the share identifier. Raise UsageError if the text is not a share identifier."""
    if is_identifier(share):
        return share
    raise UsageError(
        f"{share[:80]!r} is not a share identifier.", remedy=f"Write 1 to {MAX_IDENTIFIER} letters and digits."
    )


@dataclass(frozen=True, slots=True)
class ShareAttributes:
    """Entry of a policy. An identifier that ends in "*" applies to each share whose identifier has the prefix.

    `max_slots` is the number of slots that each share of the entry may use in each pool, or None without a limit.
    """

    identifier: str
    weight: float = 1.0
    max_slots: int | None = None

    def __post_init__(self) -> None:
        check_identifier(self.prefix if self.identifier != "*" else DEFAULT_SHARE)
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise UsageError(
                f"The weight factor {self.weight!r:.40} of share {self.identifier} is out of range.",
                remedy=f"Write {MIN_WEIGHT} to {MAX_WEIGHT}. A lower weight factor means a larger share.",
            )
        if self.max_slots is not None and not 1 <= self.max_slots <= MAX_SLOTS:
            raise UsageError(
                f"The limit of share {self.identifier} is {self.max_slots} slots.",
                remedy="Write at least 1, or leave the limit out.",
            )

    @property
    def prefix(self) -> str:
        """Return the identifier without the asterisk."""
        return self.identifier.removesuffix("*")

    def covers(self, share: str) -> bool:
        """Return whether the entry applies to the share."""
        if self.identifier.endswith("*"):
            return share.startswith(self.prefix)
        return share == self.identifier

    def overlaps(self, other: ShareAttributes) -> bool:
        """Return whether a share can exist to which both entries apply."""
        return self.covers(other.prefix) or other.covers(self.prefix)


_UNLISTED = ShareAttributes("*")


@dataclass(frozen=True, slots=True)
class SharePolicy:
    """Fair-share policy of a grid.

    The entries `shares` are in the order of their prefixes. `reservation` is the compute reservation in percent. With
    `only_listed`, a job may name only a share to which an entry applies.
    """

    shares: tuple[ShareAttributes, ...] = ()
    decay_s: float = DEFAULT_DECAY_S
    reservation: int = 0
    only_listed: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.decay_s <= MAX_DECAY_S:
            raise UsageError(
                f"The share decay is {self.decay_s!r:.40} s.", remedy="Write a time above 0 s, and at most 7 days."
            )
        if not 0 <= self.reservation <= MAX_RESERVATION:
            raise UsageError(
                f"The compute reservation is {self.reservation} %.", remedy=f"Write 0 to {MAX_RESERVATION} percent."
            )
        if len(self.shares) > MAX_ENTRIES:
            raise UsageError(f"The policy has {count(len(self.shares), 'share')}.", remedy=f"Keep {MAX_ENTRIES}.")
        object.__setattr__(self, "shares", tuple(sorted(self.shares, key=_by_prefix)))
        # If an entry overlaps a later entry, all entries between them have the same prefix and overlap too.
        for one, other in pairwise(self.shares):
            if one.overlaps(other):
                raise UsageError(
                    f"The shares {one.identifier} and {other.identifier} of the policy overlap.",
                    remedy=f"`batchlab share remove {one.identifier}` removes one of them.",
                )

    def entry(self, share: str) -> ShareAttributes | None:
        """Return the entry of the policy that applies to a share, or None."""
        # Entries do not overlap, so only the entry with the last prefix up to the identifier can apply.
        n = bisect_right(self.shares, share, key=lambda one: one.prefix)
        return self.shares[n - 1] if n and self.shares[n - 1].covers(share) else None

    def attributes(self, share: str) -> ShareAttributes:
        """Return the attributes of a share. A share without an entry has the weight factor 1."""
        return replace(self.rule(share), identifier=share)

    def rule(self, share: str) -> ShareAttributes:
        """Return the entry that applies to a share, or else an entry for all shares without an entry."""
        return self.entry(share) or _UNLISTED

    def check_share(self, share: str) -> None:
        """Raise UsageError if no job may name the share. The share of the jobs that name no share is always
        permitted."""
        if self.only_listed and share != DEFAULT_SHARE and self.entry(share) is None:
            raise UsageError(
                f"The fair-share policy of the grid does not list the share {share[:80]!r}.",
                remedy="Name a share of `batchlab share list`, or leave the share out.",
            )

    def with_share(self, entry: ShareAttributes) -> SharePolicy:
        """Return the policy with the entry in place of any entry with the same identifier. Raise UsageError if another
        entry overlaps the entry."""
        others = tuple(other for other in self.shares if other.identifier != entry.identifier)
        for other in others:
            if entry.overlaps(other):
                raise UsageError(
                    f"The share {entry.identifier} overlaps the share {other.identifier} of the policy.",
                    remedy=f"`batchlab share remove '{other.identifier}'` removes {other.identifier} from the policy.",
                )
        return replace(self, shares=(*others, entry))

    def without_share(self, identifier: str) -> SharePolicy:
        """Return the policy without the entry. Raise UsageError if the policy does not have the entry."""
        others = tuple(other for other in self.shares if other.identifier != identifier)
        if len(others) == len(self.shares):
            raise UsageError(
                f"The policy has no entry for share {identifier[:80]!r}.",
                remedy="`batchlab share list` shows the policy.",
            )
        return replace(self, shares=others)

    def usable_slots(self, max_slots: int, active: int) -> int:
        """Return the slots of a pool that `active` shares may use. The compute reservation keeps the other slots free
        for shares that are not active."""
        if not self.reservation:
            return max_slots
        return math.floor(max_slots * (1 - (self.reservation / 100) ** max(1, active)) + 1e-9)

    def decayed(self, use_s: float, age_s: float) -> float:
        """Return the part of a use that still counts `age_s` later."""
        return use_s * math.exp(-max(0.0, age_s) / self.decay_s)

    def use_of(self, slots: int, took_s: float) -> float:
        """Return the decayed use of a bundle that has just ended after `took_s` on `slots` slots. The result is at most
        the use of the slots during one decay time, however long the bundle claims to have run."""
        return slots * self.decay_s * -math.expm1(-max(0.0, took_s) / self.decay_s)

    def to_json(self) -> dict[str, Any]:
        return {
            "decay_s": self.decay_s,
            "reservation": self.reservation,
            "only_listed": self.only_listed,
            "shares": [
                {"identifier": one.identifier, "weight": one.weight, "max_slots": one.max_slots} for one in self.shares
            ],
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> SharePolicy:
        """Return the policy in a document. Raise ValueError or UsageError for other documents."""
        shares = tuple(
            ShareAttributes(
                text(one["identifier"], MAX_IDENTIFIER + 1),
                figure(one["weight"]),
                None if one.get("max_slots") is None else whole(one["max_slots"]),
            )
            for one in list_items(doc["shares"])
        )
        only_listed = flag(doc.get("only_listed", False))
        return cls(shares, figure(doc["decay_s"]), whole(doc["reservation"]), only_listed)


def _by_prefix(entry: ShareAttributes) -> tuple[str, str]:
    return entry.prefix, entry.identifier


@dataclass(slots=True)
class ShareLoad:
    """Work of one share in one pool."""

    weight: float
    use_s: float
    """Decayed use in slot seconds of the ended bundles."""
    place_s: float
    """Slot seconds of an outstanding bundle."""
    max_places: int
    """Number of bundles that are outstanding or could be cut."""

    def key(self, places: int) -> float:
        """Return the weighted use of the share with the given number of places."""
        return self.weight * (self.use_s + places * self.place_s)


def places(loads: Mapping[str, ShareLoad], window: int) -> dict[str, int]:
    """Divide the places of a window among shares.

    One place after the other goes to the share whose weighted use, including its places so far, is the lowest. If two
    weighted uses are equal, the share with the first identifier gets the place. The time of the function does not
    depend on the size of the window.
    """
    if sum(load.max_places for load in loads.values()) <= window:
        return {share: load.max_places for share, load in loads.items()}
    # The bisection finds a weighted use up to which the shares get most of the places. The loop after the bisection
    # gives the last places away one by one.
    low, high = 0.0, max(load.key(load.max_places) for load in loads.values())
    for _ in range(60):
        middle = (low + high) / 2
        rest = window
        for load in loads.values():
            rest -= _places_up_to(middle, load)
        if rest < 0:
            high = middle
            continue
        low = middle
        if rest <= len(loads):
            break
    result = {share: _places_up_to(low, load) for share, load in loads.items()}
    heap = [(load.key(result[share]), share) for share, load in loads.items() if result[share] < load.max_places]
    heapq.heapify(heap)
    for _ in range(window - sum(result.values())):
        _, share = heap[0]
        result[share] += 1
        load = loads[share]
        if result[share] < load.max_places:
            heapq.heapreplace(heap, (load.key(result[share]), share))
        else:
            heapq.heappop(heap)
    return result


def _places_up_to(weighted_use: float, load: ShareLoad) -> int:
    """Return the number of places that the share gets before it reaches the weighted use."""
    free_s = weighted_use / load.weight - load.use_s
    return 0 if free_s <= 0 else min(load.max_places, math.ceil(free_s / load.place_s))
