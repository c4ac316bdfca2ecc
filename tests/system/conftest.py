"""Grids that tests may break, and a runner of command lines in the process of a test."""

from tests.support.cli import run
from tests.support.grid.fixtures import bring_up

__all__ = ["bring_up", "run"]
