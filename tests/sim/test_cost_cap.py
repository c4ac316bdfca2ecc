"""A cost cap, which stops launches, in virtual time with the prices of instances on AWS.

An m7i.large costs 0.1008 USD per hour. A minute, which is the billed minimum, costs 0.00168 USD.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from batchlab.core.model import JobState, LifecycleState, Pool
from batchlab.core.pricing import price_book
from batchlab.core.pricing.usage import Accounting, Budget, CapBudget, Kind
from batchlab.server import job_facts, metrics
from batchlab.server.http.history import eta_of
from batchlab.server.wait_reasons import why
from batchlab.sim.world import World
from tests.support.sim.scenes import A, B, ended, in_world, job, kill_manager, leader, stage, submitted, takes

BOOK = price_book.load()
MINUTE_USD = 0.1008 / 60
POOLS = (Pool("default", 0, 10, 2, instance_type="m7i.large"),)
LAUNCHED = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


def rates(kind: Kind) -> float:
    return BOOK.instance_usd_h(kind.type, kind.market).high


def accounting(max_cost_usd: float | None = None) -> Accounting:
    return Accounting(rates, max_cost_usd=max_cost_usd)


async def settled(world: World, *, within_s: float = 2000.0) -> None:
    """Wait until the fleet has been empty for a while."""
    empty_s = 0.0
    async with asyncio.timeout(within_s):
        while empty_s < 60:
            await asyncio.sleep(1.0)
            manager = await leader(world)
            groups = await manager.ports.fleet.describe()
            busy = any(v.desired or any(i.state in LAUNCHED for i in v.instances) for v in groups)
            empty_s = 0.0 if busy else empty_s + 1.0


async def spent_usd(world: World) -> float:
    manager = await leader(world)
    assert manager.spending
    return manager.spending.meter.total.usd(rates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cap", "run_s", "boot_s", "slots"),
    [
        (0.005, 2.0, 0.0, 2),
        (0.03, 2.0, 0.0, 2),
        (0.005, 20.0, 0.0, 2),
        (0.03, 20.0, 0.0, 2),
        (0.01, 0.2, 0.0, 1),
        (0.02, 2.0, 40.0, 2),
        (0.05, 20.0, 90.0, 4),
    ],
)
def test_cost_exceeds_the_cap_by_at_most_a_minute_of_one_instance(
    cap: float, run_s: float, boot_s: float, slots: int
) -> None:
    pool = replace(POOLS[0], boot_s=boot_s, slots=slots)

    async def act(world: World) -> None:
        tasks = int(3 * cap / (0.1008 / 3600) * slots / run_s)  # three times the work that the cap pays for
        made = job(stage(A), items=tasks, max_cost_usd=cap)
        await submitted(world, made)
        await asyncio.sleep(5)
        await settled(world)
        record = await world.find(made.id)
        assert record
        assert not record.state.ended
        usd = await spent_usd(world)
        assert usd <= cap + MINUTE_USD
        done = (await world.ledger.rows(made.id)).stages[0].counts.succeeded
        assert 0 < done < tasks
        # The manager must not be so cautious that no work is done.
        assert usd >= cap / 3
        manager = await leader(world)
        text = why(await job_facts.gather(manager, made.id))
        assert f"capped: it may cost {cap:g} USD" in text
        assert "batchlab job cap" in text

    in_world(act, script=takes(run_s), pools=(pool,), accounting=accounting())


@pytest.mark.parametrize(("cap", "boot_s", "slots"), [(0.03, 0.0, 2), (0.05, 90.0, 4)])
def test_job_near_its_cap_is_capped_for_good(cap: float, boot_s: float, slots: int) -> None:
    """Before, the job lost its capped state for a second after each bundle that was cheaper than estimated, up to
    thirty times."""
    pool = replace(POOLS[0], boot_s=boot_s, slots=slots)

    async def act(world: World) -> None:
        made = job(stage(A), items=int(3 * cap / (0.1008 / 3600) * slots / 20.0), max_cost_usd=cap)
        await submitted(world, made)
        manager = await leader(world)
        assert manager.spending
        live, told, held = manager.lives[made.id], [False], [False]
        for _ in range(900):
            await asyncio.sleep(1.0)
            for seen, now in ((told, bool(live.capped)), (held, live.is_held)):
                if seen[-1] != now:
                    seen.append(now)
        assert told in ([False, True], [False, True, False, True])
        assert len(held) > 10, "or there is nothing to see here"
        manager.spending.set_cap(made.id, 1.1 * cap)
        assert not live.capped, "by this one it is not, for now"

    in_world(act, script=takes(20.0), pools=(pool,), seed=2, accounting=accounting())


def test_a_job_is_capped_no_longer_once_its_cap_pays_for_the_rest() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), items=10)
        await submitted(world, made)
        manager = await leader(world)
        assert manager.spending
        live = manager.lives[made.id]

        def told(left_usd: float, next_usd: float, uncut_usd: float) -> tuple[bool, bool, bool]:
            """Return whether the job counts as capped, and whether the page and the metrics currently show that."""
            assert manager.spending
            live.budget = Budget((CapBudget("it", 10.0, 10.0 - left_usd),), {}, {})
            manager.spending.caps._hold(live, next_usd, uncut_usd)
            shown, _ = metrics.exposition(manager, "sim", "text/plain")
            is_now = eta_of(manager, made.id)["text"] == "unknown: a cost cap stops the job"
            assert f"\nbatchlab_jobs_capped {int(is_now)}.0\n" in shown.decode()
            return bool(live.capped), live.is_held, is_now

        assert told(0.5, 0.1, 0.8) == (False, False, False), "nothing has held it back"
        assert told(0.05, 0.1, 0.8) == (True, True, True)
        assert told(0.5, 0.1, 0.8) == (True, False, False)
        assert told(0.5, 0.1, 0.4) == (False, False, False)

    in_world(act, script=takes(2.0), pools=POOLS, accounting=accounting())


def test_raised_cap_lets_the_job_finish() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), stage(B, A), items=300, max_cost_usd=0.005)
        await submitted(world, made)
        await asyncio.sleep(5)
        await settled(world)
        manager = await leader(world)
        assert manager.spending
        manager.spending.set_cap(made.id, None)
        record = await ended(world, made)
        assert record.state is JobState.SUCCEEDED
        counts = [s.counts.succeeded for s in (await world.ledger.rows(made.id)).stages]
        assert counts == [300, 300]

    in_world(act, script=takes(2.0), pools=POOLS, accounting=accounting())


def test_a_cap_on_the_grid_holds_for_all_jobs_together() -> None:
    async def act(world: World) -> None:
        first = job(stage(A), items=500)
        second = replace(job(stage(A), items=500), id=type(first.id)("other"), token="u")
        await submitted(world, first)
        await submitted(world, second)
        await asyncio.sleep(5)
        await settled(world)
        assert await spent_usd(world) <= 0.01 + MINUTE_USD
        manager = await leader(world)
        assert manager.spending
        assert all("the grid may cost 0.01 USD" in live.capped for live in manager.lives.values())
        manager.spending.set_cap(None, 10.0)
        for one in (first, second):
            assert (await ended(world, one)).state is JobState.SUCCEEDED

    in_world(act, script=takes(2.0), pools=POOLS, accounting=accounting(0.01))


def test_a_cap_that_does_not_pay_for_one_instance_launches_none() -> None:
    async def act(world: World) -> None:
        made = job(stage(A), items=5, max_cost_usd=0.001)
        await submitted(world, made)
        await asyncio.sleep(300)
        assert await spent_usd(world) == 0.0
        assert not world.workers
        manager = await leader(world)
        assert "may cost 0.001 USD, has cost 0 USD" in why(await job_facts.gather(manager, made.id))

    in_world(act, script=takes(1.0), pools=POOLS, accounting=accounting())


@pytest.mark.parametrize(("every_s", "unled_s"), [(18.0, 0.0), (22.0, 15.0)])
def test_the_account_survives_the_manager(every_s: float, unled_s: float) -> None:
    """A manager that is killed repeatedly must not forget the spent amount and spend it again. The second time, the
    manager dies when the cap is reached. Running tasks continue until another manager leads."""

    async def act(world: World) -> None:
        made = job(stage(A), items=2000, max_cost_usd=0.02)
        await submitted(world, made)
        for _ in range(4):
            await asyncio.sleep(every_s)
            kill_manager(world)
            await leader(world)
        await settled(world, within_s=4000)
        manager = await leader(world)
        assert manager.spending
        real = sum(live.billed_s for live in manager.spending.meter.lives.values())
        assert real == 0.0
        usd = manager.lives[made.id].account.usd(rates)
        unled_usd = POOLS[0].max_size * unled_s / 60 * MINUTE_USD
        assert 0.02 / 3 <= usd <= 0.02 + MINUTE_USD + unled_usd
        # The real lifetimes of the instances, measured by the world.
        assert len(world.workers) * MINUTE_USD <= 0.02 + MINUTE_USD

    in_world(act, script=takes(2.0), pools=POOLS, seed=4, accounting=accounting())


def test_without_a_cap_an_account_changes_nothing() -> None:
    """The same world with and without an account takes the same course, instance by instance."""

    def course(kept: Accounting | None) -> list[tuple[float, str, int]]:
        async def act(world: World) -> list[tuple[float, str, int]]:
            made = job(stage(A), stage(B, A), items=150)
            await submitted(world, made)
            assert (await ended(world, made)).state is JobState.SUCCEEDED
            return [(s, st, t) for s, _, st, t in world.starts]

        return in_world(act, script=takes(0.5), pools=POOLS, accounting=kept)

    def tasks(found: list[tuple[float, str, int]]) -> list[tuple[str, int]]:
        return sorted((name, task) for _, name, task in found)

    assert tasks(course(accounting())) == tasks(course(None))
