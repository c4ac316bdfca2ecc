"""Port wrappers, faults and the event log: what a seed decides, and what the dead cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from batchlab.errors import AlreadyExists, Throttled, Unreachable
from batchlab.sim.actors import Actor, ActorKilled, SimulationError
from batchlab.sim.faults import Fault, FaultKind, FaultRates, Faults
from batchlab.sim.log import EventLog, brief, canonical
from batchlab.sim.loop import SimLoop
from batchlab.sim.wrappers import wrap
from tests.sim.toy import ROUGH, Toy, ToyQueue, ToyStore, rough

PROJECT = Path(__file__).resolve().parents[2]
INSTANT = (0.0, 0.0)


def script(*faults: Fault) -> Faults:
    return Faults.from_list(faults, random.Random(1))


def at(call: int, kind: FaultKind) -> Faults:
    """That fault at that call of actor a."""
    return script(Fault("a", call, kind))


def killed(main: Callable[[Actor], Coroutine[Any, Any, None]]) -> Actor:
    """Run `main` as an actor and return it once it has ended."""
    actor = Actor("a")

    async def watch() -> None:
        await asyncio.wait([actor.spawn(main(actor))])
        assert not actor.alive

    SimLoop().run(watch())
    return actor


# --- same seed, same log ---


def log_of_a_process(seed: int, hash_seed: str) -> bytes:
    return subprocess.run(
        [sys.executable, "-m", "tests.sim.toy", str(seed)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True,
        capture_output=True,
        timeout=60,
    ).stdout


def test_the_same_seed_writes_the_same_log_in_every_process() -> None:
    first, second = log_of_a_process(7, "1"), log_of_a_process(7, "4242")
    assert first == second
    assert rough(7).log.text().encode() == first
    assert b"!kill" in first
    assert first.count(b"\n") > 50


def test_another_seed_takes_another_course() -> None:
    assert len({rough(seed).log.digest() for seed in range(5)}) == 5


def test_the_toy_survives_every_fault_over_many_seeds() -> None:
    """The toy is only worth something if all kinds of fault really happen to it."""
    seen: set[FaultKind] = set()
    for seed in range(40):
        toy = rough(seed)
        assert toy.store.writes == len(toy.store.objects) == toy.items
        seen |= set(toy.faults.counts)
    assert seen == set(FaultKind)


# --- replay ---


def test_a_list_of_faults_replays_the_run_that_injected_them() -> None:
    for seed in range(5):
        original = rough(seed)
        assert original.faults.injected
        replay = Faults.from_list(
            original.faults.injected, random.Random(seed), delay_s=(1.0, 90.0)
        )
        again = Toy(replay).run()
        assert again.log.digest() == original.log.digest()
        assert again.faults.injected == original.faults.injected


def test_leaving_one_fault_out_changes_nothing_before_it_and_no_latency_after_it() -> None:
    injected = rough(3).faults.injected
    last = injected[-1]
    full = Toy(Faults.from_list(injected, random.Random(3))).run().log.lines
    less = Toy(Faults.from_list(injected[:-1], random.Random(3))).run().log.lines
    where = next(i for i, line in enumerate(full) if f" {last.actor} #{last.call} " in line)
    assert full[:where] == less[:where]
    assert full[where:] != less[where:]

    one, other = Faults(random.Random(3), ROUGH), Faults.from_list([], random.Random(3))
    for _ in range(10):
        other.next("w-1")
    assert [one.next("w-0") for _ in range(50)] == [other.next("w-0") for _ in range(50)]


def test_a_fault_that_does_not_fit_its_call_does_not_happen() -> None:
    async def main(store: ToyStore) -> None:
        await store.put("k", "v")

    store, faults = ToyStore(), at(1, FaultKind.LOST)
    SimLoop().run(main(wrap(store, "objects", Actor("a"), faults)))
    assert store.objects == {"k": "v"}
    assert faults.injected == []


# --- every crash point ---


def test_every_crash_point_of_the_toy_is_survived() -> None:
    """Kills every worker before and after each of its port calls, one run each."""
    quiet = Toy(script(), items=4, workers=2).run()
    # The last call of each is under way when the run ends.
    points = [
        Fault(actor, call, kind)
        for actor, calls in quiet.faults.calls.items()
        for call in range(1, calls)
        for kind in (FaultKind.KILL_BEFORE, FaultKind.KILL_AFTER)
    ]
    assert len(points) > 40
    for point in points:
        toy = Toy(script(point), items=4, workers=2).run()
        assert toy.deaths == 1, point
        assert toy.store.writes == len(toy.store.objects) == 4, point


# --- kills ---


@pytest.mark.parametrize(
    ("kind", "stored"), [(FaultKind.KILL_BEFORE, False), (FaultKind.KILL_AFTER, True)]
)
def test_a_kill_falls_before_or_after_the_effect_and_hides_the_answer(
    kind: FaultKind, stored: bool
) -> None:
    store, answered = ToyStore(), list[str]()

    async def main(actor: Actor) -> None:
        await wrap(store, "objects", actor, at(1, kind)).put("k", "v")
        answered.append("put")

    killed(main)
    assert bool(store.objects) is stored
    assert answered == []


def test_a_kill_after_falls_also_where_the_call_fails() -> None:
    store = ToyStore()
    store.objects["k"] = "other"

    async def main(actor: Actor) -> None:
        port = wrap(store, "objects", actor, at(1, FaultKind.KILL_AFTER))
        await port.put("k", "v", if_absent=True)

    killed(main)


def test_whatever_a_dead_actors_code_tries_reaches_nothing() -> None:
    # Without latency an unguarded call would take effect at once. What the dead raise is ignored,
    # assertions too, so they only take notes.
    store, seen, loop = ToyStore(), list[object](), SimLoop()
    log = EventLog(loop.time)

    async def try_it(port: ToyStore, key: str) -> None:
        try:
            await port.put(key, "from the grave")
        except BaseException as error:
            seen.append(type(error))
            raise

    async def main(actor: Actor) -> None:
        faults = Faults.from_list([], random.Random(1), latency_s=INSTANT)
        port = wrap(store, "objects", actor, faults, log)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(1_000))
                await port.put("before", "v")
                await asyncio.sleep(1_000)
        finally:
            try:
                seen.append(port.local_path("before"))
            finally:
                try:
                    await asyncio.shield(asyncio.create_task(try_it(port, "shielded")))
                finally:
                    await try_it(port, "finally")

    async def watch() -> None:
        actor = Actor("a")
        root = actor.spawn(main(actor))
        await asyncio.sleep(5)
        actor.kill()
        await asyncio.wait([root])

    loop.run(watch())
    assert list(store.objects) == ["before"]
    assert len(log.lines) == 1
    assert seen == [ActorKilled]  # the shielded task never got to start


def test_a_call_that_waits_for_its_answer_when_the_actor_dies_never_returns() -> None:
    queue, seen, loop = ToyQueue(), list[object](), SimLoop()
    log = EventLog(loop.time)

    async def root(actor: Actor) -> None:
        seen.append(await wrap(queue, "queue", actor, script(), log).receive("q"))

    async def main() -> None:
        actor = Actor("a")
        actor.spawn(root(actor))
        await asyncio.sleep(5)
        actor.kill()
        await queue.send("q", ["too late"])
        await asyncio.sleep(60)

    loop.run(main())
    assert seen == log.lines == []
    assert [entry.visible_s for entry in queue.entries.values()] == [0.0]


def test_an_answer_does_not_reach_the_dead_even_from_behind_a_port_that_cannot_be_cancelled() -> (
    None
):
    class Deaf:
        async def ask(self) -> str:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1_000)
            return "answer"

    seen, loop = list[str](), SimLoop()
    log = EventLog(loop.time)

    async def root(actor: Actor) -> None:
        faults = Faults.from_list([], random.Random(1), latency_s=INSTANT)
        seen.append(await wrap(Deaf(), "deaf", actor, faults, log).ask())

    async def main() -> None:
        actor = Actor("a")
        actor.spawn(root(actor))
        await asyncio.sleep(5)
        actor.kill()

    loop.run(main())
    assert seen == log.lines == []


def test_when_the_run_ends_nobody_gets_a_last_word() -> None:
    store, loop = ToyStore(), SimLoop()
    log = EventLog(loop.time)

    async def root(actor: Actor) -> None:
        faults = Faults.from_list([], random.Random(1), latency_s=INSTANT)
        port = wrap(store, "objects", actor, faults, log)
        try:
            await asyncio.sleep(1_000)
        finally:
            await port.put("last", "word")

    async def main() -> None:
        actor = Actor("a")
        actor.spawn(root(actor))
        await asyncio.sleep(5)

    loop.run(main())
    assert store.objects == {}
    assert log.lines == []


# --- the other faults ---


async def caught(call: Coroutine[Any, Any, Any]) -> BaseException | None:
    try:
        await call
    except Exception as error:  # noqa: BLE001 - returned to the test
        return error
    return None


@pytest.mark.parametrize(
    ("kind", "error", "stored"),
    [
        (FaultKind.THROTTLED, Throttled, False),
        (FaultKind.UNREACHABLE, Unreachable, False),
        (FaultKind.ANSWER_LOST, Unreachable, True),
    ],
)
def test_an_error_is_raised_before_or_after_the_effect(
    kind: FaultKind, error: type[Exception], stored: bool
) -> None:
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
    """Pains 2 and 6 start here: work goes on while the lease runs out."""

    async def main(seed: int) -> tuple[bool, float]:
        store, loop = ToyStore(), asyncio.get_running_loop()
        faults = Faults.from_list(
            [Fault("a", 1, FaultKind.DELAYED)], random.Random(seed), delay_s=(10.0, 60.0)
        )
        call = asyncio.create_task(wrap(store, "objects", Actor("a"), faults).put("k", "v"))
        await asyncio.sleep(1)
        early = "k" in store.objects
        await call
        return early, loop.time()

    runs = [SimLoop().run(main(seed)) for seed in range(20)]
    assert {early for early, _ in runs} == {True, False}
    assert all(10 < end_s < 61 for _, end_s in runs)


@pytest.mark.parametrize(
    ("kind", "copies"), [(FaultKind.DUPLICATED, [1, 1, 2]), (FaultKind.LOST, [0, 1, 1])]
)
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
    rates = FaultRates(throttled=0.5, unreachable=0.3)
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
    faults = Faults(random.Random(1), FaultRates(throttled=0.2, lost=0.3, dropped=0.3))

    async def main() -> None:
        port = wrap(ToyStore(), "objects", Actor("a"), faults)
        for i in range(2_000):
            await caught(port.put(str(i), "v"))

    SimLoop().run(main())
    assert set(faults.counts) == {FaultKind.THROTTLED}
    assert 300 < faults.counts[FaultKind.THROTTLED] < 500


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1"):
        Faults(random.Random(1), FaultRates(kill_before=0.6, throttled=0.6))


# --- latency, pages, log ---


def test_every_call_takes_its_latency() -> None:
    async def main(latency_s: tuple[float, float]) -> float:
        faults = Faults(random.Random(1), latency_s=latency_s)
        port = wrap(ToyStore(), "objects", Actor("a"), faults)
        for i in range(100):
            await port.put(str(i), "v")
        return asyncio.get_running_loop().time()

    assert 0.2 < SimLoop().run(main((0.002, 0.020))) < 2.0
    assert SimLoop().run(main((1.0, 1.0))) == pytest.approx(100.0)
    assert SimLoop().run(main(INSTANT)) == 0.0


def test_every_page_of_a_listing_is_a_call_that_can_fail() -> None:
    store, faults = ToyStore(), at(2, FaultKind.UNREACHABLE)
    store.objects.update({f"k{i}": "" for i in range(6)})
    seen: list[Sequence[str]] = []

    async def main() -> None:
        port = wrap(store, "objects", Actor("a"), faults)
        pages = port.list("k")
        seen.append(await anext(pages))
        with pytest.raises(Unreachable):
            await anext(pages)
        seen.extend([page async for page in port.list("k5")])

    SimLoop().run(main())
    assert seen == [["k0", "k1", "k2", "k3"], ["k5"]]
    assert faults.calls == {"a": 4}


def test_a_call_writes_one_line_with_time_actor_arguments_and_answer() -> None:
    loop = SimLoop()
    log = EventLog(loop.time)

    async def main() -> None:
        faults = Faults.from_list(
            [Fault("a", 2, FaultKind.THROTTLED)], random.Random(1), latency_s=(2.0, 2.0)
        )
        port = wrap(ToyStore(), "objects", Actor("a"), faults, log)
        await port.put("k", "v", if_absent=True)
        await caught(port.put("k", "v"))
        await caught(port.put("k", "v", if_absent=True))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await port.put("late", "v")

    loop.run(main())
    assert log.lines == [
        "1.000000 a #1 objects.put('k', 'v', if_absent=True) -> None",
        "3.000000 a #2 objects.put('k', 'v') !throttled -> Throttled('objects.put is throttled.')",
        "5.000000 a #3 objects.put('k', 'v', if_absent=True) -> AlreadyExists('k is there.')",
        "6.500000 a #4 objects.put('late', 'v') -> cancelled",
    ]


def test_without_faults_and_log_there_is_no_wrapper_and_no_kill() -> None:
    store, actor = ToyStore(), Actor("a")
    assert wrap(store, "objects", actor) is store
    with pytest.raises(SimulationError, match="cannot be killed"):
        actor.kill()
    assert actor.alive


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Pair:
    left: object
    right: object = None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1, 2.5, None, True, "a\nb"), "[1, 2.5, None, True, 'a\\nb']"),
        (set("hgfedcba"), "{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}"),
        ({"b": 1, "a": {3, 1}}, "{'b': 1, 'a': {1, 3}}"),
        (Pair(Colour.RED), "Pair(left='red')"),
        (Path("/somewhere/else/file.bin"), "'file.bin'"),
        (object(), "<object>"),
        (b"short", "b'short'"),
    ],
)
def test_a_value_reads_the_same_in_every_process(value: object, text: str) -> None:
    assert brief(value) == text


def test_long_values_are_cut_but_still_told_apart() -> None:
    one, other = "x" * 500 + "1", "x" * 500 + "2"
    assert len(brief(one)) <= 72
    assert brief(one) != brief(other)
    assert canonical(b"1" * 500) != canonical(b"2" * 500)


def test_logs_that_differ_in_one_line_differ_in_their_digest() -> None:
    logs = [EventLog(lambda: 0.0) for _ in range(3)]
    for log, event in zip(logs, ("one", "one", "two"), strict=True):
        log.add("a", event)
    assert logs[0].text() == "0.000000 a one\n"
    assert logs[0].digest() == logs[1].digest() != logs[2].digest()
