"""Every named query, compared with figures that are computed in another way."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from duckdb import DuckDBPyConnection

from batchlab.core.errors import UsageError
from batchlab.reports.queries import store
from tests.support.reports.made import Made, write_run


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckDBPyConnection]:
    """Open one run with failures, stragglers, and retries, and a small second run."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", Made(job="a", tasks=400, failing=0.2, seed=3))
    write_run(folder / "b", Made(job="b", tasks=16, submitted_s=1_770_000_000.0))
    with store.open_store([folder]) as connection:
        yield connection


def rows(connection: DuckDBPyConnection, name: str) -> list[dict[str, Any]]:
    names, found = store.run_query(connection, store.find_query(name).sql)
    assert len(set(names)) == len(names), name
    return [dict(zip(names, row, strict=True)) for row in found]


def column(connection: DuckDBPyConnection, sql: str) -> list[Any]:
    return [row[0] for row in store.run_query(connection, sql)[1]]


@pytest.mark.parametrize("name", list(store.named_queries()))
def test_each_query_answers_for_all_jobs(connection: DuckDBPyConnection, name: str) -> None:
    assert store.named_queries()[name].meaning.endswith(".")
    jobs = {row["job"] for row in rows(connection, name)}
    few = {"failures", "slowest_tasks", "stragglers", "retries"}
    assert jobs <= {"a", "b"} if name in few else jobs == {"a", "b"}
    assert "a" in jobs


def test_each_query_answers_without_data(tmp_path: Path) -> None:
    write_run(tmp_path / "a", Made(job="a", tasks=8))
    for name in ("tasks", "bundles", "fleet", "instances", "scaling", "cost", "stages"):
        (tmp_path / "a" / f"{name}.parquet").unlink()
    with store.open_store([tmp_path]) as connection:
        for name in store.named_queries():
            rows(connection, name)


def test_the_summary(connection: DuckDBPyConnection) -> None:
    (a, _) = rows(connection, "summary")
    assert a["tasks"] == a["succeeded"] + a["failed"] == 801
    assert a["cost_usd_per_1000"] == pytest.approx(1000 * float(a["cost_usd"]) / a["succeeded"])


def test_percentiles_of_stages(connection: DuckDBPyConnection) -> None:
    stage = next(r for r in rows(connection, "stages") if (r["job"], r["stage"]) == ("a", "score"))
    runs = column(connection, "SELECT run_s FROM tasks WHERE job = 'a' AND stage = 'score'")
    cuts = statistics.quantiles(runs, n=100, method="inclusive")
    assert stage["run_p50_s"] == pytest.approx(statistics.median(runs))
    assert stage["run_p95_s"] == pytest.approx(cuts[94])
    assert stage["run_max_s"] == max(runs)
    waits = column(connection, "SELECT wait_s FROM tasks WHERE job = 'a' AND stage = 'score'")
    wait = next(r for r in rows(connection, "queue_wait") if r["stage"] == "score")
    assert wait["wait_p50_s"] == pytest.approx(statistics.median(waits)) == stage["wait_p50_s"]
    assert wait["wait_max_s"] == max(waits)


def test_the_slowest_and_the_stragglers(connection: DuckDBPyConnection) -> None:
    slowest = rows(connection, "slowest_tasks")
    every = column(connection, "SELECT run_s FROM tasks WHERE run_s IS NOT NULL")
    assert [row["run_s"] for row in slowest] == sorted(every, reverse=True)[:20]
    for row in rows(connection, "stragglers"):
        runs = column(connection, f"SELECT run_s FROM tasks WHERE job = '{row['job']}' AND stage = '{row['stage']}'")
        median = statistics.median(runs)
        beyond = [run - median for run in runs if run > 3 * median]
        assert row["stragglers"] == len(beyond)
        assert row["beyond_median_s"] == pytest.approx(sum(beyond))


def test_the_cost_by_stage_adds_up_to_the_bill(connection: DuckDBPyConnection) -> None:
    bills = dict(store.run_query(connection, "SELECT job, cost_usd FROM jobs")[1])
    for job, bill in bills.items():
        mine = [row for row in rows(connection, "cost_by_stage") if row["job"] == job]
        assert sum((row["cost_usd"] for row in mine), Decimal(0)) == bill
        assert mine[-1]["stage"] == ""


def test_retries_by_fingerprint(connection: DuckDBPyConnection) -> None:
    found = [row for row in rows(connection, "retries") if row["job"] == "a"]
    assert {row["fingerprint"].split()[1] for row in found} == {"KeyError", "ValueError"}
    failed = "SELECT run_s FROM attempts WHERE job = 'a' AND state = 'FAILED'"
    assert sum(row["attempts"] for row in found) == len(column(connection, failed))
    assert sum(row["run_s"] for row in found) == pytest.approx(sum(column(connection, failed)))
    gone = column(connection, "SELECT failed FROM jobs WHERE job = 'a'")[0]
    assert sum(row["final"] for row in found) == gone > 0
    reasons = [row for row in rows(connection, "failures") if row["job"] == "a"]
    assert len(reasons) == gone
    assert all("has no price" in row["reason"] for row in reasons)


def test_duplicates_are_reported_as_zero(connection: DuckDBPyConnection) -> None:
    found = [row for row in rows(connection, "duplicates") if row["job"] == "a"]
    kinds = ["message", "event", "execution", "copy", "original", "result"]
    assert [row["kind"] for row in found] == kinds
    assert [row["seen"] for row in found] == [2, 0, 1, 0, 0, 0]
    assert all(row["seen"] == row["harmless"] + row["harmful"] for row in found)


def test_the_lag_of_scaling(connection: DuckDBPyConnection) -> None:
    out, back = (row for row in rows(connection, "scaling") if row["job"] == "a")
    assert 1.5 < out["lag_s"] < 3 + column(connection, "SELECT max(step_s) FROM fleet")[0]
    assert back["lag_s"] is None
    lag = next(row for row in rows(connection, "scaling_lag") if row["job"] == "a")
    assert lag["lag_p50_s"] == lag["lag_max_s"] == out["lag_s"]
    assert (lag["scaled_out"], lag["reached"]) == (1, 1)


def test_utilisation_and_waste_stand_on_the_same_slot_time(connection: DuckDBPyConnection) -> None:
    use = next(row for row in rows(connection, "utilisation") if row["job"] == "a")
    took = sum(column(connection, "SELECT took_s * slots FROM bundles WHERE job = 'a'"))
    assert use["busy_slot_s"] == pytest.approx(took)
    assert 0 < use["run_share"] < use["busy_share"] <= 1
    waste = [row for row in rows(connection, "wasted_work") if row["job"] == "a"]
    failed = sum(column(connection, "SELECT failed_run_s FROM bundles WHERE job = 'a'"))
    assert waste[0]["slot_s"] == pytest.approx(failed)
    within = waste[0]["slot_s"] + waste[3]["slot_s"] + use["run_slot_s"]
    assert within == pytest.approx(took)


def test_throughput_counts_every_task(connection: DuckDBPyConnection) -> None:
    found = [row for row in rows(connection, "throughput") if row["job"] == "a"]
    assert len(found) == 100
    assert sum(row["tasks"] for row in found) == 801


def test_unknown_query_is_refused() -> None:
    with pytest.raises(UsageError, match="query 'slowest' does not exist") as caught:
        store.find_query("slowest")
    assert "slowest_tasks" in caught.value.remedy
