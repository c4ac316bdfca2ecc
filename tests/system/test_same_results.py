"""The results of the example jobs, which are equal on every backend: simulated, local, in containers, and on AWS."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pytest

from batchlab.core.ports import MAX_MESSAGE_BYTES
from batchlab.runtime import compose_deployment
from batchlab.runtime.compose_project import check_reference
from batchlab.runtime.home import Home
from examples.example_data import write_claims, write_records
from tests.support import ROOT
from tests.support.aws.custom_image import own_image
from tests.support.aws.instance_boot import instance_release
from tests.support.grid import backends as worlds
from tests.support.grid.backends import World
from tests.support.grid.tour import schedules_outlive_the_manager, tour
from tests.support.waiting import until

__all__ = ["own_image"]

EXAMPLES = ROOT / "examples"
_OURS = {"summary.json", "printed.log", ".batchlab-made", "report-data"}
"""Files about the run, which are not results."""


def _claims(folder: Path, _: Path) -> None:
    write_claims(folder, seed=5, files=12, claims_per_file=10)
    # The definition is larger than the maximum size of an SQS message.
    file = folder.parent / "job.yaml"
    file.write_text(f"{file.read_text()}\nparams:\n  note: {'x' * (MAX_MESSAGE_BYTES + 1)}\n")


def _sort(folder: Path, _: Path) -> None:
    write_records(folder, seed=3, size_bytes=16 * 1024 * 1024)


def _transform(folder: Path, shared: Path) -> None:
    shutil.copy(shared / "transform" / "taxis.csv", folder)


def _media(folder: Path, shared: Path) -> None:
    shutil.copy(shared / "media" / "bigbuckbunny.mp4", folder)


FILL: dict[str, Callable[[Path, Path], None]] = {
    "claims": _claims,
    "sort": _sort,
    "transform": _transform,
    "media": _media,
}


def content(path: Path) -> object:
    """Return the content of a result file, independent of its packing."""
    if path.suffix == ".mp4":
        decoded = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "framemd5", "-"]
        return subprocess.run(decoded, capture_output=True, check=True).stdout
    if path.suffix == ".parquet":
        with duckdb.connect() as db:
            return db.execute(f"SELECT * FROM read_parquet('{path}')").fetchall()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _OURS.intersection(path.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> dict[str, Path]:
    """Write the examples' job files with little data."""
    made = {}
    for name, fill in FILL.items():
        job = tmp_path_factory.mktemp(name) / name
        shutil.copytree(EXAMPLES / name, job, ignore=shutil.ignore_patterns("data"))
        (job / "data").mkdir()
        fill(job / "data", shared_data)
        made[name] = job / "job.yaml"
    return made


@pytest.fixture(scope="module")
def expected(
    jobs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ffmpeg: None
) -> dict[str, dict[str, object]]:
    """Return the results of the examples on `local`."""
    found = {}
    with worlds.plain("local", tmp_path_factory.mktemp("local")) as world:
        for name, job in jobs.items():
            out = tmp_path_factory.mktemp("out") / name
            world.run(job, out)
            found[name] = contents(out)
            assert any(path.endswith(".jsonl") for path in found[name])
    return found


WORLDS: dict[str, Callable[..., AbstractContextManager[World]]] = {
    "sim": partial(worlds.plain, "sim"),
    "localstack": worlds.localstack,
    "emulated": worlds.emulated,
    "aws": worlds.real,
}


@pytest.mark.parametrize("backend", ["sim", "localstack", "emulated", pytest.param("aws", marks=pytest.mark.aws)])
def test_examples_give_the_same_results_on_every_backend(
    backend: str,
    jobs: dict[str, Path],
    expected: dict[str, dict[str, object]],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The backend is an option of the command, and the job files and their code are the same. The questions of the tour
    have the same answers as on a laptop."""
    needs: dict[str, Any] = {}
    if backend == "emulated":
        # test_boot.py tests the installation of a release on an image without one.
        needs["archive"] = instance_release(tmp_path_factory)
        needs["image"] = request.getfixturevalue("own_image")
    with WORLDS[backend](tmp_path, **needs) as world:
        for name, job in jobs.items():
            # Amazon Linux does not have ffmpeg, which a custom image provides on AWS.
            if name != "media" or world.has_ffmpeg:
                world.run(job, tmp_path / "out" / name)
                assert contents(tmp_path / "out" / name) == expected[name], name
        if world.backend == "localstack":
            another = partial(another_manager, Home(world.home))
            tour(world, tmp_path / "tour", monkeypatch, meanwhile=another)
            schedules_outlive_the_manager(world, tmp_path, another)
        if world.backend == "aws":
            tour(world, tmp_path / "tour", monkeypatch)
            world.batchlab("grid", "down")
            a_dead_instance_costs_only_time(world, jobs["claims"], tmp_path / "again")
            assert contents(tmp_path / "again") == expected["claims"]


def another_manager(home: Home) -> None:
    """Start another manager in the same container, without time for the first one to end."""
    at, before = compose_deployment.read(home), home.record()
    assert at
    check_reference("restart", "--time", "0", f"{at.project}-manager-1")
    until(lambda: (home.record() or before) != before, 60, pause_s=0.2)


def a_dead_instance_costs_only_time(world: World, job: Path, out: Path) -> None:
    """End one instance under its worker while the job runs."""
    stop = threading.Event()
    ended: list[str] = []
    ending = threading.Thread(target=end_one, args=(world, stop, ended))
    ending.start()
    try:
        world.run(job, out)
    finally:
        stop.set()
        ending.join()
    assert ended


def end_one(world: World, stop: threading.Event, ended: list[str]) -> None:
    """End an instance of the pool, once one is in service."""
    scaling = world.aws("autoscaling")
    prefix = json.loads((world.home / "aws" / "deployment.json").read_text())["prefix"]
    while not stop.wait(0.5) and not ended:
        groups = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[f"{prefix}pool-default"])[
            "AutoScalingGroups"
        ]
        for group in groups[0]["Instances"]:
            if group["LifecycleState"] == "InService" and not ended:
                scaling.terminate_instance_in_auto_scaling_group(
                    InstanceId=group["InstanceId"], ShouldDecrementDesiredCapacity=False
                )
                ended.append(group["InstanceId"])
