"""Fair share in virtual time: the ratio of slot time, limits with larger tasks, backoffs, and changes of the policy."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import pytest

from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Failure, FailureKind, JobId, Pool
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.manager import Manager
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, value_of
from batchlab.sim.world import World
from tests.support.sim.scenes import A, ended, in_world, job, kill_manager, leader, stage, submitted

SLOTS = 10
POOLS = (Pool("default", 5, 5, 2),)
DECAY_S = 60.0


def made(share: str, items: int, name: str = "", slots: int = 1, retry: RetryRule | None = None) -> JobDef:
    name = name or share
    own = stage(A, bundle=1, slots=slots, retry=retry or RetryRule(attempts=1))
    return job(own, items=items, id=JobId(name), name=name, token=name, share=share, max_failures=10_000)


def policy(*shares: ShareAttributes, decay_s: float = DECAY_S, reservation: int = 0) -> SharePolicy:
    return SharePolicy(shares, decay_s, reservation)


async def set_policy(world: World, new: SharePolicy) -> None:
    async def change(manager: Manager) -> None:
        await manager.fair_share.change(lambda _: new)

    await world.ask(change, "set the policy")


def slot_times(world: World, since_s: float, until_s: float) -> dict[str, float]:
    """Return the slot seconds of the tasks of each job between two times."""
    result: dict[str, float] = defaultdict(float)
    for start in world.watch.starts:
        end_s = until_s if start.ended_s is None else min(until_s, start.ended_s)
        result[start.job] += max(0.0, end_s - max(since_s, start.at_s))
    return result


@pytest.mark.parametrize(
    ("run_s", "weights"),
    [
        ({"a": 600.0, "b": 5.0}, {"a": 1.0, "b": 1.0}),
        ({"a": 600.0, "b": 5.0}, {"a": 0.5, "b": 1.0}),
        ({"a": 900.0, "b": 300.0}, {"a": 1.0, "b": 1.0}),
        ({"a": 600.0, "b": 600.0}, {"a": 0.25, "b": 1.0}),
    ],
)
def test_long_tasks_keep_the_ratio(run_s: Mapping[str, float], weights: Mapping[str, float]) -> None:
    """The share decay is much shorter than the long tasks. The slot time of the shares must still have the inverse ratio
    of the weight factors, from the first minutes on.
    """

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(run_s[scene.job.id], value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await set_policy(world, policy(*(ShareAttributes(name, weight) for name, weight in weights.items())))
        for name in run_s:
            await submitted(world, made(name, items=round(SLOTS * 8000 / run_s[name])))
        for since_s, until_s in ((120.0, 600.0), (600.0, 6000.0)):
            await asyncio.sleep(until_s - world.clock.monotonic_s())
            used_s = slot_times(world, since_s, until_s)
            part = used_s["a"] / sum(used_s.values())
            expected = (1 / weights["a"]) / (1 / weights["a"] + 1 / weights["b"])
            assert part == pytest.approx(expected, abs=0.13), used_s
            assert sum(used_s.values()) > 0.9 * SLOTS * (until_s - since_s), used_s

    in_world(act, script=script, pools=POOLS, shares=True)


@pytest.mark.parametrize(
    "limits", [policy(ShareAttributes("a", 1.0, 2)), policy(ShareAttributes("a", 1.0), reservation=80)]
)
def test_a_larger_task_is_not_overtaken_forever(limits: SharePolicy) -> None:
    """The small tasks end at different times, so two slots of the two below the limit are never free by chance."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(3.0 + scene.task % 5 / 3, value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await set_policy(world, limits)
        small, large = made("a", items=600, name="small"), made("a", items=2, name="large", slots=2)
        await submitted(world, small)
        await asyncio.sleep(30.0)
        await submitted(world, large)
        await ended(world, large, within_s=300.0)
        record = await world.find(small.id)
        assert record is not None
        assert not record.state.ended

    in_world(act, script=script, pools=POOLS, shares=True)


