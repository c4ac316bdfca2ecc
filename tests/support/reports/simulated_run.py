"""The data of a simulated job, written and read again, and compared with its ledger and its bill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from duckdb import DuckDBPyConnection

from batchlab.core.model import JobId, Pool
from batchlab.core.port_retries import Patience
from batchlab.core.ports import JobRows, Objects
from batchlab.core.pricing import price_book
from batchlab.core.pricing.bill import Bill, PoolFacts, StageUse, bill
from batchlab.core.pricing.request_costs import Pace
from batchlab.reports.queries import store
from batchlab.reports.tables.build import Setting
from batchlab.reports.tables.write import Index, Writer
from batchlab.sim.world import World

BOOK = price_book.load()
PACE = Pace()
COUNTS = ("planned", "succeeded", "failed", "cancelled", "retried")


def setting(pools: tuple[Pool, ...] = (Pool("default"),)) -> Setting:
    return Setting("sim", pools, PACE, BOOK)


async def written(objects: Objects, patience: Patience, job: JobId, folder: Path, *pools: Pool) -> Index:
    """Write the job's files into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return await Writer(objects, patience, setting(pools)).make(job, folder)


@contextmanager
def answers(*folders: Path) -> Iterator[Any]:
    """Yield a function that returns the rows of a query as dicts."""
    with store.open_store(folders) as connection:
        yield lambda sql: rows(connection, sql)


def rows(connection: DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    names, found = store.run_query(connection, sql)
    return [dict(zip(names, row, strict=True)) for row in found]


def one(ask: Any, sql: str) -> Any:
    """Return the single value of a query."""
    (row,) = ask(sql)
    (value,) = row.values()
    return value


def check_against_ledger(ask: Any, ledger: JobRows) -> None:
    """Compare the tasks of each stage with the counts that `job show` shows."""
    job = ledger.job.job.id
    for record in ledger.stages:
        counts = record.counts
        (told,) = ask(f"SELECT * FROM stages WHERE job = '{job}' AND stage = '{counts.stage}'")
        assert {name: told[name] for name in COUNTS} == {name: getattr(counts, name) for name in COUNTS}, counts.stage
        (by_task,) = ask(
            "SELECT count(*) AS tasks, count(DISTINCT task) AS different, "
            "count(*) FILTER (state = 'SUCCEEDED') AS succeeded, "
            "count(*) FILTER (state = 'FAILED') AS failed, "
            "coalesce(sum(run_s) FILTER (state = 'SUCCEEDED'), 0) AS run_s "
            f"FROM tasks WHERE job = '{job}' AND stage = '{counts.stage}'"
        )
        assert by_task["tasks"] == by_task["different"] == (counts.planned or 0)
        assert (by_task["succeeded"], by_task["failed"]) == (counts.succeeded, counts.failed)
        assert by_task["run_s"] == pytest.approx(counts.run_s, abs=1e-4)
        assert told["run_s"] == pytest.approx(by_task["run_s"])
    (whole,) = ask(f"SELECT * FROM jobs WHERE job = '{job}'")
    assert whole["state"] == ledger.job.state.value
    assert whole["rounds"] == ledger.job.round + 1
    assert whole["ended_s"] == ledger.job.ended_s
    for name in COUNTS[1:]:
        assert whole[name] == sum(getattr(s.counts, name) for s in ledger.stages)
    assert whole["run_s"] == pytest.approx(sum(s.counts.run_s for s in ledger.stages), abs=1e-3)


async def bill_of(world: World, ledger: JobRows, pools: tuple[Pool, ...]) -> Bill:
    """Return the bill that `cost bill` computes from the ledger."""
    job = ledger.job.job
    account = await world.ask(lambda m: m.spending and m.spending.account(job.id), "account")
    uses = [StageUse(s.counts.stage, job.stage(s.counts.stage).pool, s.counts.run_s, 1) for s in ledger.stages]
    facts = {pool.name: PoolFacts(pool.slots, pool.instance_type) for pool in pools}
    return bill(uses, account, facts, BOOK, pace=PACE)  # type: ignore[arg-type]


def check_against_bill(ask: Any, found: Bill) -> None:
    """Compare the data with the bill line by line. The rows must add up exactly."""
    usd = one(ask, "SELECT cost_usd FROM jobs")
    assert isinstance(usd, Decimal)
    assert float(usd) == pytest.approx(found.usd.typical, abs=1e-9)
    assert one(ask, "SELECT sum(cost_usd) FROM cost") == usd
    lines = {r["line"]: r["usd"] for r in ask("SELECT line, sum(cost_usd) AS usd FROM cost GROUP BY 1")}
    assert set(lines) == {item.what for item in found.items}
    for item in found.items:
        assert float(lines[item.what]) == pytest.approx(item.usd.typical, abs=1e-9), item.what
    by_stage = one(ask, "SELECT coalesce(sum(cost_usd), 0) FROM stages")
    assert by_stage == one(ask, "SELECT coalesce(sum(cost_usd), 0) FROM cost WHERE stage IS NOT NULL")
