"""Grids that tests may break."""

from tests.support.grid.fixtures import bring_up

__all__ = ["bring_up"]
