"""Damage to objects in the store, and writes that a power cut may undo.

Invariant: the store damages only objects of the jobs in `vulnerable`. For jobs that are not in `vulnerable`, every
promise of the grid is checked.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from batchlab.adapters.memory.ledger import SimLedger
from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.model import JobId
from batchlab.core.ports import Clock
from batchlab.sim.faults import FaultKind


@dataclass(slots=True)
class Damage:
    """The damaged objects of one world. The job of a damaged object is also added to `touched`."""

    objects: SimObjects
    ledger: object
    touched: set[str]
    jobs: set[str]
    """Jobs that have a damaged object."""
    vulnerable: set[JobId] = field(default_factory=set)
    hit: dict[str, tuple[FaultKind, bytes | None]] = field(default_factory=dict)
    """Kind of damage and the content after the damage, by key."""

    _flushed: dict[str, Any] | None = None
    """State of the ledger after the last transaction that waited for the disk."""

    def save_ledger(self) -> None:
        """Save the current state of the ledger, because the state has reached the disk."""
        if isinstance(self.ledger, SimLedger):
            self._flushed = copy.deepcopy(vars(self.ledger))

    def lose_folds(self) -> None:
        """Restore the last saved state of the ledger."""
        if isinstance(self.ledger, SimLedger) and self._flushed is not None:
            vars(self.ledger).update(copy.deepcopy(self._flushed))

    def strike(self, kind: FaultKind, rng: random.Random) -> str | None:
        """Damage an object of a job in `vulnerable`.

        Return the key of the damaged object, or None if the jobs in `vulnerable` do not have objects.
        """
        groups: dict[str, list[str]] = {}
        for key in self.objects.names():
            parts = key.split("/")
            if parts[0] == "jobs" and parts[1] in self.vulnerable and key not in self.hit:
                groups.setdefault(group_of(key), []).append(key)
        if not groups:
            return None
        # A job has many outcomes and one definition, so the group of the object is chosen first.
        key = rng.choice(groups[rng.choice(sorted(groups))])
        before = self.objects.content(key)
        assert before is not None
        after = _damage(kind, before, rng)
        self.objects.damage(key, after)
        self.hit[key] = kind, after
        self.touched.add(job_of(key))
        self.jobs.add(job_of(key))
        return key

    def standing(self, kinds: Collection[FaultKind]) -> list[str]:
        """Return the keys of objects with one of the kinds of damage and with no later change of content."""
        return [key for key, (kind, data) in self.hit.items() if kind in kinds and self.objects.content(key) == data]


def job_of(key: str) -> JobId:
    """Return the job that owns the object with the key."""
    return JobId(key.split("/")[1])


def group_of(key: str) -> str:
    """Return the group of objects that a key of a job belongs to, such as "outcomes"."""
    _, _, first, *rest = key.split("/")
    if not rest or first in ("final", "retries"):
        return first
    if rest[0] != "plan":
        return rest[0]
    return "cuts" if rest[2] == "cuts" else rest[2].partition("-")[0]


def _damage(kind: FaultKind, data: bytes, rng: random.Random) -> bytes | None:
    if kind is FaultKind.MISSING:
        return None
    if kind is FaultKind.TORN or not data:
        return data[: rng.randrange(len(data) + 1 if not data else len(data))]
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


SYNC_S = 0.1
"""Seconds after which a write has reached the disk, even if the writer has not received an answer."""


@dataclass(slots=True)
class Unsynced:
    """Record of the unacknowledged writes of one world."""

    clock: Clock
    _before: dict[str, tuple[bytes | None, float]] = field(default_factory=dict)
    """Content of each object before its first unacknowledged write, and the time of the write, by key."""

    def on_write(self, key: str, before: bytes | None) -> None:
        """Record an unacknowledged write of the object."""
        self._before.setdefault(key, (before, self.clock.monotonic_s()))

    def on_acknowledge(self, key: str) -> None:
        """Record that a writer of the object has received its answer, so the object is on the disk."""
        self._before.pop(key, None)

    def before(self) -> dict[str, bytes | None]:
        """Return the content before each write that a power cut may undo at the current time, by key."""
        since_s = self.clock.monotonic_s() - SYNC_S
        self._before = {key: write for key, write in self._before.items() if write[1] > since_s}
        return {key: before for key, (before, _) in self._before.items()}
