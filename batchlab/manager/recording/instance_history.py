"""Which instances and workers there were while jobs ran, and when: rows for reports.

Invariant: bounded, and what is dropped first is what no live job can have had. What a job had can
be told without looking at what was before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, islice, takewhile
from typing import Any

from batchlab.core.model import GroupView, Instance, LifecycleState
from batchlab.manager.recording.recorded_data import Doc
from batchlab.manager.scaling.worker_registry import Registry

MOST_INSTANCES = 20_000
"""And as many workers."""
_GONE = LifecycleState.TERMINATED


class Roster:
    """As the groups and the workers' beats have told it."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.living: dict[str, list[Any]] = {}
        """Instances that have not ended."""
        self.ended: dict[str, list[Any]] = {}
        """Those that have, the last one last."""
        self.workers: dict[str, list[Any]] = {}
        """The one that was seen last is the last one."""

    def note_instances(
        self, views: Iterable[GroupView], now_s: float, since_s: Callable[[], float]
    ) -> None:
        """See who is there; nobody has looked before `since_s()`."""
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
                return  # of a time when nobody looked: a group tells of its dead for a while
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
        """See whose beats have come."""
        for seen in self._registry.workers.values():
            beat = seen.beat
            known = self.workers.pop(beat.worker, None)
            if known is None:
                known = [beat.instance, beat.pool, beat.slots, round(now_s, 3), 0.0]
            known[4] = round(now_s, 3)
            self.workers[beat.worker] = known

    def of(self, pools: Collection[str], since_s: float, most: int | None) -> Doc:
        """Who was in these pools since then, so many of each at the most."""
        ended = takewhile(lambda one: one[1][6] >= since_s, reversed(self.ended.items()))
        lately = takewhile(lambda one: one[1][4] >= since_s, reversed(self.workers.items()))
        there = chain(self.living.items(), ended)
        return {
            "instances": dict(islice(_of(there, pools, 0), most)),
            "workers": dict(islice(_of(lately, pools, 1), most)),
        }

    def forget(self, since_s: float) -> None:
        """Drop who had gone before, and beyond the most the oldest."""
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

    def to_doc(self) -> Doc:
        """All of it, as `recorded.Doc` has it."""
        return {"instances": {**self.ended, **self.living}, "workers": self.workers}

    @classmethod
    def from_doc(cls, doc: Mapping[str, Any], registry: Registry) -> Roster:
        """What `to_doc` gave, or another leader's."""
        found = cls(registry)
        found.living = {name: list(one) for name, one in doc["instances"].items()}
        ended = sorted((one[6], name) for name, one in found.living.items() if one[6] is not None)
        found.ended = {name: found.living.pop(name) for _, name in ended}
        workers = sorted((one[4], name) for name, one in doc["workers"].items())
        found.workers = {name: list(doc["workers"][name]) for _, name in workers}
        return found


def _of(
    rows: Iterable[tuple[str, list[Any]]], pools: Collection[str], column: int
) -> Iterator[tuple[str, list[Any]]]:
    """The rows whose pool, in that column, is among these."""
    return (one for one in rows if one[1][column] in pools)
