"""Reference of the tables in docs/report-data.md, made from the schema alone."""

from __future__ import annotations

from pathlib import Path

from batchlab.reports.tables.schema import TABLES, Table

PAGE = Path(__file__).resolve().parents[1] / "report-data.md"
TITLE = "## The tables\n\n"
_COMMON = """\
Every table begins with the column `job` (VARCHAR), the id of the job, which is also the first column of its key.

"""


def reference() -> str:
    """The section on the tables, in Markdown."""
    return TITLE + _COMMON + "\n".join(_section(table) for table in TABLES)


def _section(table: Table) -> str:
    job, *columns = table.columns
    rows = "\n".join(f"| `{c.name}` | {c.type} | {c.meaning} |" for c in columns)
    keys = [f"`{name}`" for name in table.key if name != job.name]
    key = f" Key: {', '.join(keys)}." if keys else ""
    return (
        f"### {table.name}\n\n{table.meaning[0].upper()}{table.meaning[1:]}.{key}\n\n"
        f"| column | type | meaning |\n| --- | --- | --- |\n{rows}\n"
    )


def page() -> str:
    """Return the page of report data. Its part before the tables is written by hand."""
    text = PAGE.read_text()
    return text[: text.index(TITLE)] + reference()
