"""The recorder of the manager, which stores a limited number of points while jobs run, and passes them to the next
leader."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, cast

import pytest

from batchlab.core.errors import Deleted
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import (
    Bundle,
    GroupView,
    Instance,
    JobId,
    JobState,
    LifecycleState,
    Pool,
    StageCounts,
    StageName,
    TaskSet,
)
from batchlab.core.ports import JobRecord, StageRecord
from batchlab.core.pricing.usage import Account
from batchlab.core.protocol import json_format
from batchlab.core.protocol.messages import Duplicate, Events, events_message, read_events_message
from batchlab.manager import recorded_data
from batchlab.manager.counters import Counters
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.recorded_data import FINE, TimeSeries, latest_point, merge_pool_points
from batchlab.manager.recorder import MAX_ROWS_OF_SHORT_JOB, SHORT_S, Recorder, ReportQueue, _LiveRecording
from batchlab.manager.state import Backlog, LiveJob, Ports
from batchlab.manager.worker_registry import WorkerRegistry


def pool_point(at_s: float, step_s: float = 1.0, visible: int = 0, busy: float = 0.0) -> list[Any]:
    return [at_s, step_s, visible, 0, 0, visible, 2, 0, 2, 0, 1, 4, busy]


def test_a_day_takes_few_points_and_the_last_minutes_keep_theirs() -> None:
    series = TimeSeries(merge_pool_points)
    for second in range(20_000):
        series.add(pool_point(float(second), visible=second % 7, busy=second % 4))
    series.thin()
    assert len(series.points) < 2_500
    # No time is lost or counted twice, and the mean stays the same.
    assert sum(point[1] for point in series.points) == 20_000
    ends = [point[0] for point in series.points]
    assert ends == sorted(ends)
    mean = sum(point[1] * point[-1] for point in series.points) / 20_000
    assert mean == pytest.approx(1.5)
    assert max(point[2] for point in series.points) == 6
    for at_s, step_s, *_ in series.points:
        age_s = 19_999 - at_s
        assert step_s <= max(1.0, age_s / FINE) + 1e-9
    recent = [point for point in series.points if point[0] > 20_000 - FINE]
    assert all(point[1] == 1.0 for point in recent)


def test_counts_that_grow_keep_the_last() -> None:
    series = TimeSeries(latest_point)
    for n in range(2_000):
        series.add([float(n), 1.0, 2 * n])
    series.thin()
    assert series.points[-1][2] == 2 * 1_999
    assert all(point[2] == 2 * point[0] for point in series.points)


def whole() -> dict[str, Any]:
    points = [pool_point(float(n)) for n in range(10)]
    return {
        "pools": {
            "default": {"slots": 2, "type": "", "series": points},
            "other": {"slots": 1, "type": "", "series": points},
        },
        "scaling": [
            ["default", -20.0, 0, 1, 0, 1, 1.0, "long before"],
            ["other", 3.0, 0, 1, 0, 1, 1.0, "another pool"],
            ["default", 3.0, 0, 1, 0, 1, 1.0, "a backlog"],
        ],
        "instances": {
            "i-gone": ["default", "", "", "on-demand", -50.0, -40.0, 1.0, "Terminated", "", 2],
            "i-here": ["default", "", "", "on-demand", 0.0, 2.0, None, "InService", "", 2],
        },
        "workers": {"w-1": ["i-here", "default", 2, 2.0, 9.0], "w-0": ["i-gone", "default", 2, 0, 1]},
        "jobs": {
            "a": {
                "since_s": 4.0,
                "requests": [[5.0, 0.0, 1, 0, 1, 1, 0]],
                "duplicates": {"s": {"message": [1, 0.0]}},
                "pools": ["default"],
            }
        },
        "earlier": {},
    }


def test_a_job_has_its_own_part_of_what_was_seen() -> None:
    part = recorded_data.job_part(whole(), JobId("a"))
    assert list(part["pools"]) == ["default"]
    assert [point[0] for point in part["pools"]["default"]["series"]] == [5.0, 6.0, 7.0, 8.0, 9.0]
    assert [one[7] for one in part["scaling"]] == ["a backlog"]
    assert list(part["instances"]) == ["i-here"]
    assert list(part["workers"]) == ["w-1"]
    assert recorded_data.job_part(whole(), JobId("unknown")) == recorded_data.empty_part()


def test_rounds_are_put_together() -> None:
    first = recorded_data.job_part(whole(), JobId("a"))
    doc = whole()
    doc["earlier"] = {"a": first}
    doc["jobs"]["a"] |= {"since_s": 7.0, "duplicates": {"s": {"message": [2, 0.5]}}}
    both = recorded_data.job_part(doc, JobId("a"))
    times = [point[0] for point in both["pools"]["default"]["series"]]
    assert times == [5.0, 6.0, 7.0, 8.0, 9.0, 8.0, 9.0]
    assert both["duplicates"] == {"s": {"message": [3, 0.5]}}
    assert len(both["scaling"]) == 1
    assert both["workers"]["w-1"][3:] == [2.0, 9.0]


def test_duplicates_and_cut_times_are_recorded() -> None:
    told = Duplicate(JobId("a"), StageName("s"), "execution", "w-1-3", 2.5)
    events = Events(duplicates=(told,))
    assert read_events_message(events_message(events)) == events
    from batchlab.core.ports import Cut

    bundle = Bundle(JobId("a"), StageName("s"), TaskSet.span(0, 4))
    cut = Cut(JobId("a"), StageName("s"), 0, 0, (bundle,), TaskSet(), 4, 17.5)
    assert json_format.cut_from_json(json_format.cut_to_json(cut)).at_s == 17.5
    old = {k: v for k, v in json_format.cut_to_json(cut).items() if k != "at"}
    assert json_format.cut_from_json(old).at_s is None


def test_a_run_that_lost_against_a_speculative_copy_counts_once() -> None:
    """The manager measures the run, and the worker may report the same run later."""
    job, stage = JobId("a"), StageName("map")
    definition = JobDef(job, "a", (StageDef(stage, handler="m:f"),), 1.0)
    live = LiveJob(JobRecord(definition, JobState.RUNNING), {stage: StageRecord(StageCounts(stage))})
    recorder = Recorder(cast(Ports, FakePorts()), LiveJobs([live]), cast(WorkerRegistry, FakeRegistry()))
    recorder.adopt(live)
    recorder.record_losers(job, stage, "original", 7.5, ["w-1"])
    recorder.record_duplicates([Duplicate(job, stage, "execution", "w-1-3", 9.0)])
    recorder.record_duplicates([Duplicate(job, stage, "execution", "w-2-1", 1.0)])
    recorder.before_close = lambda: recorder.record_losers(job, stage, "copy", 0.5, ["w-3"])
    _, part = recorder.close({job: Account()})[job]
    assert part["duplicates"] == {stage: {"original": [1, 7.5], "execution": [1, 1.0], "copy": [1, 0.5]}}


# --- The reporter --------------------------------------------------------------------------------


class Moody:
    """A reporter that fails a given number of times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.asked: list[JobId] = []

    async def write(self, job: JobId) -> None:
        self.asked.append(job)
        if len(self.asked) <= self.failures:
            raise OSError("the disk is full")


