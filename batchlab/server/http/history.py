"""Recent history of the fleet and its queues, and the estimate of a job's remaining time.

Invariant: the history has a limited size, and all values of the history come from the memory of the manager. The
history of an earlier manager comes from the recorder, which records only while jobs run.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from batchlab.core import eta
from batchlab.core.api_types import EtaView, HistoryView, PoolCurve
from batchlab.core.eta import Pace, Room, StageWork
from batchlab.core.model import Control, JobId, LifecycleState
from batchlab.manager.manager import Manager
from batchlab.manager.state import LiveJob
from batchlab.server.job_views import running_tasks

INTERVAL_S = 2.0
MAX_MOMENTS = 900
"""Maximum number of stored moments of the history. The stored moments cover half an hour."""
MAX_SHOWN_MOMENTS = 300
"""Maximum number of moments in one answer.

If the history has more moments, an answer includes only every second or third moment.
"""

_CURVES = ("desired", "in_service", "pending", "running", "waiting", "in_flight")
_NONE = (0,) * len(_CURVES)


@dataclass(slots=True)
class History:
    """History of the fleet as moments in order of time. A moment has its time and, for each pool, the values of
    _CURVES.
    """

    moments: deque[tuple[float, dict[str, tuple[int, ...]]]] = field(default_factory=lambda: deque(maxlen=MAX_MOMENTS))

    def record(self, manager: Manager) -> None:
        """Record the manager's current values as a moment of the history."""
        now_s = manager.ports.clock.now_s()
        if not self.moments and manager.recorder:
            # The history starts with the values that an earlier manager has recorded.
            earlier: dict[float, dict[str, tuple[int, ...]]] = {}
            for name, points in manager.recorder.samples(now_s - MAX_MOMENTS * INTERVAL_S).items():
                for at_s, _, visible, in_flight, delayed, _, desired, booting, in_service, *_, busy_slots in points:
                    values = desired, in_service, booting, round(busy_slots), visible + delayed, in_flight
                    earlier.setdefault(at_s, {})[name] = values
            self.moments.extend(sorted(earlier.items()))
        running: Counter[str] = Counter()
        for worker_status in manager.registry.workers.values():
            running[worker_status.beat.pool] += worker_status.beat.busy
        current: dict[str, tuple[int, ...]] = {}
        for name, group in manager.groups.items():
            if name not in manager.pools:
                continue
            states = [instance.state for instance in group.instances]
            depth = manager.depths.get(name)
            current[name] = (
                group.desired,
                states.count(LifecycleState.IN_SERVICE),
                states.count(LifecycleState.PENDING),
                running[name],
                depth.visible + depth.delayed if depth else 0,
                depth.in_flight if depth else 0,
            )
        self.moments.append((now_s, current))

    def view(self) -> HistoryView:
        """Return the curves with at most MAX_SHOWN_MOMENTS moments. The newest moment is always included."""
        step = -(-len(self.moments) // MAX_SHOWN_MOMENTS) or 1
        moments = list(self.moments)[::-1][::step][::-1]
        curves = []
        for name in sorted({name for _, pools in moments for name in pools}):
            rows = [pools.get(name, _NONE) for _, pools in moments]
            columns = {curve: [row[i] for row in rows] for i, curve in enumerate(_CURVES)}
            curves.append(cast(PoolCurve, {"name": name, **columns}))
        return {"at_s": [round(at_s, 3) for at_s, _ in moments], "pools": curves}


async def record_history(history: History, manager: Callable[[], Manager]) -> None:
    """Record a moment of the current manager every INTERVAL_S seconds. The function never returns."""
    while True:
        if (current := manager()).is_leader.is_set():
            history.record(current)
        await asyncio.sleep(INTERVAL_S)


def eta_of(manager: Manager, job: JobId) -> EtaView:
    """Return the minimum and the maximum remaining time of a job, or the reason why the remaining time is unknown."""
    live = manager.lives.get(job)
    why = _unknown(live)
    if live and not why:
        stages, rooms = _work(manager, live), _rooms(manager, live)
        if any(stage.left and rooms[stage.pool].most < 1 for stage in stages):
            why = "the pool of the job may have no instances"
        elif estimate := eta.estimate(stages, rooms):
            return {
                "low_s": estimate.low_s,
                "high_s": estimate.high_s,
                "unmeasured": list(estimate.unmeasured),
                "text": eta.describe(estimate),
            }
        else:
            why = "no task of the job has been measured yet"
    return {"low_s": None, "high_s": None, "unmeasured": [], "text": f"unknown: {why}"}


def _unknown(live: LiveJob | None) -> str:
    """Return the reason why the job's remaining time cannot be estimated, or "" if an estimate is possible."""
    if live is None or live.record.state.ended:
        return "the job has ended" if live is None or live.ended.is_set() else "the job is about to end"
    if live.record.control is Control.CANCEL:
        return "the job is being canceled"
    if live.record.control is Control.PAUSE:
        return "the job is paused"
    if live.must_wait:
        return "the job has not started"
    return "a cost cap stops the job" if live.is_held else ""


def _work(manager: Manager, live: LiveJob) -> list[StageWork]:
    running = running_tasks(live, manager.registry.workers.values())
    works: list[StageWork] = []
    for stage in live.job.stages:
        counts = live.stages[stage.name].counts
        pace = live.measured.get(stage.name, Pace())
        if pace.bundles < eta.MIN_BUNDLES and pace.tasks < counts.succeeded:
            # If an earlier manager measured the task times, the ledger has only the sum of the times.
            pace = Pace().with_bundle(counts.succeeded, counts.run_s)
        works.append(
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
    return works


def _rooms(manager: Manager, live: LiveJob) -> Mapping[str, Room]:
    rooms: dict[str, Room] = {}
    for name in {stage.pool for stage in live.job.stages}:
        group, pool = manager.groups.get(name), manager.pools.get(name)
        if pool is None:
            rooms[name] = Room(0, 0)
            continue
        states = [instance.state for instance in group.instances] if group else []
        most = manager.autoscaler.user_capacity.get(name, pool.max_size)
        rooms[name] = Room(
            now=states.count(LifecycleState.IN_SERVICE) * pool.slots,
            most=most * pool.slots,
            per_instance=pool.slots,
            boot_s=pool.boot_s,
            rivals=len(manager.lives.pool(name).working.keys() - {live.id}),
        )
    return rooms
