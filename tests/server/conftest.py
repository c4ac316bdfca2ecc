"""A manager with its API in the process of a test."""

from collections.abc import Iterator

import pytest

from tests.support.server.api import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Start a manager over services in memory, without workers."""
    with Rig() as rig:
        yield rig
