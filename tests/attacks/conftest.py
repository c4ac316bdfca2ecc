"""Grids to attack."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.worker_rights import WorkerRights
from tests.integration.api_rig import Rig
from tests.integration.conftest import bring_up

__all__ = ["bring_up", "rig", "worker"]


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A manager in this process over services in memory, without workers."""
    with Rig() as rig:
        yield rig


@pytest.fixture
def worker(rig: Rig) -> WorkerRights:
    """A compromised worker of the grid `rig`."""
    return WorkerRights(rig.objects, rig.queue, rig.run)
