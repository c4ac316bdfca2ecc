"""Which run a command means, what grid it gets, and what it says at the end."""

from __future__ import annotations

import asyncio
import random
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from batchlab import backends
from batchlab.adapters.sim.objects import SimObjects
from batchlab.cli import checkup, demo, output, pools, progress, runner, running, runs, session
from batchlab.cli.session import Session
from batchlab.cli.summary import Phases, Summary
from batchlab.errors import BackendError, Refused, Unreachable, UsageError
from batchlab.home import Home, ManagerRecord
from batchlab.model import ENDED, JobState, Pool
from batchlab.patience import Patience
from batchlab.protocol import naming, wire
from batchlab.results import Fetched
from batchlab.spec.jobfile import JobFile, load
from batchlab.spec.starter import starter
from batchlab.views import GridView, JobView
from tests.unit.test_cli_commands import a_grid, a_job

# --- Which run -----------------------------------------------------------------------------------


def put(objects: SimObjects, key: str, doc: dict[str, Any] | None = None) -> None:
    asyncio.run(objects.put(key, wire.to_bytes({"v": wire.VERSION, **(doc or {})})))


def latest(objects: SimObjects) -> runs.Run | None:
    return asyncio.run(runs.latest(objects, "sums", "f1", Patience(random.Random(1))))


def test_runs_of_one_fingerprint_are_counted_in_the_bucket() -> None:
    """Without a manager, so that a run is found whatever became of the one that began it."""
    objects = SimObjects()
    assert latest(objects) is None
    first = naming.job_id("sums", "f1")
    put(objects, naming.spec(first))
    assert latest(objects) == runs.Run(1, first, None)
    put(objects, naming.final(first, 0), {"state": "FAILED"})
    assert latest(objects) == runs.Run(1, first, JobState.FAILED)
    put(objects, naming.retry(first, 1))
    assert latest(objects) == runs.Run(1, first, None)
    put(objects, naming.final(first, 1), {"state": "SUCCEEDED"})
    assert latest(objects) == runs.Run(1, first, JobState.SUCCEEDED)
    second = naming.job_id("sums", "f1#2")
    put(objects, naming.spec(second))
    assert latest(objects) == runs.Run(2, second, None)


def a_run(ended: JobState | None) -> runs.Run:
    return runs.Run(3, naming.job_id("sums", "f1#3"), ended)


@pytest.mark.parametrize("ended", [None, *sorted(ENDED)])
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_which_run_is_gone_on_with(ended: JobState | None, resume: bool, cache: bool) -> None:
    failed = ended in (JobState.FAILED, JobState.CANCELLED)
    refused = (resume and failed) or (not resume and ended is None)
    if refused:
        with pytest.raises(Refused) as error:
            runner.choose(a_run(ended), resume=resume, cache=cache)
        assert ("job retry" if failed else "--resume") in error.value.remedy
        assert a_run(ended).job in str(error.value)
        return
    same = resume or (cache and ended is JobState.SUCCEEDED)
    assert runner.choose(a_run(ended), resume=resume, cache=cache) == (3 if same else 4)


def test_the_first_run_needs_no_earlier_one() -> None:
    for flag in (True, False):
        assert runner.choose(None, resume=flag, cache=flag) == 1


def test_the_command_to_go_on_with_is_the_one_that_was_given() -> None:
    given = ["run", "my job.yaml", "--set", "a=b c", "--debug"]
    once = running.again(given)
    assert once == "batchlab run 'my job.yaml' --set 'a=b c' --resume"
    assert running.again(shlex.split(once)[1:]) == once


# --- What grid -----------------------------------------------------------------------------------


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
    assert runner.pools_for(backends.load("local"), jobfile) == ()


def test_the_grid_has_every_pool_and_slot_that_the_job_asks_for(jobfile: JobFile) -> None:
    """Pain 1: a stage whose pool does not exist waits for ever elsewhere."""
    wish = "timeout: 1m\n    pool: big\n    resources: {slots: 4}\n    retry: 3"
    jobfile = edited(jobfile, "timeout: 1m\n    retry: 3", wish)
    backend = backends.load("local")
    own = backend.pools[0]
    assert runner.pools_for(backend, jobfile) == (own, Pool("big", 0, own.max_size, 4))


def test_workers_bounds_every_pool(jobfile: JobFile) -> None:
    backend = backends.load("local")
    busy = replace(backend, pools=(Pool("default", 2, 8, 1),))
    assert runner.pools_for(busy, jobfile, 1) == (Pool("default", 1, 1, 1),)


@pytest.mark.parametrize("text", ["default:0-4x1", "big-1:2-2x16"])
def test_a_pool_reads_as_it_is_written(text: str) -> None:
    pool = pools.parse(text)
    assert f"{pool.name}:{pool.min_size}-{pool.max_size}x{pool.slots}" == text


