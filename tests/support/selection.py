"""Selection of the tests that a run without `--all` leaves out.

A test is slow if it needs a real part (a grid of processes, a container, a service that is started for it, a browser,
or time that passes) or minutes of computing. `pytest` without options runs the other tests. The selection recognizes a
slow test by its folder (SLOW_FOLDERS), its fixtures (SLOW_FIXTURES), or the marker `slow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SLOW_FOLDERS = tuple(TESTS / name for name in ("browser", "chaos", "system"))
SLOW_FIXTURES = frozenset(
    {
        "attacked_grid",
        "bring_up",
        "browser",
        "localstack",
        "ministack",
        "moto",
        "frail_server",
        "postgres_server",
        "simpledb_url",
    }
)


def given_paths(config: pytest.Config) -> list[Path]:
    """Return the files and folders that the command line names."""
    start = config.invocation_params.dir
    return [(start / argument.partition("::")[0]).resolve() for argument in config.args]


def names_whole_suite(config: pytest.Config) -> bool:
    """Return whether the command line names no part of the suite."""
    return all(path == TESTS or TESTS.is_relative_to(path) for path in given_paths(config))


def is_left_out(folder: Path, given: Iterable[Path]) -> bool:
    """Return whether a run that names the paths `given` leaves out this whole folder."""
    return folder in SLOW_FOLDERS and not any(path.is_relative_to(folder) for path in given)


def is_slow(item: pytest.Item) -> bool:
    """Return whether a test runs only with `--all` or if the command line names it."""
    fixtures: Sequence[str] = getattr(item, "fixturenames", ())
    return (
        not SLOW_FIXTURES.isdisjoint(fixtures)
        or item.get_closest_marker("slow") is not None
        or any(item.path.is_relative_to(folder) for folder in SLOW_FOLDERS)
    )


def is_named(item: pytest.Item, given: Iterable[Path]) -> bool:
    """Return whether the paths `given` name the file of a test, or a folder of slow tests."""
    return any(
        path == item.path
        or (any(path.is_relative_to(folder) for folder in SLOW_FOLDERS) and item.path.is_relative_to(path))
        for path in given
    )
