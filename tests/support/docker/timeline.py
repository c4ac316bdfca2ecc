"""The size of a pool during a burst of work, measured on a grid in containers and simulated by
`sim`.

Invariant: both run the same job file under the same policy, and are sampled in the same way. The
simulator gets the duration of a boot and of a task, and no other measurement.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batchlab.core.model import GroupView, LifecycleState, Pool
from batchlab.core.port_retries import Patience
from batchlab.jobs import submission
from batchlab.jobs.job_file import load
from batchlab.manager.admission import admit
from batchlab.manager.autoscaler import desired_capacity
from batchlab.manager.state import Backlog
from batchlab.runtime.factory import Backend
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.tasks import TimedRunner
from batchlab.sim.trial import calm
from batchlab.sim.world import World
from tests.support.docker.chaos import Containers, Teller
from tests.support.grid.local_grid import ENDED

LOOK_S = 0.25
ONE_DECISION_S = 3.0
"""The time within which changes count as one decision. The time is far shorter than the cool-down between two
decisions."""
SETTLED_S = 30.0
"""Simulated time before the submission, in which a manager becomes leader and does not have work."""

WORK = """\
import socket, time

def nap(item):
    number, seconds = item
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as teller:
        teller.sendto(str(number).encode(), ({host!r}, {port}))
    time.sleep(seconds)
"""

JOB = """\
name: burst
input: {files: items.jsonl, split: items}
stages:
  - {name: nap, python: work:nap}
"""


@dataclass(frozen=True, slots=True)
class Look:
    """A sample of a pool at one moment, in seconds from the submission of the job. `containers` is the number of
    running containers, which may differ from the group's count."""

    at_s: float
    desired: int
    in_service: int
    pending: int
    containers: int
    backlog_tasks: int
    backlog_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """A change of desired capacity, to `level`."""

    at_s: float
    level: int


