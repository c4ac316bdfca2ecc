"""Handlers that convert a CSV file of rides to one typed, sorted Parquet file per month of pickup, with control totals.

Amounts are DECIMAL in the Parquet files and whole cents in the totals, so sums are exact. The file of a month has the
same rows in the same order, however the input was split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import duckdb

if TYPE_CHECKING:
    from batchlab import Context, File

COLUMNS = {
    "pickup": "TIMESTAMP",
    "dropoff": "TIMESTAMP",
    "passengers": "UTINYINT",
    "distance": "DECIMAL(9,2)",
    "fare": "DECIMAL(9,2)",
    "tip": "DECIMAL(9,2)",
    "tolls": "DECIMAL(9,2)",
    "total": "DECIMAL(9,2)",
    "color": "VARCHAR",
    "payment": "VARCHAR",
    "pickup_zone": "VARCHAR",
    "dropoff_zone": "VARCHAR",
    "pickup_borough": "VARCHAR",
    "dropoff_borough": "VARCHAR",
}


def convert(item: File, ctx: Context) -> list[dict[str, Any]]:
    """Convert one part of the CSV file to one Parquet file per month.

    If a value does not fit the type of its column, DuckDB raises an error that names the line and the column.
    """
    db = database(ctx)
    db.execute(
        "CREATE TABLE part AS SELECT *, strftime(pickup, '%Y-%m') AS month"
        " FROM read_csv(?, header = true, auto_detect = false, columns = ?)",
        [str(item.path), COLUMNS],
    )
    results = []
    for month, rows in db.execute("SELECT month, count(*) FROM part GROUP BY month ORDER BY month").fetchall():
        path = ctx.scratch / f"{month}.parquet"
        own = db.table("part").filter(f"month = '{month}'").project("* EXCLUDE (month)")
        own.write_parquet(str(path))
        results.append({"month": month, "rows": rows, "file": ctx.save(path, path.name)})
    return results


def partition(item: list[dict[str, Any]], ctx: Context) -> dict[str, Any]:
    """Merge all Parquet files of one month into one sorted Parquet file, and return the month's totals."""
    month = item[0]["month"]
    parts = [str(part["file"].path) for part in item]
    db = database(ctx)
    # The rows are sorted by every column, so equal input gives an equal file.
    db.read_parquet(parts).order("ALL").create("rides")
    path = ctx.scratch / f"rides-{month}.parquet"
    db.table("rides").write_parquet(str(path), compression="zstd")
    rows, fare, tip, total, unpaid = db.execute(
        "SELECT count(*), sum(fare), sum(tip), sum(total), count(*) FILTER (payment IS NULL) FROM rides"
    ).fetchall()[0]
    expected = sum(part["rows"] for part in item)
    if rows != expected:
        raise RuntimeError(f"{month}: {rows} rows arrived of {expected} that were converted")
    return {
        "month": month,
        "rows": rows,
        "fare_cents": int(fare * 100),
        "tip_cents": int(tip * 100),
        "total_cents": int(total * 100),
        "without_payment": unpaid,
        "file": ctx.save(path, path.name),
    }


def database(ctx: Context) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB database that is limited to one thread and half of the task's memory."""
    scratch = str(ctx.scratch)
    return duckdb.connect(config={"threads": 1, "memory_limit": "512 MiB", "temp_directory": scratch})
