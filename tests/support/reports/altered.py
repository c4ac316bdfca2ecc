"""Copies of a run's files, changed by SQL of a test."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import duckdb


def altered(source: Path, folder: Path, replaced: Mapping[str, str]) -> Path:
    """A copy in `folder` in which each table of `replaced` has its columns replaced as its text
    says, which is the inside of a `REPLACE (…)`; answers `folder`."""
    shutil.copytree(source, folder)
    with duckdb.connect(":memory:") as connection:
        for table, columns in replaced.items():
            file = f"{table}.parquet"
            connection.execute(
                f"COPY (SELECT * REPLACE ({columns}) FROM read_parquet('{source / file}')) "
                f"TO '{folder / file}' (FORMAT parquet)"
            )
    return folder
