"""Sets of task indices, on which bundles are based."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.model import TaskSet

indices = st.sets(st.integers(0, 60))


@given(indices)
def test_a_set_gives_back_its_indices_in_order(members: set[int]) -> None:
    tasks = TaskSet.from_indices(members)
    assert list(tasks) == sorted(members)
    assert len(tasks) == len(members)
    assert all((i in tasks) == (i in members) for i in range(61))


@given(indices, indices)
def test_difference_intersection_and_union_are_those_of_sets(a: set[int], b: set[int]) -> None:
    first, second = TaskSet.from_indices(a), TaskSet.from_indices(b)
    assert set(first - second) == a - b
    assert set(first & second) == a & b
    assert TaskSet.union([first, second]) == TaskSet.from_indices(a | b)


@given(indices, st.integers(0, 70))
def test_take_cuts_in_two_without_losing_any(members: set[int], count: int) -> None:
    head, tail = TaskSet.from_indices(members).split_at(count)
    assert len(head) == min(count, len(members))
    assert list(head) + list(tail) == sorted(members)


@given(st.sets(st.integers(0, 60), min_size=2))
def test_halves_differ_from_the_whole_in_first_or_last(members: set[int]) -> None:
    """The different first or last task makes the derived ids of split bundles unique."""
    whole = TaskSet.from_indices(members)
    for half in whole.halves():
        assert half
        assert (half.first, half.last) != (whole.first, whole.last)


@pytest.mark.parametrize("ranges", [((3, 3),), ((0, 2), (2, 4)), ((5, 6), (0, 1)), ((2, 1),)])
def test_ranges_that_are_not_in_normal_form_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="disjoint"):
        TaskSet(ranges)
