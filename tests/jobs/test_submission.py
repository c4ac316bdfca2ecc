"""The upload of raw input: every file once, in order, with a short definition."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import cast

import pytest

from batchlab.adapters.clock import WallClock
from batchlab.adapters.local.objects import open_local
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.jobs import submission
from batchlab.jobs.job_file import load
from batchlab.manager import input_split
from tests.support import job_files as jobfiles


class Counted:
    """A bucket that counts concurrent uploads."""

    def __init__(self) -> None:
        self.under_way = 0
        self.most = 0

    def around(self, upload: Callable[[str, Path], Awaitable[int]]) -> Callable[..., object]:
        async def counted(key: str, path: Path) -> int:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await asyncio.sleep(0)
            self.under_way -= 1
            return await upload(key, path)

        return counted


async def prepared(folder: Path, bucket: Objects, **more: object) -> JobDef:
    return await submission.prepare(
        load(folder / "job.yaml", {}),
        objects=bucket,
        clock=WallClock(),
        patience=Patience(Random(1)),
        token="t",
        **more,  # type: ignore[arg-type]
    )


def job_of(folder: Path, files: int) -> None:
    names = {f"data/{number:02d}.csv": str(number) for number in range(files)}
    jobfiles.write(folder, {"job.yaml": jobfiles.MINIMAL, "work.py": jobfiles.WORK, **names})


def names_of(job: JobDef, bucket: Objects) -> list[str]:
    async def collect() -> list[str]:
        assert job.input is not None
        return [item["name"] async for item in input_split.items(bucket, job.input)]

    return asyncio.run(collect())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Reduce the maximum number of file keys in a definition, and return the maximum."""
    monkeypatch.setattr(submission, "MANY_FILES", 5)
    return 5


def test_a_few_files_are_named_one_by_one(tmp_path: Path, few: int) -> None:
    job_of(tmp_path, few)
    bucket = open_local(tmp_path / "bucket")
    job = asyncio.run(prepared(tmp_path, bucket))
    assert job.input is not None
    assert len(job.input.keys) == few
    assert names_of(job, bucket) == [f"{number:02d}.csv" for number in range(few)]


def test_many_files_are_named_by_their_folder_and_keep_their_order(tmp_path: Path, few: int) -> None:
    job_of(tmp_path, few + 1)
    bucket = open_local(tmp_path / "bucket")
    job = asyncio.run(prepared(tmp_path, bucket))
    assert job.input is not None
    assert len(job.input.keys) == 1
    assert names_of(job, bucket) == [f"{number:02d}.csv" for number in range(few + 1)]


def test_definition_depends_only_on_the_files(tmp_path: Path, few: int) -> None:
    job_of(tmp_path, few + 2)
    bucket = open_local(tmp_path / "bucket")
    first = asyncio.run(prepared(tmp_path, bucket))
    assert asyncio.run(prepared(tmp_path, bucket)).input == first.input
    (tmp_path / "data" / "01.csv").unlink()
    fewer = asyncio.run(prepared(tmp_path, bucket))
    assert fewer.input != first.input
    assert len(names_of(fewer, bucket)) == few + 1
    assert len(names_of(first, bucket)) == few + 2


def test_uploads_are_concurrent_with_a_bound_and_each_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_of(tmp_path, 50)
    bucket, counted = open_local(tmp_path / "bucket"), Counted()
    monkeypatch.setattr(bucket, "upload", counted.around(bucket.upload))
    told: list[submission.Uploaded] = []
    asyncio.run(prepared(tmp_path, bucket, progress=told.append))
    assert counted.most == submission.UPLOADS_AT_ONCE
    assert [one.files for one in told] == list(range(1, 51))
    assert told[-1].of == 50


def test_vanished_file_is_a_clear_error(tmp_path: Path) -> None:
    job_of(tmp_path, 3)
    file = load(tmp_path / "job.yaml", {})
    (tmp_path / "data" / "01.csv").unlink()
    bucket = cast(Objects, open_local(tmp_path / "bucket"))
    with pytest.raises(UsageError, match=r"01\.csv no longer exists"):
        asyncio.run(
            submission.prepare(file, objects=bucket, clock=WallClock(), patience=Patience(Random(1)), token="t")
        )
