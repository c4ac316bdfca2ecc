"""Job files in the Python API, and the program in its documentation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab import Grid
from batchlab.core.errors import JobFailed, TaskFailed, UsageError
from batchlab.core.installation import starter
from batchlab.core.model import ENDED, JobState
from batchlab.core.ports import MAX_MESSAGE_BYTES
from batchlab.jobs.yaml_source import JobFileErrors
from tests.support import ROOT
from tests.support.grid.python_api import newest, warm_grid


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    with warm_grid(tmp_path_factory.mktemp("grid")) as grid:
        yield grid


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    for name, text in starter().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "job.yaml"


def test_a_job_file_runs_to_its_results(grid: Grid, job_file: Path, tmp_path: Path) -> None:
    result = grid.run(job_file, params={"min_cents": 0}, out=tmp_path / "out")
    assert repr(result) == f"<JobResult {result.id} SUCCEEDED>"
    result.raise_for_state()
    assert (result.state, result.failures, result.view["id"]) == ("SUCCEEDED", [], result.id)
    totals = list(result.results())
    assert totals == list(result.results("total"))
    parts = [row for part in result.results("summarise") for row in part]
    assert sum(row["claims"] for row in totals) == sum(row["claims"] for row in parts) > 0
    assert (tmp_path / "out" / "total.jsonl").read_text().count("\n") == len(totals)
    with pytest.raises(UsageError, match="does not have a stage 'sum'"):
        result.results("sum")


def test_parameters_change_what_a_job_file_does(grid: Grid, job_file: Path) -> None:
    def claims(cents: int) -> int:
        result = grid.run(job_file, params={"min_cents": cents})
        return sum(row["claims"] for row in result.results())

    assert claims(10**9) < claims(0)
    with pytest.raises(JobFileErrors, match="no parameter 'cents'"):
        grid.run(job_file, params={"cents": 1})
    with pytest.raises(UsageError, match="list"):
        grid.run(job_file, params={"min_cents": [1]})


def test_failed_job_gives_its_reason(grid: Grid, job_file: Path) -> None:
    broken = job_file.parent / "handlers.py"
    broken.write_text(broken.read_text().replace("cents = round(", "cents = rund("))
    result = grid.run(job_file)
    assert result.state is JobState.FAILED
    assert "rund" in result.reason
    assert result.failures[0]["stage"] == "summarise"
    assert list(result.results()) == []
    with pytest.raises(TaskFailed, match="ended FAILED") as caught:
        result.raise_for_state()
    assert "NameError" in caught.value.traceback


def test_a_job_that_takes_too_long_is_cancelled(grid: Grid, job_file: Path) -> None:
    slow = job_file.parent / "handlers.py"
    slow.write_text(slow.read_text().replace("states = {}", "import time; time.sleep(60)"))
    with pytest.raises(JobFailed, match=r"longer than 0\.5 s"):
        grid.run(job_file, timeout_s=0.5)
    assert grid.wait(newest(grid)).state is JobState.CANCELLED


def test_a_cap_of_the_call_takes_the_place_of_the_files(grid: Grid, job_file: Path) -> None:
    job = grid.submit(job_file, max_cost_usd=1.5)
    grid.wait(job)
    assert grid.client.job_use(job)["max_cost_usd"] == 1.5
    with pytest.raises(UsageError, match="max_cost_usd is 0"):
        grid.run(job_file, max_cost_usd=0)


def test_job_may_be_submitted_and_awaited_later(grid: Grid, job_file: Path) -> None:
    job = grid.submit(job_file)
    assert grid.wait(job).state is JobState.SUCCEEDED
    assert grid.client.job(job)["state"] in ENDED


def test_input_that_lies_in_the_bucket_is_run_over_where_it_is(grid: Grid, job_file: Path) -> None:
    """A user of a local grid stores the input in this way."""
    (there,) = (one for one in job_file.parent.rglob("*.csv"))
    raw = grid._link.home.objects / "raw"
    (raw / "incoming").mkdir(parents=True)
    for name in ("incoming/1.csv", "incoming/2.csv", "alone.csv"):
        (raw / name).write_bytes(there.read_bytes())
    text = job_file.read_text()
    uploaded = sum(row["claims"] for row in grid.run(job_file).results())
    before = {one.name for one in raw.iterdir()}
    place = "[s3://local/raw/alone.csv, s3://local/raw/incoming/]"
    job_file.write_text(re.sub(r"files: \S+", f"files: {place}", text))
    result = grid.run(job_file)
    result.raise_for_state()
    assert sum(row["claims"] for row in result.results()) == 3 * uploaded
    assert {one.name for one in raw.iterdir()} == before
    job_file.write_text(re.sub(r"files: \S+", "files: s3://local/raw/outgoing/", text))
    with pytest.raises(UsageError, match=r"not contain an object below raw/outgoing/"):
        grid.run(job_file)


def test_documented_program_prints_the_documented_output(job_file: Path, tmp_path: Path) -> None:
    document = (ROOT / "docs" / "python-api.md").read_text()
    blocks = re.findall(r"```(python|text)\n(.*?)```", document, re.DOTALL)
    assert len(blocks) > 6
    (tmp_path / "first").mkdir()
    for file in [job_file, job_file.parent / "handlers.py", job_file.parent / "data"]:
        file.rename(tmp_path / "first" / file.name)
    program = "\n".join(text for kind, text in blocks if kind == "python")
    (tmp_path / "program.py").write_text(program)
    run = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "BATCHLAB_HOME": str(tmp_path / "grid")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expected = "".join(text for kind, text in blocks if kind == "text")
    assert (run.stdout, run.stderr, run.returncode) == (expected, "", 0)


def test_a_definition_larger_than_a_message_may_be_runs_at_once(grid: Grid, job_file: Path) -> None:
    """A definition may be larger than a message. Before, the job's messages were too large, so it waited 120 s for the
    reconciler."""
    text = job_file.read_text()
    large = text.replace("params:\n", f"params:\n  note: {'x' * (MAX_MESSAGE_BYTES + 1)}\n")
    assert large != text
    job_file.write_text(large)
    grid.run(job_file, timeout_s=60.0).raise_for_state()
