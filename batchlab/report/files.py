"""Writes a table of job performance data as a Parquet file.

Invariant: a file has the columns of its table, in order and of their types, whatever it was made
from; and says in its own metadata which version of the schema it is of.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.report.schema import VERSION, Table

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROWS = 122_880
"""Of a row group: what DuckDB reads on one core at a time."""


def save(
    connection: DuckDBPyConnection, table: Table, query: str, path: Path, *, ordered: bool = False
) -> int:
    """Write what the query comes to, in the order of the table's key, or where it is `ordered` as
    it comes; answers how many rows.

    The query names every column of the table, in any order; DuckDB's Error where it does not, or
    where a value is not of its column's type.
    """
    order = "" if ordered else "ORDER BY " + ", ".join(f'"{name}"' for name in table.key)
    target = str(path).replace("'", "''")
    connection.execute(
        f"COPY (SELECT {table.select()} FROM ({query}) {order}) "  # noqa: S608 - ours
        f"TO '{target}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROWS}, "
        f"KV_METADATA {{batchlab_schema: '{VERSION}'}})"
    )
    row = connection.fetchone()
    return int(row[0]) if row else 0
