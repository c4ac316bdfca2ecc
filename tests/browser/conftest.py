"""Fixture with the data of a run, which is generated once."""

from tests.support.reports.fixtures import made_run

__all__ = ["made_run"]
