"""What a forecast sees of its grid as time goes by: fleet, queues and backlog.

Invariant: looking changes nothing. Every change of a fleet is kept; between changes samples are as
far apart as keeps them few.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from batchlab.forecast.machines import Machines
from batchlab.model import GroupView, LifecycleState
from batchlab.ports import Depth
from batchlab.protocol import naming
from batchlab.scenario.record import PoolSample, Sample
from batchlab.sim.world import World

QUIET_KEPT = 1000
"""Samples without a change that are kept; beyond, every second one goes."""

_COMING = {
    LifecycleState.PENDING,
    LifecycleState.PENDING_WAIT,
    LifecycleState.PENDING_PROCEED,
}

Counts = tuple[int, int, int]
"""Desired capacity, instances in service and instances that come."""


@dataclass(slots=True)
class Watching:
    """Looks at the leading manager's groups; `spacing_s` is how far quiet samples are apart at
    first, `base_s` the loop's time at the run's second 0."""

    world: World
    machines: Machines
    spacing_s: float
    base_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    _quiet: list[int] = field(default_factory=list)
    """Places of samples that show no change."""
    _last: dict[str, Counts] = field(default_factory=dict)

    def begin(self, base_s: float) -> None:
        """The run begins now: what was seen before is no part of it."""
        self.base_s = base_s
        self.samples, self._quiet, self._last = [], [], {}

    async def look(self) -> None:
        """Take a sample where there is something to see."""
        manager = self.world.manager
        if manager is None or not manager.is_leader.is_set() or not manager.groups:
            return
        now_s = self.world.clock.monotonic_s() - self.base_s
        counts = {name: self._counts(view, now_s) for name, view in manager.groups.items()}
        is_new = counts != self._last
        if not is_new and self.samples and now_s - self.samples[-1].at_s < self.spacing_s:
            return
        self._last = counts
        pools = {}
        waiting = in_flight = 0
        for name, (desired, there, coming) in counts.items():
            backlog = manager.autoscaler.backlog(name)
            pools[name] = PoolSample(desired, there, coming, backlog.tasks, backlog.seconds)
            depth: Depth = await self.world.queue.depth(naming.tasks_queue(name))
            waiting += depth.visible + depth.delayed
            in_flight += depth.in_flight
        if not is_new:
            self._quiet.append(len(self.samples))
        self.samples.append(Sample(now_s, pools, waiting, in_flight))
        if len(self._quiet) > QUIET_KEPT:
            self._thin()

    def _counts(self, view: GroupView, now_s: float) -> Counts:
        there = coming = 0
        lives = self.machines.lives
        for instance in view.instances:
            if instance.state is LifecycleState.IN_SERVICE:
                there += 1
                life = lives[instance.id]
                if life.ready_s is None:
                    life.ready_s = now_s
            elif instance.state in _COMING:
                coming += 1
        return view.desired, there, coming

    def _thin(self) -> None:
        gone = set(self._quiet[::2])
        kept = [(n, one) for n, one in enumerate(self.samples) if n not in gone]
        quiet = set(self._quiet) - gone
        self.samples = [one for _, one in kept]
        self._quiet = [place for place, (n, _) in enumerate(kept) if n in quiet]
        self.spacing_s *= 2
