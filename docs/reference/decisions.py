"""The list of decisions, from the first line of each."""

from __future__ import annotations

from pathlib import Path

from docs.reference.markdown import head, table

_WORDS = """\

# Decisions

This folder has a decision record for each choice with a serious alternative. A decision record states
the question, the decision, the rejected alternatives, the consequences, and when to revisit the
decision.

"""


def reference(docs: Path) -> str:
    """The page in Markdown; `docs` has the folder `contributing/decisions`."""
    rows = []
    for path in sorted((docs / "contributing" / "decisions").glob("[0-9]*.md")):
        title = path.read_text().splitlines()[0].removeprefix("# ")
        rows.append((path.name[:4], f"[{title}]({path.name})"))
    return head("the decisions' first lines") + _WORDS + table(("number", "decision"), rows)
