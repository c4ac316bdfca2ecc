"""The order in which several processes run the tests."""

from __future__ import annotations

import pytest

from tests.support import ROOT
from tests.support.order import WAITS_S, dealt, waiting

FILES = [*(f"tests/core/test_{n:02}.py" for n in range(40)), *WAITS_S]
NAMES = [f"{file}::test_{n}" for file in sorted(FILES) for n in range(7)]


def cut(processes: int) -> list[list[str]]:
    """Return the first part of each process."""
    order = [NAMES[position] for position in dealt(NAMES, processes)]
    parts = []
    for left in range(processes, 0, -1):
        size = len(order) // left
        parts.append(order[:size])
        del order[:size]
    return parts


def test_files_with_waits_exist() -> None:
    assert not [file for file in WAITS_S if not (ROOT / file).is_file()]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 9])
def test_each_test_runs_once_and_a_file_in_its_own_order(processes: int) -> None:
    order = dealt(NAMES, processes)
    assert sorted(order) == list(range(len(NAMES)))
    for file in FILES:
        of_file = [position for position in order if NAMES[position].startswith(f"{file}::")]
        assert of_file == sorted(of_file)


@pytest.mark.parametrize("processes", [2, 3, 4, 5])
def test_half_of_the_processes_begin_with_what_waits(processes: int) -> None:
    parts = cut(processes)
    number = waiting(processes)
    assert 1 <= number <= processes - 1
    for part in parts[number:]:
        assert not WAITS_S.keys() & {name.partition("::")[0] for name in part}
    held_s = []
    for part in parts[:number]:
        files = list(dict.fromkeys(name.partition("::")[0] for name in part))
        waits = [file for file in files if file in WAITS_S]
        assert files[: len(waits)] == waits
        held_s.append(sum(WAITS_S[file] for file in waits))
    assert sum(held_s) == sum(WAITS_S.values())
    assert max(held_s) - min(held_s) <= max(WAITS_S.values()) / 2


def test_more_files_that_wait_than_room_lose_none() -> None:
    names = [f"{file}::test" for file in WAITS_S]
    assert sorted(dealt(names, 5)) == list(range(len(names)))
    assert dealt([], 3) == []
