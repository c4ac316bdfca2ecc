"""Named queries from `queries.sql`.

Invariant: this file is the only source of a query, and its text runs unchanged.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from batchlab.core.errors import UsageError

FILE = Path(__file__).with_name("queries.sql")
_NAME = re.compile(r"^-- name: (\w+)\n((?:-- .*\n)*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Query:
    """Named query. `meaning` describes its answer in one or two sentences."""

    name: str
    meaning: str
    sql: str


@cache
def known() -> Mapping[str, Query]:
    """Return all named queries in the file's order."""
    text = FILE.read_text()
    meanings = {head[1]: _joined(head[2]) for head in _NAME.finditer(text)}
    return {name: Query(name, meanings[name], sql) for name, sql in sections(text).items()}


def sections(text: str) -> dict[str, str]:
    """Return the statements of an SQL file by name. A line `-- name:` precedes each statement."""
    heads = list(_NAME.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {
        head[1]: text[head.end() : end].strip().removesuffix(";")
        for head, end in zip(heads, ends, strict=True)
    }


def _joined(comment: str) -> str:
    return " ".join(line.removeprefix("-- ") for line in comment.splitlines())


def named(name: str) -> Query:
    """Return the query with this name. Raise UsageError if it does not exist."""
    if query := known().get(name):
        return query
    near = difflib.get_close_matches(name, known(), n=2)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"There is no query {name!r}.", remedy=f"{hint}`batchlab report queries` lists them."
    )
