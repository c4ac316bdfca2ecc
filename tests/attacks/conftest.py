"""Fixtures with grids to attack."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.attacks.worker_rights import WorkerRights
from tests.support.grid.fixtures import bring_up
from tests.support.grid.local_grid import LocalGrid
from tests.support.server.api import Rig

__all__ = ["bring_up", "grid", "rig", "worker"]


@pytest.fixture(scope="package")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGrid]:
    """Start a grid of processes on `local`, for attacks that do not change the grid."""
    made = LocalGrid(tmp_path_factory.mktemp("attacked") / "home")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Start a manager in this process with services in memory and without workers."""
    with Rig() as rig:
        yield rig


@pytest.fixture
def worker(rig: Rig) -> WorkerRights:
    """Return a compromised worker of the grid `rig`."""
    return WorkerRights(rig.objects, rig.queue, rig.run)
