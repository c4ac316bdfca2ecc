"""uv, for the tests that build and install the package."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

UV = "BATCHLAB_UV"
"""Environment variable: the program, where it is not on the path."""


class Uv:
    """Calls it; a test fails with what it has said where it fails."""

    def __init__(self, program: str) -> None:
        self._program = program

    def __call__(self, *arguments: object) -> str:
        done = subprocess.run(
            [self._program, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            # The project's own environment is not to be touched.
            env={name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        )
        assert not done.returncode, f"uv {arguments[0]}: {done.stderr}"
        return done.stdout


def program() -> str:
    """uv itself, absent on some laptops, promised in CI."""
    found = os.environ.get(UV) or shutil.which("uv")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI promises uv, but it is not installed")
        pytest.skip("uv is not installed")
    return found


@pytest.fixture(scope="session")
def uv() -> Uv:
    """uv, to be called."""
    return Uv(program())
