"""Kills during the claims job, which always gives the same result and commits nothing twice."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from batchlab.adapters.sql.ledger import open_sqlite
from batchlab.core.api_types import JobView
from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.manager.manager import LEASE
from examples.example_data import ClaimsFacts, write_claims
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import LocalGrid, outcomes
from tests.support.waiting import until
from tests.system.test_examples_end_to_end import TWO, copy

FILES = 120


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClaimsFacts]:
    job = copy("claims", tmp_path_factory.mktemp("claims"))
    return job / "job.yaml", write_claims(job / "data", seed=9, files=FILES, claims_per_file=40)


def under_way(view: JobView) -> bool:
    return view["stages"][0]["succeeded"] >= FILES // 10


def check(grid: LocalGrid, view: JobView, out: Path, facts: ClaimsFacts) -> None:
    assert view["state"] == "SUCCEEDED", view["reason"]
    totals = {row["payer"]: row for row in grid.results(view, out)["totals"]}
    for payer, truth in facts.payers.items():
        assert totals[payer]["claims"] == truth.claims
        assert totals[payer]["charge_cents"] == truth.charge_cents
    committed: Counter[tuple[str, int]] = Counter()
    for outcome in outcomes(grid, view["id"]):
        for start, stop in outcome["succeeded"]:
            committed.update((outcome["bundle"]["s"], task) for task in range(start, stop))
    assert set(committed.values()) == {1}
    for stage in view["stages"]:
        assert stage["succeeded"] == stage["planned"]


def test_a_worker_killed_in_the_middle_costs_nothing(
    bring_up: Bring, claims: tuple[Path, ClaimsFacts], tmp_path: Path
) -> None:
    """No task is lost or doubled when a worker dies."""
    path, facts = claims
    grid = bring_up(TWO)
    job = grid.submit(path)["id"]
    grid.wait(job, until=under_way)
    victim = grid.kill_worker()
    killed_s = time.monotonic()
    view = grid.wait(job)
    # The messages are returned when the fleet notices the death, not after the visibility timeout of 20 s.
    assert time.monotonic() - killed_s < 15
    check(grid, view, tmp_path / "out", facts)
    causes = [a["cause"] for a in grid.client.activities()]
    assert any("exit -9" in cause for cause in causes), (victim, causes)


def test_a_manager_killed_in_the_middle_costs_nothing(
    bring_up: Bring, claims: tuple[Path, ClaimsFacts], tmp_path: Path
) -> None:
    path, facts = claims
    grid = bring_up(TWO)
    job = grid.submit(path)["id"]
    grid.wait(job, until=under_way)
    grid.kill_manager()
    check(grid, grid.wait(job), tmp_path / "out", facts)


def test_stopped_grid_continues_after_a_restart(
    bring_up: Bring, claims: tuple[Path, ClaimsFacts], tmp_path: Path
) -> None:
    path, facts = claims
    grid = bring_up(TWO)
    job = grid.submit(path)["id"]
    grid.wait(job, until=under_way)
    grid.stop()
    grid.start()
    check(grid, grid.wait(job), tmp_path / "out", facts)


def test_a_deleted_ledger_is_rebuilt_equal(bring_up: Bring, claims: tuple[Path, ClaimsFacts], tmp_path: Path) -> None:
    """The test checks invariant I3 on real files."""
    path, facts = claims
    grid = bring_up(TWO)
    view = grid.run(path)
    grid.stop()
    before = contents(grid.home.ledger_file)
    for file in grid.home.path.glob("ledger.sqlite*"):
        file.unlink()
    grid.start()
    assert grid.client.jobs() == []
    assert grid.client.rebuild() == 1
    check(grid, grid.client.job(view["id"]), tmp_path / "out", facts)
    grid.stop()
    assert contents(grid.home.ledger_file) == before
    grid.start()


def contents(ledger_file: Path) -> object:
    async def read() -> object:
        ledger = open_sqlite(ledger_file)
        try:
            return await ledger.dump()
        finally:
            await ledger.close()

    return asyncio.run(read())


def test_two_pools_from_zero_and_back_to_zero(bring_up: Bring, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "work.py").write_text("import time\ndef nap(item):\n    time.sleep(0.02)\n    return item\n")
    (folder / "items.jsonl").write_text("\n".join(str(i) for i in range(60)))
    (folder / "job.yaml").write_text(
        "name: pools\n"
        "input: {files: items.jsonl, split: items}\n"
        "stages:\n"
        "  - {name: first, python: work:nap, pool: small}\n"
        "  - {name: second, python: work:nap, pool: large}\n"
    )
    grid = bring_up((Pool("small", 0, 1, 1), Pool("large", 0, 2, 2)))
    at_first = {p["name"]: p["desired"] for p in grid.client.grid()["pools"]}
    assert at_first == {"small": 0, "large": 0}
    view = grid.run(folder / "job.yaml")
    assert view["state"] == "SUCCEEDED", view["reason"]
    assert sorted(grid.results(view, tmp_path / "out")["second"]) == list(range(60))
    deadline_s = time.monotonic() + 30
    while any(p["desired"] or p["instances"] for p in alive(grid)):
        assert time.monotonic() < deadline_s, alive(grid)
        time.sleep(0.1)
    for pool in ("small", "large"):
        causes = " ".join(a["cause"] for a in grid.client.activities(pool=pool))
        assert "backlog of" in causes
        assert "empty backlog" in causes


def alive(grid: LocalGrid) -> list[dict[str, object]]:
    return [
        {"desired": pool["desired"], "instances": [i for i in pool["instances"] if i["state"] != "Terminated"]}
        for pool in grid.client.grid()["pools"]
    ]


def test_a_manager_that_has_lost_the_lead_stands_for_it_again(
    bring_up: Bring, claims: tuple[Path, ClaimsFacts], tmp_path: Path
) -> None:
    """The lease was lost because of a full disk or a database outage longer than the lease."""
    path, facts = claims
    grid = bring_up(TWO)
    job = grid.submit(path)["id"]
    grid.wait(job, until=under_way)
    before = grid.home.record()
    asyncio.run(_usurp(grid))
    until(lambda: _leads(grid), 30)
    view = grid.wait(job, within_s=90)
    check(grid, view, tmp_path / "out", facts)
    assert grid.home.record() == before, "the same process leads, at the same address"
    assert "the manager tries to get the lease again" in grid.home.manager_log.read_text()


def _leads(grid: LocalGrid) -> bool:
    try:
        return grid.client.grid()["leader"]
    except BackendError:
        return False


async def _usurp(grid: LocalGrid) -> None:
    """Take the lead from the current leader, keep it until the leader notices, and release it."""
    ledger = open_sqlite(grid.home.ledger_file)
    try:
        stands = await ledger.lease(LEASE, "usurper")
        while stands.owner != "usurper":  # the leader renewed the lease in between
            stands = await ledger.lease(LEASE, "usurper", over=stands)
        while "no longer the leader" not in grid.home.manager_log.read_text():
            await ledger.lease(LEASE, "usurper")
            await asyncio.sleep(0.2)
        await ledger.release(LEASE, "usurper")
    finally:
        await ledger.close()
