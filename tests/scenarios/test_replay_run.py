"""The loops of a replay against a manager in memory: failures, interruptions, and prewarming."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from batchlab.adapters.clock import WallClock
from batchlab.client.http import Client
from batchlab.core.errors import BackendError, NotFound, Refused, Unreachable, UsageError
from batchlab.core.job_definition import Condition, Dependency, JobDef
from batchlab.core.model import Pool
from batchlab.runtime.home import Home
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Job, JobTemplate, PoolPlan, Prewarm, Scenario
from batchlab.scenarios.replay import run as running
from batchlab.scenarios.replay.jobs import JobPreparer, PreparedJob, stage_def
from batchlab.scenarios.replay.run import INTERRUPTED, Prewarmer, ReplayRun
from batchlab.scenarios.replay.run_state import ManagerConnection, ReplayProgress, RunState
from tests.scenarios.test_fault_table import grid
from tests.support.cli import a_job
from tests.support.scenarios.replay import scenario, stage

QUICK = JobTemplate("quick", (stage("work", 0.1),), Constant(1))
LIMIT_S = 20.0


class Manager(Client):
    """A manager that accepts jobs, which never end. A submission takes `slow_s`. `scaled` are the requested minimum
    sizes."""

    def __init__(self, *, slow_s: float = 0.0) -> None:
        self.slow_s = slow_s
        self.taken: list[str] = []
        self.cancelled: list[str] = []
        self.scaled: list[tuple[str, int | None]] = []
        self.owner = "m-1"
        self.is_away = False

    def grid(self) -> Any:
        return {**grid(default=[], other=[]), "owner": self.owner}

    def activities(self, **_: object) -> list[Any]:
        return []

    def submit(self, job: JobDef, items: object = None) -> Any:
        time.sleep(self.slow_s)
        self.taken.append(job.id)
        return self.job(job.id)

    def job(self, job: str, **_: object) -> Any:
        if self.is_away:
            raise Unreachable("The manager does not answer.")
        if job not in self.taken:
            raise NotFound(f"There is no job {job}.")
        return {**a_job(job), "state": "RUNNING"}

    def jobs(self, **_: object) -> list[Any]:
        return [self.job(one) for one in self.taken]

    def cancel(self, job: str) -> Any:
        if job not in self.taken:
            raise NotFound(f"There is no job {job}.")
        self.cancelled.append(job)

    def scale(self, pool: str, *, min: int | None = None, **_: object) -> Any:  # noqa: A002 - its own
        self.scaled.append((pool, min))

    def close(self) -> None:
        return


class Line(ManagerConnection):
    """A direct connection to that manager."""

    def __init__(self, folder: Path, manager: Manager) -> None:
        super().__init__(Home(folder), away_s=0.1)
        self._manager = manager

    def _request(self, ask: Callable[[Client], Any]) -> Any:
        return self._manager.grid() if ask is Client.grid else ask(self._manager)


class Maker:
    """A component that prepares jobs until it raises `error`."""

    def __init__(self, error: Exception | None = None, *, good: int = 0) -> None:
        self.error = error
        self.good = good

    async def prepare(self, due: Job) -> PreparedJob:
        await asyncio.sleep(0.001)
        if self.error and not self.good:
            raise self.error
        self.good -= 1
        template = due.template
        stages = tuple(map(stage_def, template.stages))
        return PreparedJob(due, JobDef(cast("Any", due.id), template.name, stages, 0.0, items=1), [None])


class World:
    def __init__(self, folder: Path, wanted: Scenario, maker: Maker | None = None, **manager: Any) -> None:
        self.manager = Manager(**manager)
        self.link = Line(folder, self.manager)
        self.course = RunState(wanted, 1, expand(wanted, 1).jobs)
        preparer = cast("JobPreparer", maker or Maker())
        self.run = ReplayRun(self.course, self.link, preparer, WallClock(), None)

    def go(self, stop_when: Callable[[ReplayProgress], bool] = lambda _: False) -> None:
        """Run the replay, and stop it as soon as `stop_when` returns true."""

        async def run() -> None:
            stop = asyncio.Event()

            def look(state: ReplayProgress) -> None:
                if stop_when(state):
                    stop.set()

            try:
                await self.run.run(LIMIT_S, stop, look)
            finally:
                self.link.close()

        asyncio.run(run())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(running, "SHRINK_TIMEOUT_S", 0.0)


@pytest.mark.parametrize("good", [0, 1])
def test_failed_preparation_ends_the_run_at_once(tmp_path: Path, good: int) -> None:
    """The error may be of an unexpected type, and occurs long before the start of the job."""
    wanted = scenario(QUICK, at=((0.0, 1), (3600.0, 1)))
    for error in (OSError("the disk is gone"), UsageError("The job file is wrong.")):
        world = World(tmp_path, wanted, Maker(error, good=good))
        with pytest.raises(type(error)) as told:
            world.go()
        assert told.value is error
        assert world.manager.cancelled == world.manager.taken
        assert world.course.at_s is not None


def test_unreachable_bucket_stops_the_run(tmp_path: Path) -> None:
    wanted = scenario(QUICK, at=((0.0, 1), (3600.0, 1)))

    class Late(Maker):
        async def prepare(self, due: Job) -> PreparedJob:
            if due.due_s:
                while not world.course.running:
                    await asyncio.sleep(0.01)
                raise BackendError("The bucket does not answer.")
            return await super().prepare(due)

    world = World(tmp_path, wanted, Late())
    world.run._prepared.set()
    world.go()
    assert world.course.cut == "The bucket does not answer."
    assert len(world.course.running) == 1
    assert world.manager.cancelled == world.manager.taken


def test_a_submission_that_is_under_way_at_ctrl_c_is_recorded_and_cancelled(tmp_path: Path) -> None:
    world = World(tmp_path, scenario(QUICK), slow_s=0.4)
    world.go(stop_when=lambda state: state.at_s > 0.05)
    assert world.course.cut == INTERRUPTED
    assert len(world.manager.taken) == 1
    assert list(world.course.running) == world.manager.taken == world.manager.cancelled
    assert world.course.observed_jobs()


def test_unanswered_submission_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "FINAL_TIMEOUT_S", 0.1)

    class Mute(Manager):
        def submit(self, job: JobDef, items: object = None) -> Any:
            super().submit(job, items)
            raise Unreachable("Its answer was lost.")

    world = World(tmp_path, scenario(QUICK))
    world.link._away_s = 60.0
    world.manager = world.link._manager = Mute()
    world.go(stop_when=lambda state: state.at_s > 0.05)
    (job,) = world.course.running
    assert set(world.manager.taken) == set(world.manager.cancelled) == {job}


def warmed(folder: Path, *warm: Prewarm, **fields: Any) -> Manager:
    """Return the manager after a run of half a second with these prewarmings."""
    pools = tuple(PoolPlan(Pool(name, least, 9)) for name, least in (("default", 1), ("other", 0)))
    world = World(folder, scenario(QUICK, pools=pools, prewarm=warm))

    def is_over(state: ReplayProgress) -> bool:
        if fields.get("changes") and state.at_s > 0.15:
            world.manager.owner = "m-2"
            world.run.sampler.grid = world.manager.grid()
        return state.at_s > 0.5

    world.run._prepared.set()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(type(world.run), "_wait_for_start", lambda _: asyncio.sleep(0))
        patch.setattr("batchlab.scenarios.replay.run.SAMPLE_INTERVAL_S", 0.02)
        world.go(stop_when=is_over)
    return world.manager


def test_largest_of_overlapping_prewarms_applies(tmp_path: Path) -> None:
    manager = warmed(
        tmp_path,
        Prewarm("default", 2, at_s=0.0, until_s=0.3),
        Prewarm("default", 3, at_s=0.1, until_s=0.2),
        Prewarm("other", 4, at_s=0.1, until_s=0.2),
    )
    sizes = [size for pool, size in manager.scaled if pool == "default"]
    assert [size for n, size in enumerate(sizes) if sizes[n - 1 : n] != [size]] == [2, 3, 2, 1]
    assert sizes[-1] == 1
    assert manager.scaled[-1] == ("other", 0), "at the end all are told once more"


def test_a_pool_is_its_own_size_again_however_the_run_is_left(tmp_path: Path) -> None:
    manager = warmed(tmp_path, Prewarm("default", 3, at_s=0.1, until_s=60.0))
    assert manager.scaled[0] == ("default", 3)
    assert manager.scaled[-1] == ("default", 1)


def test_new_manager_gets_the_settings_again(tmp_path: Path) -> None:
    told = warmed(tmp_path, Prewarm("default", 3, at_s=0.0, until_s=60.0), changes=True).scaled
    first = warmed(tmp_path, Prewarm("default", 3, at_s=0.0, until_s=60.0)).scaled
    assert len(told) > len(first)


def test_a_pool_is_cooled_also_where_the_first_call_for_that_has_failed(tmp_path: Path) -> None:
    world = World(tmp_path, scenario(QUICK, prewarm=(warm := Prewarm("default", 2, 0.0, 0.05),)))
    scaled, scale = world.manager.scaled, world.manager.scale
    failed: list[int | None] = []

    def fails_once(pool: str, *, min: int | None = None, **_: object) -> Any:  # noqa: A002 - its own
        if scaled and not failed:
            failed.append(min)
            raise Refused("Not now.")
        return scale(pool, min=min)

    world.manager.scale = fails_once  # type: ignore[method-assign]

    async def go() -> None:
        world.course.begin(0.0)
        warmer = Prewarmer(world.course, world.link, world.run.sampler)
        with pytest.raises(Refused):
            await warmer.warm(warm)
        await warmer.restore(within_s=1.0)

    asyncio.run(go())
    assert [size for _, size in scaled] == [2, *failed]


def test_absence_of_the_manager_does_not_delay_the_next_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager is away for 0.3 s while the job ends. The next sample must not wait a further 1.2 s."""
    monkeypatch.setattr("batchlab.scenarios.replay.run_state.RETRY_INTERVAL_S", 0.01)

    class Leaving(Manager):
        def __init__(self) -> None:
            super().__init__()
            self.looked_s: list[float] = []

        def jobs(self, **_: object) -> list[Any]:
            self.looked_s.append(time.monotonic())
            if self.looked_s[-1] < self.looked_s[0] + 0.3:
                raise Unreachable("The manager does not answer.")
            return super().jobs()

    world = World(tmp_path, scenario(QUICK))
    world.manager = world.link._manager = leaving = Leaving()
    world.link._away_s = 60.0
    world.go(stop_when=lambda state: state.at_s > 1.0)
    back = next(n for n, at_s in enumerate(leaving.looked_s) if at_s >= leaving.looked_s[0] + 0.3)
    assert len(leaving.looked_s) > back + 1, "it is looked at again within what is left of a second"


