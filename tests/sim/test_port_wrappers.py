"""The port wrappers: latency, the log, and calls of killed actors."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import cast

import pytest

from batchlab.core.errors import Unreachable
from batchlab.sim.actors import Actor, ActorKilled, SimulationError
from batchlab.sim.event_log import EventLog, brief, canonical
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import Fault, FaultKind, Faults
from batchlab.sim.port_wrappers import wrap
from batchlab.sim.runtime_checks import Watch
from tests.support.sim.loop import INSTANT, at, caught, killed, script
from tests.support.sim.toy_grid import Entry, ToyQueue, ToyStore

# --- kills ---


@pytest.mark.parametrize(("kind", "stored"), [(FaultKind.KILL_BEFORE, False), (FaultKind.KILL_AFTER, True)])
def test_a_kill_falls_before_or_after_the_effect_and_hides_the_answer(kind: FaultKind, stored: bool) -> None:
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


def test_dead_actor_cannot_reach_a_port() -> None:
    # Without latency, a call of a killed actor would take effect at once if it were not blocked. Errors in killed
    # actors are ignored, including assertions, so the actors only record values.
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
                seen.append(port.peek("before"))
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
    assert seen == [ActorKilled]  # the shielded task never started


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


def test_an_answer_does_not_reach_the_dead_even_from_behind_a_port_that_cannot_be_cancelled() -> None:
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


def test_no_call_passes_after_the_end_of_the_run() -> None:
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


def test_late_receive_is_excused_until_it_arrives() -> None:
    """Before, the excuse ended too early if the answer was late, because the worker also waited for the queue in
    between (seed 2037 of the simulator). The message's timeout ended before its worker received the message."""
    queue, loop, excused_s = ToyQueue(), SimLoop(), list[float]()

    class Notes:
        def on_fault(self, _actor: Actor, for_s: float) -> None:
            excused_s.append(loop.time() + for_s)

        def on_call(self, *_: object) -> None:
            taken_s.append(loop.time())

    taken_s = list[float]()

    async def main() -> float:
        # The seed draws a delay of the answer.
        late = [Fault("a", 1, FaultKind.DELAYED)]
        faults = Faults.from_list(late, random.Random(1), delay_s=(30.0, 30.0))
        port = wrap(queue, "queue", Actor("a"), faults, watch=cast(Watch, Notes()))
        loop.call_later(15, queue.entries.update, {"m": Entry("q", "body")})
        assert await port.receive("q")
        return loop.time()

    came_s = loop.run(main())
    (before_s,) = taken_s
    assert before_s + 30 < came_s < before_s + 31
    assert max(told for told in excused_s[:-1]) > came_s - 1, "all the time, not in hindsight"


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
        faults = Faults.from_list([Fault("a", 2, FaultKind.THROTTLED)], random.Random(1), latency_s=(2.0, 2.0))
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


def test_no_wrapper_or_kill_exists_without_faults_and_log() -> None:
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


def test_long_values_are_shortened_and_stay_distinct() -> None:
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
