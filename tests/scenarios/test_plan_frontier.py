"""The frontier of a plan, and the confidence interval of a share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.scenarios.planner.plan import SeedShare, frontier


@dataclass(frozen=True)
class Point:
    usd: float
    finish_s: float


numbers = st.one_of(st.integers(0, 6).map(float), st.just(math.inf))


@given(st.lists(st.builds(Point, numbers, numbers)))
def test_no_point_is_beaten_and_every_other_one_is(points: list[Point]) -> None:
    found = frontier(points)
    able = [point for point in points if math.isfinite(point.usd) and math.isfinite(point.finish_s)]
    assert all(a.usd < b.usd and a.finish_s > b.finish_s for a, b in pairwise(found))
    assert all(one in able for one in found)
    for one in able:
        assert any(f.usd <= one.usd and f.finish_s <= one.finish_s for f in found)


@pytest.mark.parametrize(
    ("met", "of", "low", "high"),
    [(20, 20, 0.8389, 1.0), (19, 20, 0.7639, 0.9911), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634)],
)
def test_the_interval_is_wilsons(met: int, of: int, low: float, high: float) -> None:
    """R's `binom::binom.wilson` and statsmodels' `proportion_confint` return the same interval."""
    found = SeedShare(met, of).interval
    assert found[0] == pytest.approx(low, abs=5e-5)
    assert found[1] == pytest.approx(high, abs=5e-5)


def test_plan_without_seeds_knows_nothing() -> None:
    assert SeedShare(0, 0).interval == (0.0, 1.0)
