"""Names that only Linux has stay inside the package `operating_system`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import batchlab

PACKAGE = Path(batchlab.__file__).parent
ROOM = PACKAGE / "core" / "operating_system"

LINUX_NAMES = frozenset(
    """
    CLOCK_BOOTTIME F_ADD_SEALS F_SETPIPE_SZ F_SETSIG O_DIRECT O_PATH O_TMPFILE PR_SET_PDEATHSIG SOCK_CLOEXEC
    SOCK_NONBLOCK SOCK_SEQPACKET SO_PEERCRED TCP_KEEPIDLE TCP_QUICKACK TCP_USER_TIMEOUT copy_file_range epoll
    eventfd fdatasync getrandom inotify_init memfd_create pidfd_open pidfd_send_signal pipe2 posix_fadvise
    posix_fallocate prctl prlimit sched_getaffinity sched_setaffinity setns sigtimedwait signalfd sigwaitinfo splice
    timerfd_create unshare waitid
    """.split()  # noqa: SIM905 - a list would take a line for each name
)
"""Attributes, arguments of `getattr`, and functions of the C library that macOS lacks."""
LINUX_PATHS = re.compile(r"/(proc|sys|dev/shm)(/|$)")


def linux_names(source: str) -> Iterator[str]:
    """Yield the names of the source that only Linux has. Text in docstrings does not count."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in LINUX_NAMES:
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (name.name for name in node.names if name.name in LINUX_NAMES)
            yield from (name for name in [node.module or ""] if name.partition(".")[0] == "psutil")
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "psutil")
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            and (node.value in LINUX_NAMES or LINUX_PATHS.match(node.value))
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
