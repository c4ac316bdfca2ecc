"""The run that a command means, the grid that it gets, and its final output."""

from __future__ import annotations

import asyncio
import random
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from batchlab.adapters.memory.objects import SimObjects
from batchlab.cli import option_values, output, progress, run_job, session, submission
from batchlab.cli.session import Session
from batchlab.client.http import Client
from batchlab.core.api_types import GridView
from batchlab.core.errors import BackendError, Refused, Unreachable, UsageError
from batchlab.core.installation import starter
from batchlab.core.model import ENDED, JobState, Pool
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import json_format, object_keys
from batchlab.jobs.job_file import JobFile, load
from batchlab.runtime import compose_deployment, descriptor, factory
from batchlab.runtime.compose_deployment import Deployment
from batchlab.runtime.home import Home, ManagerRecord
from tests.support.cli import a_grid, view

# --- Selection of a run --------------------------------------------------------------------------


def put(objects: SimObjects, key: str, doc: dict[str, Any] | None = None) -> None:
    asyncio.run(objects.put(key, json_format.to_bytes({"v": json_format.VERSION, **(doc or {})})))


def latest(objects: SimObjects) -> submission.EarlierRun | None:
    return asyncio.run(submission.find_latest_run(objects, "sums", "f1", Patience(random.Random(1))))


def test_runs_of_one_source_digest_are_counted_in_the_bucket() -> None:
    """The runs are counted without a manager, so a run is found even if its first command was interrupted."""
    objects = SimObjects()
    assert latest(objects) is None
    first = object_keys.job_id("sums", "f1")
    put(objects, object_keys.spec(first))
    assert latest(objects) == submission.EarlierRun(1, first, None)
    put(objects, object_keys.final(first, 0), {"state": "FAILED"})
    assert latest(objects) == submission.EarlierRun(1, first, JobState.FAILED)
    put(objects, object_keys.retry(first, 1))
    assert latest(objects) == submission.EarlierRun(1, first, None)
    put(objects, object_keys.final(first, 1), {"state": "SUCCEEDED"})
    assert latest(objects) == submission.EarlierRun(1, first, JobState.SUCCEEDED)
    second = object_keys.job_id("sums", "f1#2")
    put(objects, object_keys.spec(second))
    assert latest(objects) == submission.EarlierRun(2, second, None)


def a_run(ended: JobState | None) -> submission.EarlierRun:
    return submission.EarlierRun(3, object_keys.job_id("sums", "f1#3"), ended)


@pytest.mark.parametrize("ended", [None, *sorted(ENDED)])
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_run_that_resume_continues(ended: JobState | None, resume: bool, cache: bool) -> None:
    failed = ended in (JobState.FAILED, JobState.CANCELLED)
    refused = (resume and failed) or (not resume and ended is None)
    if refused:
        with pytest.raises(Refused) as error:
            run_job.choose(a_run(ended), resume=resume, cache=cache)
        assert ("job retry" if failed else "--resume") in error.value.remedy
        assert a_run(ended).job in str(error.value)
        return
    same = resume or (cache and ended is JobState.SUCCEEDED)
    assert run_job.choose(a_run(ended), resume=resume, cache=cache) == (3 if same else 4)


def test_the_first_run_needs_no_earlier_one() -> None:
    for flag in (True, False):
        assert run_job.choose(None, resume=flag, cache=flag) == 1


def test_suggested_resume_command_repeats_the_given_one() -> None:
    given = ["run", "my job.yaml", "--set", "a=b c", "--debug"]
    once = option_values.resume_command(given)
    assert once == "batchlab run 'my job.yaml' --set 'a=b c' --resume"
    assert option_values.resume_command(shlex.split(once)[1:]) == once


# --- Selection of a grid -------------------------------------------------------------------------


@pytest.fixture
def jobfile(tmp_path: Path) -> JobFile:
    for name, text in starter().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return load(tmp_path / "job.yaml")


def edited(jobfile: JobFile, before: str, after: str) -> JobFile:
    text = jobfile.path.read_text()
    assert before in text
    jobfile.path.write_text(text.replace(before, after))
    return load(jobfile.path)


def test_a_job_without_wishes_gets_the_backends_own_pools(jobfile: JobFile) -> None:
    assert run_job.pools_for(factory.load("local"), jobfile) == ()