def test_a_backoff_uses_no_slots_of_a_limit() -> None:
    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.task < 4 and scene.bundle.attempt == 1:
            return ScriptedAttempt(1.0, failure=Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck"))
        return ScriptedAttempt(1.0, value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await set_policy(world, policy(ShareAttributes("a", 1.0, 2)))
        await submitted(world, made("a", items=60, retry=RetryRule(attempts=2, backoff_s=500.0, jitter=0.0)))
        await asyncio.sleep(150.0)
        done = {start.task for start in world.watch.starts if start.ended_s is not None}
        assert done == set(range(60))
        await ended(world, made("a", items=60))
        running = [(start.at_s, start.ended_s) for start in world.watch.starts]
        for at_s, _ in running:
            assert sum(begun_s <= at_s < (end_s or at_s) for begun_s, end_s in running) <= 2 + 2

    in_world(act, script=script, pools=POOLS, shares=True)


def test_jobs_of_one_share_keep_bundles_queued() -> None:
    """Workers can prefetch a bundle only if bundles wait in the queue."""

    async def act(world: World) -> None:
        await set_policy(world, policy(ShareAttributes("a", 1.0)))
        for n in range(6):
            await submitted(world, made("a", items=400, name=f"job{n}"))
        await asyncio.sleep(60.0)
        manager, counts = await leader(world), []
        for _ in range(200):
            counts.append(manager.lives.pool("default").bundles)
            await asyncio.sleep(0.1)
        assert sum(count > 1.5 * SLOTS for count in counts) > 0.9 * len(counts), counts

    in_world(
        act,
        script=lambda scene: ScriptedAttempt(1.0, value_of(scene.stage.name, scene.item)),
        pools=POOLS,
        shares=True,
    )


@pytest.mark.parametrize("crashes", [False, True])
def test_a_new_decay_does_not_change_the_use(crashes: bool) -> None:
    async def act(world: World) -> None:
        await set_policy(world, policy(ShareAttributes("a", 1.0), decay_s=20.0))
        short = made("a", items=200)
        await submitted(world, short)
        await ended(world, short)
        await asyncio.sleep(100.0)
        before_s = use_s(await leader(world), "a")
        await set_policy(world, policy(ShareAttributes("a", 1.0), decay_s=600_000.0))
        if crashes:
            kill_manager(world)
        await asyncio.sleep(20.0)
        manager = await leader(world)
        assert use_s(manager, "a") == pytest.approx(before_s, abs=0.5)
        assert before_s < 2.0

    in_world(
        act,
        script=lambda scene: ScriptedAttempt(1.0, value_of(scene.stage.name, scene.item)),
        pools=POOLS,
        shares=True,
    )


def test_a_change_of_weights_does_not_make_idle_shares_active() -> None:
    async def act(world: World) -> None:
        await set_policy(world, policy(ShareAttributes("a", 1.0), ShareAttributes("b", 1.0), reservation=50))
        short = made("a", items=40)
        await submitted(world, short)
        await ended(world, short)
        await asyncio.sleep(2 * DECAY_S)
        await set_policy(world, policy(ShareAttributes("a", 1.0), ShareAttributes("b", 2.0), reservation=50))
        await submitted(world, made("b", items=100))
        await asyncio.sleep(2 * DECAY_S / 3)
        manager = await leader(world)
        assert {view["share"]: round(view["part"], 2) for view in manager.fair_share.status()} == {"a": 0.67, "b": 1.0}

    in_world(
        act,
        script=lambda scene: ScriptedAttempt(20.0, value_of(scene.stage.name, scene.item)),
        pools=POOLS,
        shares=True,
    )


def use_s(manager: Manager, share: str) -> float:
    return sum(view["use_s"] for view in manager.fair_share.status() if view["share"] == share)


def test_ended_shares_are_forgotten() -> None:
    async def act(world: World) -> None:
        await set_policy(world, policy())
        jobs = [made(f"s{n}", items=2) for n in range(30)]
        await asyncio.gather(*map(partial(submitted, world), jobs))
        for one in jobs:
            await ended(world, one)
        await asyncio.sleep(5.0)
        manager = await leader(world)
        assert manager.lives.shares("default", world.clock.monotonic_s()) == {}
        assert not manager.fair_share._pending
        assert not manager.fair_share._running

    in_world(
        act,
        script=lambda scene: ScriptedAttempt(1.0, value_of(scene.stage.name, scene.item)),
        pools=POOLS,
        shares=True,
    )