@dataclass(slots=True)
class Timeline:
    """The samples of a pool from the submission of a job to the pool's return to its minimum."""

    pool: Pool
    looks: list[Look] = field(default_factory=list)
    first_task_s: float = 0.0
    """The time of the first task's start, as the task reports it."""
    last_task_s: float = 0.0
    """The end of the last task."""
    boots_s: list[float] = field(default_factory=list)
    """The seconds from the first sight of each instance until it is in service."""

    @property
    def boot_s(self) -> float:
        return statistics.median(self.boots_s)

    @property
    def steps(self) -> list[Step]:
        """Return the desired capacity at the start, and each change of it. Changes in the same direction within
        `ONE_DECISION_S` count as one. Instances are terminated by one call each, and a sample may fall between two
        calls."""
        found: list[Step] = []
        for look in self.looks:
            if found and look.desired == found[-1].level:
                continue
            if len(found) > 1 and look.at_s - found[-1].at_s < ONE_DECISION_S:
                before, last = found[-2].level, found[-1].level
                if (last > before) == (look.desired > last):
                    found[-1] = Step(found[-1].at_s, look.desired)
                    continue
            found.append(Step(look.at_s, look.desired))
        return found

    @property
    def peak(self) -> int:
        """Return the largest number of instances at once, counted in the group or as running containers."""
        return max(max(look.in_service + look.pending, look.containers) for look in self.looks)

    @property
    def asked_back_s(self) -> float:
        """Return the time at which the desired capacity reached the minimum for the last time."""
        return self.steps[-1].at_s

    @property
    def back_s(self) -> float:
        """Return the time at which the last instance above the minimum ended."""
        return self.looks[-1].at_s

    def needed(self, backend: Backend) -> int:
        """Return the largest capacity that the policy requests for any observed backlog."""
        view = GroupView(self.pool, 0, ())
        target_s = backend.manager.drain_target_s
        return max(
            desired_capacity(Backlog(look.backlog_s, look.backlog_tasks), view, target_s)[0] for look in self.looks
        )

    def flaps(self, within_s: float) -> int:
        """Return the number of changes of desired capacity that reverse the previous change less than `within_s` later.
        The sequence in-out-in has two."""
        steps, found = self.steps, 0
        for before, turn, after in zip(steps, steps[1:], steps[2:], strict=False):
            is_turned = (turn.level > before.level) != (after.level > turn.level)
            found += is_turned and after.at_s - turn.at_s < within_s
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the whole timeline as JSON."""
        return {
            "first_task_s": self.first_task_s,
            "last_task_s": self.last_task_s,
            "boots_s": self.boots_s,
            "steps": [asdict(step) for step in self.steps],
            "looks": [asdict(look) for look in self.looks],
        }


def write_burst(folder: Path, address: tuple[str, int], naps_s: Sequence[float]) -> Path:
    """Write a job with one task per nap. Each task reports its start to `address`."""
    folder.mkdir(parents=True)
    host, port = address
    (folder / "work.py").write_text(WORK.format(host=host, port=port))
    items = "".join(f"{json.dumps([n, nap_s])}\n" for n, nap_s in enumerate(naps_s))
    (folder / "items.jsonl").write_text(items)
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


def watch_burst(containers: Containers, folder: Path, naps_s: Sequence[float], *, within_s: float = 360.0) -> Timeline:
    """Submit the burst to an idle grid, and sample the pool until it is back at its minimum."""
    grid = containers.grid
    (view,) = grid.client.grid()["pools"]
    slots = next(pool.slots for pool in grid.backend.pools if pool.name == view["name"])
    timeline = Timeline(Pool(view["name"], view["min"], view["max"], slots))
    seen_s: dict[str, float] = {}
    serving: set[str] = set()
    with Teller(containers.host) as teller:
        path = write_burst(folder, teller.address, naps_s)
        # A sample from before the submission makes the change to the first step visible.
        timeline.looks.append(_look(containers, -LOOK_S))
        begun_s, begun_wall_s = time.monotonic(), time.time()
        job = grid.submit(path, token=str(folder))["id"]
        while True:
            at_s = time.monotonic() - begun_s
            assert at_s < within_s, timeline.looks[-1]
            look = _look(containers, at_s)
            timeline.looks.append(look)
            for one in grid.client.grid()["pools"][0]["instances"]:
                seen_s.setdefault(one["id"], at_s)
                if one["state"] == LifecycleState.IN_SERVICE and one["id"] not in serving:
                    serving.add(one["id"])
                    timeline.boots_s.append(at_s - seen_s[one["id"]])
            ended = grid.client.job(job)
            least = timeline.pool.min_size
            if ended["state"] in ENDED and max(look.desired, look.containers) <= least:
                break
            time.sleep(max(0.0, LOOK_S - (time.monotonic() - begun_s - at_s)))
        assert ended["state"] == "SUCCEEDED", ended
        (stage,) = ended["stages"]
        assert stage["succeeded"] == len(naps_s)
        assert stage["last_end_s"] is not None
        timeline.first_task_s = min(min(starts) for starts in teller.at_s.values()) - begun_s
        timeline.last_task_s = stage["last_end_s"] - begun_wall_s
    return timeline


def _look(containers: Containers, at_s: float) -> Look:
    (pool,) = containers.grid.client.grid()["pools"]
    states = [one["state"] for one in pool["instances"]]
    return Look(
        at_s,
        pool["desired"],
        states.count(LifecycleState.IN_SERVICE),
        states.count(LifecycleState.PENDING),
        len(containers.instances()),
        pool["backlog_tasks"],
        pool["backlog_s"],
    )


def foretold(backend: Backend, pool: Pool, path: Path, naps_s: Sequence[float], *, seed: int = 1) -> Timeline:
    """Run the same job in the simulator, in virtual time. The simulator uses `backend`'s settings and the boot time of
    `pool`."""
    loop = SimLoop(inline_executor=True)
    return loop.run(_foretold(backend, pool, path, naps_s, seed))


async def _foretold(backend: Backend, pool: Pool, path: Path, naps_s: Sequence[float], seed: int) -> Timeline:
    world = World(
        seed,
        (pool,),
        faults=calm(seed),
        make_runner=lambda world, _die, _objects: TimedRunner(
            lambda work: [naps_s[task] for task in work.bundle.tasks], world.clock
        ),
        manager_settings=backend.manager,
        worker_settings=backend.worker,
        logged=False,
    )
    supervisor = asyncio.create_task(world.supervise(), name="supervisor")
    await asyncio.sleep(SETTLED_S)
    timeline = Timeline(pool, [_simulated(world, pool, -LOOK_S)])
    begun_s = world.clock.now_s()
    job = await submission.prepare(
        load(path, {}), objects=world.objects, clock=world.clock, patience=Patience(world.rng("client")), token="t"
    )
    admit(job, {pool.name: pool.slots})
    await world.submit(job)
    while True:
        look = _simulated(world, pool, world.clock.now_s() - begun_s)
        timeline.looks.append(look)
        record = await world.find(job.id)
        ended = record is not None and record.state.ended
        if ended and max(look.desired, look.containers) <= pool.min_size:
            break
        await asyncio.sleep(LOOK_S)
    (stage,) = (await world.ledger.rows(job.id)).stages
    counts = stage.counts
    assert counts.succeeded == len(naps_s)
    assert counts.first_start_s is not None
    assert counts.last_end_s is not None
    timeline.first_task_s = counts.first_start_s - begun_s
    timeline.last_task_s = counts.last_end_s - begun_s
    supervisor.cancel()
    await world.ledger.close()
    return timeline


def _simulated(world: World, pool: Pool, at_s: float) -> Look:
    assert world.manager is not None
    group = world.manager.groups[pool.name]
    states = [instance.state for instance in group.instances]
    backlog = world.manager.autoscaler.backlog(pool.name)
    in_service = states.count(LifecycleState.IN_SERVICE)
    return Look(
        at_s,
        group.desired,
        in_service,
        states.count(LifecycleState.PENDING),
        in_service,
        backlog.tasks,
        backlog.seconds,
    )


def apart(one: Sequence[Step], other: Sequence[Step]) -> int:
    """Return the discrete Fréchet distance of two series of steps, in instances (Eiter & Mannila 1994). A path visits
    both series in order, and its cost is the largest difference on the path. The distance is the lowest cost of all
    paths. The times of the steps do not count."""
    row: list[int] = []
    for mine in one:
        last, row = row, []
        for j, yours in enumerate(other):
            ways = [*last[max(0, j - 1) : j + 1], *row[-1:]]
            row.append(max(abs(mine.level - yours.level), min(ways, default=0)))
    return row[-1]
