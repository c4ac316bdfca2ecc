"""Fair share in virtual time: changes of the policy, larger tasks, and backoffs."""

from __future__ import annotations

import asyncio

import pytest

from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Failure, FailureKind, JobId, Pool
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.manager import Manager
from batchlab.sim.tasks import AttemptInput, ScriptedAttempt, value_of
from batchlab.sim.world import World
from tests.support.sim.scenes import A, ended, in_world, job, kill_manager, leader, stage, submitted, takes

SLOTS = 10
POOLS = (Pool("default", 5, 5, 2),)
DECAY_S = 60.0


def made(share: str, items: int, name: str = "", slots: int = 1, retry: RetryRule | None = None) -> JobDef:
    name = name or share
    own = stage(A, bundle=1, slots=slots, retry=retry or RetryRule(attempts=1))
    return job(own, items=items, id=JobId(name), name=name, token=name, share=share, max_failures=10_000)


def policy(*shares: ShareAttributes, decay_s: float = DECAY_S, reservation: int = 0) -> SharePolicy:
    return SharePolicy(shares, decay_s, reservation)


async def set_policy(world: World, new: SharePolicy | None) -> None:
    async def change(manager: Manager) -> None:
        await manager.fair_share.change(None if new is None else lambda _: new)

    await world.ask(change, "set the policy")


LIMIT, RESERVATION = policy(ShareAttributes("a", 1.0, 2)), policy(ShareAttributes("a"), reservation=80)


@pytest.mark.parametrize(("limits", "share"), [(LIMIT, "a"), (RESERVATION, "a"), (RESERVATION, "b")])
def test_a_larger_task_is_not_overtaken_forever(limits: SharePolicy, share: str) -> None:
    """The small tasks end at different times, so two of the two slots below the limit are never free by chance."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(3.0 + scene.task % 5 / 3, value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await set_policy(world, limits)
        small, large = made("a", items=300, name="small"), made(share, items=2, name="large", slots=2)
        await submitted(world, small)
        await asyncio.sleep(30.0)
        await submitted(world, large)
        reasons: set[str] = set()
        manager = await leader(world)
        while "the slots that become free are reserved for job large, whose tasks need more slots" not in reasons:
            await asyncio.sleep(0.5)
            reasons.add(manager.fair_share.wait_reason(manager.lives[small.id], "default"))
            assert world.clock.monotonic_s() < 200.0
        await ended(world, large, within_s=300.0)
        record = await world.find(small.id)
        assert record is not None
        assert not record.state.ended

    in_world(act, script=script, pools=POOLS, shares=True)


def test_slots_are_not_reserved_for_a_share_without_a_place() -> None:
    """The share with the larger tasks has used far more than its part, so the small tasks of the other share come first
    and must not wait for it."""

    def script(scene: AttemptInput) -> ScriptedAttempt:
        return ScriptedAttempt(8.0 if scene.job.id == "small" else 30.0, value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await set_policy(world, policy(ShareAttributes("a", 100.0), ShareAttributes("b", 0.01), reservation=60))
        await submitted(world, made("a", items=40, name="large", slots=2))
        await asyncio.sleep(120.0)
        begin_s = world.clock.now_s()
        small = made("b", items=150, name="small")
        await submitted(world, small)
        await ended(world, small, within_s=600.0)
        # With at least six usable slots, the small tasks alone take 200 s, and the running large tasks end before.
        assert world.clock.now_s() - begin_s < 320.0

    in_world(act, script=script, pools=POOLS, shares=True)


def test_a_backoff_uses_no_slots_of_a_limit() -> None:
    def script(scene: AttemptInput) -> ScriptedAttempt:
        if scene.task < 4 and scene.bundle.attempt == 1:
            return ScriptedAttempt(1.0, failure=Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck"))
        return ScriptedAttempt(1.0, value_of(scene.stage.name, scene.item))

    async def act(world: World) -> None:
        await set_policy(world, policy(ShareAttributes("a", 1.0, 2)))
        one = made("a", items=60, retry=RetryRule(attempts=2, backoff_s=500.0, jitter=0.0))
        await submitted(world, one)
        await asyncio.sleep(150.0)
        assert {start.task for start in world.watch.starts if start.ended_s is not None} == set(range(60))
        kill_manager(world)  # the next leader reads the backoffs from the ledger
        other = made("a", items=60, name="other")
        await submitted(world, other)
        await ended(world, other, within_s=120.0)
        await ended(world, one)
        running = [(start.at_s, start.ended_s) for start in world.watch.starts]
        for at_s, _ in running:
            # The retries end their backoff at the same time, and may exceed the limit only then.
            assert sum(begun_s <= at_s < (end_s or at_s) for begun_s, end_s in running) <= 2 + 4
        manager = await leader(world)
        assert manager.lives.shares("default", world.clock.monotonic_s()) == {}

    in_world(act, script=script, pools=POOLS, shares=True)


def use_s(manager: Manager, share: str) -> float:
    return sum(view["use_s"] for view in manager.fair_share.status() if view["share"] == share)


def test_a_new_decay_does_not_restore_decayed_use() -> None:
    async def act(world: World) -> None:
        await set_policy(world, policy(ShareAttributes("a"), decay_s=20.0))
        short = made("a", items=200)
        await submitted(world, short)
        await ended(world, short)
        await asyncio.sleep(100.0)
        before_s = use_s(await leader(world), "a")
        await set_policy(world, policy(ShareAttributes("a"), decay_s=600_000.0))
        await asyncio.sleep(20.0)
        assert use_s(await leader(world), "a") == pytest.approx(before_s, abs=0.5)
        assert 0.1 < before_s < 2.0

    in_world(act, script=takes(1.0), pools=POOLS, shares=True)


def test_a_change_of_weights_does_not_make_idle_shares_active() -> None:
    async def act(world: World) -> None:
        await set_policy(world, policy(ShareAttributes("a"), ShareAttributes("b"), reservation=50))
        short = made("a", items=40)
        await submitted(world, short)
        await ended(world, short)
        await asyncio.sleep(2 * DECAY_S)
        await submitted(world, made("b", items=100))
        await set_policy(world, policy(ShareAttributes("a"), ShareAttributes("b", 2.0), reservation=50))
        await asyncio.sleep(2 * DECAY_S / 3)
        manager = await leader(world)
        assert {view["share"]: round(view["part"], 2) for view in manager.fair_share.status()} == {"a": 0.67, "b": 1.0}

    in_world(act, script=takes(20.0), pools=POOLS, shares=True)


def test_a_policy_may_be_changed_and_removed_while_jobs_run() -> None:
    """Each change of the policy takes effect on jobs that run, also after a crash of the manager."""

    async def act(world: World) -> None:
        jobs = [made(share, items=400) for share in ("a", "b")]
        for one in jobs:
            await submitted(world, one)

        async def slots() -> dict[str, int]:
            await asyncio.sleep(30.0)
            return {view["share"]: view["slots"] for view in (await leader(world)).fair_share.status()}

        await set_policy(world, policy(ShareAttributes("a", 1.0, 2)))
        assert (await slots())["a"] <= 2
        await set_policy(world, policy(ShareAttributes("b", 1.0, 1)))
        kill_manager(world)
        counted = await slots()
        assert counted["b"] <= 1
        assert counted["a"] > 2
        await set_policy(world, None)
        assert await slots() == {}
        for one in jobs:
            await ended(world, one)

    in_world(act, script=takes(3.0), pools=POOLS, shares=True)
