"""Whose work an instance does, or waits for: by that its seconds and requests are billed.

Invariant: the shares of an instance sum to 1, or there are none at all, and then it is nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping

from batchlab.core.model import GroupView, JobId
from batchlab.manager.scaling.worker_registry import Registry
from batchlab.manager.state import LiveJob


class Shares:
    """Read off the jobs that are conducted and the last beats of their workers."""

    def __init__(self, lives: Mapping[JobId, LiveJob], registry: Registry) -> None:
        self._lives = lives
        self._registry = registry

    def waiting(self, view: GroupView) -> dict[JobId, float]:
        """Jobs that an idle instance of the pool waits for, in equal shares; where there are none,
        those that a cap holds back, for which there were more instances than the least."""
        pool = view.pool
        found = [live.id for live in self._lives.values() if live.has_work(pool.name)]
        if not found and len(view.instances) > pool.min_size:
            stages = ((live, s) for live in self._lives.values() for s in live.job.stages)
            found = list({one.id: 0 for one, s in stages if one.is_held and s.pool == pool.name})
        return dict.fromkeys(found, 1 / len(found)) if found else {}

    def of(self, instance: str, waiting: Mapping[JobId, float]) -> Mapping[JobId, float]:
        """Whom the instance works for: by the bundles that it runs, or has."""
        seen = self._registry.workers.get(instance)
        held = seen.beat.held if seen else ()
        jobs = [h.job for h in held if h.running] or [h.job for h in held]
        jobs = [job for job in jobs if job in self._lives]
        if not jobs:
            return waiting
        found: dict[JobId, float] = {}
        for job in jobs:
            found[job] = found.get(job, 0.0) + 1 / len(jobs)
        return found
