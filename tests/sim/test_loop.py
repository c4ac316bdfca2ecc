"""The virtual-time loop and its actors: order, limits, and ends that nobody can miss."""

from __future__ import annotations

import asyncio
import gc
import random
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.ports import Clock, Ids
from batchlab.sim.actors import Actor, ActorKilled, SimulationError
from batchlab.sim.loop import (
    Crashed,
    Deadlock,
    SimClock,
    SimIds,
    SimLoop,
    StepLimit,
    TimeLimit,
)

Main = Coroutine[Any, Any, Any]


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


def forget(coro: Main, name: str | None = None) -> str:
    """Start a task that nobody holds on to."""
    return asyncio.create_task(coro, name=name).get_name()


# --- time ---


def test_time_jumps_to_the_next_timer_instead_of_waiting() -> None:
    loop = SimLoop()
    begun_s = time.monotonic()
    loop.run(asyncio.sleep(30 * 86_400))
    assert loop.time() == 30 * 86_400
    assert time.monotonic() - begun_s < 5


def test_equal_times_run_in_the_order_they_were_asked_for() -> None:
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


def test_order_is_kept_when_many_timers_are_cancelled() -> None:
    rng = random.Random(1)
    seen: list[float] = []
    expected: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        timers = [
            (when, loop.call_at(when, seen.append, when))
            for when in rng.choices(range(999), k=2_000)
        ]
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


def test_a_thread_is_refused_and_runs_inline_where_that_was_asked_for() -> None:
    async def main() -> int:
        return await asyncio.to_thread(len, "four")

    with pytest.raises(SimulationError, match="no threads"):
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
    with pytest.raises(SimulationError, match="no sockets"):
        SimLoop().run(reach())


# --- limits ---


def test_a_deadlock_is_told_with_the_names_of_those_who_wait() -> None:
    """Answers pain 1, stuck without a reason, for the simulator's own users."""

    async def starve(event: asyncio.Event) -> None:
        await event.wait()

    async def main() -> None:
        event = asyncio.Event()
        await asyncio.sleep(2)
        await asyncio.gather(
            asyncio.create_task(starve(event), name="left"),
            Actor("w-1").spawn(starve(event), name="right"),
        )

    with pytest.raises(Deadlock, match=r"nothing is scheduled at 2\.000 s") as caught:
        SimLoop().run(main())
    assert "left (starve:" in str(caught.value)
    assert "w-1/right (starve:" in str(caught.value)


def test_an_infinite_sleep_is_no_way_out_of_a_deadlock() -> None:
    with pytest.raises(Deadlock):
        SimLoop().run(asyncio.sleep(float("inf")))


def test_the_limit_in_virtual_seconds_holds_and_the_loop_can_go_on() -> None:
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


# --- ends ---


async def fail_soon(message: str = "lost") -> None:
    await asyncio.sleep(1)
    raise KeyError(message)


def test_an_exception_that_nobody_awaits_ends_the_run_at_once() -> None:
    loop = SimLoop()

    async def main() -> None:
        forget(fail_soon(), name="helper")
        await asyncio.sleep(1_000)

    with pytest.raises(Crashed, match="helper") as caught:
        loop.run(main())
    assert isinstance(caught.value.__cause__, KeyError)
    assert loop.time() == 1.0


def test_a_failed_task_that_is_still_referenced_surfaces_at_the_end() -> None:
    kept: list[asyncio.Task[None]] = []

    async def main() -> None:
        kept.append(asyncio.create_task(fail_soon(), name="kept"))
        await asyncio.sleep(2)

    with pytest.raises(Crashed, match="kept"):
        SimLoop().run(main())


def test_an_exception_in_a_callback_or_a_future_surfaces_too() -> None:
    async def callback() -> None:
        asyncio.get_running_loop().call_later(1, int, "no number")
        await asyncio.sleep(2)

    async def future() -> None:
        asyncio.get_running_loop().create_future().set_exception(ValueError("no number"))
        await asyncio.sleep(2)

    for main in (callback, future):
        with pytest.raises(Crashed) as caught:
            SimLoop().run(main())
        assert isinstance(caught.value.__cause__, ValueError)


