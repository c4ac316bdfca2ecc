"""The program uv, for the tests that build and install the package."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

UV = "BATCHLAB_UV"
"""Environment variable with the path of uv, if uv is not on PATH."""


class Uv:
    """A caller of uv. If uv fails, the test fails with uv's output."""

    def __init__(self, program: str) -> None:
        self._program = program

    def __call__(self, *arguments: object) -> str:
        done = subprocess.run(
            [self._program, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            # uv must not change the project's own environment.
            env={name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        )
        assert not done.returncode, f"uv {arguments[0]}: {done.stderr}"
        return done.stdout


def program() -> str:
    """Return the path of uv. If uv is not installed, skip the test on a laptop, or fail in CI."""
    found = os.environ.get(UV) or shutil.which("uv")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI promises uv, but it is not installed")
        pytest.skip("uv is not installed")
    return found


@pytest.fixture(scope="session")
def uv() -> Uv:
    """Return a caller of uv."""
    return Uv(program())
