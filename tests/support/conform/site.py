"""An endpoint that does not exist, and an environment without AWS configuration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchlab.adapters.aws.endpoint import Endpoint

NOWHERE = Endpoint("http://127.0.0.1:9")
"""An endpoint without a server. Tests never send requests to this endpoint."""


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the AWS configuration of the user who runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
