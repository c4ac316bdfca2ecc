"""What is odd in a trace, in words, and how often each kind of it occurs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from batchlab.scenario.model import Odd


@dataclass(frozen=True, slots=True)
class OddKind:
    """All records of one file that are odd in the same way."""

    file: str
    what: str
    done: str
    count: int
    first_line: int


def summary(odds: Iterable[Odd]) -> tuple[OddKind, ...]:
    """The kinds, file by file, the most frequent first."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for odd in odds:
        found.setdefault((odd.file, odd.what, odd.done), []).append(odd.line)
    kinds = [OddKind(*key, len(at), min(at)) for key, at in found.items()]
    return tuple(sorted(kinds, key=lambda kind: (kind.file, -kind.count, kind.first_line)))


def said(odd: Odd) -> str:
    """One sentence with its place."""
    detail = f" ({odd.detail})" if odd.detail else ""
    return f"{odd.file}:{odd.line}: {odd.what}{detail}: {odd.done}"
