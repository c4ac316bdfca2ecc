"""Checks of every error message about a file that a user wrote, and ways to damage such a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from batchlab.core.errors import JobFileError


def complete(errors: Iterable[JobFileError], path: Path, text: str) -> tuple[JobFileError, ...]:
    """Return the errors of a file, after checking that each error is complete."""
    found = tuple(errors)
    lines = len(text.splitlines()) + 1
    for error in found:
        assert error.file == str(path)
        assert error.line is None or 1 <= error.line <= lines
        assert error.message.endswith((".", "?")), error.message
        assert error.remedy.endswith((".", "?")), error.message
        assert f"{error.file}:" in str(error)
    return found


_SCRAPS = [*":{}[],-#&*!|>'\"%@ \t", "<<:", "null", "1e9", "é", ""]
_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text("ab :{}[]*&!%-'\"0", max_size=12),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["at", "task", "least", "zz"]), st.integers(0, 9), max_size=2),
)


@st.composite
def mangled(draw: st.DrawFn, text: str) -> str:
    """Return `text` with replaced characters in some lines, and with duplicate or missing lines."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(lines) - 1))
        at = draw(st.integers(0, len(lines[i])))
        scrap = draw(st.sampled_from(_SCRAPS))
        line = lines[i][:at] + scrap + lines[i][at + 1 :]
        lines[i] = draw(st.sampled_from([line, scrap, lines[i - 1]]))
    return "\n".join(lines)


@st.composite
def altered(draw: st.DrawFn, text: str) -> str:
    """Return `text` with other values or without values in some places. The result is valid YAML with any meaning."""
    whole = yaml.safe_load(text)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(_places(whole) or [("name",)]))
        owner = whole
        for part in path:
            owner = owner[part]
        if draw(st.booleans()):
            owner[key] = draw(_JUNK)
        else:
            del owner[key]
    return yaml.safe_dump(whole, allow_unicode=True)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        below = (*path, key)
        found += _places(one, below) if isinstance(one, dict | list) else [below]
    return found
