"""Shrinking of failing lists: any list to the fewest parts, and the faults of a planted bug to one fault."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.model import JobId
from batchlab.sim import fuzz, invariants
from batchlab.sim.actors import Violated
from batchlab.sim.faults import FaultKind
from batchlab.sim.fuzz import ShrinkResult, shrink
from batchlab.sim.world import World
from tests.support import ROOT


class Needs:
    """An attempt that succeeds if all of `parts` are in the list, and records every tried list."""

    def __init__(self, *parts: int) -> None:
        self.parts = set(parts)
        self.tried: list[tuple[int, ...]] = []

    def __call__(self, given: tuple[int, ...]) -> Sequence[int] | None:
        self.tried.append(given)
        return given if self.parts <= set(given) else None


def test_reproduction_without_faults_takes_one_try() -> None:
    assert shrink(range(100), Needs()) == ShrinkResult((), 1, least=True)


def test_list_that_does_not_reproduce_cannot_be_shrunk() -> None:
    assert shrink(range(3), Needs(7)) is None


@given(st.integers(1, 80), st.data())
def test_exactly_what_is_needed_is_left(size: int, data: st.DataObject) -> None:
    needed = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=6))
    found = shrink(range(size), Needs(*needed), tries=10_000)
    assert found is not None
    assert found.parts == tuple(sorted(needed))
    assert found.least


@given(st.integers(1, 40), st.integers())
def test_shrunk_list_is_minimal(size: int, seed: int) -> None:
    """Without one fault, later faults move, so a subset may succeed where a larger set fails."""

    def attempt(parts: tuple[int, ...]) -> Sequence[int] | None:
        holds = len(parts) == size or random.Random(f"{seed}/{parts}").random() < 0.3
        return parts if holds and parts else None

    found = shrink(range(size), attempt, tries=100_000)
    assert found is not None
    assert found.least
    assert attempt(found.parts)
    for spared in found.parts:
        assert not attempt(tuple(part for part in found.parts if part != spared))


def test_one_among_many_takes_few_tries_and_no_list_is_tried_twice() -> None:
    attempt = Needs(700)
    found = shrink(range(1000), attempt)
    assert found is not None
    assert found.parts == (700,)
    assert found.tries == len(attempt.tried) == len(set(attempt.tried)) < 30


def test_irrelevant_parts_are_removed_at_once() -> None:
    attempt = Needs(3, 700)
    found = shrink(range(1000), lambda parts: (3, 700) if attempt(parts) else None)
    assert found == ShrinkResult((3, 700), 4, least=True)


@pytest.mark.parametrize("bound", ["tries", "time"])
def test_a_search_cut_short_returns_the_best_so_far(bound: str) -> None:
    attempt, time_s = Needs(1, 50, 99), count()
    found = (
        shrink(range(100), attempt, tries=12)
        if bound == "tries"
        else shrink(range(100), attempt, out_of_time=lambda: next(time_s) >= 12)
    )
    assert found is not None
    assert not found.least
    assert found.tries == 12
    assert len(found.parts) < 100
    assert attempt(found.parts)


# --- A planted bug -------------------------------------------------------------------------------

SEED, WEATHER = 8, "storm"
PLANTED = FaultKind.THROTTLED


@contextmanager
def planted() -> Iterator[None]:
    """Run a grid that fails when it is throttled."""
    check = invariants.check_all

    async def checked(world: World, jobs: Sequence[JobId]) -> None:
        assert world.faults is not None
        if PLANTED in world.faults.counts:
            raise Violated("I2 is violated: planted")
        await check(world, jobs)

    with patch.object(invariants, "check_all", checked):
        yield


def replayed(only: str) -> str:
    """Return the result of these faults in a fresh process with the same bug."""
    program = (
        "import json, sys; from batchlab.sim import fuzz; from tests.sim import test_shrink as t\n"
        "with t.planted(), fuzz.silence():\n"
        "    failure = fuzz.replay(t.SEED, t.WEATHER, fuzz.read(sys.argv[1])).failure\n"
        "print(json.dumps(failure and [failure.text, fuzz.write(failure.faults)]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, only], cwd=ROOT, capture_output=True, check=True, text=True, timeout=120
    )
    return answer.stdout


@pytest.mark.slow
def test_a_planted_bug_shrinks_to_one_fault_which_replays_anywhere() -> None:
    with planted(), fuzz.silence():
        failure = fuzz.try_seed(SEED, WEATHER).failure
        assert failure is not None
        assert (failure.promise, failure.text) == ("I2", "I2 is violated: planted")
        assert len(failure.faults) > 20
        found = fuzz.fewest(failure, WEATHER, time.monotonic, limit_s=300)
    assert found is not None
    assert found.least
    (fault,) = found.parts
    assert fault.kind is PLANTED
    assert fault in failure.faults
    only = fuzz.write(found.parts)
    assert f"--only {only}" in fuzz.command(failure, WEATHER, found.parts)
    assert json.loads(replayed(only)) == [failure.text, only]
    assert json.loads(replayed(fuzz.FAIR)) is None


def test_a_bug_that_needs_no_fault_shrinks_to_none() -> None:
    async def broken(world: World, jobs: Sequence[JobId]) -> None:
        raise KeyError("oh")

    with patch.object(invariants, "check_all", broken), fuzz.silence():
        failure = fuzz.try_seed(SEED, WEATHER).failure
        assert failure is not None
        assert failure.promise == "KeyError"
        assert "in broken" in failure.trace
        assert fuzz.fewest(failure, WEATHER, time.monotonic) == ShrinkResult((), 1, least=True)
    assert fuzz.command(failure, "all", ()) == f"batchlab sim replay {SEED} --only none"


def test_failure_of_another_kind_does_not_count() -> None:
    with planted(), fuzz.silence():
        failure = fuzz.try_seed(SEED, WEATHER).failure
    assert failure is not None
    with fuzz.silence():
        assert fuzz.fewest(failure, WEATHER, time.monotonic) is None
