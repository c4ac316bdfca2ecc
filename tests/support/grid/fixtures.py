"""A fixture that starts grids which a test may break."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from batchlab.core.model import Pool
from tests.support.grid.local_grid import LocalGrid, processes_of

Bring = Callable[..., LocalGrid]


@pytest.fixture
def bring_up(tmp_path: Path) -> Iterator[Bring]:
    """Return a function that starts a grid of real processes. After the test, no process of the grid may exist."""
    grids: list[LocalGrid] = []

    def bring(
        pools: Sequence[Pool] = (), folder: Path | None = None, *, backend: str = "local", endpoint: str | None = None
    ) -> LocalGrid:
        home = folder or tmp_path / f"home-{len(grids)}"
        grids.append(LocalGrid(home, pools, backend=backend, endpoint=endpoint))
        return grids[-1]

    yield bring
    for grid in grids:
        grid.stop()
        deadline_s = time.monotonic() + 5
        while left := processes_of(grid.home.path):
            assert time.monotonic() < deadline_s, f"left behind: {left}"
            time.sleep(0.05)
