"""The command `batchlab report html`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from batchlab.adapters.local.objects import open_local
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Outcome, StageName, TaskSet
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.reports.html.failures import LOG_BYTES, Case, cases, samples
from batchlab.reports.html.source import ReportRun as ReportedRun
from batchlab.reports.queries import store
from batchlab.runtime.home import Home
from tests.support.cli import Run, runner
from tests.support.reports.made import Made, write_run

JOB = Made().job


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHLAB_HOME", str(tmp_path / "home"))
    return runner(monkeypatch, capsys)


def test_a_folder_is_all_that_a_page_needs(run: Run, made_run: Path, tmp_path: Path) -> None:
    code, out, err = run("report", "html", made_run)
    file = tmp_path / f"{JOB}.html"
    assert (code, err) == (0, "")
    assert out.startswith(f"{file.name}: ")
    assert file.read_text().startswith("<!doctype html>")
    assert sorted(one.name for one in tmp_path.iterdir()) == [file.name]


def test_json_contains_the_suggested_changes(run: Run, made_run: Path, tmp_path: Path) -> None:
    code, out, _ = run("report", "html", made_run, "--out", tmp_path / "new" / "a.html", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["job"] == JOB
    assert told["size_bytes"] == (tmp_path / "new" / "a.html").stat().st_size
    assert [one["check"] for one in told["to_change"]] == ["fleet too small", "idle cost"]
    assert "--max" in told["to_change"][0]["setting"]


def test_folder_that_is_not_a_run_is_refused(run: Run, made_run: Path, tmp_path: Path) -> None:
    code, _, err = run("report", "html", tmp_path / "nowhere")
    assert code == 2
    assert "does not exist" in err
    write_run(tmp_path / "two" / "a", Made(job="a"))
    write_run(tmp_path / "two" / "b", Made(job="b"))
    code, _, err = run("report", "html", tmp_path / "two")
    assert code == 2
    assert "holds 2 runs" in err
    code, _, err = run("report", "html", made_run, "--out", tmp_path)
    assert code == 2
    assert "cannot be written" in err


# --- Tracebacks and logs -------------------------------------------------------------------------


def _case(folder: Path) -> Case:
    with store.open_store([folder]) as connection:
        return cases(ReportedRun(connection, JOB))[0]


async def _commit(objects: Objects, case: Case, log: bytes | None) -> None:
    """Commit an outcome as a worker does, and store the output of its tasks."""
    first, last = (int(n) for n in case.bundle.split(".")[0].split("-"))
    bundle = Bundle(JobId(JOB), StageName(case.stage), TaskSet.span(first, last + 1), attempt=case.attempt)
    assert bundle.id == case.bundle
    key = object_keys.log(bundle, case.execution, UNSEALED)
    failure = Failure(case.task, FailureKind.EXCEPTION, "no price", "ValueError", traceback="In <price>: line 7")
    outcome = Outcome(
        bundle,
        case.execution,
        "w-1",
        1.0,
        2.0,
        failed=(failure,),
        cancelled=bundle.tasks - TaskSet.from_indices([case.task]),
        log=key,
        log_spans=((case.task, 10, 10 + len(log)),) if log is not None else (),
    )
    await objects.put(
        object_keys.outcome(bundle, UNSEALED),
        json_format.to_bytes(json_format.outcome_to_json(outcome)),
        if_absent=True,
    )
    if log is not None:
        await objects.put(key, b"whatever10" + log + b" and more", if_absent=True)


def test_samples_are_read_from_the_bucket(run: Run, made_run: Path, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    asyncio.run(_commit(open_local(home.objects), _case(made_run), b"before <it>\nfailed\n"))
    code, _, err = run("report", "html", made_run, "--backend", "local")
    page = (tmp_path / f"{JOB}.html").read_text()
    assert (code, err) == (0, "")
    assert "In &lt;price&gt;: line 7" in page
    assert "before &lt;it&gt;\nfailed\n" in page
    assert "whatever10" not in page
    code, _, _ = run("report", "html", made_run, "--backend", "local", "--no-logs")
    page = (tmp_path / f"{JOB}.html").read_text()
    assert "line 7" not in page
    assert "not available" in page


def test_unreachable_bucket_still_gives_a_report(run: Run, made_run: Path, tmp_path: Path) -> None:
    code, out, err = run("report", "html", made_run, "--backend", "ministack")
    assert code == 0
    assert out.startswith(f"{JOB}.html")
    assert "The page has no tracebacks and no logs: " in err


def test_deleted_objects_are_omitted(made_run: Path, tmp_path: Path) -> None:
    objects = open_local(tmp_path)
    case = _case(made_run)
    assert asyncio.run(samples(objects, JOB, [case])) == {}
    asyncio.run(_commit(objects, case, None))
    found = asyncio.run(samples(objects, JOB, [case]))
    assert (found[case].traceback, found[case].log) == ("In <price>: line 7", "")


def test_end_of_a_long_log_is_shown(made_run: Path, tmp_path: Path) -> None:
    objects = open_local(tmp_path)
    case = _case(made_run)
    asyncio.run(_commit(objects, case, b"x" * 100_000 + b"the end"))
    log = asyncio.run(samples(objects, JOB, [case]))[case].log
    assert log.startswith("… 92,007 bytes are left out …\n")
    assert log.endswith("the end")
    assert len(log) < LOG_BYTES + 100
