"""The remaining time of a job, as a band computed from measured values."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import median, stdev
from typing import Any

import pytest

from batchlab.core.eta import Eta, Pace, Room, StageWork, describe, estimate
from batchlab.core.text import about


def pace(times_s: Sequence[float], of: int = 1) -> Pace:
    """Return a pace measured in bundles of `of` tasks."""
    found = Pace()
    for at in range(0, len(times_s), of):
        some = times_s[at : at + of]
        found = found.with_bundle(len(some), sum(some))
    return found


STEADY = pace([2.0] * 50)
FOUR = {"default": Room(now=4, most=4)}


def work(name: str = "map", left: int | None = 100, **more: Any) -> StageWork:
    return replace(StageWork(name, "default", left=left, pace=STEADY), **more)


def band(*stages: StageWork, rooms: dict[str, Room] | None = None) -> Eta:
    found = estimate(stages, rooms or FOUR)
    assert found
    return found


def test_even_tasks_on_a_stable_fleet_give_a_narrow_band() -> None:
    found = band(work())
    assert found.low_s == pytest.approx(50.0)
    assert found.high_s == pytest.approx(52.0)  # and the last task begins late
    assert describe(found) == "about 51 s left"


@pytest.mark.parametrize("of", [1, 10])
def test_the_spread_of_single_tasks_is_seen_through_bundles(of: int) -> None:
    rng = random.Random(4)
    times_s = [rng.uniform(0.5, 3.5) for _ in range(2000)]
    found = pace(times_s, of)
    assert found.mean_s == pytest.approx(sum(times_s) / 2000)
    assert found.spread_s == pytest.approx(stdev(times_s), rel=0.15)


def test_the_band_holds_what_then_happens() -> None:
    """Simulated jobs of uneven tasks on four slots, nearly all of which end within the band that was computed
    halfway."""
    rng = random.Random(7)
    inside, widths = 0, []
    for _ in range(200):
        times_s = [rng.lognormvariate(0.0, 0.8) for _ in range(200)]
        ends_s = [0.0] * 4
        for one in times_s[100:]:
            ends_s[ends_s.index(min(ends_s))] += one
        found = band(work(left=100, pace=pace(times_s[:100])))
        inside += found.low_s <= max(ends_s) <= found.high_s
        widths.append(found.high_s / found.low_s)
    assert inside >= 180
    assert median(widths) < 2.0


def test_few_measurements_make_a_wide_band() -> None:
    few, many = band(work(pace=pace([2.0] * 2))), band(work(pace=pace([2.0] * 500)))
    assert few.low_s < many.low_s
    assert few.high_s > many.high_s


def test_a_fleet_that_may_grow_lowers_the_hopeful_end_only() -> None:
    found = band(work(), rooms={"default": Room(now=4, most=40)})
    assert found.low_s == pytest.approx(5.0)
    assert found.high_s == pytest.approx(52.0)
    assert describe(found) == "5 s to 52 s left"


def test_assumed_fleet_is_no_larger_than_the_tasks_need() -> None:
    found = band(work(left=2), rooms={"default": Room(now=1, most=1000)})
    assert found.low_s == pytest.approx(2.0)


def test_without_an_instance_the_careful_end_waits_for_one() -> None:
    found = band(work(), rooms={"default": Room(now=0, most=4, per_instance=2, boot_s=30.0)})
    assert found.high_s == pytest.approx(30.0 + 100.0 + 2.0)


def test_other_jobs_widen_the_band() -> None:
    alone = band(work())
    beside = band(work(), rooms={"default": Room(now=4, most=4, rivals=1)})
    assert beside.low_s == alone.low_s
    assert beside.high_s == pytest.approx(102.0)


def test_pipelined_stages_overlap_and_waiting_stages_follow() -> None:
    chained = work("next", after=("map",), chained=True)
    assert band(work(), chained).low_s == pytest.approx(100.0)  # one pool runs both stages
    rooms = {**FOUR, "big": Room(now=4, most=4)}
    elsewhere = replace(chained, pool="big")
    assert band(work(), elsewhere, rooms=rooms).low_s == pytest.approx(50.0)
    gather = replace(chained, chained=False, pool="big")
    assert band(work(), gather, rooms=rooms).low_s == pytest.approx(100.0)


def test_branches_of_one_pool_share_its_slots() -> None:
    assert band(work("a"), work("b")).low_s == pytest.approx(100.0)


def test_slots_of_a_task_count() -> None:
    assert band(work(slots=2)).low_s == pytest.approx(100.0)


def test_running_tasks_count_as_partly_done() -> None:
    assert band(work(left=4, running=4)).low_s == pytest.approx(1.0)
    assert band(work(left=4, running=4)).high_s == pytest.approx(4.0)


def test_unmeasured_stages_are_named() -> None:
    found = band(work(), work("total", None, after=("map",), pace=Pace()))
    assert found.unmeasured == ("total",)
    assert describe(found) == "more than 50 s left; stage total not measured yet"
    found = band(work(), work("a", None), work("b", 3, pace=Pace()))
    assert describe(found).endswith("stages a, b not measured yet")


def test_estimate_without_measurements_is_missing() -> None:
    assert estimate([work(pace=Pace())], FOUR) is None
    assert estimate([work(), work(pool="none")], {**FOUR, "none": Room(0, 0)}) is None


def test_ended_job_takes_no_more_time() -> None:
    assert estimate([work(left=0)], FOUR) == Eta(0.0, 0.0)


def test_the_band_is_never_upside_down() -> None:
    rng = random.Random(1)
    for _ in range(500):
        stages = [
            work(
                name,
                rng.choice([0, 1, 5, 1000]),
                running=rng.randrange(4),
                slots=rng.choice([1, 2]),
                pace=pace([rng.expovariate(1.0) for _ in range(rng.randrange(1, 9))]),
            )
            for name in "abc"
        ]
        now = rng.randrange(9)
        room = Room(now, now + rng.randrange(1, 9), rivals=rng.randrange(3), boot_s=rng.random())
        found = band(*stages, rooms={"default": room})
        assert 0 <= found.low_s <= found.high_s


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (60, "60 s"), (600, "10 min"), (9000, "2.5 h"), (200_000, "2.3 days")]
)
def test_a_span_has_the_precision_of_an_estimate(seconds: float, text: str) -> None:
    assert about(seconds) == text
