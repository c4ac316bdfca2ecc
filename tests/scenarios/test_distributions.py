"""Distributions: mean, spread, and tail, scaling without a change of shape, and refused parameters."""

from __future__ import annotations

from itertools import pairwise
from math import e, exp, inf, log, nan, sqrt
from statistics import fmean, median, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.scenarios.model.distributions import (
    Constant,
    Empirical,
    Exponential,
    Lognormal,
    Mixture,
    Pareto,
    Stream,
    Uniform,
    Weibull,
)
from batchlab.scenarios.model.values import Distribution
from tests.support.properties import PROPERTY
from tests.support.scenarios.burstiness import cv2

DRAWS: list[Distribution] = [
    Constant(3.0),
    Uniform(1.0, 5.0),
    Exponential(4.0),
    Lognormal(4.0, 0.8),
    Lognormal(4.0, 0.0),
    Weibull(3.0, 0.7),
    Weibull(3.0, 2.0),
    Pareto(2.0, 3.5),
    Pareto(2.0, 1.0, most=100.0),
    Pareto(2.0, 0.5, most=100.0),
    Empirical((5.0, 1.0, 1.0, 9.0)),
    Mixture(((9.0, Exponential(1.0)), (1.0, Uniform(50.0, 70.0)))),
]
SIZE = 100_000


def sample(draw: Distribution) -> list[float]:
    return [draw.at(unit) for unit in Stream(11, "sample").units(0, SIZE)]


@pytest.mark.parametrize("draw", DRAWS, ids=repr)
def test_the_mean_is_that_of_what_is_drawn(draw: Distribution) -> None:
    drawn = sample(draw)
    # The tolerance is four standard errors plus the rounding error of a sum.
    assert fmean(drawn) == pytest.approx(draw.mean, abs=4 * pstdev(drawn) / sqrt(SIZE) + 1e-9)
    assert min(drawn) >= 0


@pytest.mark.parametrize("draw", DRAWS, ids=repr)
@PROPERTY
@given(unit=st.floats(0, 1, exclude_max=True), factor=st.floats(0.001, 1000.0))
def test_scaled_is_the_same_times_a_factor(draw: Distribution, unit: float, factor: float) -> None:
    assert draw.multiply(factor).at(unit) == pytest.approx(draw.at(unit) * factor, rel=1e-9)
    assert draw.multiply(factor).mean == pytest.approx(draw.mean * factor, rel=1e-9)


@pytest.mark.parametrize("draw", [d for d in DRAWS if not isinstance(d, Mixture)], ids=repr)
@PROPERTY
@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=2))
def test_a_quantile_grows_with_its_unit(draw: Distribution, units: list[float]) -> None:
    drawn = [draw.at(unit) for unit in sorted(units)]
    # A power of nearly equal units may round in either direction.
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(drawn))


def test_quantiles_match_hand_computations() -> None:
    assert Uniform(1, 5).at(0.25) == 2.0
    assert Exponential(4.0).at(1 - 1 / e) == pytest.approx(4.0)
    assert Lognormal(4.0, 0.8).at(0.5) == pytest.approx(4.0)
    assert Lognormal(4.0, 0.8).at(0.841344746) == pytest.approx(4.0 * exp(0.8), rel=1e-6)
    assert Lognormal(4.0, 0.8).at(0.0) == 0.0
    assert Weibull(3.0, 2.0).at(1 - 1 / e) == pytest.approx(3.0)
    assert Pareto(2.0, 2.0).at(0.75) == pytest.approx(4.0)
    assert Pareto(2.0, 1.0, most=100.0).at(1 - 2**-53) == pytest.approx(100.0)
    assert [Empirical((5.0, 1.0, 9.0)).at(unit) for unit in (0.0, 0.34, 0.99)] == [1.0, 5.0, 9.0]


def test_spread_and_tail_match_the_literature() -> None:
    assert cv2(sample(Exponential(4.0))) == pytest.approx(1.0, abs=0.03)
    assert cv2(sample(Lognormal(4.0, 0.8))) == pytest.approx(exp(0.8**2) - 1, rel=0.06)
    assert cv2(sample(Uniform(0.0, 6.0))) == pytest.approx(1 / 3, abs=0.005)
    tail = [one for one in sample(Pareto(2.0, 2.0)) if one > 20]
    assert len(tail) / SIZE == pytest.approx(0.01, abs=0.001)
    assert median(tail) == pytest.approx(20 * sqrt(2), rel=0.05)
    assert max(sample(Pareto(2.0, 0.5, most=100.0))) <= 100


def test_a_mixture_has_its_parts_in_their_shares() -> None:
    drawn = sample(Mixture(((9.0, Constant(1.0)), (1.0, Uniform(50.0, 70.0)))))
    long = [one for one in drawn if one > 1]
    assert len(long) / SIZE == pytest.approx(0.1, abs=0.003)
    assert fmean(long) == pytest.approx(60, abs=0.3)
    assert all(50 <= one <= 70 for one in long)


def test_a_bounded_pareto_of_alpha_one_has_its_own_mean() -> None:
    assert Pareto(1.0, 1.0, most=e).mean == pytest.approx(log(e) / (1 - 1 / e))
    assert Pareto(1.0, 1.0, most=e).mean == pytest.approx(Pareto(1.0, 1 + 1e-9, most=e).mean)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1.0), "value must be a number of at least 0"),
        (lambda: Constant(nan), "value must be"),
        (lambda: Uniform(5.0, 1.0), r"most \(1.0\) must not be below least"),
        (lambda: Exponential(0.0), "mean must be a number above 0"),
        (lambda: Exponential(inf), "mean must be"),
        (lambda: Lognormal(0.0, 1.0), "median must be"),
        (lambda: Lognormal(1.0, -1.0), "sigma must be"),
        (lambda: Weibull(1.0, 0.0), "shape must be"),
        (lambda: Pareto(1.0, 1.0), "alpha must be above 1 without most"),
        (lambda: Pareto(2.0, 1.5, most=2.0), "must be above least"),
        (lambda: Empirical(()), "at least one value"),
        (lambda: Empirical((1.0, -1.0)), "value must be"),
        (lambda: Mixture(()), "at least one part"),
        (lambda: Mixture(((0.0, Constant(1.0)),)), "weight must be"),
    ],
)
def test_invalid_distribution_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
