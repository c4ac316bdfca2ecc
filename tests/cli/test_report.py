"""`batchlab report …` on folders: its output and its errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.runtime.home import Home, Place
from batchlab.scenarios import record
from tests.support.cli import FakeClient, Run, a_job
from tests.support.reports.made import Made, write_run
from tests.support.scenarios.records import a_job as replayed
from tests.support.scenarios.records import a_record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("runs") / "shop-a", Made(job="shop-a", tasks=24)))


def test_rows_are_a_table_json_or_csv(run: Run, made: str) -> None:
    sql = "SELECT stage, planned, after, cost_usd, NULL AS none FROM stages ORDER BY position"
    code, out, _ = run("report", "query", sql, made)
    assert code == 0
    assert out.splitlines()[0].split() == ["STAGE", "PLANNED", "AFTER", "COST_USD", "NONE"]
    assert out.splitlines()[2].split()[:3] == ["score", "24", "read"]
    code, out, _ = run("report", "query", sql, made, "--json")
    rows = json.loads(out)["rows"]
    assert rows[1]["after"] == ["read"]
    assert isinstance(rows[1]["cost_usd"], float)
    assert rows[1]["none"] is None
    code, out, _ = run("report", "query", sql, made, "--csv")
    assert out.splitlines()[0] == "stage,planned,after,cost_usd,none"
    assert out.splitlines()[2].startswith('score,24,"[""read""]",')
    code, _, err = run("report", "query", sql, made, "--csv", "--json")
    assert code == 2
    assert "exclude each other" in err


def test_small_numbers_are_shown_without_exponents(run: Run, made: str) -> None:
    sql = "SELECT 0.000003316::DECIMAL(24,12) AS usd, 1.5e-7::DOUBLE AS share, 2e9::DOUBLE AS at, 'inf'::DOUBLE AS odd"
    code, out, _ = run("report", "query", sql, made)
    assert (code, out.splitlines()[1].split()) == (0, ["0.000003316", "0.00000015", "2000000000.000", "inf"])
    assert json.loads(run("report", "query", sql, made, "--json")[1])["rows"][0]["usd"] == 3.316e-6


def test_queries_are_listed_and_run_by_name(run: Run, made: str) -> None:
    code, out, _ = run("report", "query")
    assert code == 0
    assert "slowest_tasks" in out
    code, out, _ = run("report", "query", "stages", made)
    assert code == 0
    assert "RUN_P95_S" in out
    code, _, err = run("report", "query", "slow", made)
    assert code == 2
    assert "The query 'slow' does not exist" in err
    code, out, err = run("report", "query", "SELECT 1 AS one WHERE false", made)
    assert (code, out, err) == (0, "", "No rows.\n")


def test_no_text_of_a_job_reaches_the_terminal_as_it_is(run: Run, made: str) -> None:
    code, out, _ = run("report", "query", "SELECT chr(27) || '[31mred' AS x FROM jobs", made)
    assert code == 0
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("query", "SELECT 1", "no/such/folder"), "The folder no/such/folder does not exist"),
        (("query", "SELEC 1", "MADE"), "The query fails"),
        (("query", "DROP VIEW jobs", "MADE"), "is not one SELECT"),
        (("query", "SELECT * FROM '/etc/passwd'", "MADE"), "The query fails"),
        (("query", "SELECT 1", "MADE", "MADE"), "more than once"),
        (("query", "SELECT 1", "nothing"), "has no ledger with jobs"),
        (("pull", "nothing"), "has no ledger with jobs"),
        (("write", "nothing"), "has no ledger with jobs"),
        (("diff", "MADE", "nothing"), "has no ledger with jobs"),
        (("query", "SELECT 1", "last", "--backend", "no-such"), "Unknown backend"),
        (("pull", "../../etc", "--backend", "aws"), "is not the id of a job"),
        (("pull", "last", "--backend", "aws"), "so the last job is unknown"),
    ],
)
def test_mistakes_are_clear_sentences(
    arguments: tuple[str, ...], said: str, run: Run, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHLAB_HOME", raising=False)
    code, out, err = run("report", *(made if argument == "MADE" else argument for argument in arguments))
    assert code == 2, err
    assert said in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    [
        ("report", "pull", "sums-0123456789"),
        ("report", "query", "SELECT 1", "sums-0123456789"),
        ("report", "write", "sums-0123456789"),
        ("job", "show", "sums-0123456789", "add/0"),
        ("job", "replay-task", "sums-0123456789", "add/0"),
    ],
)
def test_report_does_not_wait_for_a_deleted_bucket(command: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.backend_folder("ministack").mkdir()
    # The grid has ended, so its port does not answer.
    home.write_place("ministack", Place("http://127.0.0.1:9", "bucket-1", named=False))
    code, out, err = run(*command, "--backend", "ministack", "--home", str(tmp_path))
    assert (code, out) == (3, "")
    assert "runs only while the grid is up" in err
    assert "batchlab grid up --backend ministack" in err
    code, out, err = run(*command, "--backend", "localstack", "--home", str(tmp_path))
    assert (code, out) == (3, "")
    assert f"No grid on localstack is up in {tmp_path}" in err


def test_folder_that_is_not_a_run_is_not_overwritten(
    run: Run, manager: type[FakeClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manager.answers = {"job": a_job("sums-0123456789")}
    mine = tmp_path / "sums-0123456789"
    mine.mkdir()
    (mine / "thesis.txt").write_text("ten years of work")
    code, _, err = run("report", "pull", "sums-0123456789")
    assert code == 2
    assert "does not contain the performance data" in err
    assert (mine / "thesis.txt").exists()


def test_a_replays_record_stands_for_all_of_its_jobs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name, Made(job=name, tasks=4)).name for name in ("a", "b")]
    fact = a_record(*(replayed(n, id=name) for n, name in enumerate(runs)))
    record.write(fact, tmp_path / "fact.json")
    code, out, err = run("report", "query", "SELECT job FROM jobs ORDER BY job", "fact.json", "--csv")
    assert (code, out.split()) == (0, ["job", "a", "b"]), err
    record.write(replace(fact, simulated=True), tmp_path / "forecast.json")
    code, _, err = run("report", "pull", "forecast.json")
    assert code == 2
    assert "forecast.json is the record of a forecast, whose jobs have not run." in err


def test_damaged_folder_is_reported(run: Run, made: str, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run" / "tasks.parquet").write_bytes(b"PAR1 and then nothing")
    code, _, err = run("report", "query", "stages", str(tmp_path / "run"))
    assert code == 2
    assert "cannot be read" in err


def test_failed_report_is_named_with_its_job(run: Run, manager: type[FakeClient]) -> None:
    job = a_job("sums-0123456789", "SUCCEEDED", report="the disk is full")
    manager.answers = {"job": job, "why": "it has ended", "eta": {"text": "it has ended"}}
    code, out, _ = run("job", "show", "sums-0123456789")
    assert code == 0
    assert "the disk is full; `batchlab report write sums-0123456789` tries again" in out
