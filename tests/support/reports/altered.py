"""Copies of a run's files, changed by a test's SQL."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import duckdb


def altered(source: Path, folder: Path, replaced: Mapping[str, str]) -> Path:
    """Copy a run to `folder`, and return `folder`. `replaced` has the inside of a `REPLACE (…)` clause for each table
    to change."""
    shutil.copytree(source, folder)
    with duckdb.connect(":memory:") as connection:
        for table, columns in replaced.items():
            file = f"{table}.parquet"
            connection.execute(
                f"COPY (SELECT * REPLACE ({columns}) FROM read_parquet('{source / file}')) "
                f"TO '{folder / file}' (FORMAT parquet)"
            )
    return folder
