"""Which port calls go wrong, and how: drawn from a seed, or replayed from a list.

Invariant: every call has an identity (actor, number of the call), and what is drawn for it depends
on nothing else. So a fault can be left out, and latencies and chances elsewhere stay the same.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

LATENCY_S = (0.002, 0.020)
DELAY_S = (1.0, 60.0)


class FaultKind(StrEnum):
    """What may happen to a port call; the values name the fields of FaultRates."""

    KILL_BEFORE = "kill_before"
    KILL_AFTER = "kill_after"
    THROTTLED = "throttled"
    UNREACHABLE = "unreachable"
    ANSWER_LOST = "answer_lost"
    DELAYED = "delayed"
    DUPLICATED = "duplicated"
    LOST = "lost"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class FaultRates:
    """Probability of each fault per port call that it applies to."""

    kill_before: float = 0.0
    """The actor is killed before the call takes effect."""
    kill_after: float = 0.0
    """The actor is killed after the effect, before it sees the answer."""
    throttled: float = 0.0
    """Throttled is raised, without effect."""
    unreachable: float = 0.0
    """Unreachable is raised, without effect."""
    answer_lost: float = 0.0
    """Unreachable is raised, after the effect."""
    delayed: float = 0.0
    """The request or the answer takes very long."""
    duplicated: float = 0.0
    """Queue.send: one of the messages is sent twice."""
    lost: float = 0.0
    """Queue.send: one of the messages is not sent, though the call succeeds."""
    dropped: float = 0.0
    """Queue.receive: messages are received, but the answer is empty."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The fault `kind` at the `call`th port call (from 1) of the actors named `actor`."""

    actor: str
    call: int
    kind: FaultKind


@dataclass(slots=True)
class Point:
    """One port call and what was drawn for it; `chance` and `pick` are uniform in [0, 1)."""

    actor: str
    call: int
    request_s: float
    answer_s: float
    chance: float
    pick: float


_APPLIES = {
    FaultKind.DUPLICATED: "queue.send",
    FaultKind.LOST: "queue.send",
    FaultKind.DROPPED: "queue.receive",
}


class Faults:
    """The faults of one run, shared by all wrapped ports; it also gives calls their latency.

    `budget` limits how many of a kind are injected (all kinds unlimited by default); `latency_s`
    bounds how long request and answer together take, `delay_s` what DELAYED adds.
    """

    def __init__(
        self,
        rng: random.Random,
        rates: FaultRates = FaultRates(),
        *,
        budget: Mapping[FaultKind, int] | None = None,
        latency_s: tuple[float, float] = LATENCY_S,
        delay_s: tuple[float, float] = DELAY_S,
    ) -> None:
        """Raises ValueError where the rates sum up to more than 1."""
        if sum(getattr(rates, field.name) for field in fields(rates)) > 1:
            raise ValueError(f"fault rates sum up to more than 1: {rates}")
        self.injected: list[Fault] = []
        """What has been injected, in order; from_list replays it."""
        self._seed = rng.getrandbits(64)
        self._rates = rates
        self._budget = dict(budget or {})
        self._half_s = (latency_s[0] / 2, (latency_s[1] - latency_s[0]) / 2)
        self._delay_s = delay_s
        self._script: dict[tuple[str, int], FaultKind] | None = None
        self._streams: dict[str, random.Random] = {}
        self._calls: dict[str, int] = {}
        self._ladders: dict[str, list[tuple[float, FaultKind]]] = {}

    @classmethod
    def from_list(
        cls,
        faults: Iterable[Fault],
        rng: random.Random,
        *,
        latency_s: tuple[float, float] = LATENCY_S,
        delay_s: tuple[float, float] = DELAY_S,
    ) -> Faults:
        """Exactly these faults. With `rng` seeded as in the run that injected them, a replay.

        A fault that does not apply to the call at its point (a lost message, but the call is no
        send) does not happen: that occurs when a list was shortened or the code has changed.
        """
        replay = cls(rng, latency_s=latency_s, delay_s=delay_s)
        replay._script = {(fault.actor, fault.call): fault.kind for fault in faults}
        return replay

    @property
    def calls(self) -> Mapping[str, int]:
        """Port calls so far by actor: the crash points to enumerate."""
        return self._calls

    @property
    def counts(self) -> Counter[FaultKind]:
        """How many of each kind have been injected."""
        return Counter(fault.kind for fault in self.injected)

    def next(self, actor: str) -> Point:
        """The actor's next call, with its latency. Takes a fixed number of draws per call."""
        stream = self._streams.get(actor)
        if stream is None:
            # Not hash(): it differs per process. A text seed is hashed with SHA-512.
            stream = random.Random(f"{self._seed}/{actor}")  # noqa: S311 - no cryptography
            self._streams[actor] = stream
            self._calls[actor] = 0
        self._calls[actor] += 1
        draw = stream.random
        low, width = self._half_s
        return Point(
            actor,
            self._calls[actor],
            request_s=low + width * draw(),
            answer_s=low + width * draw(),
            chance=draw(),
            pick=draw(),
        )

    def strike(self, point: Point, label: str) -> FaultKind | None:
        """Which fault, if any, happens now to the call `label` ("queue.send") at `point`."""
        if self._script is None:
            kind = self._drawn(point.chance, label)
        else:
            kind = self._script.get((point.actor, point.call))
            if kind is not None and _APPLIES.get(kind, label) != label:
                kind = None
        if kind is None:
            return None
        left = self._budget.get(kind)
        if left is not None:
            if left <= 0:
                return None
            self._budget[kind] = left - 1
        self.injected.append(Fault(point.actor, point.call, kind))
        return kind

    def delay_s(self, point: Point) -> tuple[float, float]:
        """What DELAYED adds to the request and to the answer: one of them is 0."""
        low, high = self._delay_s
        late_answer, fraction = divmod(point.pick * 2, 1)
        extra_s = low + (high - low) * fraction
        return (0.0, extra_s) if late_answer else (extra_s, 0.0)

    def _drawn(self, chance: float, label: str) -> FaultKind | None:
        ladder = self._ladders.get(label)
        if ladder is None:
            ladder, top = [], 0.0
            for kind in FaultKind:
                rate: float = getattr(self._rates, kind.value)
                if rate > 0 and _APPLIES.get(kind, label) == label:
                    top += rate
                    ladder.append((top, kind))
            self._ladders[label] = ladder
        for top, kind in ladder:
            if chance < top:
                return kind
        return None
