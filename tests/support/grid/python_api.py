"""Functions for the tests of the Python API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchlab import Grid
from tests.support.waiting import until


@contextmanager
def warm_grid(home: Path) -> Iterator[Grid]:
    """A grid with two workers that are up."""
    with Grid("local", home=home, workers=2, warm=True) as grid:
        until(lambda: in_service(grid) == 2)
        yield grid


def in_service(grid: Grid) -> int:
    """Instances of the one pool that work."""
    (pool,) = grid.client.grid()["pools"]
    return sum(one["state"] == "InService" for one in pool["instances"])


def newest(grid: Grid) -> str:
    """The job that was submitted last."""
    return grid.client.jobs(limit=1)[0]["id"]
