"""The one grid that the tables of bad input share."""

from __future__ import annotations

import os

import pytest

from tests.system.bad_input.trial import Evidence, hold, shared


@pytest.fixture(scope="session")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """What came of everything that was tried on one grid; the processes of one run share it."""
    base = tmp_path_factory.getbasetemp()
    # Under xdist each process has a folder of its own in that of the run.
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return shared(run / "bad-input", "grid", hold)
