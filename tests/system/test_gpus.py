"""GPUs of real worker processes. A test machine needs no GPU, because the pool declares the number of its GPUs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from batchlab import Grid
from batchlab.core.errors import UsageError
from batchlab.core.model import Pool
from batchlab.server.worker_service import gpu_names
from tests.support.grid.fixtures import Bring

POOL = Pool("default", 1, 1, slots=4, gpus=2)

WORK = """\
import json, os, signal, time
from pathlib import Path

AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")
FOLDER = Path({folder!r})

def train(item):
    began_s = time.time()
    mark = FOLDER / f"mark-{item}"
    if item % 3 == 0 and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 4:
        time.sleep(60)
    time.sleep(0.4)
    return {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "import": AT_IMPORT, "span": [began_s, time.time()]}

def plain(item):
    time.sleep(0.2)
    return {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "import": AT_IMPORT}
"""

JOB = """\
name: gpus
input: {files: items.jsonl, split: items}
failure: {max_failures: 1}
stages:
  - {name: train, python: "work:train", bundle: 1, timeout: 3s, resources: {gpus: 1}, retry: {attempts: 1}}
  - {name: plain, python: "work:plain", after: [], bundle: 2}
  - name: program
    after: []
    bundle: 1
    resources: {gpus: 2}
    command: [sh, -c, 'echo "$CUDA_VISIBLE_DEVICES"; sleep 0.2']
    stdout: gpus.txt
"""


def _overlap(spans: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    return [(a, b) for a, b in itertools.combinations(spans, 2) if a[0] < b[1] and b[0] < a[1]]


def test_each_gpu_of_a_worker_has_one_task(bring_up: Bring, tmp_path: Path) -> None:
    """Tasks that are killed or time out return their GPU, and tasks without GPUs see none."""
    grid = bring_up((POOL,))
    (tmp_path / "work.py").write_text(WORK.replace("{folder!r}", repr(str(tmp_path))))
    (tmp_path / "items.jsonl").write_text("".join(f"{n}\n" for n in range(10)))
    (tmp_path / "job.yaml").write_text(JOB)
    job = grid.submit(tmp_path / "job.yaml")["id"]
    grid.wait(job, until=lambda view: view["stages"][0]["running"] > 0)
    busy = 0
    while (view := grid.client.job(job))["ended_s"] is None:
        (pool,) = grid.client.grid()["pools"]
        busy = max([busy, *(instance["busy_gpus"] for instance in pool["instances"])])
    assert view["state"] == "SUCCEEDED", view["reason"]
    assert busy == 2
    results = grid.results(view, tmp_path / "out")
    train = results["train"]
    assert len(train) == 9, "task 4 exceeds its timeout"
    assert all(value["import"] == value["gpu"] for value in train)
    spans = {gpu: [value["span"] for value in train if value["gpu"] == gpu] for gpu in ("0", "1")}
    assert sum(map(len, spans.values())) == 9
    assert not any(map(_overlap, spans.values()))
    assert results["plain"] == [{"gpu": "", "import": ""}] * 10
    texts = [(tmp_path / "out" / path).read_text() for path in results["program"]]
    assert texts == ["0,1\n"] * 10


def test_the_python_api_asks_for_gpus(tmp_path: Path) -> None:
    def visible(_: int) -> str:
        import os
        import time

        time.sleep(0.1)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    with Grid("local", pools=[POOL], home=tmp_path / "home") as grid:
        assert set(grid.map(visible, range(4), gpus=2)) == {"0,1"}
        assert set(grid.map(visible, range(4), gpus=1, bundle=1)) == {"0", "1"}
        assert set(grid.map(visible, range(2))) == {""}
        with grid.executor(gpus=1) as executor:
            assert executor.submit(visible, 1).result() in ("0", "1")
        with pytest.raises(UsageError, match="asks for 3 GPUs per task, but an instance of pool 'default' has 2"):
            list(grid.map(visible, range(4), gpus=3))
        with pytest.raises(UsageError, match="gpus is -1"):
            grid.map(visible, [1], gpus=-1)


def test_instances_of_one_machine_do_not_share_gpus(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="several instances would use the same GPUs"):
        Grid("local", pools=[Pool("default", 0, 2, 4, gpus=1)], home=tmp_path / "home")


@pytest.mark.parametrize(
    ("gpus", "visible", "names"),
    [(2, None, ["0", "1"]), (2, "3,5", ["3", "5"]), (1, "GPU-8f, GPU-9a", ["GPU-8f"]), (0, "3", []), (0, None, [])],
)
def test_the_workers_own_variable_names_its_gpus(gpus: int, visible: str | None, names: list[str]) -> None:
    assert gpu_names(gpus, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == names


def test_a_worker_cannot_see_fewer_gpus_than_its_pool_declares() -> None:
    with pytest.raises(UsageError, match="names 1 GPU, and the worker's pool declares 2"):
        gpu_names(2, {"CUDA_VISIBLE_DEVICES": "7"})
