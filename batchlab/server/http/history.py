"""Recent history of the fleet and its queues, and the estimate of a job's remaining time.

Invariant: the history has a limited size, and all values come from the memory of the manager. The
history of an earlier manager comes from the recorder, which records only while jobs run.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from batchlab.core import eta
from batchlab.core.api_types import EtaView, HistoryView, PoolCurve
from batchlab.core.eta import Pace, Room, StageWork
from batchlab.core.model import Control, JobId, JobState, LifecycleState
from batchlab.manager.manager import Manager
from batchlab.manager.recorded_data import Point
from batchlab.manager.state import LiveJob
from batchlab.server.job_views import running_tasks

INTERVAL_S = 2.0
MAX_MOMENTS = 900
"""Number of stored moments, which cover half an hour."""
MAX_SHOWN_MOMENTS = 300
"""Maximum number of moments in one answer. If there are more, only every second or third one is
included."""

_NONE = (0, 0, 0, 0, 0, 0)
_NAMES = ("desired", "in_service", "pending", "running", "waiting", "in_flight")


@dataclass(slots=True)
class History:
    """Moments in order: the time, and for each pool the values of PoolCurve."""

    moments: deque[tuple[float, dict[str, tuple[int, ...]]]] = field(default_factory=lambda: deque(maxlen=MAX_MOMENTS))

    def look(self, manager: Manager) -> None:
        """Record the current values of the manager."""
        now_s = manager.ports.clock.now_s()
        if not self.moments and manager.recorder:
            self._recall(manager.recorder.samples(now_s - MAX_MOMENTS * INTERVAL_S))
        running: dict[str, int] = {}
        for worker_status in manager.registry.workers.values():
            running[worker_status.beat.pool] = running.get(worker_status.beat.pool, 0) + worker_status.beat.busy
        seen_now: dict[str, tuple[int, ...]] = {}
        for name, group in manager.groups.items():
            if name not in manager.pools:
                continue
            states = [instance.state for instance in group.instances]
            depth = manager.depths.get(name)
            seen_now[name] = (
                group.desired,
                states.count(LifecycleState.IN_SERVICE),
                states.count(LifecycleState.PENDING),
                running.get(name, 0),
                depth.visible + depth.delayed if depth else 0,
                depth.in_flight if depth else 0,
            )
        self.moments.append((now_s, seen_now))

    def _recall(self, samples: Mapping[str, Sequence[Point]]) -> None:
        """Start with the values of the recorder."""
        earlier: dict[float, dict[str, tuple[int, ...]]] = {}
        for name, points in samples.items():
            for point in points:
                earlier.setdefault(point[0], {})[name] = _recorded(point)
        self.moments.extend(sorted(earlier.items()))

    def view(self) -> HistoryView:
        """Return the curves with at most MAX_SHOWN_MOMENTS moments. The newest moment is always included."""
        step = -(-len(self.moments) // MAX_SHOWN_MOMENTS) or 1
        kept = list(self.moments)[::-1][::step][::-1]
        names = sorted({name for _, pools in kept for name in pools})
        return {
            "at_s": [round(at_s, 3) for at_s, _ in kept],
            "pools": [_curve(name, [pools.get(name, _NONE) for _, pools in kept]) for name in names],
        }


def _recorded(point: Point) -> tuple[int, ...]:
    """Convert a point of the recorder into the values of PoolCurve."""
    _, _, visible, in_flight, delayed, _, desired, booting, in_service, *_, busy_slots = point
    return desired, in_service, booting, round(busy_slots), visible + delayed, in_flight


def _curve(name: str, rows: list[tuple[int, ...]]) -> PoolCurve:
    desired, in_service, pending, running, waiting, in_flight = (
        [row[column] for row in rows] for column in range(len(_NAMES))
    )
    return {
        "name": name,
        "desired": desired,
        "in_service": in_service,
        "pending": pending,
        "running": running,
        "waiting": waiting,
        "in_flight": in_flight,
    }


async def record_history(history: History, manager: Callable[[], Manager]) -> None:
    """Record a moment of the current manager every INTERVAL_S seconds. Never return."""
    while True:
        if (now := manager()).is_leader.is_set():
            history.look(now)
        await asyncio.sleep(INTERVAL_S)


def eta_of(manager: Manager, job: JobId) -> EtaView:
    """Return the band of the remaining time of a job, or the reason why it is unknown."""
    live = manager.lives.get(job)
    if live is None or live.record.state.ended:
        return _none("it has ended" if live is None or live.ended.is_set() else "it is ending")
    if live.record.control is Control.CANCEL:
        return _none("it is being cancelled")
    if live.record.control is Control.PAUSE:
        return _none("it is paused")
    if live.record.state is JobState.SCHEDULED:
        return _none("it has not begun")
    if live.is_held:
        return _none("a cap on cost holds it back")
    stages = _work(manager, live)
    rooms = _rooms(manager, live)
    if any(stage.left and rooms[stage.pool].most < 1 for stage in stages):
        return _none("its pool may have no instances")
    found = eta.estimate(stages, rooms)
    if found is None:
        return _none("nothing of it has been measured yet")
    return {
        "low_s": found.low_s,
        "high_s": found.high_s,
        "unmeasured": list(found.unmeasured),
        "text": eta.describe(found),
    }


def _none(why: str) -> EtaView:
    return {"low_s": None, "high_s": None, "unmeasured": [], "text": f"unknown: {why}"}


def _work(manager: Manager, live: LiveJob) -> list[StageWork]:
    running = running_tasks(live, manager.registry.workers.values())
    stage_works: list[StageWork] = []
    for stage in live.job.stages:
        counts = live.stages[stage.name].counts
        pace = live.measured.get(stage.name, Pace())
        if pace.bundles < eta.MIN_BUNDLES and pace.tasks < counts.succeeded:
            # An earlier manager measured these tasks, and the ledger has only their sum.
            pace = Pace().with_bundle(counts.succeeded, counts.run_s)
        stage_works.append(
            StageWork(
                name=stage.name,
                pool=stage.pool,
                after=tuple(stage.after),
                chained=stage.chained,
                left=None if counts.planned is None else max(0, counts.planned - counts.terminal),
                running=running.get(stage.name, 0),
                slots=stage.slots,
                pace=pace,
            )
        )
    return stage_works


def _rooms(manager: Manager, live: LiveJob) -> Mapping[str, Room]:
    found: dict[str, Room] = {}
    for pool in {stage.pool for stage in live.job.stages}:
        group, known = manager.groups.get(pool), manager.pools.get(pool)
        if known is None:
            found[pool] = Room(0, 0)
            continue
        states = [instance.state for instance in group.instances] if group else []
        held = manager.autoscaler.user_capacity.get(pool)
        most = known.max_size if held is None else held
        rivals = sum(live_job.id != live.id and live_job.has_work(pool) for live_job in manager.lives.values())
        found[pool] = Room(
            now=states.count(LifecycleState.IN_SERVICE) * known.slots,
            most=most * known.slots,
            per_instance=known.slots,
            boot_s=known.boot_s,
            rivals=rivals,
        )
    return found
