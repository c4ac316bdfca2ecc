"""A connection that only one thread may use at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from batchlab.adapters.clock import Busy, CallRunner, ReadWriteThreads, SingleThread


def test_a_quick_call_runs_on_the_spot() -> None:
    async def main() -> None:
        thread = SingleThread()
        ran = await thread(threading.current_thread, writes=True, quick=True)
        assert ran is threading.current_thread()
        ran = await thread(threading.current_thread, writes=True, quick=False)
        assert ran is not threading.current_thread()
        await thread.close(lambda: None)

    asyncio.run(main())


def test_lock_is_awaited_in_the_thread() -> None:
    async def main() -> None:
        thread, here = SingleThread(), threading.current_thread()

        def call() -> str:
            if threading.current_thread() is here:
                raise Busy("Locked.")
            return "done"

        assert await thread(call, writes=True, quick=True) == "done"
        await thread.close(lambda: None)

    asyncio.run(main())


def test_no_call_runs_beside_a_call_whose_caller_was_canceled() -> None:
    async def main() -> list[str]:
        thread, began, ends = SingleThread(), threading.Event(), threading.Event()
        order: list[str] = []

        def long() -> None:
            began.set()
            ends.wait(10)
            order.append("long")

        caller = asyncio.create_task(thread(long, writes=True, quick=False))
        await asyncio.to_thread(began.wait, 10)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        quick = asyncio.create_task(thread(lambda: order.append("quick"), writes=True, quick=True))
        await asyncio.sleep(0)
        ends.set()
        await quick
        await thread.close(lambda: None)
        return order

    assert asyncio.run(main()) == ["long", "quick"]


@pytest.mark.parametrize("made", [SingleThread, ReadWriteThreads])
def test_close_completes_without_a_waiting_caller(made: Callable[[], CallRunner]) -> None:
    async def main() -> None:
        threads, ends, closed = made(), threading.Event(), threading.Event()
        busy = asyncio.create_task(threads(ends.wait, writes=True, quick=False))
        await asyncio.sleep(0)
        closing = asyncio.create_task(threads.close(closed.set))
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        assert not closed.is_set()
        ends.set()
        assert await busy
        assert await asyncio.to_thread(closed.wait, 10)

    asyncio.run(main())
