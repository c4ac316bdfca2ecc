"""Schedules in virtual time: the fleet before a peak, and the cost of a schedule."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from batchlab.core import due_times
from batchlab.core.job_definition import InputDef, SplitBy
from batchlab.core.model import Pool
from batchlab.core.pricing import price_book
from batchlab.core.pricing.usage import Accounting, Kind
from batchlab.core.protocol import object_keys
from batchlab.core.schedules import Definition, When
from batchlab.sim.world import World
from tests.support.sim.scenes import leader
from tests.support.sim.schedule_scenes import (
    BERLIN,
    HOUR,
    MINUTE,
    UNHURRIED,
    added,
    ask,
    begins,
    definition,
    in_time,
    shown,
    template,
    until,
)

# --- Pre-warming ---------------------------------------------------------------------------------

WIDE = (Pool("default", 0, 6, 1, instance_type="m7i.large", boot_s=20.0),)
BOOK = price_book.load()


def rates(kind: Kind) -> float:
    return BOOK.instance_usd_h(kind.type, kind.market).high


async def desired(world: World) -> int:
    (view,) = await world.groups()
    return view.desired


def warm(capacity: int | None = None, **changes: Any) -> Definition:
    return definition("0 10 * * *", prewarm_s=10 * MINUTE, capacity=capacity, **changes)


def test_fleet_is_warm_before_the_peak_and_released_after_it() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        await added(world, warm(4))
        await until(world, "2026-03-02T09:49:50")
        assert await desired(world) == 0
        await until(world, "2026-03-02T09:52:00")
        (view,) = await world.groups()
        assert view.desired == len(view.instances) == 4
        manager = await leader(world)
        causes = [activity.cause for activity in await manager.ports.fleet.activities()]
        told = "schedule nightly is due at 2026-03-02 10:00:00 UTC: 4 as it asks for"
        assert any(told in cause for cause in causes), causes
        await until(world, "2026-03-02T09:59:59")
        assert await desired(world) == 4
        await until(world, "2026-03-02T10:03:00")
        (run,) = (await shown(world)).runs
        assert run.result == "SUCCEEDED"
        assert await desired(world) == 0

    in_time(act, pools=WIDE)


@pytest.mark.parametrize("paused", [True, False])
def test_prewarmed_capacity_is_released_without_a_job(paused: bool) -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        empty = template(input=InputDef(("raw/nothing/",), SplitBy.ITEMS))
        await added(world, warm(4), empty)
        await until(world, "2026-03-02T09:55:00")
        assert await desired(world) == 4
        if paused:
            await ask(world, lambda s: s.pause("nightly"))
            await until(world, "2026-03-02T09:57:00")
        else:
            await until(world, "2026-03-02T10:01:00")
        assert await desired(world) == 0

    in_time(act, pools=WIDE)


def test_default_prewarm_size_follows_the_last_runs_or_the_tasks() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        keys = tuple(f"raw/{number}" for number in range(30))
        for key in keys:
            await world.objects.put(key, b"data")
        twice = warm(None, when=When("0 10,11 * * *"))
        await added(world, twice, template(input=InputDef(keys)))
        await until(world, "2026-03-02T09:55:00")
        assert await desired(world) == 3  # 30 tasks of a second in 10 s
        await until(world, "2026-03-02T10:30:00")
        (run,) = (await shown(world)).runs
        assert run.tasks == 30
        (used,) = dict(run.peak).values()
        assert used > 3  # the tasks take 40 s each
        await until(world, "2026-03-02T10:55:00")
        assert await desired(world) == used

    in_time(act, run_s=40.0, pools=WIDE)


def test_pool_limit_and_manual_capacity_hold() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        await added(world, warm(50))
        await until(world, "2026-03-02T09:55:00")
        assert await desired(world) == 6
        manager = await leader(world)
        causes = [activity.cause for activity in await manager.ports.fleet.activities()]
        assert any("of which its limit leaves 6" in cause for cause in causes)
        manager.autoscaler.user_capacity["default"] = 2
        await manager.ports.fleet.set_desired("default", 2, cause="by hand")
        await until(world, "2026-03-02T09:57:00")
        assert await desired(world) == 2

    in_time(act, pools=WIDE)


@pytest.mark.parametrize("whose", ["grid", "job"])
def test_a_cap_on_cost_is_not_passed_for_a_warm_fleet(whose: str) -> None:
    # 6 instances for at least 10 minutes cost more than 0.1 USD.
    cap = 0.05

    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:30:00")
        job = template(max_cost_usd=cap) if whose == "job" else template()
        await added(world, warm(6), job)
        await until(world, "2026-03-02T09:55:00")
        assert 1 <= await desired(world) < 6
        manager = await leader(world)
        causes = [activity.cause for activity in await manager.ports.fleet.activities()]
        assert any("a cap on cost pays for" in cause for cause in causes)
        await until(world, "2026-03-02T09:59:50")
        assert 1 <= await desired(world) < 6
        await until(world, "2026-03-02T10:10:00")
        assert manager.spending
        assert manager.spending.meter.total.usd(rates) <= cap

    max_cost_usd = cap if whose == "grid" else None
    in_time(act, pools=WIDE, accounting=Accounting(rates, max_cost_usd=max_cost_usd))


# --- Cost ----------------------------------------------------------------------------------------


def test_schedule_without_a_due_time_sends_no_request() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:00:00")
        await added(world, definition("0 0 1 1 *"))
        manager = await leader(world)
        await asyncio.sleep(MINUTE)
        asked: list[str] = []
        assert manager.scheduler
        for name in ("put", "get", "head", "get_if_changed"):
            inner = getattr(world.objects, name)

            async def counted(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                asked.append(args[0])
                return await inner(*args, **kwargs)

            setattr(world.objects, name, counted)
        await asyncio.sleep(HOUR)
        assert [key for key in asked if key.startswith("grid/")] == []

    in_time(act, **UNHURRIED)


def test_a_due_time_costs_two_writes_of_its_schedule() -> None:
    async def act(world: World) -> None:
        begins(world, "2026-03-02T09:58:30")
        await added(world, definition("*/5 * * * *"))
        written: list[str] = []
        world.objects.written = lambda key, *_: written.append(key)
        await until(world, "2026-03-02T10:04:00")
        assert written.count(object_keys.schedule("nightly")) == 2

    in_time(act, watched=False)


def test_times_are_shown_in_the_zone_and_in_utc() -> None:
    at_s = datetime(2026, 3, 29, 1, tzinfo=UTC).timestamp()
    assert due_times.iso(at_s) == "2026-03-29T01:00:00Z"
    assert due_times.iso(at_s, ZoneInfo(BERLIN)) == "2026-03-29T03:00:00+02:00"
    assert due_times.text_of_time(at_s, ZoneInfo(BERLIN)) == "2026-03-29 03:00:00 CEST"
