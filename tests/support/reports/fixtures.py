"""A fixture with the files of a generated run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.reports.made import write_run


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the Parquet files of a small run. Tests must not write to the folder."""
    return write_run(tmp_path_factory.mktemp("run") / "shop-0123456789")
