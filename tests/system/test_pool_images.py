"""Pools with container images of their own: two images in one job, each with a tool that only it has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from batchlab.runtime.compose_project import check_reference
from batchlab.runtime.home import Home
from batchlab.runtime.pool_images import inspect
from tests.support.docker.grid import need_containers
from tests.support.docker.pool_images import BASE_IMAGE, build_image, remove_images, two_images, write_job
from tests.support.grid.backends import command as batchlab
from tests.support.waiting import until


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    need_containers(tmp_path_factory.mktemp("doctor"))
    made = two_images("batchlab-tests")
    yield made
    remove_images(*made)


PLAIN = """\
  - name: copy
    command: [cp, "{input}", "{output:here.txt}"]
"""


def kill_the_manager_and_start_it_again(home: Path, images: tuple[str, str]) -> None:
    """The next manager adopts the containers of a killed manager, or removes them."""
    record = Home(home).record()
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    until(lambda: Home(home).record() is None, 10.0)
    batchlab("grid", "up", "--home", home, "--pool", "default:0-1x1", *pools(images))
    batchlab("grid", "scale", "cutters", "--desired", "1", "--home", home)

    def serves() -> bool:
        return any(
            one["pool"] == "cutters" and one["state"] == "InService" and one["worker"] for one in workers_of(home)
        )

    until(serves, 60.0, pause_s=1.0)


def workers_of(home: Path) -> list[dict[str, Any]]:
    """Return the instances of the grid, as `grid workers` shows them."""
    found: list[dict[str, Any]] = json.loads(batchlab("grid", "workers", "--json", "--home", home)[0])
    return found


def pools(images: tuple[str, str]) -> list[str]:
    return ["--pool", f"cutters:0-2x1,image={images[0]}", "--pool", f"joiners:0-2x1,image={images[1]}"]


def check_results(out: Path) -> None:
    """The last stage has joined the lines that the first stage has cut."""
    joined = sorted(path.read_text() for path in out.rglob("joined.txt"))
    assert joined == ["abc+ghi+"] * 3


def test_stages_of_one_job_run_in_two_images_on_localstack(tmp_path: Path, images: tuple[str, str]) -> None:
    home, job = tmp_path / "home", write_job(tmp_path / "job")
    batchlab("grid", "up", "--backend", "localstack", "--home", home, *pools(images))
    try:
        batchlab("run", job, "--home", home, "--backend", "localstack", "--out", tmp_path / "out")
        check_results(tmp_path / "out")
        ids = {image: inspect(image, "a test", print)["Id"] for image in images}
        grid = json.loads(batchlab("grid", "status", "--json", "--home", home)[0])
        shown = {pool["name"]: pool["image"] for pool in grid["pools"]}
        assert shown == {"cutters": f"{images[0]}@{ids[images[0]]}", "joiners": f"{images[1]}@{ids[images[1]]}"}
        workers = workers_of(home)
        assert {(one["pool"], one["image"]) for one in workers} <= set(shown.items())
        assert workers
    finally:
        batchlab("grid", "down", "--home", home)


def test_stages_of_one_job_run_in_two_images_on_local(tmp_path: Path, images: tuple[str, str]) -> None:
    """The instances of a pool with an image are containers, and the instances of other pools are processes."""
    home, job = tmp_path / "home", write_job(tmp_path / "job")
    job.write_text(job.read_text() + PLAIN)
    label = f"label=batchlab.home={home}"
    batchlab("grid", "up", "--home", home, "--pool", "default:0-1x1", *pools(images))
    try:
        batchlab("run", job, "--home", home, "--out", tmp_path / "out")
        assert [path.read_text() for path in (tmp_path / "out").rglob("here.txt")] == ["abc+ghi+"] * 3
        batchlab("gc")
        assert len(check_reference("ps", "-q", "--filter", label).split()) >= 1
        shown = {one["pool"]: one["image"] for one in workers_of(home)}
        assert shown["default"] == ""
        assert shown["joiners"].startswith(f"{images[1]}@sha256:")
        kill_the_manager_and_start_it_again(home, images)
    finally:
        batchlab("grid", "down", "--home", home)
    assert not check_reference("ps", "-aq", "--filter", label).split()


FAILING = """\
name: fails

