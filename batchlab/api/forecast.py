"""How long a job still takes, from what its manager has in memory."""

from __future__ import annotations

from collections.abc import Mapping

from batchlab import eta
from batchlab.eta import Pace, Room, StageWork
from batchlab.manager.live import LiveJob
from batchlab.manager.manager import Manager
from batchlab.model import Control, JobId, JobState, LifecycleState
from batchlab.viewing import running_tasks
from batchlab.views import EtaView


def eta_of(manager: Manager, job: JobId) -> EtaView:
    """The band of a job that has not ended, or why there is none."""
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
    if any(one.left and rooms[one.pool].most < 1 for one in stages):
        return _none("its pool may have no instances")
    found = eta.estimate(stages, rooms)
    if found is None:
        return _none("nothing of it has been measured yet")
    return {
        "low_s": found.low_s,
        "high_s": found.high_s,
        "unmeasured": list(found.unmeasured),
        "text": eta.told(found),
    }


def _none(why: str) -> EtaView:
    return {"low_s": None, "high_s": None, "unmeasured": [], "text": f"unknown: {why}"}


def _work(manager: Manager, live: LiveJob) -> list[StageWork]:
    running = running_tasks(live, manager.registry.workers.values())
    found: list[StageWork] = []
    for stage in live.job.stages:
        counts = live.stages[stage.name].counts
        pace = live.measured.get(stage.name, Pace())
        if pace.bundles < eta.FEW and pace.tasks < counts.succeeded:
            # By a manager before us, which has told the ledger their sum.
            pace = Pace().with_bundle(counts.succeeded, counts.run_s)
        found.append(
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
    return found


def _rooms(manager: Manager, live: LiveJob) -> Mapping[str, Room]:
    found: dict[str, Room] = {}
    for pool in {stage.pool for stage in live.job.stages}:
        group, known = manager.groups.get(pool), manager.pools.get(pool)
        if known is None:
            found[pool] = Room(0, 0)
            continue
        states = [one.state for one in group.instances] if group else []
        held = manager.autoscaler.held.get(pool)
        most = known.max_size if held is None else held
        rivals = sum(one.id != live.id and one.has_work(pool) for one in manager.lives.values())
        found[pool] = Room(
            now=states.count(LifecycleState.IN_SERVICE) * known.slots,
            most=most * known.slots,
            per_instance=known.slots,
            boot_s=known.boot_s,
            rivals=rivals,
        )
    return found
