"""The end of a simulated run, which reports every failure and leaves no task running."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator

import pytest

from batchlab.sim.event_loop import Crashed, SimLoop
from tests.support.sim.loop import fail_soon, forever, forget


def test_unawaited_exception_ends_the_run_at_once() -> None:
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


def test_handled_exception_is_not_a_crash() -> None:
    async def main() -> str:
        task = asyncio.create_task(fail_soon())
        await asyncio.sleep(5)
        try:
            await task
        except KeyError:
            return "handled"
        return "missed"

    assert SimLoop().run(main()) == "handled"


def test_error_of_main_comes_first_and_other_losses_are_noted() -> None:
    async def main() -> None:
        forget(fail_soon("other"))
        await fail_soon("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        SimLoop().run(main())
    assert any("other" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_all_tasks_however_many_wait_for_the_one_it_hits(kind: type[BaseException]) -> None:
    ended: list[str] = []

    async def interrupted() -> None:
        await asyncio.sleep(1)
        raise kind

    async def waiting(name: str, doing: asyncio.Future[None]) -> None:
        try:
            await doing
        finally:
            ended.append(name)

    async def main() -> None:
        first = asyncio.ensure_future(interrupted())
        second = asyncio.ensure_future(waiting("second", first))
        await asyncio.gather(waiting("third", second), waiting("other", asyncio.Future()))

    with pytest.raises(kind):
        SimLoop().run(main())
    assert sorted(ended) == ["other", "second", "third"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("failing", [False, True])
def test_an_interrupt_that_hits_the_end_of_a_run_is_raised(kind: type[BaseException], failing: bool) -> None:
    ended: list[str] = []

    async def lingering(name: str, raised: type[BaseException] | None) -> None:
        try:
            await asyncio.Future()
        finally:
            ended.append(name)
            if raised:
                raise raised

    async def main() -> None:
        tasks = [
            asyncio.ensure_future(lingering(name, raised))
            for name, raised in (("first", None), ("second", kind), ("third", None))
        ]
        await asyncio.sleep(1)
        assert len(tasks) == 3
        if failing:
            raise ValueError

    with pytest.raises(kind):
        SimLoop().run(main())
    assert sorted(ended) == ["first", "second", "third"]


def test_tasks_end_at_the_instant_at_which_main_ends() -> None:
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
    """TaskGroup keeps its tasks in a set, whose order depends on addresses."""
    kept: list[asyncio.Task[None]] = []

    async def linger(i: int, ended: list[int]) -> None:
        try:
            await forever()
        finally:
            ended.append(i)

    async def main(ended: list[int]) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(linger(i, ended)) for i in range(50)]
            kept.extend(tasks[len(kept) % 7 :: 3])  # the next run gets other addresses
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
