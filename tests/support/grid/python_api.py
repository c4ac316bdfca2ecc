"""Functions for the tests of the Python API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchlab import Grid
from tests.support.waiting import until


@contextmanager
def warm_grid(home: Path) -> Iterator[Grid]:
    """Start a grid with two ready workers."""
    with Grid("local", home=home, workers=2, warm=True) as grid:
        until(lambda: in_service(grid) == 2)
        yield grid


def in_service(grid: Grid) -> int:
    """Return the number of instances in service in the only pool."""
    (pool,) = grid.client.grid()["pools"]
    return sum(one["state"] == "InService" for one in pool["instances"])


def newest(grid: Grid) -> str:
    """Return the id of the newest job."""
    return grid.client.jobs(limit=1)[0]["id"]
