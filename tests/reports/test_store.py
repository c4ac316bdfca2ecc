"""Folders of Parquet files as views, and the restrictions on queries."""

from __future__ import annotations

import shutil
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from batchlab.core.errors import UsageError
from batchlab.reports.html.source import ReportRun
from batchlab.reports.queries import store
from batchlab.reports.tables.schema import TABLES
from tests.support.reports.made import Made, write_run


def test_one_view_for_each_table(made_run: Path) -> None:
    with store.open_store([made_run]) as connection:
        for table in TABLES:
            names, rows = store.run_query(connection, f'SELECT * FROM "{table.name}"')
            assert names == [c.name for c in table.columns]
            assert rows, table.name


def test_the_parts_add_up_to_the_whole(made_run: Path) -> None:
    with store.open_store([made_run]) as connection:

        def one(sql: str) -> object:
            return store.run_query(connection, sql)[1][0][0]

        by_task = one("SELECT sum(run_s) FROM tasks WHERE state = 'SUCCEEDED'")
        assert by_task == pytest.approx(one("SELECT sum(run_s) FROM stages"))
        assert by_task == pytest.approx(one("SELECT run_s FROM jobs"))
        cost = one("SELECT cost_usd FROM jobs")
        assert isinstance(cost, Decimal)
        assert one("SELECT sum(cost_usd) FROM cost") == cost


def test_several_runs_and_folders_of_runs(made_run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "runs" / "b", Made(job="shop-b", tasks=16))
    with store.open_store([made_run, tmp_path / "runs"]) as connection:
        found = store.run_query(connection, "SELECT job FROM jobs ORDER BY job")[1]
    assert found == [("shop-0123456789",), ("shop-b",)]
    with pytest.raises(UsageError, match="more than once"):
        store.open_store([other, tmp_path / "runs"])


def test_columns_missing_in_older_data_are_null(made_run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(made_run, old)
    (old / "duplicates.parquet").unlink()
    with duckdb.connect(":memory:") as connection:
        connection.execute(
            f"COPY (SELECT * EXCLUDE (is_whole, share) REPLACE ('old' AS job) "
            f"FROM '{made_run}/jobs.parquet') TO '{old}/jobs.parquet'"
        )
    with store.open_store([old, made_run]) as connection:
        found = store.run_query(connection, "SELECT job, is_whole, share FROM jobs ORDER BY job")[1]
        assert found == [("old", None, None), ("shop-0123456789", True, "default")]
        assert ReportRun(connection, "old").share == ""
    with store.open_store([old]) as connection:
        assert store.run_query(connection, "SELECT count(*) FROM duplicates")[1] == [(0,)]


def test_data_of_a_newer_version_is_refused(made_run: Path, tmp_path: Path) -> None:
    shutil.copytree(made_run, tmp_path / "new")
    with duckdb.connect(":memory:") as connection:
        connection.execute(
            f"COPY (SELECT * REPLACE (2 AS schema_version) FROM '{made_run}/jobs.parquet') "
            f"TO '{tmp_path}/new/jobs.parquet'"
        )
    with pytest.raises(UsageError, match="newer version"):
        store.open_store([tmp_path / "new"])


def test_a_folder_without_data_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no job performance data"):
        store.open_store([tmp_path])
    with pytest.raises(UsageError, match="holds no job performance data"):
        store.open_store([tmp_path / "nowhere"])
    (tmp_path / "jobs.parquet").write_text("not one")
    with pytest.raises(UsageError, match="cannot be read"):
        store.open_store([tmp_path])


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM query('SELECT 1')",
        "SELECT * FROM query_table('jobs')",
        "SELECT * FROM json_execute_serialized_sql('{}')",
        "SELECT * FROM read_parquet('https://example.com/x.parquet')",
        "COPY jobs TO 'out.csv'",
        "COPY (SELECT 1) TO 'out.parquet'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "LOAD httpfs",
        "ATTACH 'x.db'",
        "CREATE TABLE x AS SELECT 1",
        "DROP VIEW jobs",
        "EXPORT DATABASE 'x'",
        "PRAGMA database_list",
        "EXPLAIN ANALYZE SELECT 1",
        "SELECT 1; SELECT 2",
        "SELECT job FROM jobs; COPY jobs TO 'out.csv'",
        "WITH x AS (INSERT INTO jobs VALUES (1) RETURNING *) SELECT * FROM x",
        "SELECT nothing FROM jobs",
        "SELEC 1",
        "",
    ],
)
def test_a_query_can_only_read_the_runs(
    sql: str, made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with store.open_store([made_run]) as connection, pytest.raises(UsageError, match="query"):
        store.run_query(connection, sql)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sql",
    [
        "WITH x AS ({}) SELECT 1",
        "SELECT (WITH x AS ({}) SELECT 1)",
        "SELECT * FROM (WITH x AS ({}) SELECT 1)",
        "SELECT 1 UNION ALL (WITH x AS ({}) SELECT 1)",
    ],
)
def test_a_copy_within_a_query_does_not_write_over_the_run(sql: str, made_run: Path, tmp_path: Path) -> None:
    shutil.copytree(made_run, tmp_path / "run")
    before = (tmp_path / "run" / "jobs.parquet").read_bytes()
    copy = f"COPY (SELECT 3 AS x) TO '{tmp_path}/run/jobs.parquet' (USE_TMP_FILE false)"
    with store.open_store([tmp_path / "run"]) as connection, pytest.raises(UsageError):
        store.run_query(connection, sql.format(copy))
    assert (tmp_path / "run" / "jobs.parquet").read_bytes() == before


@pytest.mark.parametrize(
    "sql",
    [
        "FROM stages",
        "DESCRIBE tasks",
        "SHOW TABLES",
        "SUMMARIZE stages",
        "WITH RECURSIVE t AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM t WHERE a < 5) FROM t",
        "SELECT unnest(after) FROM stages",
        "SELECT i FROM range(3) t(i)",
        "SELECT stage, rank() OVER (ORDER BY run_s DESC) FROM stages",
        "SELECT quantile_cont(run_s, [0.5, 0.95]) FROM tasks",
        "SELECT to_timestamp(submitted_s) FROM jobs -- a comment",
        "SELECT t.task FROM tasks t ASOF JOIN fleet f ON t.job = f.job AND t.started_s >= f.at_s;",
    ],
)
def test_reading_statements_are_permitted(sql: str, made_run: Path) -> None:
    with store.open_store([made_run]) as connection:
        names, rows = store.run_query(connection, sql)
    assert names
    assert rows
