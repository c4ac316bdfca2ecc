"""Repeatability of the simulator: the same seed gives the same log, a list of faults can be replayed, and every crash
point can be enumerated."""

from __future__ import annotations

import os
import random
import subprocess
import sys

from batchlab.sim.actors import Actor
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import Fault, FaultKind, Faults
from batchlab.sim.port_wrappers import wrap
from tests.support import ROOT
from tests.support.sim.loop import at, script
from tests.support.sim.toy_grid import LATE_S, ROUGH, Toy, ToyStore, rough


def log_of_a_process(seed: int, hash_seed: str) -> bytes:
    return subprocess.run(
        [sys.executable, "-m", "tests.support.sim.toy_grid", str(seed)],
        cwd=ROOT,
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


def test_other_seed_gives_another_run() -> None:
    assert len({rough(seed).log.digest() for seed in range(5)}) == 5


def test_the_toy_survives_every_fault_over_many_seeds() -> None:
    """The toy is useful only if every kind of fault really occurs in it."""
    seen: set[FaultKind] = set()
    for seed in range(40):
        toy = rough(seed)
        assert toy.store.writes == len(toy.store.objects) == toy.items
        seen |= set(toy.faults.counts)
    assert seen == {kind for kind in FaultKind if ROUGH.rate(kind)}


# --- replay ---


def test_a_list_of_faults_replays_the_run_that_injected_them() -> None:
    for seed in range(5):
        original = rough(seed)
        assert original.faults.injected
        replay = Faults.from_list(original.faults.injected, random.Random(seed), delay_s=LATE_S)
        again = Toy(replay).run()
        assert again.log.digest() == original.log.digest()
        assert again.faults.injected == original.faults.injected


def test_leaving_one_fault_out_changes_nothing_before_it_and_no_latency_after_it() -> None:
    injected = rough(3).faults.injected
    last = injected[-1]
    full = Toy(Faults.from_list(injected, random.Random(3), delay_s=LATE_S)).run().log.lines
    less = Toy(Faults.from_list(injected[:-1], random.Random(3), delay_s=LATE_S)).run().log.lines
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
    """The test kills every worker before and after each of its port calls, in one run each."""
    quiet = Toy(script(), items=4, workers=2).run()
    # The last call of each worker is running when the run ends.
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
