"""Plugin of pytest that fails a run in which two files of one folder have names that macOS would not distinguish.

The file system of a Mac ignores case, and the Unicode form of a letter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import pytest


def collisions(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        seen: dict[str, str] = {}
        for name in (*folders, *files):
            other = seen.setdefault(normalize("NFD", normalize("NFD", name).casefold()), name)
            if other != name:
                yield f"{parent}: {other!r} and {name!r}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    found = list(collisions(session.config._tmp_path_factory.getbasetemp()))  # type: ignore[attr-defined]
    for one in found:
        print(f"names that macOS does not distinguish: {one}", file=sys.stderr)
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
