"""Markdown helpers of the reference pages: head comment, tables, and escaped text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

AGAIN = "python -m docs.reference docs"


def head(made_from: str) -> str:
    """Return the comment at the beginning of a page."""
    return f"<!-- Made from {made_from}. To make it again: {AGAIN} -->\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [_row(columns), _row(["---"] * len(columns)), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def text(words: str) -> str:
    """Escape `<` and `*` in text outside of code, so that Markdown shows them unchanged."""
    shown = []
    for number, part in enumerate(words.split("`")):
        is_code = number % 2 == 1
        shown.append(part if is_code else part.replace("<", "&lt;").replace("*", "\\*"))
    return "`".join(shown)
