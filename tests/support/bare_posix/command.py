"""Commands in bare POSIX."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from batchlab.core.operating_system import PORTABLE_VARIABLE
from tests.support import ROOT


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in bare POSIX, and return its exit code and its output, which includes its error output.

    If the system does not allow mount namespaces, skip the test on a laptop, or fail in CI.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "XDG_"))}
    if sys.platform == "darwin":
        return _output_of(argv, env)
    namespace = _namespace()
    # The folder must not be in the temporary folder, which may be in /dev/shm.
    folder = Path(tempfile.mkdtemp(prefix="bare-", dir="/tmp"))
    enter = (sys.executable, "-m", "tests.support.bare_posix.enter", folder)
    try:
        return _output_of([*namespace, *enter, *argv], env | {PORTABLE_VARIABLE: "1"})
    finally:
        folder.rmdir()


def _namespace() -> list[str]:
    """Return the program and the options that give a command its own mounts."""
    own_mounts = ["unshare", "--mount"]
    for command in (own_mounts, [*own_mounts, "--map-root-user"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    if os.environ.get("CI"):
        pytest.fail("CI promises mount namespaces, but none can be created")
    pytest.skip("this user cannot create a mount namespace")


def _output_of(argv: Sequence[str | Path], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
