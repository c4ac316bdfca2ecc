"""The grid that the tables of bad input share."""

from __future__ import annotations

import os

import pytest

from tests.system.bad_input.trial import Evidence, hold, shared


@pytest.fixture(scope="session")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """Return the results of all trials on one grid. The processes of a test run share the results."""
    base = tmp_path_factory.getbasetemp()
    # Under xdist, each process has its own folder in the folder of the run.
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return shared(run / "bad-input", "grid", hold)
