"""Recorded traces of other systems, which are read completely and have their known totals."""

from __future__ import annotations

from pathlib import Path
from random import Random
from statistics import fmean, median

import pytest

from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import Arrival, JobTemplate, Scenario, Schedule, StageTemplate
from batchlab.scenarios.traces.rows import Columns, ColumnSum, summarize
from batchlab.scenarios.traces.source import Trace, TraceFormat
from tests.support.scenarios.burstiness import cv2, gaps, peak_to_mean

MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86_400.0

FACEBOOK = ("job", "submit", "gap", "input", "shuffle", "output")


@pytest.fixture
def traces(shared_data: Path) -> Path:
    return shared_data / "traces"


def arrivals(trace: Trace) -> list[Arrival]:
    return list(trace.arrivals(Random(1)))


def swf(path: Path, tasks: str = "") -> Trace:
    columns = Columns("submit", task_s=ColumnSum(("run",)), label="job", tasks=ColumnSum((tasks,)) if tasks else None)
    return Trace(template="job", path=path, format=TraceFormat.SWF, columns=columns)


def table(path: Path, columns: Columns, names: tuple[str, ...] = ()) -> Trace:
    return Trace(template="job", path=path, format=TraceFormat.TABLE, columns=columns, names=names)


def test_nasa_ipsc(traces: Path) -> None:
    trace = swf(traces / "NASA-iPSC-1993-3.1-cln.swf.gz", tasks="processors")
    jobs = arrivals(trace)
    times = [job.at_s for job in jobs]
    assert len(jobs) == trace.reading().records == 18_239
    assert not trace.odd()
    assert times == sorted(times)
    assert times[-1] / DAY_S == pytest.approx(92.0, abs=0.05)
    assert peak_to_mean(times, MINUTE_S) == pytest.approx(87, abs=0.5)
    assert peak_to_mean(times, HOUR_S) == pytest.approx(10.2, abs=0.05)
    assert peak_to_mean(times, DAY_S) == pytest.approx(3.2, abs=0.05)
    assert cv2(gaps(times)) == pytest.approx(90, abs=0.5)
    runs = [job.task_s for job in jobs if job.task_s is not None]
    assert len(runs) == len(jobs)
    assert fmean(runs) == pytest.approx(765, abs=0.5)
    assert median(runs) == 86
    assert max(runs) == 62_643
    assert cv2(runs) == pytest.approx(12, abs=0.5)
    assert runs.count(0.0) == 173
    assert max(job.tasks or 0 for job in jobs) == 128


def test_nasa_ipsc_leaves_no_wait_to_be_read(traces: Path) -> None:
    """All waits in this trace are -1, so a mapping that uses them gets a report for every record."""
    path = traces / "NASA-iPSC-1993-3.1-cln.swf.gz"
    trace = Trace(
        template="job", path=path, format=TraceFormat.SWF, columns=Columns("submit", task_s=ColumnSum(("wait", "run")))
    )
    (kind,) = summarize(trace.odd())
    assert (kind.what, kind.done, kind.count) == ("wait is unknown (-1)", "left out", 18_239)


def test_hpc2n(traces: Path) -> None:
    path = traces / "hpc2n-2002-head.swf"
    trace = swf(path)
    jobs = arrivals(trace)
    assert trace.reading().records == 3170
    kinds = {kind.what: (kind.done, kind.count) for kind in summarize(trace.odd())}
    assert kinds == {
        "run is unknown (-1)": ("left out", 25),
        "the header promises another number of records": ("those that are there were read", 1),
    }
    assert len(jobs) == 3145
    submitted = [
        job.at_s
        for job in arrivals(Trace(template="job", path=path, format=TraceFormat.SWF, columns=Columns("submit")))
    ]
    assert len(submitted) == 3170
    assert submitted[-1] / DAY_S == pytest.approx(57.3, abs=0.05)
    assert peak_to_mean(submitted, HOUR_S) == pytest.approx(28.6, abs=0.05)
    assert peak_to_mean(submitted, DAY_S) == pytest.approx(4.1, abs=0.05)
    assert cv2(gaps(submitted)) == pytest.approx(30, abs=0.5)


