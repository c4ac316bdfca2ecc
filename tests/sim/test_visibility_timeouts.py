"""Visibility timeouts in virtual time: requests and recovery with measured run times."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from batchlab.adapters.memory.queue import SimQueue
from batchlab.core import visibility_timeouts
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobState, Pool
from batchlab.manager.state import LiveJob
from batchlab.sim import invariants
from batchlab.sim.actors import CURRENT, Actor
from batchlab.sim.tasks import AttemptInput, Script, ScriptedAttempt, value_of
from batchlab.sim.world import MANAGER, WORKER, World
from tests.support.sim.scenes import A, B, ended, ended_well, in_world, job, kill_manager, stage, submitted, takes

ON_AWS = replace(WORKER, visibility_s=60.0)
SELDOM: dict[str, Any] = {
    "manager_settings": replace(MANAGER, tick_s=5.0, control_lease_s=20.0),
    "worker_settings": replace(ON_AWS, control_lease_s=20.0, beat_s=30.0),
}
"""Settings for hours of long tasks. The default settings would mostly cause heartbeats and reads of the control
object."""
POOLS = (Pool("default", 2, 2, 1),)
SINGLE = stage(A, bundle=1)
KILLED = 30


@pytest.fixture
def timeouts_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of the visibility timeouts in seconds of all extensions."""
    found: list[float] = []
    change = SimQueue.change_visibility

    async def change_visibility(self: SimQueue, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        found.extend(timeout_s for _, timeout_s in changes)
        return await change(self, queue, changes)

    monkeypatch.setattr(SimQueue, "change_visibility", change_visibility)
    return found


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after whose call all timeouts are the visibility timeout of the backend."""

    def fix() -> None:
        monkeypatch.setattr(visibility_timeouts, "expected_run_s", lambda _: None)
        monkeypatch.setattr(visibility_timeouts, "receive_s", lambda _, visibility_s: visibility_s)
        monkeypatch.setattr(visibility_timeouts, "extension_s", lambda _, _held_s, visibility_s: visibility_s)

    return fix


@dataclass(slots=True)
class Runs:
    """Script that records the virtual time of each start. From the task `grows_at`, tasks take `factor` times as
    long. `on_start` is called at the first start of task KILLED, and `on_any` at each start."""

    run_s: float
    on_start: Callable[[Actor], object] = lambda _: None
    on_any: Callable[[int], object] = lambda _: None
    grows_at: int = 1_000_000
    factor: float = 1.0
    starts_s: dict[int, list[float]] = field(default_factory=dict)

    def __call__(self, scene: AttemptInput) -> ScriptedAttempt:
        times_s = self.starts_s.setdefault(scene.task, [])
        times_s.append(asyncio.get_running_loop().time())
        self.on_any(scene.task)
        if scene.task == KILLED and len(times_s) == 1:
            actor = CURRENT.get()
            assert actor is not None
            self.on_start(actor)
        run_s = self.run_s * (self.factor if scene.task >= self.grows_at else 1.0)
        return ScriptedAttempt(run_s, value_of(scene.stage.name, scene.item))


def run(made: JobDef, script: Script) -> None:
    async def act(world: World) -> None:
        await submitted(world, made)
        assert (await ended(world, made, within_s=200_000.0)).state is JobState.SUCCEEDED
        await invariants.check_all(world, [made.id])

    in_world(act, script=script, pools=POOLS, **SELDOM)


def test_a_long_task_needs_few_extensions(timeouts_s: list[float], fixed: Callable[[], None]) -> None:
    run(job(SINGLE, items=60), takes(300.0))
    measured, longest_s = len(timeouts_s) / 60, max(timeouts_s)
    timeouts_s.clear()
    fixed()
    run(job(SINGLE, items=60), takes(300.0))
    assert len(timeouts_s) / 60 > 9
    assert measured < 4
    assert longest_s < 360.0


def test_a_new_leader_keeps_the_measured_run_times(timeouts_s: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """No leader folds five outcomes before it dies, so only the ledger knows how long the tasks take."""

    def extensions() -> float:
        timeouts_s.clear()
        script = Runs(300.0)

        async def act(world: World) -> None:
            def kill(task: int) -> None:
                if task % 4 == 3 and world.leader:
                    kill_manager(world)

            script.on_any = kill
            await submitted(world, made)
            assert (await ended(world, made, within_s=200_000.0)).state is JobState.SUCCEEDED
            await invariants.check_all(world, [made.id])

        made = job(SINGLE, items=60)
        in_world(act, script=script, pools=POOLS, **SELDOM)
        assert set(map(len, script.starts_s.values())) == {1}
        return len(timeouts_s) / 60

    assert extensions() < 5
    monkeypatch.setattr(LiveJob, "learn_run_times", lambda _: None)
    assert extensions() > 8


def test_a_chained_stage_has_long_timeouts(timeouts_s: list[float]) -> None:
    run(job(SINGLE, stage(B, A, bundle=1), items=40), takes(300.0))
    assert len(timeouts_s) / 80 < 6


def test_a_timeout_has_a_limit(timeouts_s: list[float]) -> None:
    run(job(SINGLE, items=12), takes(1_500.0))
    assert max(timeouts_s) == pytest.approx(480.0)


def recovery_s() -> float:
    """Return the seconds after which the task of a killed worker starts again if the manager dies with the worker."""

    async def act(world: World) -> None:
        def kill(actor: Actor) -> None:
            asyncio.get_running_loop().call_later(0.5, actor.kill)
            asyncio.get_running_loop().call_later(0.5, kill_manager, world)

        script.on_start = kill
        await submitted(world, made)
        await ended_well(world, made)

    made, script = job(SINGLE, items=60), Runs(2.0)
    in_world(act, script=script, pools=POOLS, worker_settings=ON_AWS)
    first_s, again_s = script.starts_s[KILLED]
    return again_s - first_s


def test_the_short_task_of_a_dead_worker_returns_early(fixed: Callable[[], None]) -> None:
    measured_s = recovery_s()
    fixed()
    fixed_s = recovery_s()
    assert measured_s < 35.0
    assert fixed_s > 50.0


def test_tasks_that_suddenly_take_longer_run_once(timeouts_s: list[float]) -> None:
    script = Runs(2.0, grows_at=40, factor=50.0)
    run(job(SINGLE, items=80), script)
    assert Counter(map(len, script.starts_s.values())) == {1: 80}
    assert timeouts_s


def test_tasks_that_suddenly_take_longer_than_a_long_timeout_run_once() -> None:
    script = Runs(100.0, grows_at=20, factor=50.0)
    run(job(SINGLE, items=24), script)
    assert Counter(map(len, script.starts_s.values())) == {1: 24}
