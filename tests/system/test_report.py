"""The performance data of a job on a real grid: written, queried, downloaded, and queried without the grid.

The figures are computed from the Parquet files alone. The figures are compared with `job show` and `cost bill`, which
use the ledger and the account.
"""

from __future__ import annotations

import json
import re
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from batchlab.core.api_types import JobView
from batchlab.core.model import Pool
from batchlab.core.protocol import object_keys
from batchlab.reports.costs import DIGIT
from batchlab.reports.queries import store
from tests.support.cli import Run
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import LocalGrid
from tests.support.reports.simulated_run import answers

JOB = """
name: sums
input: {files: "data.txt", split: lines, size: 4}
stages:
  - {name: add, python: "handlers:add", retry: {attempts: 2, backoff: 0s}, bundle: 5}
  - {name: double, python: "handlers:double"}
  - {name: total, python: "handlers:total", gather: all}
failure: {max_failures: 1}
"""
HANDLERS = """
import pathlib, time

def add(part):
    numbers = [int(line) for line in pathlib.Path(part.path).read_text().split()]
    time.sleep(0.02)
    if numbers[0] == 8:
        raise ValueError(f"{numbers[0]} is unlucky")
    return sum(numbers)

def double(number):
    return 2 * number

def total(results):
    return sum(results)
"""


def test_report_ledger_and_bill_agree(
    bring_up: Bring, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    (folder / "handlers.py").write_text(HANDLERS)
    (folder / "data.txt").write_text("".join(f"{n}\n" for n in range(160)))
    grid = bring_up([Pool("default", 1, 2, 2)])
    home = ("--home", str(grid.home.path))
    view = grid.run(folder / "job.yaml")
    assert view["state"] == "SUCCEEDED", view
    job = view["id"]
    used = grid.home.objects / object_keys.reference_key(job)  # type: ignore[arg-type]
    deadline_s = time.monotonic() + 20
    while not used.exists():
        assert time.monotonic() < deadline_s, "the job's account is not written down"
        time.sleep(0.05)

    # The data is downloaded, and from now on only the folder is queried.
    monkeypatch.chdir(tmp_path)
    code, out, err = run("report", "pull", "last", "--out", "runs", *home, "--json")
    assert code == 0, err
    (brought,) = json.loads(out)["runs"]
    assert brought == {"job": job, "folder": f"runs/{job}", "is_final": True}
    with answers(tmp_path / "runs") as ask:
        check(ask, run, view, home)
        check_cost(ask, run, grid, job)

    # The data is queried in place by the job's name, after a second write, and without a grid.
    count = ("SELECT succeeded FROM jobs", "--json")
    code, out, err = run("report", "query", *count, "last", *home)
    assert code == 0, err
    before = json.loads(out)["rows"]
    code, out, err = run("report", "write", job, *home)
    assert code == 0, err
    assert f"in reports/{job}/" in out
    grid.stop()
    code, out, err = run("report", "query", *count, job, *home)
    assert code == 0, err
    assert json.loads(out)["rows"] == before
    nowhere = ("--home", str(tmp_path / "nowhere"))
    code, out, err = run("report", "diff", "runs", "runs", "--threshold", "1%", *nowhere)
    assert code == 0, err
    assert not (tmp_path / "nowhere").exists()


def check(ask: Any, run: Run, view: JobView, home: tuple[str, str]) -> None:
    # The counts per task are compared with the ledger's counters.
    told = {
        row["stage"]: row
        for row in ask(
            "SELECT stage, count(*) AS planned, "
            "count(*) FILTER (state = 'SUCCEEDED') AS succeeded, "
            "count(*) FILTER (state = 'FAILED') AS failed, "
            "count(*) FILTER (state = 'CANCELLED') AS cancelled, "
            "coalesce(sum(run_s) FILTER (state = 'SUCCEEDED'), 0) AS run_s "
            "FROM tasks GROUP BY stage"
        )
    }
    for stage in view["stages"]:
        mine = told[stage["name"]]
        for name in ("planned", "succeeded", "failed", "cancelled"):
            assert mine[name] == stage[name], (stage["name"], name)
        assert mine["run_s"] == pytest.approx(stage["run_s"], abs=1e-5)
    (whole,) = ask("SELECT * FROM jobs")
    assert whole["backend"] == "local"
    assert whole["ended_s"] == view["ended_s"]
    assert (whole["failed"], whole["retried"], whole["cancelled"]) == (1, 1, 1)
    (print_,) = ask("SELECT DISTINCT fingerprint FROM attempts WHERE state = 'FAILED'")
    (group,) = json.loads(run("job", "failures", view["id"], *home, "--json")[1])
    assert print_ == {"fingerprint": group["fingerprint"]}
    for query in store.named_queries().values():
        ask(query.sql)

    # The workers were processes of this machine.
    workers = {row["instance"] for row in ask("SELECT instance FROM workers WHERE bundles > 0")}
    assert None not in workers
    assert workers <= {row["instance"] for row in ask("SELECT instance FROM instances")}
    assert ask("SELECT count(*) > 0 AS seen FROM fleet") == [{"seen": True}]
    assert not ask("SELECT * FROM bundles WHERE wait_s < 0 OR took_s < 0 OR took_s < run_s - 0.05")


def check_cost(ask: Any, run: Run, grid: LocalGrid, job: str) -> None:
    """The page, the bill, and the report show one cost of the job, to the last digit."""
    home = ("--home", str(grid.home.path))
    code, out, err = run("cost", "bill", job, *home, "--json")
    assert code == 0, err
    bill = json.loads(out)
    lines = {r["line"]: r["usd"] for r in ask("SELECT line, sum(cost_usd) AS usd FROM cost GROUP BY 1")}
    assert lines == {item["what"]: Decimal(repr(item["usd"]["typical"])).quantize(DIGIT) for item in bill["items"]}
    usd = Decimal(repr(bill["usd"]["typical"]))
    assert usd > 0
    assert ask("SELECT cost_usd FROM jobs") == [{"cost_usd": usd}]
    with httpx.Client(base_url=grid.client.url, trust_env=False) as http:
        login = http.post("/ui/login", data={"word": grid.home.token()}, headers={"Sec-Fetch-Site": "same-origin"})
        page = f"{login.headers['location']}jobs/{job}"
        shown = re.search(r'<data value="([\d.]+)">([\d.]+ USD)</data>', http.get(page).text)
        report = http.get(f"{page}/report.html", timeout=60.0)
    assert shown
    assert Decimal(shown[1]) == usd
    assert report.status_code == 200
    assert f">{usd:.6f}<" in report.text
    code, out, err = run("cost", "bill", job, *home)
    assert code == 0, err
    assert f"{shown[2]} on AWS" in out
