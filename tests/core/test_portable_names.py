"""Names that only Linux has stay inside the package `operating_system`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import batchlab
from tests.support.bare_posix import LINUX_NAMES

PACKAGE = Path(batchlab.__file__).parent
ROOM = PACKAGE / "core" / "operating_system"

NAMES = LINUX_NAMES | {"killpg"}
"""Names that only the package may use. The errors of `os.killpg` differ between Linux and macOS."""
LINUX_PATHS = re.compile(r"/(proc|sys|dev/shm)(/|$)")


def linux_names(source: str) -> Iterator[str]:
    """Yield the names of the source that only Linux has. Text in docstrings does not count."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (name.name for name in node.names if name.name in NAMES)
            yield from (name for name in [node.module or ""] if name.partition(".")[0] == "psutil")
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "psutil")
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            and (node.value in NAMES or LINUX_PATHS.match(node.value))
        ):
            yield node.value


def test_only_the_room_names_what_only_linux_has() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if ROOM not in path.parents
        for name in linux_names(path.read_text())
    ]
    assert not found


def test_the_room_names_them() -> None:
    found = {name for path in ROOM.glob("*.py") for name in linux_names(path.read_text())}
    assert {"pidfd_open", "prctl", "psutil", "/proc", "CLOCK_BOOTTIME"} <= found


@pytest.mark.parametrize(
    "source",
    [
        "import os; os.pidfd_open(1)",
        "from os import waitid",
        "os.killpg(1, 9)",
        "import psutil",
        "from psutil import pids",
        "getattr(time, 'CLOCK_BOOTTIME', None)",
        "open(f'/proc/{1}/stat')",
        "Path('/dev/shm')",
    ],
)
def test_lint_finds(source: str) -> None:
    assert list(linux_names(source))


@pytest.mark.parametrize("source", ["'''About /proc and waitid.'''", "'/process'", "os.fsync(1)", "'waitid is a call'"])
def test_lint_ignores(source: str) -> None:
    assert not list(linux_names(source))
