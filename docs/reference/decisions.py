"""The list of decisions, from the first line of each."""

from __future__ import annotations

from pathlib import Path

from docs.reference.markdown import head, table

_WORDS = """\

# Decisions

Where an alternative was seriously considered, the reason for what was chosen is written down: the
question, the decision, what was rejected, what follows from it, and when to look at it again.

"""


def reference(docs: Path) -> str:
    """The page in Markdown; `docs` has the folder `decisions`."""
    rows = []
    for path in sorted((docs / "decisions").glob("[0-9]*.md")):
        title = path.read_text().splitlines()[0].removeprefix("# ")
        rows.append((path.name[:4], f"[{title}]({path.name})"))
    return head("the decisions' first lines") + _WORDS + table(("number", "decision"), rows)
