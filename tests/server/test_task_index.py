"""The index of a job's tasks: states, pages, and searches, without a manager."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from batchlab.core.job_definition import StageDef
from batchlab.core.model import Bundle, Completion, StageName, TaskSet
from batchlab.core.ports import BundleRecord, BundleResult, Cut
from batchlab.manager.retry_rounds import RetriedTasks, Retry
from batchlab.server.task_index import ListedTask, RunningBundle, TaskIndex, TaskList, TaskState
from batchlab.server.time_buckets import MAX_LANES
from batchlab.server.timeline import MAX_BARS, timeline
from tests.support.server.api import MAP, job

JOB = replace(job(tasks=4, after=(StageDef(StageName("next"), handler="m:g", after=(MAP,)),)), submitted_s=0.0)
NEXT = StageName("next")
EMPTY = TaskSet()


def record(
    seq: int,
    tasks: TaskSet,
    *,
    stage: StageName = MAP,
    failed: TaskSet = EMPTY,
    cancelled: TaskSet = EMPTY,
    retried: TaskSet = EMPTY,
    worker: str = "w-1",
    begin_s: float = 0.0,
    end_s: float = 1.0,
    attempt: int = 1,
) -> BundleResult:
    bundle = Bundle(JOB.id, stage, tasks, attempt)
    good = tasks - failed - cancelled - retried
    done = Completion(bundle, worker, begin_s, end_s, good, failed, cancelled, 1.0, (), len(retried))
    return BundleResult.of(BundleRecord(bundle, done, seq))


def listing(*records: BundleResult, planned: int | None = 10, has_ended: bool = False, **more: object) -> TaskList:
    index = TaskIndex(JOB, RetriedTasks(()))
    index.add(records, 1e9)
    return TaskList(JOB, index, {MAP: planned, NEXT: planned}, has_ended, **more)  # type: ignore[arg-type]


def states(listed: TaskList, stage: StageName = MAP) -> str:
    """Return the first letter of each task's state, in the order of the tasks."""
    return "".join(one.state[0] for one in listed.tasks([stage]))


def span(first: int, stop: int) -> TaskSet:
    return TaskSet.span(first, stop)


def test_every_task_has_its_state() -> None:
    run = RunningBundle(Bundle(JOB.id, MAP, span(6, 8)), "w-2", 5.0)
    listed = listing(
        record(1, span(4, 6), failed=span(5, 6)),
        record(2, span(0, 2)),
        record(3, span(2, 3), cancelled=span(2, 3)),
        running={MAP: [run]},
    )
    assert states(listed) == "sscwsfrrww"
    # The upstream tasks 2 and 5 have no result, so the chained tasks 2 and 5 cannot run.
    assert states(listed, NEXT) == "wwcwwcwwww"
    assert [one.running for one in listed.tasks([MAP], TaskState.RUNNING)] == [run, run]
    assert states(listing(record(1, span(0, 4)), has_ended=True)) == "sssscccccc"
    assert states(listing(planned=None)) == ""


def test_a_retried_task_is_listed_once_with_its_last_result() -> None:
    listed = listing(
        record(1, span(0, 4), retried=span(1, 3)), record(2, span(1, 3), attempt=2, failed=span(2, 3)), planned=4
    )
    assert states(listed) == "ssfs"
    found = listed.state(MAP, 1)
    assert found is not None
    assert listed.index.bundle(found.row).attempt == 2
    assert listed.index.attempt_seq(MAP, 1, 1) == 1
    assert listed.index.attempt_seq(MAP, 0, 2) == 0
    assert listed.state(MAP, 4) is None


@pytest.mark.parametrize("seed", range(20))
def test_pages_of_any_size_list_every_task_once(seed: int) -> None:
    draw = random.Random(seed)
    edges = sorted({0, 60, *draw.sample(range(1, 60), 12)})
    records = []
    for seq, (first, stop) in enumerate(draw.sample(list(pairwise(edges)), 9)):
        tasks = span(first, stop)
        failed = TaskSet.from_indices(draw.sample(range(first, stop), draw.randint(0, stop - first)))
        records.append(record(seq + 1, tasks, failed=failed))
    listed = listing(*records, planned=64)
    for state in (None, TaskState.SUCCEEDED, TaskState.FAILED, TaskState.WAITING):
        whole = list(listed.tasks([MAP, NEXT], state))
        assert len(set(whole)) == len(whole)
        assert [one for one in listed.tasks([MAP, NEXT]) if state in (None, one.state)] == whole
        for first in draw.sample(range(len(whole)), min(5, len(whole))):
            begin: ListedTask = whole[first]
            assert list(listed.tasks([MAP, NEXT], state, begin=(begin.stage, begin.task))) == whole[first:]
    assert len(list(listed.tasks([MAP]))) == 64


def test_tasks_of_a_worker_are_found_in_bundles_and_heartbeats() -> None:
    run = RunningBundle(Bundle(JOB.id, MAP, span(7, 8)), "w-22", 5.0)
    listed = listing(record(1, span(0, 2), worker="w-2"), record(2, span(2, 4)), running={MAP: [run]})
    assert [one.task for one in listed.tasks([MAP], worker="w-2")] == [0, 1, 7]
    assert [one.task for one in listed.tasks([MAP], TaskState.RUNNING, worker="2")] == [7]
    assert list(listed.tasks([MAP], worker="x")) == []