@pytest.mark.parametrize(("failures", "tries", "trouble"), [(0, 1, ""), (2, 3, ""), (9, 3, "full")])
def test_failed_write_is_retried_and_then_reported(
    failures: int, tries: int, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchlab.manager import recorder as report_queue

    monkeypatch.setattr(report_queue, "RETRY_S", 0.0)
    monkeypatch.setattr(report_queue, "QUIET_S", 0.0)
    moody = Moody(failures)
    reports = ReportQueue(moody)

    async def act() -> None:
        keeping = asyncio.create_task(reports.run())
        reports.add(JobId("short"), report_queue.SHORT_S - 1)
        reports.add(JobId("a"), report_queue.SHORT_S)
        reports.add(JobId("a"), report_queue.SHORT_S)
        for _ in range(100):
            await asyncio.sleep(0)
            if len(moody.asked) == tries:
                break
        await asyncio.sleep(0.01)
        assert not keeping.done()
        keeping.cancel()

    asyncio.run(act())
    assert moody.asked == [JobId("a")] * tries
    assert trouble in reports.troubles.get(JobId("a"), "")
    assert bool(reports.troubles) == bool(trouble)


def test_writer_that_fails_during_shutdown_is_not_called_again() -> None:
    """Before, the manager of such a writer did not end."""

    class Clumsy:
        async def write(self, job: JobId) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise OSError(f"{job}: it has just been closed") from None

    reports = ReportQueue(Clumsy())

    async def act() -> None:
        writing = asyncio.create_task(reports._write(JobId("a")))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait({writing}, timeout=10)
        assert writing.cancelled()

    asyncio.run(act())


def test_report_of_a_deleted_job_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion waits for a running write, and the next attempts do not delay other jobs."""
    from batchlab.manager import recorder as report_queue

    monkeypatch.setattr(report_queue, "QUIET_S", 0.0)
    monkeypatch.setattr(report_queue, "RETRY_S", 0.01)
    begun, end = asyncio.Event(), asyncio.Event()
    asked: list[str] = []

    class Slow:
        async def write(self, job: JobId) -> None:
            asked.append(job)
            if job == "deleted":
                raise Deleted("The job was deleted.")
            if job == "slow":
                begun.set()
                await end.wait()
                raise OSError("full")

    reports = ReportQueue(Slow())

    async def act() -> None:
        keeping = asyncio.create_task(reports.run())
        for job in ("deleted", "slow", "waiting", "other"):
            reports.add(JobId(job), report_queue.SHORT_S)
        await reports.forget(JobId("waiting"))
        async with asyncio.timeout(10):
            await begun.wait()
            forgetting = asyncio.create_task(reports.forget(JobId("slow")))
            await asyncio.sleep(0.02)
            assert not forgetting.done()
            end.set()
            await forgetting
            while "other" not in asked:
                await asyncio.sleep(0.001)
        keeping.cancel()

    asyncio.run(act())
    assert asked == ["deleted", "slow", "other"]
    assert not reports.troubles


@pytest.mark.parametrize("latest_s", [60.0, 0.0])
def test_report_is_written_after_a_pause_or_at_the_deadline(latest_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, one call in fifty on an idle grid waited 100 ms for the report of the previous job."""
    from batchlab.manager import recorder as report_queue

    monkeypatch.setattr(report_queue, "QUIET_S", 0.05)
    monkeypatch.setattr(report_queue, "MAX_DELAY_S", latest_s)
    moody, counts = Moody(0), Counters()
    reports = ReportQueue(moody, counts)

    async def act() -> None:
        keeping = asyncio.create_task(reports.run())
        reports.add(JobId("a"), report_queue.SHORT_S)
        for _ in range(20):
            counts.submitted += 1
            await asyncio.sleep(0.01)
        assert moody.asked == ([] if latest_s else [JobId("a")])
        async with asyncio.timeout(10):
            while not moody.asked:
                await asyncio.sleep(0.01)
        keeping.cancel()

    asyncio.run(act())


def test_earlier_instances_do_not_count_for_a_job() -> None:
    recorder = Recorder(cast(Ports, FakePorts()), LiveJobs(), cast(WorkerRegistry, FakeRegistry()))
    old = Instance("i-old", "default", LifecycleState.TERMINATED, 100.0)
    new = Instance("i-new", "default", LifecycleState.IN_SERVICE, 900.0)
    view = GroupView(Pool("default"), 1, (old, new))
    recorder.observe({"default": view}, {}, lambda _: Backlog())
    assert list(recorder._history.living) == ["i-new"]
    assert recorder._history.living["i-new"][5] == 1000.0


@pytest.mark.parametrize(
    ("first_s", "round_", "retried_s", "took_s"),
    [
        (None, 0, None, 0.0),
        (990.0, 0, None, 10.0),
        (1000.5, 0, None, 0.0),
        (400.0, 1, 998.0, 2.0),
        (400.0, 1, None, 0.0),
    ],
)
def test_a_job_took_the_time_before_this_manager_too(
    first_s: float | None, round_: int, retried_s: float | None, took_s: float
) -> None:
    """The duration of a job decides whether its data is written, and the current manager may have led only for a
    second. The duration of an earlier round does not count. Before, a retry of one second, an hour after the job,
    counted as an hour."""
    stage = StageCounts(StageName("map"), first_start_s=first_s)
    definition = JobDef(JobId("a-1"), "a", (StageDef(StageName("map"), handler="m:f"),), 1.0)
    record = JobRecord(definition, JobState.RUNNING, round=round_)
    live = LiveJob(record, {stage.stage: StageRecord(stage)}, retried_s=retried_s)
    lives = LiveJobs([live])
    recorder = Recorder(cast(Ports, FakePorts()), lives, cast(WorkerRegistry, FakeRegistry()))
    recorder.adopt(live)
    closed = recorder.close({live.id: Account(), JobId("unknown"): Account()})
    assert {job: seen_s for job, (seen_s, _) in closed.items()} == {live.id: took_s, "unknown": 0.0}


class FakePorts:
    """Fake ports with a clock that does not move."""

    @property
    def clock(self) -> FakePorts:
        return self

    def now_s(self) -> float:
        return 1000.0

    def monotonic_s(self) -> float:
        return 5.0


class FakeRegistry:
    """A registry without workers."""

    workers: ClassVar[dict[str, Any]] = {}
    spot: ClassVar[dict[str, None]] = {}


class Row(list[Any]):
    """A row that counts how often it is read."""

    looks = 0

    def __getitem__(self, key: Any) -> Any:
        Row.looks += 1
        return super().__getitem__(key)


def closed(history: int, seconds: float) -> tuple[dict[str, Any], int]:
    """Return the data of a job that ran for `seconds` after a long fleet history, and the number of reads of this
    history."""
    ports = FakePorts()
    recorder = Recorder(cast(Ports, ports), LiveJobs(), cast(WorkerRegistry, FakeRegistry()))
    instances = recorder._history
    recorder._slots["default"] = 2, ""
    recorder._pools["default"] = TimeSeries(merge_pool_points, [pool_point(n * 900 / history) for n in range(history)])
    for n in range(history):
        name, since_s = f"{n}", n / 1000
        instances.ended[name] = Row(["default", "", "", "", since_s, since_s, since_s, "", "", 2])
        instances.workers[name] = Row([name, "default", 2, since_s, since_s])
        recorder._decisions.append(Row(["default", since_s, 0, 1, 0, 1, 1.0, "a backlog"]))
    for n in range(MAX_ROWS_OF_SHORT_JOB + 6):
        instances.living[f"i-{n}"] = ["default", "", "", "", 900.0, 900.0, None, "", "", 2]
    for n in range(500):
        recorder._jobs[JobId(f"other-{n}")] = _LiveRecording(0.0, ["default"])
    instances.ended["last"] = Row(["default", "", "", "", 0.0, 0.0, 999.99, "", "", 2])
    recorder._jobs[JobId("a")] = _LiveRecording(1000.0 - seconds, ["default"])
    Row.looks = 0
    ((_, part),) = recorder.close({JobId("a"): Account()}).values()
    return part, Row.looks


@pytest.mark.parametrize("seconds", [1.0, 60.0])
def test_cost_of_an_ended_job_does_not_grow_with_the_history(seconds: float) -> None:
    few, some_looks = closed(100, seconds)
    many, many_looks = closed(10_000, seconds)
    assert many_looks == some_looks < 50
    assert len(json_format.to_bytes(many)) == len(json_format.to_bytes(few))
    assert len(few["instances"]) == (MAX_ROWS_OF_SHORT_JOB if seconds < SHORT_S else MAX_ROWS_OF_SHORT_JOB + 7)
    assert "last" in few["instances"] or seconds < SHORT_S
    assert not few["workers"]
    assert not few["scaling"]
