"""The pure part of the protocol: follow-ups of an outcome, bundle sizes, retries, and messages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import BackendError, Malformed
from batchlab.core.job_definition import InputDef, JobDef, SplitBy, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Outcome, Ran, StageName, TaskSet
from batchlab.core.ports import Cut
from batchlab.core.pricing.request_costs import Requests, WorkerRequests
from batchlab.core.protocol import commit_keys, json_format, object_keys, settlement
from batchlab.core.protocol.messages import (
    Beat,
    CounterReport,
    Events,
    HeldBundle,
    TaskMessage,
    events_message,
    read_events_message,
    read_task_message,
    task_message,
)
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey
from batchlab.core.protocol.settlement import judge
from batchlab.core.retry_rule import RetryRule

A, B, C = StageName("a"), StageName("b"), StageName("c")
JOB = JobDef(
    JobId("j"),
    "j",
    (
        StageDef(A, handler="m:f", retry=RetryRule(attempts=3)),
        StageDef(B, after=(A,), handler="m:g"),
        StageDef(C, after=(B,), gather="*", handler="m:h"),
    ),
    1.0,
    InputDef(("raw/j/0",), SplitBy.LINES, 10, header=True),
)
BUNDLE = Bundle(JOB.id, A, TaskSet.span(0, 10))


def failed(task: int, kind: FailureKind = FailureKind.EXCEPTION, **kw: object) -> Ran:
    return Ran(task, 0.1, failure=Failure(task, kind, "no", **kw))  # type: ignore[arg-type]


def settled(ran: list[Ran], bundle: Bundle = BUNDLE, *, cancelled: bool = False) -> Outcome:
    return settlement.settle(
        JOB, bundle, ran, execution="x", worker="w", started_s=1.0, ended_s=2.0, cancelled=cancelled
    )


@given(st.lists(st.sampled_from(["ok", "no", "import"]), max_size=10), st.booleans(), st.integers(1, 3))
def test_every_task_of_a_bundle_is_settled_exactly_once(ends: list[str], cancelled: bool, attempt: int) -> None:
    """Each task ends in this bundle or is in exactly one follow-up of the same stage (I1 and I2)."""
    kinds = {"no": FailureKind.EXCEPTION, "import": FailureKind.IMPORT}
    ran = [Ran(i, 0.1, i) if e == "ok" else failed(i, kinds[e]) for i, e in enumerate(ends)]
    bundle = replace(BUNDLE, attempt=attempt)
    outcome = settled(ran, bundle, cancelled=cancelled)
    ways = [*outcome.succeeded, *outcome.cancelled]
    ways += [f.task for f in outcome.failed if f.final]
    same_stage = [f.bundle for f in outcome.follows if f.bundle.stage == A]
    ways += [task for b in same_stage for task in b.tasks]
    assert sorted(ways) == list(bundle.tasks)
    chained = [task for f in outcome.follows if f.bundle.stage == B for task in f.bundle.tasks]
    assert chained == ([] if cancelled else list(outcome.succeeded))
    if ran:
        assert bundle.id not in {b.id for b in same_stage}
        assert len({b.id for b in same_stage}) == len(same_stage)


def test_remaining_tasks_continue_as_halves_of_the_same_attempt() -> None:
    outcome = settled([Ran(0, 0.1, "v"), Ran(1, 0.1, "v")])
    rest = [f.bundle for f in outcome.follows if f.bundle.stage == A]
    assert [list(b.tasks) for b in rest] == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert {b.attempt for b in rest} == {1}


def test_a_retry_is_one_attempt_further_and_waits_for_its_backoff() -> None:
    outcome = settled([failed(i) for i in range(10)])
    (follow,) = outcome.follows
    assert follow.bundle.attempt == 2
    assert 0.75 <= follow.delay_s <= 1.25
    assert all(not f.final for f in outcome.failed)


def test_the_last_attempt_is_final() -> None:
    outcome = settled([failed(i) for i in range(10)], replace(BUNDLE, attempt=3))
    assert not outcome.follows
    assert all(f.final for f in outcome.failed)
    assert settlement.casualties(JOB, settlement.completion(outcome)) == {B: 10}


@pytest.mark.parametrize(
    ("rule", "failure", "again"),
    [
        (RetryRule(), Failure(0, FailureKind.EXCEPTION, ""), True),
        (RetryRule(), Failure(0, FailureKind.IMPORT, ""), False),
        (RetryRule(), Failure(0, FailureKind.RESULT, ""), False),
        (RetryRule(attempts=1), Failure(0, FailureKind.EXCEPTION, ""), False),
        (RetryRule(kinds=(FailureKind.TIMEOUT,)), Failure(0, FailureKind.EXCEPTION, ""), False),
        (RetryRule(kinds=(FailureKind.TIMEOUT,)), Failure(0, FailureKind.TIMEOUT, ""), True),
        (RetryRule(exit_codes=(75,)), Failure(0, FailureKind.EXIT, "", exit_code=75), True),
        (RetryRule(exit_codes=(75,)), Failure(0, FailureKind.EXIT, "", exit_code=1), False),
        (RetryRule(exceptions=("OSError",)), Failure(0, FailureKind.EXCEPTION, "", "OSError"), True),
        (RetryRule(exceptions=("OSError",)), Failure(0, FailureKind.EXCEPTION, "", "KeyError"), False),
        (RetryRule(exceptions=("OSError",)), Failure(0, FailureKind.TIMEOUT, ""), True),
    ],
)
def test_the_retry_rule(rule: RetryRule, failure: Failure, again: bool) -> None:
    assert rule.allows_retry(failure, 1) is again


def test_backoff_grows_and_is_reproducible() -> None:
    rule = RetryRule(backoff_s=2.0, factor=3.0, jitter=0.0, max_backoff_s=10.0)
    waits = [rule.wait_s(replace(BUNDLE, attempt=n)) for n in (1, 2, 3)]
    assert waits == [2.0, 6.0, 10.0]
    jittered = RetryRule(jitter=0.5)
    assert jittered.wait_s(BUNDLE) == jittered.wait_s(BUNDLE)
    shortest_s, longest_s = jittered.wait_range_s(1)
    assert shortest_s == 0.5 <= jittered.wait_s(BUNDLE) <= longest_s == 1.5


def test_a_bisected_bundle_touches_no_task_and_makes_the_next_worker_careful() -> None:
    outcome = settlement.bisect(BUNDLE, execution="x", worker="w", now_s=1.0)
    assert not outcome.succeeded
    assert not outcome.failed
    assert [f.bundle.losses for f in outcome.follows] == [1, 1]
    assert TaskSet.union(f.bundle.tasks for f in outcome.follows) == BUNDLE.tasks


# --- Sizes ---------------------------------------------------------------------------------------


@given(
    st.integers(0, 100_000),
    st.integers(1, 64),
    st.one_of(st.none(), st.floats(1e-6, 1e4)),
    st.one_of(st.none(), st.integers(1, 500)),
    st.integers(-5, 200),
)
def test_a_wave_never_cuts_more_than_is_left(
    left: int, slots: int, mean_s: float | None, fixed: int | None, room: int
) -> None:
    sizes = settlement.wave(left, slots, mean_s, fixed, room)
    assert sum(sizes) <= left
    assert all(size >= 1 for size in sizes)
    assert len(sizes) <= max(0, room)
    if left and room > 0:
        assert sizes


def test_long_task_counts_only_for_its_wait() -> None:
    assert settlement.weight_s(100, 0.5) == 0.5
    assert settlement.weight_s(1, 600.0) == settlement.BUDGET_S
    assert settlement.weight_s(2, 600.0) == 2 * settlement.BUDGET_S
    assert settlement.weight_s(100, 600.0) == 2 * settlement.BUDGET_S  # the last task was long
    assert settlement.weight_s(0, 0.0) == 0.0


def test_retained_tasks_form_a_bundle_and_the_rest_halves() -> None:
    bundle = replace(BUNDLE, tasks=TaskSet.span(0, 10))
    outcome = settlement.settle(
        JOB,
        bundle,
        [Ran(0, 0.1), Ran(1, 0.1)],
        execution="x",
        worker="w",
        started_s=0.0,
        ended_s=1.0,
        kept=TaskSet.span(2, 3),
    )
    same_stage = [f.bundle.tasks for f in outcome.follows if f.bundle.stage == bundle.stage]
    assert outcome.succeeded == TaskSet.span(0, 2)
    assert same_stage == [TaskSet.span(2, 3), TaskSet.span(3, 7), TaskSet.span(7, 10)]


def test_sizes_follow_the_measured_time_and_shrink_at_the_end() -> None:
    assert settlement.bundle_size(10_000, 2, 0.005, None) == 150  # the bundle has 0.75 s of work
    assert settlement.bundle_size(10_000, 2, 60.0, None) == 1
    assert settlement.bundle_size(120, 2, 0.005, None) == 30
    assert settlement.bundle_size(36, 2, 0.005, None) == 10  # a bundle has at least 50 ms of work
    assert settlement.bundle_size(6, 2, 0.005, None) == 3  # a bundle is smaller if a slot would stay empty
    assert settlement.bundle_size(1, 2, 0.005, None) == 1
    assert settlement.bundle_size(10_000, 2, None, None) == 1  # no task was measured yet
    assert settlement.bundle_size(10_000, 2, 5.0, 64) == 64  # the user sets this number


def test_first_wave_gives_each_slot_tasks_to_measure_and_to_continue() -> None:
    assert settlement.wave(2000, 2, None, None, 7) == [1, 1, 8, 8]
    assert settlement.wave(66, 2, None, None, 7) == [1, 1, 4, 4]
    assert settlement.wave(20, 2, None, None, 7) == [1, 1, 1, 1]  # each task may take ten minutes
    assert settlement.wave(3, 2, None, None, 7) == [1, 1, 1]
    assert settlement.wave(2000, 2, None, None, 3) == [1, 1, 8]
    assert settlement.wave(2000, 2, None, None, 0) == []


def test_the_last_fraction_of_a_second_is_cut_once_and_evenly() -> None:
    """If the last tasks were halved repeatedly, ten thousand tiny tasks would travel in a dozen bundles."""
    assert settlement.wave(9980, 2, 1e-6, None, 7) == [2495, 2495, 2495, 2495]  # CAP is 4096
    assert settlement.wave(20, 2, 0.005, None, 7) == [10, 10]
    assert settlement.wave(19, 2, 0.005, None, 7) == [10, 9]
    assert settlement.wave(19, 2, 0.005, None, 1) == [10]
    assert settlement.wave(21, 2, 0.005, None, 7)[:1] == [10]
    assert settlement.wave(20, 2, 0.005, 7, 7) == [7, 7, 6]  # the user sets this number


# --- Messages ------------------------------------------------------------------------------------


def test_messages_round_trip() -> None:
    ran = [Ran(0, 0.25, {"x": [1, None]}), failed(1), failed(2, FailureKind.IMPORT, error="E")]
    outcome = settled(ran)
    again = json_format.outcome_from_json(json_format.loads(json_format.to_bytes(json_format.outcome_to_json(outcome))))
    assert again == outcome
    done = settlement.completion(outcome)
    assert json_format.completion_from_json(json_format.completion_to_json(done)) == done
    assert json_format.job_from_json(json_format.loads(json_format.to_bytes(json_format.job_to_json(JOB)))) == JOB
    cut = Cut(JOB.id, A, 1, 3, (replace(BUNDLE, round=1),), TaskSet.span(10, 20), 20)
    assert json_format.cut_from_json(json_format.loads(json_format.to_bytes(json_format.cut_to_json(cut)))) == cut
    source = replace(BUNDLE, stage=B, source=BUNDLE.id, round=2, losses=1)
    message = TaskMessage(source, list(range(10)), 12.5, True, copy_s=7.5)
    assert read_task_message(task_message(message)) == message
    message = replace(message, key=CommitKey("0f" * 16))
    assert read_task_message(task_message(message)) == message
    first = replace(cut, round=0, seq=0, bundles=(BUNDLE,))
    for opening in (None, commit_keys.Opening([1, "a"]), commit_keys.Opening([1, "a"], first)):
        doc = json_format.loads(commit_keys.to_bytes(JOB, opening))
        assert (json_format.job_from_json(doc), commit_keys.opening_in(doc)) == (JOB, opening)
    held = HeldBundle("q", "r", JOB.id, A, BUNDLE.id, True)
    beat = Beat("w", "i", "p", 1.0, 2, 1, (held,), 7, key="instance-key")
    events = Events((done,), (object_keys.outcome(BUNDLE, UNSEALED),), (beat,), (outcome,))
    assert read_events_message(events_message(events)) == events
    with_gpus = replace(events, beats=(replace(beat, gpus=4, busy_gpus=3),))
    assert read_events_message(events_message(with_gpus)) == with_gpus
    asked = (WorkerRequests("w", "i", Requests(10, 2, 3, 4, 5), is_spot=True),)
    assert read_events_message(events_message(replace(events, requests=asked))).requests == asked


def test_optional_fields_are_omitted_from_messages() -> None:
    """A grid may have two versions during an update, so messages must not contain fields that the earlier version does
    not know. The exception is a cost cap."""
    assert "max_cost_usd" not in json_format.job_to_json(JOB)
    assert json_format.job_to_json(replace(JOB, max_cost_usd=5.0))["max_cost_usd"] == 5.0
    capped = replace(JOB, max_cost_usd=5.0)
    assert json_format.job_from_json(json_format.loads(json_format.to_bytes(json_format.job_to_json(capped)))) == capped
    beat = Beat("w", "i", "p", 1.0, 2, 1, (), 7)
    assert "gpus" not in json_format.loads(events_message(Events(beats=(beat,))))["h"][0]
    # A message of an earlier worker does not contain counts, and an earlier manager ignores counts.
    assert read_events_message(events_message(Events())).requests == ()
    assert "q" not in json_format.loads(events_message(Events()))


def test_earlier_releases_refuse_a_job_with_gpus() -> None:
    """A worker of an earlier release would run several tasks on one GPU."""
    plain, *_ = json_format.job_to_json(JOB)["stages"]
    assert "gpus" not in plain
    job = replace(JOB, stages=tuple(replace(stage, gpus=1) for stage in JOB.stages))
    doc = json_format.job_to_json(replace(job, commit_hash="0f" * 32))
    assert doc["needs"] == json_format.GPUS
    assert json_format.job_from_json(json_format.loads(json_format.to_bytes(doc))).stages == job.stages


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(BackendError, match="newer version"):
        json_format.loads('{"v": 99}')


# --- The failure policy --------------------------------------------------------------------------


def test_the_policy_counts_tasks_or_percent() -> None:
    from batchlab.core.model import StageCounts

    counts = [StageCounts(A, planned=100, succeeded=97, failed=3)]
    assert judge(JOB, [StageCounts(A, planned=5, succeeded=5)]).failed is False
    assert judge(JOB, counts).failed
    assert "3 of 100" in judge(JOB, counts).reason
    assert not judge(replace(JOB, max_failures=3), counts).failed
    assert not judge(replace(JOB, max_failures=3.0, max_failures_percent=True), counts).failed
    assert judge(replace(JOB, max_failures=2.9, max_failures_percent=True), counts).failed
    assert not judge(JOB, counts).stop
    assert judge(replace(JOB, fail_fast=True), counts).stop


def test_worker_reports_round_trip_and_survive_tampering() -> None:
    told = Events(counters=(CounterReport("w-1", {"retried.timeout": 2}),))
    assert read_events_message(events_message(told)) == told
    for mischief in ([["w", 3]], [["w", {"a": "x"}]], [["w"]], [["w", {"a": float("inf")}]]):
        body = json.dumps({"v": 1, "m": mischief})
        with pytest.raises(Malformed):
            read_events_message(body)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"v": 1,\n "n": x}', "expecting value at line 2, column 7"),
        (b'{"v": "1', "unterminated string starting at line 1, column 7"),
        (b"", "it is empty"),
        (b"\xff", "it is not UTF-8 text"),
        (b'{"v": 1, "n": "\\ud800"}', "it has an incomplete surrogate pair"),
        (b'{"v": NaN}', "NaN is not JSON"),
    ],
)
def test_the_error_of_unreadable_json_names_its_position(data: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=f"batchlab reads: {reason}[.]$"):
        json_format.loads(data)
