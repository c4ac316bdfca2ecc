"""Pools whose instances do not come up: launching is stopped in them, and tried again rarely.

An Auto Scaling group replaces for ever what never comes up, and every try is billed. After so many
in a row that ended before their worker reported, the pool keeps what it has in service, and what
was booting already; one instance more is tried after a pause, each pause twice as long as the one
before. The first that comes up ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from batchlab.core.model import GroupView, Instance, LifecycleState
from batchlab.core.ports import Clock
from batchlab.core.retry import doubled_s
from batchlab.manager.settings import ManagerSettings

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 1800.0
_ENDED = (LifecycleState.TERMINATING, LifecycleState.TERMINATED)


@dataclass(slots=True)
class _Pool:
    """What is known of one pool's launches."""

    booting: dict[str, float] = field(default_factory=dict)
    """Instances that were seen Pending and have not come up, since when (monotonic)."""
    failures: int = 0
    """In a row."""
    last: str = ""
    """The last of them, with what is said of its end."""
    pause_s: float = 0.0
    """Before the next try; 0 while nothing is held back."""
    stopped_s: float = 0.0
    """When it began to be held back (monotonic)."""
    retry_s: float = 0.0
    """When that is (monotonic)."""


class Boots:
    """Counts what does not come up, and says what may be launched."""

    def __init__(
        self, clock: Clock, settings: ManagerSettings, has_reported: Callable[[str], bool]
    ) -> None:
        """`has_reported` says whether an instance's worker has ever told of itself."""
        self._clock = clock
        self._tries = settings.boot_tries
        self._pause_s = settings.boot_pause_s
        self._has_reported = has_reported
        self._pools: dict[str, _Pool] = {}

    def observe(self, views: Sequence[GroupView]) -> None:
        """See which instances have come up, and which never will."""
        for view in views:
            pool = self._pools.setdefault(view.pool.name, _Pool())
            for instance in view.instances:
                self._look_at(view.pool.name, pool, instance)
            there = {instance.id for instance in view.instances}
            for gone in pool.booting.keys() - there:
                del pool.booting[gone]

    def _look_at(self, name: str, pool: _Pool, instance: Instance) -> None:
        if instance.state is LifecycleState.PENDING and not self._has_reported(instance.id):
            pool.booting.setdefault(instance.id, self._clock.monotonic_s())
        elif instance.state not in _ENDED or self._has_reported(instance.id):
            if pool.booting.pop(instance.id, None) is not None:
                self._came_up(name, pool)
        elif instance.id in pool.booting and not _was_wanted(instance):
            self._failed(name, pool, instance, pool.booting.pop(instance.id))

    def _came_up(self, name: str, pool: _Pool) -> None:
        if pool.pause_s:
            log.warning("pool %s comes up again: it is scaled as ever", name, extra={"pool": name})
        pool.failures, pool.pause_s, pool.last = 0, 0.0, ""

    def _failed(self, name: str, pool: _Pool, instance: Instance, since_s: float) -> None:
        now_s = self._clock.monotonic_s()
        pool.failures += 1
        pool.last = f"{instance.id}: {instance.note.rstrip('.')}"
        if pool.failures < self._tries or not self._pause_s:
            return
        if not pool.pause_s:
            pool.pause_s, pool.stopped_s = self._pause_s, now_s
        elif since_s >= pool.retry_s:
            pool.pause_s = doubled_s(pool.pause_s, LONGEST_PAUSE_S)
        else:
            return  # launched before it was stopped: no try of its own
        pool.retry_s = now_s + pool.pause_s
        log.warning("%s", self.trouble(name), extra={"pool": name})

    def most(self, view: GroupView) -> int | None:
        """What desired capacity may be at the most; None where nothing is held back."""
        pool = self._pools.get(view.pool.name)
        if pool is None or not pool.pause_s:
            return None
        # Those that were launched side by side with the ones that failed may be whole: a Spot wave
        # takes some of a fleet while it boots.
        kept = sum(
            one.state is LifecycleState.IN_SERVICE
            or pool.booting.get(one.id, pool.stopped_s) < pool.stopped_s
            for one in view.instances
        )
        trial = int(self._clock.monotonic_s() >= pool.retry_s)
        return max(view.pool.min_size, min(view.pool.max_size, kept + trial))

    def try_now(self, name: str) -> None:
        """Somebody says that it is mended: the next try need not wait."""
        if pool := self._pools.get(name):
            pool.retry_s = min(pool.retry_s, self._clock.monotonic_s())

    def trouble(self, name: str) -> str:
        """What is wrong with the pool's launches, as a clause; "" where nothing is."""
        pool = self._pools.get(name)
        if pool is None or pool.failures < self._tries:
            return ""
        text = (
            f"the last {pool.failures} instances of pool {name} ended before their worker had "
            f"reported, the last was {pool.last}"
        )
        if not pool.pause_s:
            return f"{text}; its group goes on trying"
        left_s = pool.retry_s - self._clock.monotonic_s()
        when = f"the next is tried in {left_s:.0f} s" if left_s > 0 else "another is being tried"
        return f"{text}; launching is stopped, {when}"

    def stopped(self) -> dict[str, str]:
        """By pool, why it launches no more for now."""
        return {name: self.trouble(name) for name, pool in self._pools.items() if pool.pause_s}


def _was_wanted(instance: Instance) -> bool:
    """Whether its end was asked for: nobody waits for it to come up any more."""
    return instance.healthy and instance.note.startswith("terminated")