def test_grid_has_every_pool_and_slot_of_the_job(jobfile: JobFile) -> None:
    """A stage whose pool does not exist would wait forever."""
    wish = "timeout: 1m\n    pool: big\n    resources: {slots: 4}\n    retry: 3"
    jobfile = edited(jobfile, "timeout: 1m\n    retry: 3", wish)
    backend = factory.load("local")
    own = backend.pools[0]
    assert run_job.pools_for(backend, jobfile) == (own, Pool("big", 0, own.max_size, 4))


def test_workers_bounds_every_pool(jobfile: JobFile) -> None:
    backend = factory.load("local")
    busy = replace(backend, pools=(Pool("default", 2, 8, 1),))
    assert run_job.pools_for(busy, jobfile, 1) == (Pool("default", 1, 1, 1),)


IMAGE = f"registry.example:5000/team/tools:1@sha256:{'0' * 64}"


@pytest.mark.parametrize("text", ["default:0-4x1", "big-1:2-2x16", "gpu:0-4x8,gpus=2", f"tools:0-1x1,image={IMAGE}"])
def test_a_pool_reads_as_it_is_written(text: str) -> None:
    assert descriptor.pool_option(option_values.parse_pool(text)) == text


def test_image_of_a_pool_is_not_an_instance_type() -> None:
    pool, types = option_values.parse_typed_pool(f"tools:0-1x1@m7i.large,m6i.large,image={IMAGE}")
    assert (pool.image, types) == (IMAGE, ("m7i.large", "m6i.large"))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("image=", "is not the name of a container image"),
        ("image=-v", "is not the name of a container image"),
        ("image=a b", "is not the name of a container image"),
        ("image=a@sha256:1", "is not the name of a container image"),
        ("imagine=a", "unknown or given twice"),
        ("image=a,image=b", "unknown or given twice"),
    ],
)
def test_mistake_in_a_pools_option_is_refused(option: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        option_values.parse_pool(f"tools:0-1x1,{option}")


@pytest.mark.parametrize(
    "text", ["default", "default:4", "default:4-2x1", "default:0-4x0", "Default:0-4x1", "a:0-4x1 "]
)
def test_invalid_pool_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="default:0-4x1"):
        option_values.parse_pool(text)


@pytest.mark.parametrize("text", ["a:0-4x1,gpus=17", "a:0-4x1,gpus=x", "a:0-4x1,gpus=1,gpus=2", "a:0-4x1,tpus=1"])
def test_an_invalid_option_of_a_pool_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"has gpus=|has the option"):
        option_values.parse_pool(text)


def test_a_pool_has_instance_types_and_options() -> None:
    pool, types = option_values.parse_typed_pool("a:0-4x8@g5.xlarge,g6.xlarge,gpus=1")
    assert (pool, types) == (Pool("a", 0, 4, 8, gpus=1), ("g5.xlarge", "g6.xlarge"))


def test_a_pool_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="given twice"):
        option_values.parse_pools(["a:0-1x1", "a:0-2x1"])


# --- A dying manager -----------------------------------------------------------------------------


class Managers:
    """Fake managers, each of which dies after a number of answers."""

    def __init__(self, home: Home, lives: list[int]) -> None:
        self.home = home
        self.lives = lives
        self.started = self.stopped = 0
        self.options: list[dict[str, Any]] = []
        self.backend = "local"
        self.is_ours = True
        """Whether this process owns the next started manager."""

    def start(self, *_: object, **options: Any) -> ManagerRecord:
        self.options.append(options)
        self.started += 1
        found = self.record()
        assert found
        return found

    def record(self) -> ManagerRecord | None:
        alive = self.started and self.lives[self.started - 1] > 0
        return ManagerRecord(f"http://{self.started}", 1, "m", self.backend) if alive else None

    def has_started(self, home: Home, record: ManagerRecord | None) -> bool:
        return bool(record and self.options) and self.is_ours

    def stop(self, *_: object) -> bool:
        self.stopped += 1
        return True

    def answer(self) -> str:
        if not self.lives[self.started - 1]:
            raise Unreachable("Connection refused.")
        self.lives[self.started - 1] -= 1
        return "answer"