@pytest.mark.parametrize(
    "text", ["default", "default:4", "default:4-2x1", "default:0-4x0", "Default:0-4x1", "a:0-4x1 "]
)
def test_what_is_no_pool_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="default:0-4x1"):
        pools.parse(text)


def test_a_pool_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="given twice"):
        pools.parse_all(["a:0-1x1", "a:0-2x1"])


# --- A manager that dies -------------------------------------------------------------------------


class Managers:
    """Managers of which each dies after a number of answers."""

    def __init__(self, home: Home, lives: list[int]) -> None:
        self.home = home
        self.lives = lives
        self.started = self.stopped = 0

    def start(self, *_: object, **options: Any) -> ManagerRecord:
        assert options["parent"], "it must end with the command"
        self.started += 1
        return ManagerRecord(f"http://{self.started}", 1, "m", "local")

    def record(self) -> ManagerRecord | None:
        alive = self.started and self.lives[self.started - 1] > 0
        return ManagerRecord(f"http://{self.started}", 1, "m", "local") if alive else None

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
        monkeypatch.setattr("batchlab.services.start_manager", made.start)
        monkeypatch.setattr("batchlab.services.stop_manager", made.stop)
        monkeypatch.setattr(Home, "record", lambda _: made.record())
        return made

    return make


def test_a_manager_that_dies_is_replaced_and_the_question_asked_again(
    managers: Callable[[list[int]], Managers],
) -> None:
    made = managers([1, 1, 2])
    with Session(made.home, backends.load("local")) as grid:
        grid.start()
        assert [grid.call(lambda _: made.answer()) for _ in range(4)] == ["answer"] * 4
    assert (made.started, made.stopped) == (3, 1)


def test_managers_that_keep_dying_are_given_up_with_exit_code_three(
    managers: Callable[[list[int]], Managers],
) -> None:
    made = managers([1] * 10)
    grid = Session(made.home, backends.load("local"))
    with grid:
        grid.start()
        for _ in range(1 + session.REVIVALS):
            assert grid.call(lambda _: made.answer()) == "answer"
        with pytest.raises(Unreachable, match="nothing is lost") as error:
            grid.call(lambda _: made.answer())
    assert made.started == 1 + session.REVIVALS
    assert error.value.exit_code == 3


def test_a_grid_that_was_up_is_left_up(managers: Callable[[list[int]], Managers]) -> None:
    made = managers([5])
    made.started = 1
    with Session(made.home, backends.load("local")) as grid:
        grid.start()
        assert grid.call(lambda _: made.answer()) == "answer"
    assert (made.started, made.stopped) == (1, 0)


def test_a_manager_that_does_not_lead_yet_is_waited_for(
    managers: Callable[[list[int]], Managers],
) -> None:
    made = managers([5])
    refusals = iter([BackendError("It does not lead."), BackendError("It does not lead.")])

    def ask(_: object) -> str:
        for refusal in refusals:
            raise refusal
        return "now"

    with Session(made.home, backends.load("local")) as grid:
        grid.start()
        assert grid.call(ask) == "now"


