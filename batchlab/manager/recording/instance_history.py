"""History of instances and workers while jobs ran, as rows for reports.

Invariant: the history is bounded. Rows that no live job needs are dropped first. The rows of a job
are found without reading older rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, islice, takewhile
from typing import Any

from batchlab.core.model import GroupView, Instance, LifecycleState
from batchlab.manager.recording.recorded_data import RecordedData
from batchlab.manager.scaling.worker_registry import WorkerRegistry

MOST_INSTANCES = 20_000
"""Limit for instances, and the same limit for workers."""
_GONE = LifecycleState.TERMINATED


class InstanceHistory:
    """Instances from the groups, and workers from their beats."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry
        self.living: dict[str, list[Any]] = {}
        """Instances that have not ended."""
        self.ended: dict[str, list[Any]] = {}
        """Ended instances, the latest last."""
        self.workers: dict[str, list[Any]] = {}
        """Workers, the most recently seen last."""

    def note_instances(
        self, views: Iterable[GroupView], now_s: float, since_s: Callable[[], float]
    ) -> None:
        """Record the instances of the groups. `since_s()` is when recording began."""
        there: set[str] = set()
        for view in views:
            for instance in view.instances:
                there.add(instance.id)
                self._note(instance, view, now_s, since_s)
        for one in [name for name in self.living if name not in there]:
            self.living[one][7] = _GONE.value
            self._end(one, now_s)

    def _note(
        self, instance: Instance, view: GroupView, now_s: float, since_s: Callable[[], float]
    ) -> None:
        known = self.living.get(instance.id) or self.ended.get(instance.id)
        if known is None:
            if instance.state is _GONE and instance.launched_s < since_s():
                # the instance ended before the recording; a group lists ended instances for a while
                return
            launched_s = round(instance.launched_s, 3)
            known = [instance.pool, "", "", "", launched_s, None, None, "", "", view.pool.slots]
            self.living[instance.id] = known
        machine = instance.machine
        spot = instance.id in self._registry.spot
        type_ = machine.type or view.pool.instance_type
        known[1:4] = type_, machine.zone, "spot" if spot else machine.market.value
        known[7] = instance.state.value
        known[8] = instance.note or known[8]
        if instance.state is LifecycleState.IN_SERVICE and known[5] is None:
            known[5] = round(now_s, 3)
        if instance.state is _GONE and known[6] is None:
            self._end(instance.id, now_s)

    def _end(self, instance: str, now_s: float) -> None:
        known = self.ended[instance] = self.living.pop(instance)
        known[6] = round(now_s, 3)

    def note_workers(self, now_s: float) -> None:
        """Record the workers with beats."""
        for seen in self._registry.workers.values():
            beat = seen.beat
            known = self.workers.pop(beat.worker, None)
            if known is None:
                known = [beat.instance, beat.pool, beat.slots, round(now_s, 3), 0.0]
            known[4] = round(now_s, 3)
            self.workers[beat.worker] = known

    def of(self, pools: Collection[str], since_s: float, most: int | None) -> RecordedData:
        """Return the rows of these pools since `since_s`, at most `most` of each kind."""
        ended = takewhile(lambda one: one[1][6] >= since_s, reversed(self.ended.items()))
        lately = takewhile(lambda one: one[1][4] >= since_s, reversed(self.workers.items()))
        there = chain(self.living.items(), ended)
        return {
            "instances": dict(islice(_in_pools(there, pools, 0), most)),
            "workers": dict(islice(_in_pools(lately, pools, 1), most)),
        }

    def forget(self, since_s: float) -> None:
        """Drop rows that ended before `since_s`, and the oldest rows above the limit."""
        too_many = len(self.living) + len(self.ended) - MOST_INSTANCES
        for name, instance in list(self.ended.items()):
            if instance[6] < since_s or too_many > 0:
                del self.ended[name]
                too_many -= 1
        beating = {seen.beat.worker for seen in self._registry.workers.values()}
        gone = [name for name in self.workers if name not in beating]
        too_many = len(self.workers) - MOST_INSTANCES
        for name in gone:
            if self.workers[name][4] < since_s or too_many > 0:
                del self.workers[name]
                too_many -= 1

    def to_doc(self) -> RecordedData:
        """Return all rows in the form of RecordedData."""
        return {"instances": {**self.ended, **self.living}, "workers": self.workers}

    @classmethod
    def from_doc(cls, doc: Mapping[str, Any], registry: WorkerRegistry) -> InstanceHistory:
        """Read rows written by `to_doc`, possibly of another leader."""
        found = cls(registry)
        found.living = {name: list(one) for name, one in doc["instances"].items()}
        ended = sorted((one[6], name) for name, one in found.living.items() if one[6] is not None)
        found.ended = {name: found.living.pop(name) for _, name in ended}
        workers = sorted((one[4], name) for name, one in doc["workers"].items())
        found.workers = {name: list(doc["workers"][name]) for _, name in workers}
        return found


def _in_pools(
    rows: Iterable[tuple[str, list[Any]]], pools: Collection[str], column: int
) -> Iterator[tuple[str, list[Any]]]:
    """Return the rows whose pool, in that column, is among these."""
    return (one for one in rows if one[1][column] in pools)
