"""Faults of port calls and of the world, drawn from a seed or replayed from a list.

Invariant: every port call and every draw of a world event has an identity (actor, number), which alone determines its
random values. The omission of a fault does not change the latencies and draws of other calls.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

LATENCY_S = (0.002, 0.020)
DELAY_S = (1.0, 60.0)
LATE_S = (1.0, 300.0)

WEATHER = "weather"
"""Label and actor name of world events, which are faults that happen without a port call."""

USER = "user"
"""Label of the requests of a user."""

CREATE = "objects.create"
"""Label of a conditional put."""

LOOK = "objects.get_if_changed"
"""Label of a read of a control object."""
SLOW_LOOKS_S = (4.0, 12.0)
"""Range of seconds that a slow answer to a read of a control object takes."""
SLOW_SHARE = 0.4
"""Share of a worker's reads of control objects that have slow answers, in a world with slow reads."""


class FaultKind(StrEnum):
    """Kinds of faults that may hit a port call, the world (WEATHER), or a user's request (USER).

    A kind with a `label` hits only calls with the same label. The values of FaultKind are the field names of Weather.
    `meaning` describes the kind of fault in words.
    """

    label: str
    meaning: str

    def __new__(cls, value: str, label: str, meaning: str) -> FaultKind:
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.label = label
        kind.meaning = meaning
        return kind

    KILL_BEFORE = (
        "kill_before",
        "",
        "a process is killed before its port call (a call of S3, a queue, or another service) takes effect",
    )
    KILL_AFTER = (
        "kill_after",
        "",
        "a process is killed after its port call has taken effect, and before the process receives the answer",
    )
    THROTTLED = "throttled", "", "a service temporarily refuses a port call (status 503 of S3, throttling of SQS)"
    UNREACHABLE = "unreachable", "", "a port call does not take effect and does not receive an answer"
    ANSWER_LOST = "answer_lost", "", "a port call takes effect, but its answer is lost"
    DELAYED = "delayed", "", "a port call's request or answer takes up to a minute"
    CONFLICT = "conflict", CREATE, "a conditional PUT returns status 409 and does not take effect"
    DUPLICATED = "duplicated", "queue.send", "a sent message arrives twice"
    LOST = "lost", "queue.send", "a sent message never arrives, although the call succeeds"
    LATE = "late", "queue.send", "a sent message arrives up to five minutes late"
    DROPPED = (
        "dropped",
        "queue.receive",
        "a receive request hides messages, but its answer does not contain the messages",
    )
    REDELIVERED = ("redelivered", WEATHER, "a message is delivered again although its worker still holds it")
    VANISHED = "vanished", WEATHER, "a message is lost from its queue"
    PURGED = "purged", WEATHER, "a queue of tasks, events, or dead letters loses all its messages (purge)"
    EXPIRED = "expired", WEATHER, "a queue's older messages exceed their retention and are deleted"
    REMOVED = "removed", WEATHER, "a queue is deleted, as after the restart of an emulator"
    SHUFFLED = "shuffled", WEATHER, "the waiting messages of a queue change their order"
    CLOCK_JUMPED = "clock_jumped", WEATHER, "the wall clock of a process jumps forwards or backwards"
    STALLED = "stalled", WEATHER, "a process freezes for 5 to 60 s and then continues"
    CRASHED = "crashed", WEATHER, "an instance dies while it is booting, idle, or busy"
    SPOT_NOTICE = ("spot_notice", WEATHER, "an instance receives a Spot notice, and is killed 120 s later")
    SPOT_KILL = "spot_kill", WEATHER, "a Spot instance is terminated without a notice"
    NO_CAPACITY = "no_capacity", WEATHER, "launches of instances fail for a while"
    SCALED_IN = "scaled_in", WEATHER, "a person terminates an idle or busy instance"
    SCALED_BY_HAND = "scaled_by_hand", WEATHER, "a person sets the desired capacity or the limits of a pool for a while"
    SECOND_MANAGER = "second_manager", WEATHER, "another manager starts while the leader runs"
    MANAGER_STOPPED = "manager_stopped", WEATHER, "a manager receives SIGTERM"
    LEDGER_LOST = "ledger_lost", WEATHER, "the ledger loses all its rows, and is rebuilt after a while"
    LEDGER_REBUILT = "ledger_rebuilt", WEATHER, "the ledger is rebuilt while jobs run"
    CANCELLED = "cancelled", USER, "a user cancels a job"
    PAUSED = "paused", USER, "a user pauses a job"
    RESUMED = "resumed", USER, "a user resumes a job"
    RETRIED = "retried", USER, "a user retries a job"
    RESUBMITTED = "resubmitted", USER, "a user submits a job again with the same client token"
    # New kinds must be added at the end, so that earlier kinds keep their random draws.
    CORRUPTED = (
        "corrupted",
        WEATHER,
        "a worker begins to send wrong messages and write wrong objects, within the rights of its role",
    )
    TORN = "torn", WEATHER, "the object store keeps only the beginning of an object"
    MISSING = "missing", WEATHER, "the object store loses an object"
    ROTTED = "rotted", WEATHER, "the object store changes one bit of an object"
    UNSYNCED = (
        "unsynced",
        WEATHER,
        "the power fails: every process ends, and writes that were not acknowledged may be lost",
    )
    FROZEN = "frozen", WEATHER, "a worker freezes forever"

    def applies(self, label: str) -> bool:
        """Return whether the kind of fault can happen at a call or event with `label`."""
        if not self.label:
            return label not in (WEATHER, USER)
        return label == self.label


