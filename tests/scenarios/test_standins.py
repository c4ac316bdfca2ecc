"""Stand-ins, which follow the times, failures, and deaths of the scenario exactly."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.model import TaskSet
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.distributions import Constant, Lognormal
from batchlab.scenarios.model.values import Job, JobTemplate, StageTemplate
from batchlab.scenarios.replay.jobs import JobPreparer, declared_s, job_items, stage_def, stage_parameters
from batchlab.scenarios.replay.standin import standins
from tests.support.scenarios.replay import claims, stage

LATE_S = 0.25
"""The time that a busy machine may add to a measured time."""


@dataclass
class Ctx:
    stage: str
    params: dict[str, Any]
    scratch: Path = Path()
    task: int = 0
    attempt: int = 1


def shape(kind: str = "sleep", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "hold": None, "passes": [], "groups": {}, **more}


def run(item: Any, stage_: str, shapes: dict[str, Any], **more: Any) -> tuple[Any, float]:
    begun_s = time.monotonic()
    value = standins.work(item, Ctx(stage_, {"stages": shapes}, **more))
    return value, time.monotonic() - begun_s


@pytest.mark.parametrize("kind", ["sleep", "cpu", "memory", "io"])
def test_each_kind_takes_its_time(kind: str, tmp_path: Path) -> None:
    item = {"t": {"work": [0.3, [], False]}}
    _, took_s = run(item, "work", {"work": shape(kind, hold=1 << 20)}, scratch=tmp_path)
    assert 0.3 <= took_s < 0.3 + LATE_S


@pytest.mark.skipif(sys.platform != "linux", reason="/proc has the peak of the memory since the start of the program")
def test_cpu_is_used_and_memory_is_held_and_disk_is_written(tmp_path: Path) -> None:
    item = {"t": {"work": [0.4, [], False]}}
    before_s = time.process_time()
    run(item, "work", {"work": shape("cpu")})
    used_s = time.process_time() - before_s
    before_s = time.process_time()
    run(item, "work", {"work": shape("sleep")})
    # The core may be shared, but the used time must clearly be more than zero.
    assert used_s > 10 * (time.process_time() - before_s)
    code = (
        "import json, re, sys; sys.path.insert(0, sys.argv[1]); import standins; "
        "from types import SimpleNamespace as N; "
        "ctx = N(stage='w', task=0, attempt=1, params=json.loads(sys.argv[2])); "
        "most = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); "
        "before = most(); "
        "standins.work({'t': {'w': [0.5, [], False]}}, ctx); "
        "print(most() - before)"
    )
    told = json.dumps({"stages": {"w": shape("memory", hold=48 << 20)}})
    folder = str(Path(standins.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder, told], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40 * 1024, "in KiB"
    run(item, "work", {"work": shape("io")}, scratch=tmp_path)
    assert 0 < (tmp_path / "written").stat().st_size <= standins.FILE_BYTES


def test_an_attempt_fails_when_its_time_is_over() -> None:
    item = {"t": {"work": [0.1, [1, 3], False]}}
    begun_s = time.monotonic()
    with pytest.raises(standins.ScenarioFailure, match="attempt 1 fails"):
        run(item, "work", {"work": shape()})
    assert time.monotonic() - begun_s >= 0.1
    assert run(item, "work", {"work": shape()}, attempt=2)[0] is None


def test_poison_kills_the_worker_and_not_the_task_alone(tmp_path: Path) -> None:
    """The worker is a shell with the task's process as its child, and both must end."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import standins; "
        "from types import SimpleNamespace as N; "
        "standins.work({'t': {'w': [0.2, [], True]}}, N(stage='w', task=0, attempt=1, "
        "params={'stages': {'w': {'kind': 'sleep', 'passes': [], 'groups': {}}}}))"
    )
    worker = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]); "
        "print(p.pid, flush=True); p.wait()"
    )
    begun_s = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", worker, code, str(Path(standins.__file__).parent)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        task = int(process.stdout.readline())
        assert process.wait(20) == -9
    assert time.monotonic() - begun_s >= 0.1, "it dies in the middle of its time"
    os.kill(task, 9)  # the task's own worker would do the same


