"""Jobs whose code or input was changed, or that no command of a user would create."""

from __future__ import annotations

import asyncio
import hashlib
import io
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchlab.client.http import Client
from batchlab.core.errors import BatchlabError
from batchlab.core.job_definition import JobDef
from batchlab.jobs import job_file, submission
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from tests.system.bad_input import jobs
from tests.system.bad_input.shell import Shell

Evidence = dict[str, Any]

LATER = f"{jobs.JOB}at: +2s\n"


@dataclass(frozen=True, slots=True)
class Tampered:
    """A tampered job. `says` is a part of the output of `batchlab job watch`."""

    name: str
    does: str
    says: str
    submit: Callable[[Shell], str]
    """Submits the job, and returns its id."""

    def scene(self, folder: Path) -> None:
        jobs.sound(folder)
        # The job has its own code, which no worker has loaded yet.
        (folder / "work.py").write_text(f"{jobs.HANDLERS}# {self.name}\n")
        (folder / "job.yaml").write_text(LATER)

    def run(self, shell: Shell) -> Evidence:
        job = self.submit(shell)
        return {"told": shell("job", "watch", job).to_json()}


# --- Changes in the bucket before the job starts -------------------------------------------------


def _then(change: Callable[[Path], None], where: str) -> Callable[[Shell], str]:
    """Return a function that submits the job, and changes the object below `where` before the job starts."""

    def submit(shell: Shell) -> str:
        told = shell("job", "submit", "job.yaml")
        assert told.code == 0, told
        job = told.out.strip()
        bucket = Home(Path(shell.home)).objects
        definition = job_file.load(shell.folder / "job.yaml")
        digest = submission.code_digest(definition)[1]
        (found,) = bucket.glob(where.format(job=job, digest=digest))
        change(found)
        return job

    return submit


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


INPUT = "raw/{job}/*/items.jsonl"
CODE = "code/{digest}.zip"


# --- Code that `batchlab job submit` never makes -------------------------------------------------


def _zip(*entries: tuple[str | zipfile.ZipInfo, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return buffer.getvalue()


def _link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("work.py")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def _with(data: bytes) -> Callable[[Shell], str]:
    """Return a function that submits the job through the API, with this zip as its code."""

    def submit(shell: Shell) -> str:
        job = _prepared(shell, data)
        with _client(shell) as client:
            return client.submit(job)["id"]

    return submit


def _prepared(shell: Shell, code: bytes) -> JobDef:
    home, backend = Home(Path(shell.home)), factory.load("local")
    preparing = submission.prepare(
        job_file.load(shell.folder / "job.yaml"),
        objects=backend.open_objects(home),
        clock=backend.open_clock(),
        patience=factory.patience(),
        token=hashlib.sha256(code).hexdigest(),
        packed=(code, hashlib.sha256(code).hexdigest()),
    )
    return asyncio.run(preparing)


def _client(shell: Shell) -> Client:
    home = Home(Path(shell.home))
    record = home.record()
    assert record is not None
    return Client.of(home, record)


WORK = ("work.py", jobs.HANDLERS)

TAMPERED = [
    Tampered("input gone", "deletes the input from the bucket", "does not exist", _then(Path.unlink, INPUT)),
    Tampered(
        "code gone", "deletes the code from the bucket", "The job's code cannot be fetched", _then(Path.unlink, CODE)
    ),
    Tampered("code cut", "cuts the end of the code off", "does not match its name", _then(_damage, CODE)),
    Tampered("code no zip", "gives text for a zip of code", "The code zip cannot be read", _with(b"no zip")),
    Tampered(
        "zip up",
        "has a zip that leaves its folder",
        "which is outside its folder",
        _with(_zip(WORK, ("../../evil.py", ""))),
    ),
    Tampered(
        "zip root",
        "has a zip with an absolute path",
        "which is outside its folder",
        _with(_zip(WORK, ("/tmp/evil.py", ""))),
    ),
    Tampered(
        "zip backslash",
        "has a zip with a path of Windows",
        "which is outside its folder",
        _with(_zip(WORK, ("..\\evil.py", ""))),
    ),
    Tampered("zip link", "has a zip with a link", "which is a link or a device", _with(_zip((_link(), "/etc/passwd")))),
    Tampered(
        "zip clash", "has a zip with a file as folder", "cannot be unpacked", _with(_zip(WORK, ("work.py/x", "")))
    ),
]


def twice(shell: Shell) -> Evidence:
    """Submit a job, and another job with the same token."""
    job = _prepared(shell, _zip(WORK))
    with _client(shell) as client:
        first = client.submit(job)
        again = client.submit(replace(job, submitted_s=job.submitted_s + 60))
        try:
            client.submit(replace(job, priority=7))
        except BatchlabError as error:
            refused = {"code": error.exit_code, "said": str(error)}
        else:
            refused = {}
    return {"first": first["id"], "again": again["id"], "refused": refused}