input:
  files: data/*.txt
  split: file

stages:
  - name: cut
    pool: cutters
    command: [cut-tool, "{input}", "{output:cut.txt}", more]
    retry: 1
  - name: eat
    pool: cutters
    python: handlers:eat
    resources: {memory: 128 MiB}
    after: []
    retry: 1
  - name: count
    pool: cutters
    python: handlers:count
    after: []
    retry: 1
"""
HANDLERS = """\
import os
import shutil


def eat(ctx, item):
    everything = [bytearray(1 << 20) for _ in range(1 << 12)]
    return len(everything)


def count(ctx, item):
    tool = shutil.which("cut-tool")
    raise ValueError(tool)
"""


def test_task_is_replayed_in_the_image_of_its_worker(tmp_path: Path) -> None:
    need_containers(tmp_path)
    image = build_image("batchlab-tests/failing:1", {"cut-tool": 'echo "$TOOL_HOME $3" >&2; exit 7'})
    home, job = tmp_path / "home", write_job(tmp_path / "job")
    job.write_text(FAILING)
    (job.parent / "handlers.py").write_text(HANDLERS)
    (job.parent / "data" / "0.txt").rename(job.parent / "data" / "only.txt")
    for number in (1, 2):
        (job.parent / "data" / f"{number}.txt").unlink()
    batchlab("grid", "up", "--home", home, "--pool", f"cutters:0-2x1,image={image}")
    try:
        batchlab("run", job, "--home", home, "--out", tmp_path / "out", code=1)

        def replayed(
            task: str, *options: str, env: Mapping[str, str] = MappingProxyType({})
        ) -> tuple[dict[str, Any], str]:
            arguments = ("job", "replay-task", "last", task, "--home", home, "--json", *options)
            out, said = batchlab(*arguments, env=env, code=1)
            return json.loads(out), said

        reference = f"{image}@{inspect(image, 'a test', print)['Id']}"
        shown = json.loads(batchlab("job", "show", "last", "cut/0", "--json", "--home", home)[0])
        assert [attempt["image"] for attempt in shown["attempts"]] == [reference]
        assert shown["attempts"][0]["environment"]["image"] == reference
        for task in ("cut/0", "eat/0", "count/0"):
            found, said = replayed(task)
            assert (found["verdict"], found["image"]) == ("same", reference), (found, said)
            assert found["differences"] == [], task
        assert "/opt/tools more" in replayed("cut/0")[1]
        found, _ = replayed("cut/0", "--no-image")
        assert (found["verdict"], found["image"]) == ("different", None)
        found, said = replayed("cut/0", env={"DOCKER_HOST": f"unix://{tmp_path}/no.sock"})
        assert found["image"] is None
        assert (
            "The task runs without the image of its worker. The image of task cut/0 needs Docker, and Docker does"
            in said
        )
        found, said = replayed("count/0", "--image", BASE_IMAGE)
        assert found["image"].startswith(f"{BASE_IMAGE}@sha256:")
        assert f"The worker ran from the image {reference}." in found["differences"]
        assert "ValueError: None" in said
        pdb = subprocess.run(
            [sys.executable, "-m", "batchlab", "job", "replay-task", "last", "count/0", "--home", str(home), "--debug"],
            input="p tool\nq\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert "'/opt/tools/cut-tool'" in pdb.stdout, pdb.stderr
        left = check_reference("ps", "-aq", "--filter", "name=batchlab-replay-")
        assert not left.split()
    finally:
        batchlab("grid", "down", "--home", home)
        remove_images(image)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("lines", "reason", "code"),
    [
        ((), "is not on this machine and cannot be pulled", 3),
        (("RUN rm -f /usr/bin/python3*",), "cannot run a worker.", 2),
    ],
)
def test_unsuitable_image_is_one_error_before_the_grid_starts(
    tmp_path: Path, lines: tuple[str, ...], reason: str, code: int
) -> None:
    name = "127.0.0.1:1/batchlab-tests/absent:1"
    if lines:
        name = build_image("batchlab-tests/bare:1", {}, *lines)
    home = tmp_path / "home"
    pool = f"cutters:0-2x1,image={name}"
    _, said = batchlab("grid", "up", "--backend", "localstack", "--home", home, "--pool", pool, code=code)
    assert f"Error: The image {name} of pool cutters {reason}" in " ".join(said.split())
    assert "Traceback" not in said
    assert not check_reference("ps", "-aq", "--filter", f"label=batchlab.home={home}").split()


def test_backend_without_images_refuses_the_pool(tmp_path: Path) -> None:
    pool = "cutters:0-2x1,image=tools:1"
    _, said = batchlab("grid", "up", "--backend", "ministack", "--home", tmp_path / "home", "--pool", pool, code=2)
    assert "The pool 'cutters' has an image, which the backend ministack does not support." in " ".join(said.split())