@pytest.fixture
def managers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], Managers]:
    def make(lives: list[int]) -> Managers:
        made = Managers(Home(tmp_path), lives)
        monkeypatch.setattr("batchlab.runtime.manager_process.start_manager", made.start)
        monkeypatch.setattr("batchlab.runtime.manager_process.stop_manager", made.stop)
        monkeypatch.setattr("batchlab.runtime.manager_process.has_started", made.has_started)
        monkeypatch.setattr(Client, "grid", lambda _: a_grid())
        monkeypatch.setattr(Home, "record", lambda _: made.record())
        return made

    return make


def test_dead_manager_is_replaced_and_the_request_repeated(managers: Callable[[list[int]], Managers]) -> None:
    made = managers([1, 1, 3])
    with Session(made.home, factory.load("local")) as grid:
        grid.start()
        assert [grid.call(lambda _: made.answer()) for _ in range(4)] == ["answer"] * 4
    assert (made.started, made.stopped) == (3, 1)
    assert all(option["parent"] for option in made.options), "each must end with the command"


def test_managers_that_keep_dying_are_given_up_with_exit_code_three(managers: Callable[[list[int]], Managers]) -> None:
    made = managers([1] * 10)
    grid = Session(made.home, factory.load("local"))
    with grid:
        grid.start()
        for _ in range(1 + session.MAX_MANAGER_RESTARTS):
            assert grid.call(lambda _: made.answer()) == "answer"
        with pytest.raises(Unreachable, match="nothing is lost") as error:
            grid.call(lambda _: made.answer())
    assert made.started == 1 + session.MAX_MANAGER_RESTARTS
    assert error.value.exit_code == 3


def test_next_manager_of_a_standing_grid_keeps_running(managers: Callable[[list[int]], Managers]) -> None:
    made = managers([1, 2])
    made.started = 1
    with Session(made.home, factory.load("local"), [Pool("big", 0, 9, 9)]) as grid:
        grid.start()
        assert [grid.call(lambda _: made.answer()) for _ in range(2)] == ["answer"] * 2
        assert not grid.ends_grid
    assert (made.started, made.stopped) == (2, 0)
    (options,) = made.options
    assert not options["parent"]
    assert options["pools"] == [Pool("default", 0, 4, 2)], "the job's pools are not the grid's"


def test_containers_that_stand_without_a_manager_are_not_taken_down(managers: Callable[[list[int]], Managers]) -> None:
    """The LocalStack of the containers stores the objects of all jobs."""
    made = managers([2, 2])
    made.backend = "localstack"
    at = Deployment("batchlab-1", "10.213.70", "image:1", "1:1", "3.13")
    compose_deployment.write(made.home, at)
    with Session(made.home, factory.load("localstack")) as grid:
        grid.start()
        assert grid.call(lambda _: made.answer()) == "answer"
    assert (made.started, made.stopped) == (1, 0)
    assert not made.options[0]["parent"]


def test_containers_after_grid_down_belong_to_the_command(managers: Callable[[list[int]], Managers]) -> None:
    made = managers([1, 2])
    made.backend, made.started = "localstack", 1
    at = Deployment("batchlab-1", "10.213.70", "image:1", "1:1", "3.13")
    compose_deployment.write(made.home, at)
    with Session(made.home, factory.load("localstack")) as grid:
        grid.start()
        assert grid.call(lambda _: made.answer()) == "answer"
        compose_deployment.forget(made.home)  # `grid down` does the same
        assert grid.call(lambda _: made.answer()) == "answer"
    assert (made.started, made.stopped) == (2, 1)


def test_manager_of_another_command_keeps_running(managers: Callable[[list[int]], Managers]) -> None:
    made = managers([2])
    made.is_ours = False
    with Session(made.home, factory.load("local")) as grid:
        grid.start()
        assert grid.call(lambda _: made.answer()) == "answer"
    assert made.stopped == 0


def test_command_waits_for_a_manager_that_docker_restarts(managers: Callable[[list[int]], Managers]) -> None:
    """A command that did not start the grid does not start its manager either."""
    made = managers([1, 1])
    made.started = 1
    grid = Session(made.home, factory.load("localstack"))
    grid._client = Client("http://1", "secret")
    at = Deployment("batchlab-1", "10.213.70", "image:1", "1:1", "3.13")
    compose_deployment.write(made.home, at)
    assert grid.call(lambda _: made.answer()) == "answer"

    later = iter([0, 0, 1])  # the first two looks do not find a manager

    def ask(_: object) -> str:
        try:
            return made.answer()
        except Unreachable:
            made.started += next(later)
            raise

    assert grid.call(ask) == "answer"
    assert not made.options
    compose_deployment.forget(made.home)  # the grid was taken down meanwhile
    attached = Session(made.home, factory.load("localstack"), revivals=0)
    attached._client = grid._client
    with pytest.raises(Unreachable, match="nothing is lost"):
        attached.call(lambda _: made.answer())


