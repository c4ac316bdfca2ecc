"""Job files for tests, and checks of every error message about a job file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from batchlab.core.errors import JobFileError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId
from batchlab.jobs import job_file
from batchlab.jobs.yaml_source import JobFileErrors
from tests.support.mistakes import complete

MINIMAL = """\
name: j
input: {files: data/*}
stages:
  - {name: one, python: "work:one"}
"""

WORK = "def one(item): ...\ndef two(item): ...\n"

FULL = """\
name: j
input:
  files: data/*
params: {limit: 1}
stages:
  - name: one
    python: work:one
  - name: two
    command: [wc, "{input}"]
"""

FOLDER = {"work.py": WORK, "data/b.csv": "2", "data/a.csv": "1", "data/c.txt": "3"}


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def load(folder: Path, text: str, **overrides: str) -> job_file.JobFile:
    (folder / "job.yaml").write_text(textwrap.dedent(text))
    return job_file.load(folder / "job.yaml", overrides)


def refused(folder: Path, text: str, **overrides: str) -> list[JobFileError]:
    """Return the errors of the file, after checking that each error is complete."""
    with pytest.raises(JobFileErrors) as caught:
        load(folder, text, **overrides)
    return list(complete(caught.value.errors, folder / "job.yaml", textwrap.dedent(text)))


def told(errors: list[JobFileError]) -> list[tuple[int | None, str]]:
    return [(error.line, f"{error.message} {error.remedy}") for error in errors]


def compiled(jobfile: job_file.JobFile, submitted_s: float = 0.0) -> JobDef:
    return job_file.compile_job(
        jobfile,
        job_id=JobId("j-1"),
        token="t",
        code_key="code/abc.zip",
        input_keys=["raw/j-1/a"],
        submitted_s=submitted_s,
    )
