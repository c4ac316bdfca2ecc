"""Reference of the tables in docs/report-data.md, made from the schema alone."""

from __future__ import annotations

from pathlib import Path

from batchlab.reports.tables.schema import TABLES, Table

PAGE = Path(__file__).resolve().parents[1] / "report-data.md"
TITLE = "## The tables\n\n"


def reference() -> str:
    """The section on the tables, in Markdown."""
    names = "\n".join(f"| [`{t.name}`](#{t.name}) | {t.meaning} |" for t in TABLES)
    index = f"| table | content |\n| --- | --- |\n{names}\n\n"
    return TITLE + index + "\n".join(_section(table) for table in TABLES)


def _section(table: Table) -> str:
    rows = "\n".join(f"| `{c.name}` | {c.type} | {c.meaning} |" for c in table.columns)
    key = ", ".join(f"`{name}`" for name in table.key)
    return (
        f"### {table.name}\n\n{table.meaning[0].upper()}{table.meaning[1:]}. Key: {key}.\n\n"
        f"| column | type | meaning |\n| --- | --- | --- |\n{rows}\n"
    )


def page() -> str:
    """Return the page of report data. Its part before the tables is written by hand."""
    text = PAGE.read_text()
    return text[: text.index(TITLE)] + reference()
