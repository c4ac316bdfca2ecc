"""One bad task in a job of 100 tasks, which gives 99 results and one FAILED task with a clear reason (I7)."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.core.errors import JobFileError
from batchlab.jobs.job_file import load
from tests.support.grid.fixtures import Bring
from tests.system.test_examples_end_to_end import TWO

HANDLERS = """
import os, signal, sys, time

def crash(item):
    if item == 41:
        os.kill(os.getpid(), signal.SIGSEGV)
    return item

def hang(item):
    while item == 41:
        time.sleep(0.01)
    return item

def hog(item):
    kept = []
    while item == 41:
        kept.append(bytearray(8 << 20))
        time.sleep(0.002)
    return item

def lacking(item):
    if item == 41:
        import a_module_that_is_not_there
    return item

def odd(item):
    return object() if item == 41 else item
"""


def job_file(folder: Path, handler: str, extra: str = "") -> Path:
    folder.mkdir()
    (folder / "bad.py").write_text(HANDLERS)
    (folder / "items.jsonl").write_text("\n".join(str(i) for i in range(100)))
    path = folder / "job.yaml"
    path.write_text(
        "name: bad\n"
        "input: {files: items.jsonl, split: items}\n"
        "stages:\n"
        f"  - name: work\n    python: bad:{handler}\n    retry: 1\n{extra}"
    )
    return path


@pytest.mark.parametrize(
    ("handler", "extra", "kind", "said"),
    [
        ("crash", "", "crash", "SIGSEGV"),
        ("hang", "    timeout: 1s\n", "timeout", "timeout of 1 s"),
        ("hog", "    resources: {memory: 128 MiB}\n", "memory", "memory limit of 128 MiB"),
        ("lacking", "", "exception", "a_module_that_is_not_there"),
        ("odd", "", "result", "object"),
    ],
)
def test_one_bad_task_of_a_hundred(
    bring_up: Bring, tmp_path: Path, handler: str, extra: str, kind: str, said: str
) -> None:
    grid = bring_up(TWO)
    view = grid.run(job_file(tmp_path / "job", handler, extra))
    assert view["state"] == "FAILED"
    (stage,) = view["stages"]
    assert (stage["succeeded"], stage["failed"]) == (99, 1)
    (failure,) = grid.client.failures(view["id"])
    assert (failure["task"], failure["kind"]) == (41, kind)
    assert said in failure["reason"]
    assert said in view["reason"]
    values = grid.results(view, tmp_path / "out")["work"]
    assert values == [i for i in range(100) if i != 41]


def test_retry_runs_again_only_what_failed(bring_up: Bring, tmp_path: Path) -> None:
    """A job with some failed tasks must not run completely again."""
    folder = tmp_path / "job"
    path = job_file(folder, "gate")
    gate = tmp_path / "open"
    (folder / "bad.py").write_text(
        "import pathlib\n"
        "def gate(item):\n"
        f"    with open({str(tmp_path / 'starts')!r}, 'a') as log: log.write(f'{{item}}\\n')\n"
        f"    if item % 10 == 3 and not pathlib.Path({str(gate)!r}).exists():\n"
        "        raise RuntimeError('the gate is shut')\n"
        "    return item\n"
    )
    grid = bring_up(TWO)
    view = grid.run(path)
    assert view["state"] == "FAILED"
    assert "the gate is shut" in view["reason"]
    gate.touch()
    view = grid.wait(grid.client.retry(view["id"])["id"])
    assert view["state"] == "SUCCEEDED", view["reason"]
    assert grid.results(view, tmp_path / "out")["work"] == list(range(100))
    assert len((tmp_path / "starts").read_text().split()) == 110


def test_missing_handler_is_refused_before_any_message(tmp_path: Path) -> None:
    path = job_file(tmp_path / "job", "crash")
    path.write_text(path.read_text().replace("bad:crash", "bad:absent"))
    with pytest.raises(JobFileError, match="absent"):
        load(path, {})


def test_cancel_pause_and_resume(bring_up: Bring, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    path = job_file(folder, "slow")
    # The job takes far longer than a busy machine needs to send the requests below.
    (folder / "bad.py").write_text("import time\ndef slow(item):\n    time.sleep(0.3)\n    return item\n")
    grid = bring_up(TWO)
    job = grid.submit(path)["id"]
    grid.wait(job, until=lambda v: v["stages"][0]["succeeded"] > 5)
    assert grid.client.pause(job)["state"] == "PAUSED"
    quiet = grid.wait(job, until=lambda v: not v["stages"][0]["running"])
    held = quiet["stages"][0]["succeeded"]
    assert held < 100
    assert "paused" in grid.client.why(job)
    grid.client.resume(job)
    grid.wait(job, until=lambda v: v["stages"][0]["succeeded"] > held + 5)
    grid.client.cancel(job)
    view = grid.wait(job)
    assert view["state"] == "CANCELLED"
    (stage,) = view["stages"]
    assert stage["succeeded"] + stage["cancelled"] == stage["planned"] == 100
    assert stage["cancelled"] > 0
