"""The schema of the report data, which stays compatible and matches its page."""

from __future__ import annotations

from pathlib import Path

from batchlab.reports.tables.schema import TABLES


def test_no_column_is_removed_or_changed() -> None:
    pinned = (Path(__file__).parent / "columns.txt").read_text().split("\n")[:-1]
    now = [f"{table.name}.{c.name} {c.type}" for table in TABLES for c in table.columns]
    gone = set(pinned) - set(now)
    assert not gone, "a column is never removed or changed; add another one"
    assert set(now) == set(pinned), "pin what is new: add it to columns.txt"


def test_every_column_has_a_unit_and_a_description() -> None:
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