@dataclass(frozen=True, slots=True)
class Weather:
    """Probability of each kind of fault per port call, world event, or user request.

    With `varied`, each seed chooses its kinds of faults and their rates. With `timed`, each world also has a schedule.
    With `lies`, workers may begin to lie (CORRUPTED) in every world, and every world has additional jobs. With
    `storage`, objects may be damaged in every world, and every world has additional jobs. With `accounts`, the managers
    record the usage of each job. With `orphans`, no manager leads in every world until the fleet has ended. With
    `dependent`, jobs depend on earlier jobs of the world. With `speculative`, stages may have speculative copies, and
    some workers are slow. With `mended`, more tasks fail, and users retry some of them with mended inputs. With
    `shares`, every world has a fair-share policy and several shares. With `gpus`, the first pool has GPUs, and some
    stages need GPUs. With `audited`, the managers write an audit log, users retry with mended inputs, and a user
    changes the fair-share policy.
    """

    kill_before: float = 0.0
    kill_after: float = 0.0
    throttled: float = 0.0
    unreachable: float = 0.0
    answer_lost: float = 0.0
    delayed: float = 0.0
    conflict: float = 0.0
    duplicated: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    dropped: float = 0.0
    redelivered: float = 0.0
    vanished: float = 0.0
    purged: float = 0.0
    expired: float = 0.0
    removed: float = 0.0
    shuffled: float = 0.0
    clock_jumped: float = 0.0
    stalled: float = 0.0
    crashed: float = 0.0
    spot_notice: float = 0.0
    spot_kill: float = 0.0
    no_capacity: float = 0.0
    scaled_in: float = 0.0
    scaled_by_hand: float = 0.0
    second_manager: float = 0.0
    manager_stopped: float = 0.0
    ledger_lost: float = 0.0
    ledger_rebuilt: float = 0.0
    cancelled: float = 0.0
    paused: float = 0.0
    resumed: float = 0.0
    retried: float = 0.0
    resubmitted: float = 0.0
    corrupted: float = 0.0
    torn: float = 0.0
    missing: float = 0.0
    rotted: float = 0.0
    unsynced: float = 0.0
    frozen: float = 0.0
    varied: bool = False
    timed: bool = False
    lies: bool = False
    storage: bool = False
    accounts: bool = False
    shares: bool = False
    speculative: bool = False
    orphans: bool = False
    dependent: bool = False
    mended: bool = False
    gpus: bool = False
    audited: bool = False

    def rate(self, kind: FaultKind) -> float:
        rate: float = getattr(self, kind.value)
        return rate

    def of_seed(self, rng: random.Random, *, heaviness: float = 1.0) -> Weather:
        """Return the probabilities of faults for one seed."""
        if not self.varied:
            return self
        rates: dict[str, Any] = {k.value: self.rate(k) * rng.choice(_SHARES) * heaviness for k in FaultKind}
        drawn = replace(self, **rates, varied=False)
        if self.lies:
            drawn = replace(drawn, corrupted=self.corrupted)
        if self.speculative:
            drawn = replace(drawn, frozen=self.frozen, stalled=self.stalled)
        if self.storage:
            damages: dict[str, Any] = {kind.value: self.rate(kind) for kind in (*DAMAGES, FaultKind.UNSYNCED)}
            drawn = replace(drawn, **damages)
        return drawn


DAMAGES = (FaultKind.TORN, FaultKind.MISSING, FaultKind.ROTTED)
"""Kinds of damage to an object in the store."""