def test_a_grid_that_was_up_is_left_up(managers: Callable[[list[int]], Managers]) -> None:
    made = managers([5])
    made.started = 1
    with Session(made.home, factory.load("local")) as grid:
        grid.start()
        assert grid.call(lambda _: made.answer()) == "answer"
    assert (made.started, made.stopped) == (1, 0)


def test_command_waits_for_a_manager_that_does_not_lead_yet(managers: Callable[[list[int]], Managers]) -> None:
    made = managers([5])
    refusals = iter([BackendError("It does not lead."), BackendError("It does not lead.")])

    def ask(_: object) -> str:
        for refusal in refusals:
            raise refusal
        return "now"

    with Session(made.home, factory.load("local")) as grid:
        grid.start()
        assert grid.call(ask) == "now"


def test_grid_of_another_backend_is_refused(
    managers: Callable[[list[int]], Managers], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = managers([5])
    record = ManagerRecord("http://1", 1, "m", "ministack")
    monkeypatch.setattr(Home, "record", lambda _: record)
    with pytest.raises(UsageError, match="--backend ministack"), Session(made.home, factory.load("local")) as grid:
        grid.start()
    assert made.stopped == 0


# --- Progress ------------------------------------------------------------------------------------


def test_plain_progress_has_no_control_codes_and_prints_only_changes(capsys: pytest.CaptureFixture[str]) -> None:
    """A line must be readable without a terminal, also in a CI log."""
    grid = cast("GridView", a_grid())
    with progress.JobDisplay(is_live=False, every_s=60) as lines:
        for state in ("RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"):
            lines.show(view(state=state), grid)
    err = capsys.readouterr().err
    assert err.isprintable() or err.replace("\n", "").isprintable()
    told = err.splitlines()
    assert len(told) == 2
    assert told[0].endswith("sums-0123456789 RUNNING: parse 5/10 (1 failed); 1/1 workers")


def test_plain_progress_repeats_changes_after_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.JobDisplay(is_live=False, every_s=0) as lines:
        job = view()
        lines.show(job, None)
        lines.show(job, None)
        job["stages"][0]["succeeded"] += 1
        lines.show(job, None)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_rate_does_not_count_the_wait_for_workers() -> None:
    rates, job = progress.Rates(), view()
    stage = job["stages"][0]
    stage["failed"] = 0
    for at_s, done in ((0.0, 0), (100.0, 0), (101.0, 2), (102.0, 4)):
        stage["succeeded"] = done
        rates.note(job, at_s)
    assert rates.of(stage) == 2.0
    assert rates.left_s(stage) == 3.0


def test_capacity_counts_the_pools_that_the_job_uses() -> None:
    grid = a_grid()
    other = {**grid["pools"][0], "name": "other"}
    grid["pools"].append(other)
    assert progress.capacity(cast("GridView", grid), view()) == (1, 1, 2)


def test_the_picture_has_a_line_per_stage_and_one_for_the_workers() -> None:
    picture = progress.JobDisplay(is_live=True)
    console = Console(file=StringIO(), width=100)
    console.print(picture.draw())
    job = view()
    job["stages"].append({**job["stages"][0], "name": "total", "planned": None, "failed": 0})
    picture.show(job, cast("GridView", a_grid()))
    console.print(picture.draw())
    waiting, parse, total, foot = cast("StringIO", console.file).getvalue().splitlines()
    assert waiting == "waiting for the grid"
    assert re.search(r"^parse .* 5/10 +1 failed +2 running", parse)
    assert re.search(r"^total .* 4/\? +2 running", total)
    assert foot.startswith("sums-0123456789 RUNNING  1/1 workers  ")


def test_check_of_the_folder_for_results_creates_no_folder(tmp_path: Path) -> None:
    """The run may be refused after the check."""
    output.check_folder(tmp_path / "new" / "out")
    (tmp_path / "results").mkdir()
    output.check_folder(tmp_path / "results")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        output.check_folder(tmp_path / "file" / "out")