def test_an_exception_that_somebody_handles_is_no_crash() -> None:
    async def main() -> str:
        task = asyncio.create_task(fail_soon())
        await asyncio.sleep(5)
        try:
            await task
        except KeyError:
            return "handled"
        return "missed"

    assert SimLoop().run(main()) == "handled"


def test_what_main_raises_comes_first_and_other_losses_are_noted() -> None:
    async def main() -> None:
        forget(fail_soon("other"))
        await fail_soon("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        SimLoop().run(main())
    assert any("other" in note for note in caught.value.__notes__)


def test_what_still_runs_when_main_ends_is_ended_at_the_same_instant() -> None:
    ends: list[str] = []
    loop = SimLoop()

    async def linger() -> None:
        try:
            await asyncio.sleep(1_000)
        finally:
            ends.append("cancelled")
            await asyncio.sleep(1_000)
            ends.append("never")

    async def main() -> str:
        forget(linger())
        await asyncio.sleep(1)
        return "result"

    assert loop.run(main(), limit_s=1) == "result"
    assert ends == ["cancelled"]
    assert loop.time() == 1


def test_a_generator_that_is_dropped_half_way_is_closed_during_the_run() -> None:
    closed: list[float] = []
    loop = SimLoop()

    async def pages() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(loop.time())

    async def main() -> None:
        async for _ in pages():
            break
        await asyncio.sleep(10)

    loop.run(main())
    assert closed == [0.0]


def test_garbage_is_collected_after_a_number_of_steps_not_of_allocations() -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self

    async def main(loop: SimLoop, other_objects: int) -> list[int]:
        junk = [[i] for i in range(other_objects)]
        collected: list[int] = []
        for i in range(150_000):
            if i % 10 == 0:
                weakref.finalize(Node(), lambda: collected.append(loop.steps))
            await asyncio.sleep(0)
        assert len(junk) == other_objects
        return collected

    runs = [loop.run(main(loop, n)) for loop, n in ((SimLoop(), 0), (SimLoop(), 12_345))]
    assert runs[0] == runs[1]
    assert len(runs[0]) > 5_000
    assert gc.isenabled()


def test_siblings_are_cancelled_in_an_order_that_does_not_follow_their_addresses() -> None:
    """TaskGroup keeps its tasks in a set."""
    kept: list[asyncio.Task[None]] = []

    async def linger(i: int, ended: list[int]) -> None:
        try:
            await forever()
        finally:
            ended.append(i)

    async def main(ended: list[int]) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(linger(i, ended)) for i in range(50)]
            kept.extend(tasks[len(kept) % 7 :: 3])  # so that the next run gets other addresses
            group.create_task(fail_soon())

    orders: set[tuple[int, ...]] = set()
    for _ in range(5):
        ended: list[int] = []
        with pytest.raises(ExceptionGroup):
            SimLoop().run(main(ended))
        orders.add(tuple(ended))
    assert len(orders) == 1


def test_default_task_names_do_not_depend_on_earlier_runs() -> None:
    async def main() -> str:
        return asyncio.create_task(asyncio.sleep(0)).get_name()

    assert SimLoop().run(main()) == SimLoop().run(main())


# --- actors ---


class World:
    """An actor whose tasks write down how they end."""

    def __init__(self) -> None:
        self.actor = Actor("a")
        self.ends: list[str] = []

    async def linger(self, name: str) -> None:
        try:
            await forever()
        finally:
            self.ends.append(name)

    async def tree(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.linger("child"))
            await asyncio.sleep(1)
            await asyncio.gather(self.linger("left"), asyncio.shield(self.linger("shielded")))