def test_a_jobs_items_carry_what_the_scenario_draws_through_every_kind_of_stage() -> None:
    template = claims()
    job = Job(4, "j", template, 0.0, 12)
    items, shapes = list(job_items(7, job)), stage_parameters(7, job)
    parse, price = template.stages[:2]
    for task, item in enumerate(items):
        assert set(item["t"]) == {"parse", "price"}, "a gather's own are in the parameters"
        for one in (parse, price):
            seconds = expansion.task_s(7, job, one, task)
            assert item["t"][one.name] == [pytest.approx(seconds, abs=1e-6), [], False]
    assert expansion.stage_sizes(template, 12) == {"parse": 12, "price": 12, "by": 3, "sum": 1, "last": 1}
    assert [set(shape) for shape in shapes["by"]["tasks"]] == [{"by"}] * 3
    assert [set(shape) for shape in shapes["sum"]["tasks"]] == [{"sum", "last"}]
    assert shapes["price"]["groups"] == {"group_by": 3}
    assert shapes["parse"]["passes"] == ["price"]
    assert declared_s(7, job, "parse", TaskSet.span(0, 12)) == pytest.approx(
        {task: item["t"]["parse"][0] for task, item in enumerate(items)}, abs=1e-5
    )
    assert declared_s(7, job, "no such", TaskSet.span(0, 1)) == {}


def test_results_hand_on_what_the_next_stages_need_and_nothing_else() -> None:
    quick = claims(4)
    quick = JobTemplate(
        quick.name,
        tuple(
            StageTemplate(stage.name, Constant(0.0), stage.after, stage.gather, stage.groups) for stage in quick.stages
        ),
        quick.tasks,
    )
    job = Job(0, "j", quick, 0.0, 4)
    shapes = stage_parameters(1, job)
    items = list(job_items(1, job))
    parsed = [run(item, "parse", shapes, task=n)[0] for n, item in enumerate(items)]
    assert [set(one["t"]) for one in parsed] == [{"price"}] * 4
    priced = [run(item, "price", shapes, task=n)[0] for n, item in enumerate(parsed)]
    assert [one["group_by"] for one in priced] == ["000000", "000001", "000002", "000000"]
    assert [set(one) for one in priced] == [{"group_by"}] * 4
    assert run(priced, "by", shapes)[0] is None
    summed = run([None], "sum", shapes)[0]
    assert set(summed["t"]) == {"last"}
    assert run(summed, "last", shapes)[0] is None


def test_a_join_finds_its_times_in_any_of_its_inputs() -> None:
    template = JobTemplate(
        "join",
        (
            stage("a", 0.0),
            stage("b", 0.0, after=("a",)),
            stage("c", 0.0, after=("a",)),
            stage("d", 0.0, after=("b", "c")),
            stage("e", 0.0, after=("d",)),
        ),
        Constant(3),
    )
    job = Job(0, "j", template, 0.0, 3)
    shapes = stage_parameters(1, job)
    for task, item in enumerate(job_items(1, job)):
        a = run(item, "a", shapes, task=task)[0]
        b, c = (run(a, name, shapes, task=task)[0] for name in ("b", "c"))
        d = run({"b": b, "c": c}, "d", shapes, task=task)[0]
        assert run(d, "e", shapes, task=task)[0] is None


def test_failures_and_deaths_are_drawn_as_the_simulator_draws_them() -> None:
    frail = StageTemplate("work", Lognormal(1.0, 0.5), fails=0.4, poison=2)
    job = Job(3, "j", JobTemplate("frail", (frail,), Constant(50)), 0.0, 50)
    for task, item in enumerate(job_items(9, job)):
        _, failing, kills = item["t"]["work"]
        assert failing == [n for n in (1, 2, 3) if expansion.attempt_fails(9, job, frail, task, n)]
        assert kills == (task < 2)


@pytest.mark.parametrize(("wanted", "found"), [(0, (5.0, True)), (3, (3, False))], ids=["the file's", "the scenario's"])
def test_real_work_survives_the_configured_failures(wanted: int, found: tuple[float, bool], tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("def work(item):\n    return item\n")
    (tmp_path / "items.jsonl").write_text("1\n2\n")
    (tmp_path / "job.yaml").write_text(
        "name: real\ninput: {files: items.jsonl, split: items}\n"
        "stages: [{name: work, python: work:work}]\nfailure: {max_failures: 5%}\n"
    )
    backend, home = factory.load("local"), Home(tmp_path / "home")
    preparer = JobPreparer(
        scenario="s",
        seed=1,
        run="r",
        objects=backend.open_objects(home),
        clock=backend.open_clock(),
        patience=factory.patience(),
    )
    one = JobTemplate("real", (stage("work", 1.0),), Constant(2), max_failures=wanted, file=tmp_path / "job.yaml")
    ready = asyncio.run(preparer.prepare(Job(0, "j", one, 0.0, 2)))
    assert (ready.job.max_failures, ready.job.max_failures_percent) == found


def test_stage_keeps_its_scheduling_properties() -> None:
    one = stage_def(stage("by", 1.0, gather="key", groups=3, after=("a",), slots=2, bundle=5, pool="big"))
    assert (one.gather, one.after, one.slots, one.bundle, one.pool) == ("group_by", ("a",), 2, 5, "big")
    assert stage_def(stage("sum", 1.0, gather="*", after=("a",))).gather == "*"
