"""Named substreams of random numbers, which are equal everywhere, independent, and uniform."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.scenarios.model.distributions import Stream
from tests.support.properties import PROPERTY


def test_a_stream_is_what_it_was_in_every_earlier_version() -> None:
    """A changed stream would make recorded runs unrepeatable. The expected values are from a plain SplitMix64."""
    stream = Stream(7, "tasks", 0, "work")
    assert [stream.unit(i) for i in (0, 1, 10**7)] == [0.702721095486368, 0.43210571291805444, 0.218675104799522]


def test_generator_is_splitmix64() -> None:
    """The expected values are the first outputs of the reference implementation for the state 1234567."""
    stream = Stream(0)
    object.__setattr__(stream, "_key", (1234567 + 0x9E3779B97F4A7C15) % 2**64)
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [stream.unit(i) for i in range(4)] == [(one >> 11) / 2**53 for one in known]


@PROPERTY
@given(st.integers(), st.text(max_size=5), st.integers(0, 2**40), st.integers(0, 700))
def test_many_at_once_are_what_each_is(seed: int, name: str, start: int, count: int) -> None:
    stream = Stream(seed, name)
    assert stream.units(start, start + count) == [stream.unit(i) for i in range(start, start + count)]


@PROPERTY
@given(st.integers(), st.lists(st.text(), max_size=3))
def test_units_are_in_range(seed: int, names: list[str]) -> None:
    assert all(0 <= unit < 1 for unit in Stream(seed, *names).units(0, 300))


def test_units_are_even() -> None:
    """The test is chi squared of 100,000 units in 100 boxes. With 99 degrees of freedom, the value exceeds 149 once in
    1,000 tests."""
    for name in ("a", "b", "c"):
        boxes = [0] * 100
        for unit in Stream(1, name).units(0, 100_000):
            boxes[int(unit * 100)] += 1
        assert sum((count - 1000) ** 2 / 1000 for count in boxes) < 149


def test_neighbours_and_other_names_know_nothing_of_each_other() -> None:
    n = 50_000
    units = Stream(1, "a").units(0, n + 1)
    # The limit is three standard deviations of the correlation of independent values.
    most = 3 / n**0.5
    assert abs(correlation(units[:-1], units[1:])) < most
    for other in (Stream(2, "a"), Stream(1, "b"), Stream(1, "a", 0), Stream(-1, "a")):
        assert abs(correlation(units[:-1], other.units(0, n))) < most


def correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = fmean(a), fmean(b)
    return fmean((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) * 12


def test_a_generator_starts_from_the_stream() -> None:
    assert Stream(1, "a").random().random() == Stream(1, "a").random().random()
    assert Stream(1, "a").random().random() != Stream(1, "b").random().random()


def test_names_give_independent_streams() -> None:
    assert Stream(1, "a", 1).unit() != Stream(1, "a", 11).unit()
    assert Stream(11, "a").unit() != Stream(1, "1a").unit()
    with pytest.raises(AttributeError):
        Stream(1).other = 1  # type: ignore[attr-defined]
