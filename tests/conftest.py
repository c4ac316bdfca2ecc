"""Fixtures every suite may use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.emulators import localstack, ministack, moto
from tests.postgres import frail_server, postgres, postgres_server

__all__ = [
    "ffmpeg",
    "frail_server",
    "localstack",
    "ministack",
    "moto",
    "postgres",
    "postgres_server",
    "shared_data",
]

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ffmpeg() -> None:
    """Needed by the media job; absent on a laptop, promised in CI."""
    if shutil.which("ffmpeg") is None:
        if os.environ.get("CI"):
            pytest.fail("CI promises ffmpeg, but it is not installed")
        pytest.skip("ffmpeg is not installed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real traces and claims; absent on a laptop, promised in CI."""
    folder = Path(os.environ.get("BATCHLAB_SHARED", _ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI promises the reference data, but {folder} is not there")
        pytest.skip("the reference data is not on this machine")
    return folder
