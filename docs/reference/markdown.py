"""What the pages share: their first lines, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

AGAIN = "python -m docs.reference docs"


def head(made_from: str) -> str:
    """The comment that a page begins with."""
    return f"<!-- Made from {made_from}. To make it again: {AGAIN} -->\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, and an empty line after it."""
    lines = [_row(columns), _row(["---"] * len(columns)), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def text(words: str) -> str:
    """Words of a docstring or a help text, safe within Markdown: what HTML would take for a tag is
    written as it is read, and so are stars."""
    shown = []
    for number, part in enumerate(words.split("`")):
        is_code = number % 2 == 1
        shown.append(part if is_code else part.replace("<", "&lt;").replace("*", "\\*"))
    return "`".join(shown)