def test_another_backends_grid_is_not_taken(
    managers: Callable[[list[int]], Managers], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = managers([5])
    record = ManagerRecord("http://1", 1, "m", "ministack")
    monkeypatch.setattr(Home, "record", lambda _: record)
    with (
        pytest.raises(UsageError, match="--backend ministack"),
        Session(made.home, backends.load("local")) as grid,
    ):
        grid.start()
    assert made.stopped == 0


# --- Progress ------------------------------------------------------------------------------------


def view(**more: Any) -> JobView:
    return cast("JobView", a_job("sums-0123456789", **more))


def test_plain_progress_has_no_control_codes_and_says_only_what_is_new(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pain 13 and CI logs: a line has to read well without a terminal."""
    grid = cast("GridView", a_grid())
    with progress.Lines(every_s=60) as lines:
        for state in ("RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"):
            lines.show(view(state=state), grid)
    err = capsys.readouterr().err
    assert err.isprintable() or err.replace("\n", "").isprintable()
    told = err.splitlines()
    assert len(told) == 2
    assert told[0].endswith("sums-0123456789 RUNNING: parse 5/10 (1 failed); 1/1 workers")


def test_plain_progress_is_told_again_after_a_while_if_there_is_news(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.Lines(every_s=0) as lines:
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


# --- The end -------------------------------------------------------------------------------------


def test_phases_add_up_to_the_wall_time() -> None:
    phases = Phases(begun_s=0.0)
    for name, seconds in (("check", 1.0), ("start", 2.0), ("run", 10.0)):
        phases.add(name, seconds)
    phases.split("run", "wait", 4.0)
    phases.split("run", "wait", -3.0)
    phases.end()
    assert phases.spent_s["wait"] == 4.0
    assert phases.spent_s["run"] == 6.0
    assert sum(phases.spent_s.values()) == pytest.approx(phases.wall_s)


def a_summary(tmp_path: Path, **more: Any) -> Summary:
    phases = Phases()
    phases.add("run", 2.0)
    fetched = Fetched(tmp_path, {"parse": 9}, 2, 2048)
    return Summary(view(**more), phases, {"default": 2}, {"parse": 1}, (), fetched)


def test_the_summary_says_where_the_time_went(tmp_path: Path) -> None:
    text = a_summary(tmp_path, state="FAILED", reason="1 of 10 failed").text()
    assert "sums-0123456789 FAILED in" in text
    assert "10 tasks, 1 failed, 1 retried" in text
    # 2 s of task time in 2 s on 2 slots
    assert "10 tasks, 2.0 s of task time, 50% of 2 slots" in text
    assert "files/: 2 files, 2.0 KiB" in text


def test_the_summary_for_programs_has_the_same(tmp_path: Path) -> None:
    doc = a_summary(tmp_path).to_json()
    assert doc["stages"][0]["utilisation"] == 0.5
    assert doc["results"]["results"] == {"parse": 9}
    assert doc["phases_s"]["run"] == 2.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0003, "0.3 ms"),
        (0.04, "40 ms"),
        (0.99951, "1.0 s"),
        (99.9, "99.9 s"),
        (99.96, "1 min 40 s"),
        (725, "12 min 05 s"),
        (12_000, "3 h 20 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert output.span(seconds) == text


def test_columns_of_numbers_stand_to_the_right() -> None:
    told = output.table(("name", "count", "took"), [("a", 5, "3.2 s"), ("b", 10, "-")])
    assert told == "NAME  COUNT   TOOK\na         5  3.2 s\nb        10      -"


# --- The demo ------------------------------------------------------------------------------------


def test_the_demos_claims_are_made_once(tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        files = (tmp_path / "demo").rglob("*")
        return {str(path): path.stat().st_mtime_ns for path in files if path.is_file()}

    first = demo.prepare(Home(tmp_path), seed=1, files=3, claims_per_file=5)
    before = times()
    assert demo.prepare(Home(tmp_path), seed=1, files=3, claims_per_file=5) == first
    assert times() == before
    assert sum(fact["claims"] for fact in first.facts.values()) == 15
    other = demo.prepare(Home(tmp_path), seed=2, files=3, claims_per_file=5)
    assert other.facts != first.facts
    assert len(load(other.job_file).files) == 3


def totals_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"payer": payer, "payer_name": fact["name"], "paid_cents": 5, **demo.expected(fact)}
        for payer, fact in facts.items()
    ]


@pytest.mark.parametrize("wrong", ["", "claims", "charge_cents", "denied", "payer"])
def test_the_demos_totals_are_compared_with_the_facts(tmp_path: Path, wrong: str) -> None:
    """A check that cannot say no is none."""
    prepared = demo.prepare(Home(tmp_path), seed=1, files=3, claims_per_file=5)
    totals = totals_of(dict(prepared.facts))
    if wrong == "payer":
        totals.pop()
    elif wrong:
        totals[0][wrong] += 1
    summary = a_summary(tmp_path)
    lines = [wire.dumps({"task": i, "value": one}) for i, one in enumerate(totals)]
    (tmp_path / "totals.jsonl").write_text("\n".join(lines) + "\n")
    verdict = demo.check(prepared, summary)
    assert verdict.agrees is not bool(wrong)
    answer = "no" if wrong else "yes"
    assert f"totals agree with the generator: {answer}" in verdict.text()


# --- The doctor ----------------------------------------------------------------------------------


def levels(home: Home, backend: str = "local") -> dict[str, set[checkup.Level]]:
    found: dict[str, set[checkup.Level]] = {}
    for one in checkup.examine(home, backend):
        found.setdefault(one.about, set()).add(one.level)
        assert one.level is checkup.Level.OK or one.remedy or one.text
    return found


def test_the_doctor_finds_nothing_here_and_leaves_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    found = levels(home)
    assert checkup.Level.FAIL not in set.union(*found.values())
    assert [path.name for path in home.path.iterdir()] == [".gitignore"]


def test_the_doctor_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    found = levels(Home(tmp_path / "file" / "h"), "nonsense")
    assert found["backend"] == found["folder"] == found["sqlite"] == {checkup.Level.FAIL}
    assert found["port"] == found["python"] == {checkup.Level.OK}

    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    def no_ports(*_: object, **__: object) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr("os.link", no_links)
    monkeypatch.setattr("socket.create_server", no_ports)
    monkeypatch.setattr(checkup, "FAIL_BELOW_BYTES", 0)
    monkeypatch.setattr("time.time", lambda: 1.0)
    found = levels(Home(tmp_path / "h"))
    assert found["folder"] == found["port"] == found["clock"] == {checkup.Level.FAIL}


def test_the_doctor_tells_of_a_manager_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = ManagerRecord("http://127.0.0.1:9", 1, "m", "local")
    monkeypatch.setattr(Home, "record", lambda _: record)
    assert levels(Home(tmp_path))["manager"] == {checkup.Level.FAIL}
