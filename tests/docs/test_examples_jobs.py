"""The job files of the examples, which pass every check and name what their handlers need."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from batchlab.jobs.job_file import JobFile, load
from examples.example_data import write_claims, write_records, write_rides
from tests.support.examples import EXAMPLES


def some_video(folder: Path) -> None:
    folder.mkdir()
    picture = "testsrc2=duration=0.4:size=192x144:rate=25"
    made = str(folder / "made.mp4")
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, made], check=True)


def a_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "made.mp4").touch()


def loaded(example: str, folder: Path, data: Callable[[Path], object]) -> JobFile:
    """Copy an example, generate its data, and load its job file."""
    copy = folder / example
    shutil.copytree(EXAMPLES / example, copy, ignore=shutil.ignore_patterns("data", "out"))
    data(copy / "data")
    return load(copy / "job.yaml")


@pytest.mark.parametrize(
    ("example", "data", "stages"),
    [
        ("claims", write_claims, ["parse", "adjudicate", "totals"]),
        ("transform", write_rides, ["convert", "partition"]),
        ("media", a_file, ["segment", "transcode", "join", "poster"]),
        ("sort", lambda folder: write_records(folder, size_bytes=1000), ["sort_part", "merge"]),
    ],
)
def test_each_job_file_passes_every_check(
    tmp_path: Path, example: str, data: Callable[[Path], object], stages: list[str]
) -> None:
    job = loaded(example, tmp_path, data)
    assert job.job.name == example
    assert [stage.name for stage in job.job.stages] == stages
    assert all(stage.timeout for stage in job.job.stages), "no example may hang"


def test_the_first_run_has_two_hundred_files(tmp_path: Path) -> None:
    assert len(loaded("claims", tmp_path, write_claims).files) == 200


def test_the_sorted_file_is_larger_than_the_memory_of_its_tasks(tmp_path: Path) -> None:
    """The test checks the default values, and does not need a large file."""
    job = loaded("sort", tmp_path, lambda folder: write_records(folder, size_bytes=1000)).job
    limits = [stage.resources.memory or 0 for stage in job.stages]
    default = (write_records.__kwdefaults__ or {})["size_bytes"]
    assert max(limits) < default


@pytest.mark.usefixtures("ffmpeg")
def test_poster_command_makes_a_picture_of_the_requested_height(tmp_path: Path) -> None:
    job = loaded("media", tmp_path, some_video)
    poster = tmp_path / "poster.png"
    values = {
        "{input}": str(job.files[0]),
        "{output:poster.png}": str(poster),
        "{params.height}": str(job.params["height"]),
    }
    command = list(job.job.stages[3].command or [])
    for placeholder, value in values.items():
        command = [word.replace(placeholder, value) for word in command]
    assert not any("{" in word for word in command)
    subprocess.run(command, check=True)
    assert poster.read_bytes()[16:24] == (240).to_bytes(4, "big") + (180).to_bytes(4, "big")