def test_a_kill_ends_every_task_the_actor_has_made_and_nobody_elses() -> None:
    world, loop = World(), SimLoop()

    async def main() -> bool:
        other = asyncio.create_task(world.linger("other"))
        root = world.actor.spawn(world.tree())
        await asyncio.sleep(5)
        world.actor.kill()
        await asyncio.wait([root])
        assert sorted(world.ends) == ["child", "left", "shielded"]
        assert loop.time() == 5
        return other.done()

    assert loop.run(main()) is False
    assert not world.actor.alive


def test_a_killed_actors_tasks_end_in_the_order_they_were_spawned() -> None:
    world = World()

    async def main() -> None:
        for i in range(50):
            world.actor.spawn(world.linger(f"{i:02d}"))
        await asyncio.sleep(1)
        world.actor.kill()
        await asyncio.sleep(0)

    SimLoop().run(main())
    assert world.ends == [f"{i:02d}" for i in range(50)]


def test_what_a_dead_actor_raises_is_ignored() -> None:
    async def fails_when_dying() -> None:
        try:
            await forever()
        finally:
            raise KeyError("in finally")

    async def root() -> None:
        asyncio.get_running_loop().call_later(3, int, "no number")
        await asyncio.gather(fails_when_dying(), fails_when_dying())

    async def main() -> None:
        actor = Actor("a")
        actor.spawn(root())
        await asyncio.sleep(1)
        actor.kill()
        await asyncio.sleep(5)

    SimLoop().run(main())


def test_the_echo_of_a_death_in_somebody_elses_future_is_no_crash() -> None:
    async def main() -> None:
        echo = BaseExceptionGroup("gathered", [ActorKilled("a"), ActorKilled("b")])
        asyncio.get_running_loop().create_future().set_exception(echo)
        await asyncio.sleep(1)

    SimLoop().run(main())


def test_a_failure_left_unhandled_by_a_death_is_no_crash() -> None:
    """A parent that would have looked at its child's failure was killed before it could."""
    kept: list[asyncio.Task[None]] = []

    async def root() -> None:
        kept.append(asyncio.create_task(fail_soon()))
        await forever()

    async def main() -> None:
        actor = Actor("a")
        actor.spawn(root())
        await asyncio.sleep(2)
        actor.kill()

    SimLoop().run(main())
    assert kept[0].done()


def test_a_living_actors_crash_names_the_actor() -> None:
    async def main() -> None:
        Actor("w-7").spawn(fail_soon())
        await asyncio.sleep(5)

    with pytest.raises(Crashed, match="w-7"):
        SimLoop().run(main())


def test_a_task_that_outlives_one_cancellation_is_cancelled_again() -> None:
    loop = SimLoop()

    async def stubborn() -> None:
        for _ in range(20):
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        actor = Actor("a")
        root = actor.spawn(stubborn())
        await asyncio.sleep(1)
        actor.kill()
        await asyncio.wait([root])

    loop.run(main())
    assert loop.time() == 1


def test_a_task_that_swallows_every_cancellation_is_an_error() -> None:
    given_up = False

    async def immortal() -> None:
        while not given_up:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        nonlocal given_up
        actor = Actor("a")
        actor.spawn(immortal(), name="immortal")
        await asyncio.sleep(1)
        actor.kill()
        try:
            await asyncio.sleep(1)
        finally:
            given_up = True

    with pytest.raises(Crashed, match="swallows every cancellation: immortal"):
        SimLoop().run(main())


def test_the_dead_start_nothing() -> None:
    async def root(late: list[str]) -> None:
        def from_the_grave() -> None:
            asyncio.get_running_loop().create_task(act(late))

        asyncio.get_running_loop().call_later(2, from_the_grave)
        await forever()

    async def act(late: list[str]) -> None:
        late.append("acted")

    async def main() -> list[str]:
        actor, late = Actor("a"), list[str]()
        actor.spawn(root(late))
        await asyncio.sleep(1)
        actor.kill()
        actor.kill()
        await asyncio.sleep(5)
        with pytest.raises(SimulationError, match="dead"):
            actor.spawn(forever())
        return late

    assert SimLoop().run(main()) == []


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
    """Ten times slower would still pass on an idle machine: this catches a change of order."""
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
