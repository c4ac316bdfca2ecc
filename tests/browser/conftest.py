"""The data of a run, made once."""

from tests.support.reports.fixtures import made_run

__all__ = ["made_run"]