# --- Timeline -------------------------------------------------------------------------------------


def test_lanes_are_workers_and_rows_are_parallel_bundles() -> None:
    run = RunningBundle(Bundle(JOB.id, MAP, span(6, 8)), "b", 3.0)
    listed = listing(
        record(1, span(0, 1), worker="a", begin_s=0.0, end_s=4.0),
        record(2, span(1, 2), worker="a", begin_s=1.0, end_s=2.0, failed=span(1, 2)),
        record(3, span(2, 3), worker="a", begin_s=2.0, end_s=3.0),
        record(4, span(3, 4), worker="b", begin_s=-9.0, end_s=1e9),
    )
    view = timeline(listed.index, [run], 0.0, 6.0, 6.0)
    first, second = view["lanes"] if view["lanes"][0]["worker"] == "a" else reversed(view["lanes"])
    assert [(bar["state"], bar["row"]) for bar in first["bars"]] == [("succeeded", 0), ("failed", 1), ("succeeded", 1)]
    # A worker may report any time, but a bar stays within the timeline.
    assert [(bar["started_s"], bar["ended_s"]) for bar in second["bars"]] == [(0.0, 6.0), (3.0, 6.0)]
    assert second["bars"][1]["state"] == "running"
    assert (view["workers"], view["merged_s"], second["rows"]) == (2, 0.0, 2)


def test_a_large_timeline_has_time_buckets() -> None:
    index = TaskIndex(JOB, RetriedTasks(()))
    for n in range(12_000):
        begin_s = n / 100
        bad = span(n, n + 1) if n == 6_000 else EMPTY
        more = {"worker": f"w-{n % 400}", "begin_s": begin_s, "end_s": begin_s + 0.9}
        index.add([record(n + 1, span(n, n + 1), failed=bad, **more)], 200.0)  # type: ignore[arg-type]
    view = timeline(index, [], 0.0, 120.9, 200.0)
    bars = [bar for lane in view["lanes"] for bar in lane["bars"]]
    assert (len(view["lanes"]), view["workers"]) == (MAX_LANES, 400)
    assert len(bars) <= MAX_BARS
    assert sum(bar["bundles"] for bar in bars) == 12_000 * MAX_LANES // 400
    assert view["merged_s"] > 0
    assert [bar["worker"] for bar in view["lanes"]][:2] == ["w-0", "w-1"]
    assert [lane["worker"] for lane in view["lanes"] for bar in lane["bars"] if bar["state"] == "failed"] == ["w-0"]
    assert all(one["ended_s"] <= two["started_s"] for lane in view["lanes"] for one, two in pairwise(lane["bars"]))


def test_buckets_show_when_a_worker_failed_and_when_it_was_idle() -> None:
    index = TaskIndex(JOB, RetriedTasks(()))
    spans = [(n / 10, n / 10 + 0.1) for n in range(1_000)] + [(200 + n / 10, 200 + n / 10 + 0.1) for n in range(1_000)]
    for n, (begin_s, end_s) in enumerate(spans):
        tasks = span(n, n + 1)
        index.add([record(n + 1, tasks, failed=tasks if n == 500 else EMPTY, begin_s=begin_s, end_s=end_s)], 400.0)
    # A worker that reports impossible times does not change the bars of other workers.
    index.add([record(9_999, span(5_000, 5_001), worker="odd", begin_s=-1e9, end_s=9e9)], 400.0)
    run = RunningBundle(Bundle(JOB.id, MAP, span(6_000, 6_001)), "w-1", 10.0)
    view = timeline(index, [run], 0.0, 400.0, 400.0)
    bars = next(lane["bars"] for lane in view["lanes"] if lane["worker"] == "w-1")
    ended = [bar for bar in bars if bar["state"] != "running"]
    assert len(ended) >= MAX_BARS // 4
    bad = [bar for bar in ended if bar["state"] == "failed"]
    assert [(bar["started_s"] <= 50 <= bar["ended_s"], bar["bundles"] < 10) for bar in bad] == [(True, True)]
    gaps = [(one["ended_s"], two["started_s"]) for one, two in pairwise(ended) if two["started_s"] > one["ended_s"] + 1]
    assert [pytest.approx(gap) for gap in gaps] == [(100.0, 200.0)]
    assert [(bar["started_s"], bar["ended_s"]) for bar in bars if bar["state"] == "running"] == [(10.0, 400.0)]
    odd = next(lane["bars"] for lane in view["lanes"] if lane["worker"] == "odd")
    assert [(bar["started_s"], bar["ended_s"]) for bar in odd] == [(0.0, 400.0)]


def test_many_failures_that_a_retry_ran_again_are_dropped_in_one_pass() -> None:
    """The time does not grow with the square of the number of bundles."""
    again = TaskSet.from_indices(range(0, 20_000, 2))
    rerun = Retry((), (Cut(JOB.id, MAP, 1, 0, (), again),))
    index = TaskIndex(JOB, RetriedTasks((rerun,)))
    begun_s = time.process_time()
    index.add([record(n + 1, span(n, n + 1), failed=span(n, n + 1)) for n in range(10_000)], 1.0)
    took_s = time.process_time() - begun_s
    assert [start for start, _, _ in index.segments(MAP, TaskState.FAILED)] == list(range(1, 10_000, 2))
    assert took_s < 1.0