def test_the_golden_sums_of_the_logs(traces: Path, shared_data: Path) -> None:
    """A replay starts from these jobs and run times, which two other programs have counted."""
    golden = (shared_data / "reference" / "fifo_replay_golden.csv").read_text().splitlines()
    known = {row.split(",")[0]: row.split(",")[2:4] for row in golden[1:]}
    for name, file in (("nasa-ipsc", "NASA-iPSC-1993-3.1-cln.swf.gz"), ("hpc2n-head", "hpc2n-2002-head.swf")):
        jobs = arrivals(swf(traces / file))
        assert [str(len(jobs)), f"{sum(job.task_s or 0 for job in jobs):.0f}"] == known[name]


def test_facebook(traces: Path) -> None:
    path = traces / "FB-2009_samples_24_times_1hr_0.tsv"
    moved = Columns("submit", tasks=ColumnSum(("input", "shuffle", "output"), per=64 * 2**20))
    jobs = arrivals(table(path, moved, FACEBOOK))
    times = [job.at_s for job in jobs]
    assert len(jobs) == 5894
    assert times[-1] - times[0] == 86_355
    assert peak_to_mean(times, MINUTE_S) == pytest.approx(7.8, abs=0.05)
    assert peak_to_mean(times, 5 * MINUTE_S) == pytest.approx(4.3, abs=0.05)
    assert peak_to_mean(times, HOUR_S) == pytest.approx(2.2, abs=0.05)
    assert cv2(gaps(times)) == pytest.approx(13, abs=0.5)
    assert max(job.tasks or 0 for job in jobs) == -(-max_bytes(path) // (64 * 2**20))
    assert median(job.tasks or 0 for job in jobs) == 1
    kilobytes = Columns("submit", tasks=ColumnSum(("input", "shuffle", "output"), per=1000))
    sizes = [job.tasks or 0 for job in arrivals(table(path, kilobytes, FACEBOOK))]
    assert median(sizes) / 1e3 == pytest.approx(5.4, abs=0.05)
    assert fmean(sizes) / 1e6 == pytest.approx(9.5, abs=0.05)
    assert max(sizes) / 1e9 == pytest.approx(9.8, abs=0.05)
    assert cv2(sizes) == pytest.approx(307, abs=0.5)


def test_facebook_has_jobs_too_large_for_tasks_of_a_byte(traces: Path) -> None:
    path = traces / "FB-2009_samples_24_times_1hr_0.tsv"
    trace = table(path, Columns("submit", tasks=ColumnSum(("input", "shuffle", "output"))), FACEBOOK)
    kinds = {(kind.what, kind.done): kind.count for kind in summarize(trace.odd())}
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    sums = [sum(map(int, row[3:])) for row in rows]
    assert kinds == {
        ("more tasks than a job may have", "left out"): sum(one > 10**12 for one in sums),
        ("input and shuffle and output is 0", "counted as one task"): sums.count(0),
    }
    assert min(kinds.values()) > 0


def max_bytes(path: Path) -> int:
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return max(int(a) + int(b) + int(c) for _, _, _, a, b, c in rows)


def test_gap_column_of_facebook_is_not_a_time(traces: Path) -> None:
    path = traces / "FB-2009_samples_24_times_1hr_0.tsv"
    trace = table(path, Columns("job"), FACEBOOK)
    (kind,) = summarize(trace.odd())
    assert (kind.what, kind.count, kind.first_line) == ("job is not a time", 5894, 1)


def test_azure_requests(traces: Path) -> None:
    path = traces / "AzureLLMInferenceTrace_conv.csv"
    tokens = Columns("TIMESTAMP", task_s=ColumnSum(("GeneratedTokens",), per=30))
    trace = table(path, tokens)
    times = [job.at_s for job in arrivals(trace)]
    assert len(times) == 19_366
    assert not trace.odd()
    assert times[-1] == pytest.approx(3502, abs=0.5)
    assert peak_to_mean(times, MINUTE_S) == pytest.approx(1.5, abs=0.05)
    assert cv2(gaps(times)) == pytest.approx(1.2, abs=0.05)


def test_azure_functions(traces: Path) -> None:
    path = traces / "Azure2021_200.csv"
    ends = Columns("end_timestamp", minus="duration", task_s=ColumnSum(("duration",)), tenant="app")
    jobs = arrivals(table(path, ends))
    runs = [job.task_s or 0 for job in jobs]
    assert len(jobs) == 199
    assert jobs[-1].at_s == pytest.approx(1200, abs=0.5)
    assert fmean(runs) == pytest.approx(53, abs=0.5)
    assert max(runs) == pytest.approx(405, abs=0.5)
    assert len({job.tenant for job in jobs}) > 1
    assert [job.at_s for job in jobs] == sorted(job.at_s for job in jobs)


def test_load_balancer_counts(traces: Path) -> None:
    path = traces / "elb_request_count_8c0756.csv"
    trace = table(path, Columns("timestamp", count="value"))
    reading = trace.reading()
    counts = [row.jobs for row in reading.rows]
    assert reading.records == len(counts) == 4032
    assert fmean(counts) == pytest.approx(62, abs=0.5)
    assert max(counts) == 656
    assert max(counts) / fmean(counts) == pytest.approx(10.6, abs=0.05)
    (late,) = summarize(trace.odd())
    assert (late.what, late.count) == ("the next record is late", 8)
    assert {odd.detail for odd in trace.odd()} == {"600 s, not 300 s"}
    jobs = arrivals(trace)
    assert len(jobs) == sum(counts)
    assert 0 <= jobs[0].at_s < 300


def test_taxi_counts(traces: Path) -> None:
    path = traces / "nyc_taxi.csv"
    trace = table(path, Columns("timestamp", count="value", scale=0.001))
    reading = trace.reading()
    counts = [row.jobs for row in reading.rows]
    assert reading.records == len(counts) == 10_320
    assert not trace.odd()
    assert fmean(counts) == pytest.approx(15_138, abs=0.5)
    peak = max(reading.rows, key=lambda row: row.jobs)
    assert peak.jobs == 39_197
    assert peak.jobs / fmean(counts) == pytest.approx(2.6, abs=0.05)
    # 2014-11-02 01:00 is 124 days and an hour after 2014-07-01 00:00.
    assert peak.at_s - reading.rows[0].at_s == 124 * DAY_S + HOUR_S
    jobs = arrivals(trace)
    assert len(jobs) == int(sum(counts) / 1000)
    an_hour = [job.at_s for job in jobs if 124 * DAY_S <= job.at_s < 125 * DAY_S]
    day = sum(row.jobs for row in reading.rows[124 * 48 : 125 * 48]) / 1000
    assert len(an_hour) == pytest.approx(day, abs=1)


def test_a_count_can_be_one_large_job_instead(traces: Path) -> None:
    jobs = arrivals(table(traces / "nyc_taxi.csv", Columns("timestamp", tasks=ColumnSum(("value",)))))
    assert len(jobs) == 10_320
    assert max(job.tasks or 0 for job in jobs) == 39_197


def test_every_trace_becomes_a_schedule_that_names_what_is_odd(traces: Path) -> None:
    template = JobTemplate("job", (StageTemplate("work", Constant(1.0)),), Constant(1))
    sources = (
        swf(traces / "hpc2n-2002-head.swf"),
        table(traces / "elb_request_count_8c0756.csv", Columns("timestamp", count="value")),
    )
    schedule: Schedule = expand(Scenario("both", "", {"job": template}, sources, ()))
    assert len(schedule.jobs) == 3145 + 249_327
    assert len(schedule.odd) == 26 + 8
    first = next(job for job in schedule.jobs if job.label == "1")
    assert (first.due_s, first.task_s, first.tasks) == (0.0, 31_405.0, 1)
