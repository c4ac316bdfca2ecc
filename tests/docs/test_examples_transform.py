"""The transform example, compared with one DuckDB query over the whole CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest

from batchlab.core.task_context import File
from examples.example_data import write_rides
from tests.support.examples import contexts, gathered, handler, parts_of_lines

convert = handler("transform", "rides:convert")
partition = handler("transform", "rides:partition")


def run(csv: Path, folder: Path, size: int) -> dict[str, dict[str, Any]]:
    """Run the job without a grid, and return the results by month."""
    parts = parts_of_lines(csv, folder / "parts", size, header=True)
    ctx = contexts(folder / "tasks")
    converted = [convert(part, next(ctx)) for part in parts]
    results = [partition(group, next(ctx)) for group in gathered(converted, by="month")]
    assert len({result["month"] for result in results}) == len(results)
    return {result["month"]: result for result in results}


def expected(csv: Path) -> dict[str, tuple[int, ...]]:
    """Return the rows, the cents of fare, tip, and total, and the rides without payment, by month."""
    rows = duckdb.execute(
        "SELECT pickup[1:7], count(*), sum(fare::DECIMAL(9,2)) * 100, sum(tip::DECIMAL(9,2)) * 100,"
        " sum(total::DECIMAL(9,2)) * 100, count(*) - count(payment)"
        " FROM read_csv(?, all_varchar = true) GROUP BY ALL",
        [str(csv)],
    ).fetchall()
    return {month: tuple(map(int, numbers)) for month, *numbers in rows}


def totals(results: dict[str, dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    names = ("rows", "fare_cents", "tip_cents", "total_cents", "without_payment")
    return {month: tuple(result[name] for name in names) for month, result in results.items()}


def test_real_rides_have_the_totals_of_one_query(shared_data: Path, tmp_path: Path) -> None:
    csv = shared_data / "transform" / "taxis.csv"
    results = run(csv, tmp_path, size=1000)
    assert totals(results) == expected(csv)
    assert sum(result["rows"] for result in results.values()) == 6_433
    assert sum(result["without_payment"] for result in results.values()) == 44


def test_real_rides_lose_no_value_on_the_way(shared_data: Path, tmp_path: Path) -> None:
    """Every row of the CSV is in the Parquet files, as numbers and times."""
    csv = shared_data / "transform" / "taxis.csv"
    files = [str(result["file"].path) for result in run(csv, tmp_path, size=1000).values()]
    db = duckdb.connect()
    db.read_csv(str(csv)).create_view("original")
    db.read_parquet(files).create_view("written")
    columns = "* EXCLUDE (distance, fare, tip, tolls, total)" + "".join(
        f", {name}::DECIMAL(9,2) AS {name}" for name in ("distance", "fare", "tip", "tolls", "total")
    )
    for one, other in (("original", "written"), ("written", "original")):
        query = f"FROM (SELECT {columns} FROM {one} EXCEPT ALL SELECT {columns} FROM {other})"
        assert db.sql(query).fetchall() == []


def test_generated_rides_have_the_totals_of_the_facts(tmp_path: Path) -> None:
    facts = write_rides(tmp_path, seed=3, rows=5_000)
    results = run(facts.path, tmp_path, size=700)
    assert results.keys() == facts.months.keys()
    for month, fact in facts.months.items():
        result = results[month]
        assert result["rows"] == fact.rides
        assert result["total_cents"] == fact.total_cents
        assert result["without_payment"] == fact.without_payment


def test_files_are_the_same_bytes_however_the_input_is_split(tmp_path: Path) -> None:
    facts = write_rides(tmp_path, seed=4, rows=3_000)
    coarse = run(facts.path, tmp_path / "coarse", size=10_000)
    fine = run(facts.path, tmp_path / "fine", size=170)
    for month, result in coarse.items():
        assert result["file"].read_bytes() == fine[month]["file"].read_bytes()


def test_each_file_holds_one_month_in_order_of_pickup(tmp_path: Path) -> None:
    facts = write_rides(tmp_path, seed=5, rows=2_000)
    for month, result in run(facts.path, tmp_path, size=500).items():
        rows = duckdb.read_parquet(str(result["file"].path)).select("pickup").fetchall()
        assert {f"{pickup:%Y-%m}" for (pickup,) in rows} == {month}
        assert rows == sorted(rows)


def test_a_value_of_the_wrong_type_fails_with_its_column(tmp_path: Path) -> None:
    """The error must name the row."""
    facts = write_rides(tmp_path, seed=6, rows=3)
    lines = facts.path.read_text().splitlines()
    lines[2] = lines[2].replace(lines[2].split(",")[4], "n/a", 1)
    facts.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(duckdb.Error, match=r"(?s)Line: 3.*fare.*n/a"):
        convert(File(facts.path), next(contexts(tmp_path / "task")))


def test_rows_that_got_lost_between_the_stages_are_noticed(tmp_path: Path) -> None:
    facts = write_rides(tmp_path, seed=7, rows=300)
    ctx = contexts(tmp_path / "tasks")
    [group, *_] = gathered([convert(File(facts.path), next(ctx))], by="month")
    group[0]["rows"] += 1
    with pytest.raises(RuntimeError, match="rows arrived of"):
        partition(group, next(ctx))
