"""Shutdown notices. A worker with a notice leaves in time, and no message waits (I6)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from batchlab.core.errors import Unreachable
from batchlab.core.model import Pool
from batchlab.core.ports import Notice
from batchlab.sim import world as worlds
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.world import EPOCH_S, WORKER, SimWorker, World
from batchlab.worker.inflight_message import Identity
from batchlab.worker.loop import LEAVE_S, NOTICE_POLL_S, Worker, poll_notices
from tests.support.sim.scenes import A, ended_well, in_world, job, stage, submitted, takes

POOLS = (Pool("default", 2, 2, 1),)
SPOT_S = 120.0
LONG_S = 1_000.0
GIVING_BACK_S = 7.0
"""The time of a few calls with the latency of a service."""


class Platform:
    """The Notices port of every instance, of which only the instances in `told` receive a notice."""

    def __init__(self) -> None:
        self.told: dict[str, Notice] = {}

    def of(self, instance: str) -> Told:
        return Told(self, instance)


class Told:
    def __init__(self, platform: Platform, instance: str) -> None:
        self._platform, self._instance = platform, instance

    async def notice(self) -> Notice | None:
        return self._platform.told.get(self._instance)


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Platform:
    """Make every worker of the simulation use this Notices port."""
    made = Platform()

    class Asking(Worker):
        def __init__(self, who: Identity, *rest: Any, **options: Any) -> None:
            super().__init__(who, *rest, **options | {"notices": made.of(who.instance)})

    monkeypatch.setattr(worlds, "Worker", Asking)
    return made


MADE = job(stage(A, bundle=5), items=20)


async def one_of_two_busy(world: World) -> SimWorker:
    """Submit the job, and return a worker once two workers have begun tasks."""
    await submitted(world, MADE)
    while len(world.watch.starts) < 2:
        await asyncio.sleep(0.5)
    return next(iter(world.workers.values()))


def tasks_of(world: World, worker: SimWorker) -> list[int]:
    """Return the tasks that have begun on the worker, in order."""
    return [start.task for start in world.watch.starts if start.actor is worker.actor]


def spot_notice(worker: SimWorker) -> Notice:
    return Notice("a Spot interruption", worker.clock.now_s() + SPOT_S)


async def leaves(worker: SimWorker) -> float:
    """Wait until the worker has drained, and return the seconds that this took."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    while worker.ended is None:
        await asyncio.sleep(0.1)
    assert worker.ended == "exit 0"
    return loop.time() - begun_s


def test_after_a_spot_notice_the_running_task_is_finished_and_the_rest_given_back_at_once(platform: Platform) -> None:
    """The instance receives its notice two minutes before its end, so no work needs to be lost."""
    run_s = 60.0  # longer than the drain time after a SIGTERM, and shorter than the notice

    async def act(world: World) -> None:
        worker = await one_of_two_busy(world)
        platform.told[worker.instance] = spot_notice(worker)
        assert await leaves(worker) < run_s + NOTICE_POLL_S + GIVING_BACK_S
        assert len(tasks_of(world, worker)) == 1, "no other task began on it"
        await ended_well(world, MADE)
        everything = sorted(start.task for start in world.watch.starts)
        assert everything == list(range(20)), "nothing ran twice"

    in_world(act, script=takes(run_s), pools=POOLS)


def test_tasks_longer_than_the_notice_move_at_once(platform: Platform) -> None:
    async def act(world: World) -> None:
        worker = await one_of_two_busy(world)
        platform.told[worker.instance] = spot_notice(worker)
        assert SPOT_S - LEAVE_S - 1.0 <= await leaves(worker) < SPOT_S
        (lost,) = tasks_of(world, worker)
        loop = asyncio.get_running_loop()
        gone_s = loop.time()
        while [start.task for start in world.watch.starts].count(lost) < 2:
            await asyncio.sleep(0.1)
        assert loop.time() - gone_s < WORKER.visibility_s / 2

    in_world(act, script=takes(LONG_S), pools=POOLS)


@pytest.mark.parametrize("by_s", [None, EPOCH_S - 1.0], ids=["nobody says when", "past"])
def test_a_notice_without_a_time_leaves_what_a_drain_does_and_a_late_one_nothing(
    platform: Platform, by_s: float | None
) -> None:
    async def act(world: World) -> None:
        worker = await one_of_two_busy(world)
        platform.told[worker.instance] = Notice("its group takes it out", by_s)
        least_s = WORKER.drain_s if by_s is None else 0.0
        assert least_s <= await leaves(worker) < least_s + NOTICE_POLL_S + GIVING_BACK_S

    in_world(act, script=takes(LONG_S), pools=POOLS)


def test_a_sigterm_during_the_notice_shortens_it_and_a_second_one_changes_nothing(platform: Platform) -> None:
    async def act(world: World) -> None:
        worker = await one_of_two_busy(world)
        platform.told[worker.instance] = spot_notice(worker)
        await asyncio.sleep(NOTICE_POLL_S + 1.0)
        worker.stop(grace_s=25.0)
        asyncio.get_running_loop().call_later(10.0, worker.stop, 25.0)
        assert WORKER.drain_s <= await leaves(worker) < WORKER.drain_s + GIVING_BACK_S

    in_world(act, script=takes(LONG_S), pools=POOLS)


def test_idle_worker_exits_at_its_notice(platform: Platform) -> None:
    async def act(world: World) -> None:
        while len(world.workers) < 2:
            await asyncio.sleep(0.5)
        worker = next(iter(world.workers.values()))
        platform.told[worker.instance] = spot_notice(worker)
        assert await leaves(worker) < NOTICE_POLL_S + GIVING_BACK_S

    in_world(act, script=takes(1.0), pools=POOLS)


# --- Asking --------------------------------------------------------------------------------------


class Script:
    """A source of notices that returns its answers in turn, and repeats the last one."""

    def __init__(self, *answers: Notice | Exception | None) -> None:
        self._answers = list(answers)
        self.asked_s: list[float] = []

    async def notice(self) -> Notice | None:
        self.asked_s.append(asyncio.get_running_loop().time())
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_notice_is_polled_every_five_seconds() -> None:
    script = Script(None, None, None, Notice("the end"))
    heard: list[Notice] = []
    loop = SimLoop()
    loop.run(poll_notices(script, heard.append))
    assert heard == [Notice("the end")]
    assert script.asked_s == [0.0, NOTICE_POLL_S, 2 * NOTICE_POLL_S, 3 * NOTICE_POLL_S]


def test_failing_source_of_notices_is_polled_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    away = Unreachable("No metadata service answers.")
    script = Script(away, away, None, away, away, away, Notice("the end", 5.0))
    heard: list[Notice] = []
    with caplog.at_level(logging.INFO, "batchlab.worker.loop"):
        SimLoop().run(poll_notices(script, heard.append))
    assert heard == [Notice("the end", 5.0)]
    said = [record.getMessage() for record in caplog.records]
    assert sum("No metadata service answers" in line for line in said) == 2
    assert sum("can be read again" in line for line in said) == 2
    assert said[-1] == "leaving: the end"


def test_bug_in_a_source_of_notices_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        SimLoop().run(poll_notices(Script(ZeroDivisionError()), lambda _: None))
