"""What a scenario's faults do to port calls and messages, and what they have done so far.

Invariant: only what happened is counted, where it happens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from batchlab.adapters.sim.queue import SimQueue
from batchlab.ports import MAX_BATCH, MAX_DELAY_S, MAX_WAIT_S, Clock, Outgoing
from batchlab.scenario.streams import Stream
from batchlab.sim.faults import FaultKind, Faults, Point

LATE_S = (1.0, 60.0)
"""How much later SQS delivers a message that it delivers late."""


@dataclass(slots=True)
class Trouble:
    """What services do to whom just now. `cut_off` are actors that reach no service, each as often
    as it was cut off; the rates are shares of all S3 requests and of all messages sent."""

    cut_off: Counter[str] = field(default_factory=Counter)
    s3_errors: float = 0.0
    duplicates: float = 0.0
    delays: float = 0.0
    hits: Counter[str] = field(default_factory=Counter)
    """How often each has happened: by "s3", "duplicates", "delays" or an actor's name."""


class TroubledFaults(Faults):
    """The latencies of a grid's calls, and the faults of a scenario's timeline."""

    def __init__(
        self, rng: random.Random, trouble: Trouble, *, latency_s: tuple[float, float]
    ) -> None:
        super().__init__(rng, latency_s=latency_s, answers=False)
        self._trouble = trouble

    def due(self, point: Point, label: str) -> FaultKind | None:
        """See Faults."""
        trouble = self._trouble
        if trouble.cut_off and trouble.cut_off.get(point.actor):
            return FaultKind.UNREACHABLE
        if trouble.s3_errors and label.startswith("objects.") and point.chance < trouble.s3_errors:
            return FaultKind.THROTTLED
        return None

    def happened(self, point: Point, kind: FaultKind) -> None:
        """See Faults."""
        what = "s3" if kind is FaultKind.THROTTLED else point.actor
        self._trouble.hits[what] += 1


class TroubledQueue(SimQueue):
    """SQS that may deliver a message twice, or late; `squeeze` divides how late. Which ones follows
    from `seed` and the message, and from nothing else that was sent."""

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        trouble: Trouble,
        *,
        seed: int,
        squeeze: float = 1.0,
        fifo: bool = False,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        super().__init__(clock, rng, fifo=fifo, max_wait_s=max_wait_s)
        self._trouble = trouble
        self._seed = seed
        self._squeeze = squeeze

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        """See SimQueue."""
        if not self._trouble.duplicates and not self._trouble.delays:
            await super().send(queue, messages)
            return
        told = list(map(self._late, messages))
        rate = self._trouble.duplicates
        twice = [one for one in told if self._luck("duplicates", one).unit() < rate]
        await super().send(queue, told)
        for start in range(0, len(twice), MAX_BATCH):
            await super().send(queue, twice[start : start + MAX_BATCH])
        self._trouble.hits["duplicates"] += len(twice)

    def _late(self, message: Outgoing) -> Outgoing:
        luck = self._luck("delays", message)
        if luck.unit() >= self._trouble.delays:
            return message
        self._trouble.hits["delays"] += 1
        least_s, most_s = LATE_S
        late_s = (least_s + (most_s - least_s) * luck.unit(1)) / self._squeeze
        return replace(message, delay_s=min(MAX_DELAY_S, message.delay_s + late_s))

    def _luck(self, what: str, message: Outgoing) -> Stream:
        return Stream(self._seed, what, message.body)
