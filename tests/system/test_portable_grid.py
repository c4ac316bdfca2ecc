"""Tests that also pass with the portable implementation of the package `operating_system`, as on a Mac.

The variable selects the implementation at the start of a process, so each selection runs in a pytest of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchlab.core.operating_system import PORTABLE_VARIABLE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "selection",
    [
        "tests/contract/test_launcher.py tests/worker/test_crashes.py -k process or crashes",
        "tests/system/test_command_line.py -k demo_runs_from_nothing or interrupted_run_resumes",
        "tests/system/test_kills.py",
    ],
)
def test_selection_passes_with_the_portable_implementation(selection: str, tmp_path: Path) -> None:
    paths, _, expression = selection.partition(" -k ")
    argv = [sys.executable, "-m", "pytest", "--all", "-n", "0", "-p", "no:cacheprovider"]
    argv += ["--basetemp", str(tmp_path / "t")]
    argv += [*paths.split(), "-k", expression] if expression else paths.split()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        argv, cwd=ROOT, env=env | {PORTABLE_VARIABLE: "1"}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
