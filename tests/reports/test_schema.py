"""The schema stays compatible, and its page says what it says."""

from __future__ import annotations

from pathlib import Path

import duckdb

from batchlab.reports.tables.schema import TABLES, VERSION
from docs.reference import report_tables
from tests.support import ROOT


def test_no_column_is_removed_or_changed() -> None:
    pinned = (Path(__file__).parent / "columns.txt").read_text().split("\n")[:-1]
    now = [f"{table.name}.{c.name} {c.type}" for table in TABLES for c in table.columns]
    gone = set(pinned) - set(now)
    assert not gone, "a column is never removed or changed; add another one"
    assert set(now) == set(pinned), "pin what is new: add it to columns.txt"


def test_every_column_is_told_in_units_and_words() -> None:
    for table in TABLES:
        names = [c.name for c in table.columns]
        assert len(set(names)) == len(names)
        assert set(table.key) <= set(names)
        for column in table.columns:
            assert column.meaning, (table.name, column.name)
            if column.name.endswith("_usd"):
                assert column.type.startswith("DECIMAL"), (table.name, column.name)
            if column.type == "DOUBLE" and table.name not in {"requests"}:
                assert column.name.endswith(("_s", "seconds", "slots")), (table.name, column.name)


def test_the_page_is_made_from_the_schema() -> None:
    text = (ROOT / "docs" / "report-data.md").read_text()
    assert text == report_tables.renewed(text)


def test_files_have_the_columns_in_order_and_say_the_version(made_run: Path) -> None:
    with duckdb.connect(":memory:") as connection:
        for table in TABLES:
            path = str(made_run / table.file)
            found = connection.execute(
                "SELECT column_name, column_type FROM (DESCRIBE SELECT * FROM read_parquet(?))",
                [path],
            ).fetchall()
            assert found == [(c.name, c.type) for c in table.columns]
            said = connection.execute(
                "SELECT value FROM parquet_kv_metadata(?) WHERE key = 'batchlab_schema'", [path]
            ).fetchall()
            assert said == [(str(VERSION).encode(),)]
