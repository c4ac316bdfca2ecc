"""The event loop in virtual time: order, limits, clocks, and speed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.core.ports import Clock, Ids
from batchlab.sim.actors import Actor, SimClock, SimIds, SimulationError
from batchlab.sim.event_loop import Deadlock, SimLoop, StepLimit, TimeLimit
from tests.support.sim.loop import Main

# --- time ---


def test_time_jumps_to_the_next_timer_instead_of_waiting() -> None:
    loop = SimLoop()
    begun_s = time.monotonic()
    loop.run(asyncio.sleep(30 * 86_400))
    assert loop.time() == 30 * 86_400
    assert time.monotonic() - begun_s < 5


def test_events_at_equal_times_run_in_request_order() -> None:
    seen: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for i in range(1_000):
            loop.call_at(5.0, seen.append, i)
        await asyncio.sleep(5)

    SimLoop().run(main())
    assert seen == list(range(1_000))


def test_timers_that_are_due_run_although_something_is_always_ready() -> None:
    async def main() -> int:
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(0, done.set)
        spins = 0
        while not done.is_set():
            spins += 1
            await asyncio.sleep(0)
        return spins

    assert SimLoop().run(main(), limit_steps=100) <= 2


def test_timers_cancelled_long_before_they_are_due_do_not_pile_up() -> None:
    loop = SimLoop()

    async def main() -> None:
        for _ in range(5_000):
            async with asyncio.timeout(3_600):
                await asyncio.sleep(0.001)

    loop.run(main())
    waiting = 0

    async def count() -> None:
        nonlocal waiting
        for _ in range(5_000):
            loop.call_later(3_600, print).cancel()
        waiting = len(loop._timers)

    loop.run(count())
    assert waiting < 200
    assert loop.time() < 100


def test_order_is_kept_when_many_timers_are_canceled() -> None:
    rng = random.Random(1)
    seen: list[float] = []
    expected: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        timers = [(when, loop.call_at(when, seen.append, when)) for when in rng.choices(range(999), k=2_000)]
        for when, timer in timers:
            if rng.random() < 0.7:
                timer.cancel()
            else:
                expected.append(when)
        await asyncio.sleep(1_000)

    SimLoop().run(main())
    assert seen == sorted(expected)
    assert len(seen) > 100


def test_the_standard_tools_of_asyncio_work_on_virtual_time() -> None:
    async def main() -> list[object]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        seen: list[object] = []

        async def put() -> None:
            await asyncio.sleep(3)
            await queue.put(7)

        async with asyncio.TaskGroup() as group:
            group.create_task(put())
            seen.append(await asyncio.wait_for(queue.get(), 10))
        try:
            await asyncio.wait_for(queue.get(), 10)
        except TimeoutError:
            seen.append("timeout")
        seen.append(await asyncio.gather(asyncio.sleep(2, "a"), asyncio.sleep(1, "b")))
        seen.append(asyncio.get_running_loop().time())
        return seen

    assert SimLoop().run(main()) == [7, "timeout", ["a", "b"], 15.0]


def test_thread_is_refused_or_runs_inline_as_configured() -> None:
    async def main() -> int:
        return await asyncio.to_thread(len, "four")

    with pytest.raises(SimulationError, match="simulations do not use threads"):
        SimLoop().run(main())
    assert SimLoop(inline_executor=True).run(main()) == 4


@pytest.mark.parametrize(
    "reach",
    [
        lambda: asyncio.open_connection("127.0.0.1", 9),
        lambda: asyncio.start_server(print, "127.0.0.1", 0),
        lambda: asyncio.create_subprocess_exec("true"),
    ],
    ids=["connect", "listen", "subprocess"],
)
def test_the_outside_is_refused(reach: Callable[[], Main]) -> None:
    with pytest.raises(SimulationError, match="does not support sockets"):
        SimLoop().run(reach())


# --- limits ---


def test_deadlock_names_the_waiting_tasks() -> None:
    """The error of a deadlock must name the reason."""

    async def starve(event: asyncio.Event) -> None:
        await event.wait()

    async def main() -> None:
        event = asyncio.Event()
        await asyncio.sleep(2)
        await asyncio.gather(
            asyncio.create_task(starve(event), name="left"), Actor("w-1").spawn(starve(event), name="right")
        )

    with pytest.raises(Deadlock, match=r"nothing is scheduled at 2\.000 s") as caught:
        SimLoop().run(main())
    assert "left (starve:" in str(caught.value)
    assert "w-1/right (starve:" in str(caught.value)


def test_infinite_sleep_does_not_hide_a_deadlock() -> None:
    with pytest.raises(Deadlock):
        SimLoop().run(asyncio.sleep(float("inf")))


def test_limit_in_virtual_seconds_holds_and_the_loop_can_continue() -> None:
    loop = SimLoop()
    with pytest.raises(TimeLimit, match="main"):
        loop.run(asyncio.sleep(100), limit_s=99)
    assert loop.time() == 99
    loop.run(asyncio.sleep(99), limit_s=99)
    assert loop.time() == 198


def test_spinning_without_waiting_runs_into_the_step_limit() -> None:
    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(asyncio.create_task(spin(), name="spinner"))

    with pytest.raises(StepLimit, match="spinner"):
        SimLoop().run(main(), limit_steps=10_000)


# --- clocks and ids ---


def test_a_jump_of_the_wall_clock_is_one_actors_own_and_spares_the_monotonic_clock() -> None:
    loop = SimLoop()
    here, there = SimClock(loop, 1_000.0), SimClock(loop, 1_000.0)
    loop.run(asyncio.sleep(5))
    here.jump(-3_600)
    assert (here.now_s(), there.now_s()) == (-2_595.0, 1_005.0)
    assert here.monotonic_s() == there.monotonic_s() == 5.0


def test_simulated_ids_follow_from_the_seed() -> None:
    def draw(seed: int) -> list[str]:
        ids: Ids = SimIds(random.Random(seed))
        return [ids.fresh("w") for _ in range(100)]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 100
    assert all(one.startswith("w-") for one in draw(1))


def test_real_clocks_advance_and_real_ids_differ() -> None:
    clock: Clock = WallClock()
    ids: Ids = RandomIds()
    before_s = clock.monotonic_s()
    assert abs(clock.now_s() - time.time()) < 5
    assert clock.monotonic_s() >= before_s
    drawn = {ids.fresh("i") for _ in range(1_000)}
    assert len(drawn) == 1_000
    assert all(one.startswith("i-") for one in drawn)


# --- speed ---


def test_the_loop_is_fast_enough_for_ten_thousand_workers() -> None:
    """A loop that is ten times slower would still pass on an idle machine. The test finds a change of the order of
    growth."""
    loop = SimLoop()
    loop.set_debug(False)

    async def main() -> None:
        async def work() -> None:
            for _ in range(5):
                await asyncio.sleep(1)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for _ in range(10_000):
                group.create_task(work())

    begun_s = time.process_time()
    loop.run(main())
    assert loop.steps / (time.process_time() - begun_s) > 50_000
