"""Input that is already in the grid's bucket: the objects that become input, and the refused paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchlab.core.job_definition import JobDef
from batchlab.jobs import submission
from batchlab.runtime.home import Home
from tests.support import job_files as jobfiles
from tests.support.cli import FakeClient, Run, a_job, at_home


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    return at_home(monkeypatch, submit=a_job("j-0123456789"), jobs=[])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the home of a local grid whose bucket contains some objects."""
    jobfiles.write(tmp_path, {**jobfiles.FOLDER, "job.yaml": jobfiles.MINIMAL})
    raw = {"in/a.csv": "1", "in/more/b.csv": "2", "alone.csv": "3"}
    home = Home(tmp_path / "h")
    home.make()
    jobfiles.write(home.objects / "raw", raw)
    return tmp_path


def says(folder: Path, files: str) -> None:
    (folder / "job.yaml").write_text(jobfiles.MINIMAL.replace("data/*", files))


def submitted(manager: type[FakeClient], run: Run, folder: Path, files: str) -> JobDef:
    """Return the job that the manager receives if the job file names this input."""
    says(folder, files)
    code, _, err = run("job", "submit", folder / "job.yaml", "--home", folder / "h")
    assert code == 0, err
    assert "Uploaded the code; the input is in the bucket." in err
    ((job,),) = (args for name, args, _ in manager.asked if name == "submit")
    manager.asked.clear()
    found: Any = job
    assert isinstance(found, JobDef)
    return found


@pytest.mark.parametrize(
    ("files", "keys"),
    [
        ("s3://local/raw/in/", ("raw/in/a.csv", "raw/in/more/b.csv")),
        ("[s3://local/raw/alone.csv, s3://local/raw/in/more/]", ("raw/alone.csv", "raw/in/more/b.csv")),
        ("[s3://local/raw/in/a.csv, s3://local/raw/in/]", ("raw/in/a.csv", "raw/in/more/b.csv")),
    ],
)
@pytest.mark.parametrize("many", [False, True])
def test_existing_objects_become_the_jobs_input(
    manager: type[FakeClient],
    run: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: str,
    keys: tuple[str, ...],
    many: bool,
) -> None:
    """Objects that are added after the submission are not input, because --cache would not notice them."""
    if many:
        monkeypatch.setattr(submission, "MANY_FILES", 1)
        alone, below = "raw/alone.csv", "raw/in/more/" if "alone" in files else "raw/in/"
        keys = (alone, below) if "alone" in files else (below,)
    job = submitted(manager, run, folder, files)
    assert job.input
    assert job.input.keys == keys
    objects = Home(folder / "h").objects
    assert sorted(one.name for one in (objects / "raw").iterdir()) == ["alone.csv", "in"]
    assert (objects / (job.code or "")).is_file()


def test_different_object_makes_a_different_run(manager: type[FakeClient], run: Run, folder: Path) -> None:
    """--resume and --cache compare the digest of the run."""
    objects = Home(folder / "h").objects
    files = "[s3://local/raw/in/, s3://local/raw/alone.csv]"
    jobs = [submitted(manager, run, folder, files).id for _ in range(2)]
    (objects / "raw/elsewhere.csv").write_text("4")
    jobs.append(submitted(manager, run, folder, files).id)
    assert len(set(jobs)) == 1
    (objects / "raw/in/c.csv").write_text("5")
    jobs.append(submitted(manager, run, folder, files).id)
    (objects / "raw/alone.csv").write_text("another")
    jobs.append(submitted(manager, run, folder, files).id)
    assert len(set(jobs)) == 3


@pytest.mark.parametrize("command", [("job", "submit"), ("run",)])
@pytest.mark.parametrize(
    ("files", "told"),
    [
        ("s3://local/raw/out/", "The grid's bucket does not contain an object below raw/out/."),
        ("s3://local/raw/in", "The grid's bucket does not contain an object named raw/in."),
        ("'s3://local/raw/*.csv'", "The grid's bucket does not contain an object named raw/*.csv."),
        ("s3://other/raw/in/", "The grid cannot read the input s3://other/raw/in/: its own bucket"),
        ("[s3://local/raw/in/, s3://other/raw/in/]", "and partly, with s3://other/raw/in/, in an"),
        ("[data/a.csv, s3://local/raw/in/]", "The input is partly files, and partly, with s3://"),
        ("s3://local/jobs/", "The input 's3://local/jobs/' is not below raw/ in the grid's bucket"),
        ("s3://local/raw/../jobs/", "is not below raw/ in the grid's bucket"),
        ("s3://local/raw//in/", "is not below raw/ in the grid's bucket"),
        ("s3://local", "is not below raw/ in the grid's bucket"),
        ("'s3://local/raw/a#1'", "ends in '#' and digits"),
    ],
)
def test_invalid_bucket_input_is_reported_before_any_upload(
    manager: type[FakeClient], run: Run, folder: Path, command: tuple[str, ...], files: str, told: str
) -> None:
    says(folder, files)
    code, out, err = run(*command, folder / "job.yaml", "--home", folder / "h")
    assert (code, out) == (2, ""), err
    sentence, remedy = err.rstrip("\n").split("\n")
    assert told in sentence
    assert remedy.strip()
    assert manager.asked == []
    assert [one.name for one in Home(folder / "h").objects.iterdir()] == ["raw"]


def test_check_reports_mistakes_without_a_bucket(run: Run, folder: Path) -> None:
    says(folder, "[data/a.csv, s3://local/raw/in/]")
    code, _, err = run("job", "check", folder / "job.yaml")
    assert code == 2
    assert "partly files" in err
    says(folder, "s3://local/raw/nothing/")
    assert run("job", "check", folder / "job.yaml")[0] == 0


def test_a_simulated_run_has_no_bucket_to_read_from(run: Run, folder: Path) -> None:
    says(folder, "s3://local/raw/in/")
    options = ("--backend", "sim", "--out", folder / "out")
    code, _, err = run("run", folder / "job.yaml", *options)
    assert code == 2
    assert "cannot read the input s3://local/raw/in/" in err
    assert "on a grid that has one: not the simulator" in err
    assert not (folder / "out").exists()
