"""A check that Docker can run a grid in containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchlab.cli.doctor import Level, container_findings
from batchlab.core.errors import BatchlabError
from batchlab.runtime import factory
from batchlab.runtime.home import Home


def need_containers(tmp_path: Path) -> None:
    """Skip the test, or fail in CI, if Docker cannot start a grid in containers without pulling images: Docker does not
    answer, or a plugin or an image is missing."""
    home = Home(tmp_path / "doctor")
    try:
        bad = [
            finding.text
            for finding in container_findings(home, factory.load("localstack"))
            if finding.level is Level.FAIL or (finding.about == "image" and finding.level is Level.WARN)
        ]
    except BatchlabError as error:
        bad = [str(error)]
    if not bad:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI promises containers: {bad[0]}")
    pytest.skip(f"no grid in containers here: {bad[0]}")