_SHARES = (0.0, 0.0, 0.3, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """Fault of one `kind` at a port call, world event, or user request.

    `call` is the number of the call among all calls of the actors named `actor`, counted from 1.
    """

    actor: str
    call: int
    kind: FaultKind


class Point(NamedTuple):
    """One port call and its random values. The random values `chance` and `pick` are uniform in [0, 1)."""

    actor: str
    call: int
    request_s: float
    answer_s: float
    chance: float
    pick: float


class Faults:
    """Source of the faults and latencies of one run, shared by all wrapped ports.

    `budget` limits the number of injected faults per kind. Faults of a kind without a budget are not limited.
    `latency_s` is the range of the total time of a request and its answer. `delay_s` is the range of the additional
    time of a DELAYED fault. Without `answers`, the request takes the whole latency, which halves the number of waits.
    Runs whose answers are never lost can set `answers` to False.
    """

    def __init__(
        self,
        rng: random.Random,
        rates: Weather = Weather(),
        *,
        budget: Mapping[FaultKind, int] | None = None,
        latency_s: tuple[float, float] = LATENCY_S,
        delay_s: tuple[float, float] = DELAY_S,
        answers: bool = True,
    ) -> None:
        """Raise ValueError if the rates of one kind of call add up to more than 1."""
        for label in sorted({kind.label for kind in FaultKind}):
            if sum(rates.rate(kind) for kind in FaultKind if kind.applies(label)) > 1:
                raise ValueError(f"fault rates sum up to more than 1: {rates}")
        self.intercept: Callable[..., Awaitable[Any]] | None = None
        """Substitute of a test for the effect of each call, called with (actor, call, label, effect)."""
        self.slow_looks_s: tuple[float, float] | None = None
        """Range of seconds that slow answers to reads of control objects take."""
        self.injected: list[Fault] = []
        """Injected faults in the order of their injection, for a replay by `from_list`."""
        self._seed = rng.getrandbits(64)
        self._rates = rates
        self._budget = dict(budget or {})
        self._half_s = (latency_s[0] / 2, (latency_s[1] - latency_s[0]) / 2)
        self._answers = answers
        self._delay_s = delay_s
        self._script: dict[tuple[str, int], FaultKind] | None = None
        self._draws: dict[str, Callable[[], float]] = {}
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
        """Return a source of exactly the listed faults.

        The `rng` of an earlier run gives the same latencies as the earlier run. A fault that does not fit its call is
        skipped, for example a lost message at a call that does not send. A fault may not fit its call if the list was
        shortened or the code has changed.
        """
        replay = cls(rng, latency_s=latency_s, delay_s=delay_s)
        replay._script = {(fault.actor, fault.call): fault.kind for fault in faults}
        return replay

    @property
    def calls(self) -> Mapping[str, int]:
        """Number of port calls so far, by actor. A test can crash an actor at each of its port calls."""
        return self._calls

    @property
    def counts(self) -> Counter[FaultKind]:
        """Number of injected faults, by kind."""
        return Counter(fault.kind for fault in self.injected)

    def next(self, actor: str) -> Point:
        """Return the actor's next call, with its latency. The number of random draws per call is fixed."""
        draw = self._draws.get(actor)
        if draw is None:
            # Python's hash() differs between processes, but the random source hashes a text seed with SHA-512.
            draw = random.Random(f"{self._seed}/{actor}").random  # noqa: S311 - no cryptography
            self._draws[actor] = draw
            self._calls[actor] = 0
        self._calls[actor] = call = self._calls[actor] + 1
        low, width = self._half_s
        if not self._answers:
            return Point(actor, call, 2 * (low + width * draw()), 0.0, draw(), 0.0)
        request_s, answer_s = low + width * draw(), low + width * draw()
        return Point(actor, call, request_s, answer_s, draw(), draw())

    def is_plain(self, point: Point, label: str) -> bool:
        """Return whether the call `label` has neither a fault nor a substitute nor a slow answer."""
        return self.intercept is None and self.slow_looks_s is None and self.due(point, label) is None

    def strike(self, point: Point, label: str) -> FaultKind | None:
        """Inject and return the fault, if any, that hits the call `label`, such as "queue.send", at `point`."""
        kind = self.due(point, label)
        if kind is not None:
            self.happened(point, kind)
        return kind

    def due(self, point: Point, label: str) -> FaultKind | None:
        """Return the fault that `strike` would return, without injecting the fault.

        The caller of `due` calls `happened` if the fault takes effect.
        """
        if self._script is None:
            kind = self._draw(point.chance, label)
        else:
            kind = self._script.get((point.actor, point.call))
            if kind is not None and not kind.applies(label):
                kind = None
        return None if kind is None or self._budget.get(kind, 1) <= 0 else kind

    def happened(self, point: Point, kind: FaultKind) -> None:
        """Record that the fault has been injected."""
        if kind in self._budget:
            self._budget[kind] -= 1
        self.injected.append(Fault(point.actor, point.call, kind))

    def delay_s(self, point: Point) -> tuple[float, float]:
        """Return the delays of the request and of the answer by a DELAYED fault. One of the delays is 0."""
        low, high = self._delay_s
        late_answer, fraction = divmod(point.pick * 2, 1)
        extra_s = low + (high - low) * fraction
        return (0.0, extra_s) if late_answer else (extra_s, 0.0)

    def slow_s(self, point: Point, label: str) -> float:
        """Return the additional seconds until the answer to a worker's read of a control object."""
        if self.slow_looks_s is None or label != LOOK or not point.actor.startswith("worker"):
            return 0.0
        rng = random.Random(f"{self._seed}/{point.actor}/{point.call}/slow")  # noqa: S311
        return rng.uniform(*self.slow_looks_s) if rng.random() < SLOW_SHARE else 0.0

    def _draw(self, chance: float, label: str) -> FaultKind | None:
        ladder = self._ladders.get(label)
        if ladder is None:
            ladder, top = [], 0.0
            for kind in FaultKind:
                rate = self._rates.rate(kind)
                if rate > 0 and kind.applies(label):
                    top += rate
                    ladder.append((top, kind))
            self._ladders[label] = ladder
        for top, kind in ladder:
            if chance < top:
                return kind
        return None