class Chain(Maker):
    """A component that prepares jobs with their dependencies."""

    async def prepare(self, due: Job) -> PreparedJob:
        prepared = await super().prepare(due)
        return replace(prepared, job=replace(prepared.job, after=due.after))


class Failing(Manager):
    """A manager on which every job fails at once. It refuses a job whose dependency it does not have or has failed."""

    def submit(self, job: JobDef, items: object = None) -> Any:
        for other in job.after:
            if other.job not in self.taken or other.condition is Condition.SUCCEEDED:
                raise Refused(f"Job {other.job} is a dependency that must succeed.")
        return super().submit(job, items)

    def job(self, job: str, **_: object) -> Any:
        return {**super().job(job), "state": "FAILED"}


def test_a_replay_records_a_job_after_a_failed_job_as_failed(tmp_path: Path) -> None:
    """A job after a refused job is refused, too, unless it may begin after any end."""
    names = ("first", "second", "third", "last")
    after: Any = ((), ("first",), ("second",), ("second:ended", "first:ended"))
    templates = [
        replace(QUICK, name=name, after=tuple(map(Dependency.parse, others)))
        for name, others in zip(names, after, strict=True)
    ]
    wanted = scenario(*reversed(templates))
    world = World(tmp_path, wanted, Chain())
    # Submissions overlap, because each of them takes a while.
    world.manager = world.link._manager = manager = Failing(slow_s=0.05)
    world.go()
    first, second, last, third = (job.id for job in world.course.jobs)
    assert manager.taken == [first, last]
    assert {name: run.state for name, run in world.course.refused.items()} == {second: "FAILED", third: "FAILED"}
    assert world.course.cut == ""
    assert world.course.is_over
