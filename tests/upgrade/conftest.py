"""Grids that continue with the data of an earlier release."""

from tests.support.grid.fixtures import bring_up

__all__ = ["bring_up"]
