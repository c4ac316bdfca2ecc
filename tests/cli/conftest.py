"""Fixtures that run the command line in the process of a test."""

from tests.support.cli import manager, run

__all__ = ["manager", "run"]
