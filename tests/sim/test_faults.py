"""The effect of each kind of fault on a port call."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from batchlab.core.errors import AlreadyExists, Throttled, Unreachable
from batchlab.sim.actors import Actor
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import Fault, FaultKind, Faults, Weather
from batchlab.sim.port_wrappers import wrap
from tests.support.sim.loop import at, caught
from tests.support.sim.toy_grid import ToyQueue, ToyStore


@pytest.mark.parametrize(
    ("kind", "error", "stored"),
    [
        (FaultKind.THROTTLED, Throttled, False),
        (FaultKind.UNREACHABLE, Unreachable, False),
        (FaultKind.ANSWER_LOST, Unreachable, True),
    ],
)
def test_an_error_is_raised_before_or_after_the_effect(kind: FaultKind, error: type[Exception], stored: bool) -> None:
    store, faults = ToyStore(), at(2, kind)

    async def main() -> None:
        port = wrap(store, "objects", Actor("a"), faults)
        assert await caught(port.put("first", "v")) is None
        assert isinstance(await caught(port.put("second", "v")), error)
        assert await caught(port.put("third", "v")) is None

    SimLoop().run(main())
    assert ("second" in store.objects) is stored
    assert faults.injected == [Fault("a", 2, kind)]
    assert faults.counts == {kind: 1}


def test_a_lost_answer_hides_even_an_error() -> None:
    async def main() -> None:
        store = ToyStore()
        store.objects["k"] = "other"
        port = wrap(store, "objects", Actor("a"), at(1, FaultKind.ANSWER_LOST))
        error = await caught(port.put("k", "v", if_absent=True))
        assert isinstance(error, Unreachable)
        assert isinstance(error.__cause__, AlreadyExists)

    SimLoop().run(main())


def test_a_delayed_call_is_late_with_its_effect_or_with_its_answer() -> None:
    """Work continues while a delayed call lets the lease expire."""

    async def main(seed: int) -> tuple[bool, float]:
        store, loop = ToyStore(), asyncio.get_running_loop()
        faults = Faults.from_list([Fault("a", 1, FaultKind.DELAYED)], random.Random(seed), delay_s=(10.0, 60.0))
        call = asyncio.create_task(wrap(store, "objects", Actor("a"), faults).put("k", "v"))
        await asyncio.sleep(1)
        early = "k" in store.objects
        await call
        return early, loop.time()

    runs = [SimLoop().run(main(seed)) for seed in range(20)]
    assert {early for early, _ in runs} == {True, False}
    assert all(10 < end_s < 61 for _, end_s in runs)


@pytest.mark.parametrize(("kind", "copies"), [(FaultKind.DUPLICATED, [1, 1, 2]), (FaultKind.LOST, [0, 1, 1])])
def test_one_message_of_a_send_is_doubled_or_lost(kind: FaultKind, copies: list[int]) -> None:
    queue = ToyQueue()

    async def main() -> None:
        await wrap(queue, "queue", Actor("a"), at(1, kind)).send("q", messages=["x", "y", "z"])

    SimLoop().run(main())
    bodies = [entry.body for entry in queue.entries.values()]
    assert sorted(bodies.count(body) for body in "xyz") == copies


def test_losing_the_only_message_sends_nothing() -> None:
    queue = ToyQueue()

    async def main() -> None:
        await wrap(queue, "queue", Actor("a"), at(1, FaultKind.LOST)).send("q", ["x"])

    SimLoop().run(main())
    assert queue.entries == {}


def test_a_dropped_receive_leaves_the_message_in_flight() -> None:
    queue = ToyQueue()

    async def main() -> tuple[Sequence[object], Sequence[object], Sequence[object]]:
        port = wrap(queue, "queue", Actor("a"), at(2, FaultKind.DROPPED))
        await port.send("q", ["x"])
        first = await port.receive("q")
        second = await port.receive("q", wait_s=0)
        await asyncio.sleep(60)
        return first, second, await port.receive("q")

    assert SimLoop().run(main()) == ([], [], [("m1", "x")])


def test_a_budget_ends_faults_of_its_kind_only() -> None:
    rates = Weather(throttled=0.5, unreachable=0.3)
    faults = Faults(random.Random(1), rates, budget={FaultKind.THROTTLED: 3})

    async def main() -> None:
        port = wrap(ToyStore(), "objects", Actor("a"), faults)
        for i in range(100):
            await caught(port.put(str(i), "v"))

    SimLoop().run(main())
    assert faults.counts[FaultKind.THROTTLED] == 3
    assert faults.counts[FaultKind.UNREACHABLE] > 10
    assert faults.calls == {"a": 100}


def test_rates_are_met_and_queue_faults_spare_other_ports() -> None:
    faults = Faults(random.Random(1), Weather(throttled=0.2, lost=0.3, dropped=0.3))

    async def main() -> None:
        port = wrap(ToyStore(), "objects", Actor("a"), faults)
        for i in range(2_000):
            await caught(port.put(str(i), "v"))

    SimLoop().run(main())
    assert set(faults.counts) == {FaultKind.THROTTLED}
    assert 300 < faults.counts[FaultKind.THROTTLED] < 500


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1"):
        Faults(random.Random(1), Weather(kill_before=0.6, throttled=0.6))
