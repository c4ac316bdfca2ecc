"""Jobs over the HTTP API: views, controls, and the results of tasks."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import Malformed, NotFound, Refused, TooNew, UsageError
from batchlab.core.job_definition import Condition, Dependency, JobDef, NotifyDef
from batchlab.core.model import Control, JobId
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.core.protocol.messages import Tail, to_bytes
from batchlab.core.retry_rule import RetryRule
from batchlab.server.http import logs
from tests.support.server.api import Rig, job, later

TOPIC = "arn:aws:sns:eu-west-1:123456789012:jobs"

# --- Views and controls --------------------------------------------------------------------------


def test_a_long_poll_wakes_with_the_change(rig: Rig) -> None:
    name = rig.submit(job())
    rig.client.pause(name)
    view = rig.client.job(name)
    started_s = time.monotonic()
    answer = later(lambda: rig.client.job(name, version=view["version"], wait_s=30))
    rig.client.resume(name)
    assert answer()["version"] > view["version"]
    assert time.monotonic() - started_s < 8


def test_a_long_poll_without_news_answers_when_its_time_is_up(rig: Rig) -> None:
    name = rig.submit(job())
    rig.client.pause(name)
    view = rig.client.job(name)
    begun_s = time.monotonic()
    again = rig.client.job(name, version=view["version"], wait_s=0.15)
    assert again == view
    assert time.monotonic() - begun_s >= 0.15


def test_a_watcher_with_an_old_version_or_of_an_ended_job_is_answered_at_once(rig: Rig) -> None:
    name = rig.submit(job())
    begun_s = time.monotonic()
    rig.client.job(name, version=1, wait_s=30)
    rig.client.cancel(name)
    ended = rig.ended(name)
    assert ended["version"] == 0
    assert rig.client.job(name, version=0, wait_s=30) == ended
    assert time.monotonic() - begun_s < 8


def test_watcher_is_notified_when_a_worker_starts(rig: Rig) -> None:
    name = rig.submit(job(tasks=1))
    one = rig.outstanding(name, 1)
    (instance,) = rig.instances(1, "Pending")
    rig.beat(instance)
    rig.until(lambda: rig.client.job(name)["state"] == "STARTING", "the start")
    view = rig.client.job(name)
    answer = later(lambda: rig.client.job(name, version=view["version"], wait_s=30))
    rig.beat(instance, *one)
    assert answer()["stages"][0]["running"] == 1
    assert "runs 1 task in 1 bundle on 1 worker" in rig.client.why(name)


def test_job_runs_once_a_worker_has_begun_a_bundle(rig: Rig) -> None:
    """The state does not wait for the end of the first bundle, also after a pause."""
    name = rig.submit(job(tasks=2))
    first, second = rig.outstanding(name, 2)
    (instance,) = rig.instances(1, "Pending")
    rig.beat(instance)
    rig.until(lambda: rig.client.job(name)["state"] == "STARTING", "the start")
    rig.beat(instance, first, second)
    view = rig.client.job(name)
    (stage,) = view["stages"]
    assert (view["state"], stage["running"], stage["succeeded"]) == ("RUNNING", 2, 0)
    assert rig.client.pause(name)["state"] == "PAUSED"
    assert rig.client.resume(name)["state"] == "RUNNING"
    rig.work(name, 2)
    assert rig.ended(name)["state"] == "SUCCEEDED"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_cost_usd": 2e11}, "`max_cost_usd` is 2"),
        ({"notify": (NotifyDef("sns", TOPIC, failures=1 << 54),)}, "number of failures must be 1 to"),
        ({"notify": (NotifyDef("sns", TOPIC, stuck_s=2e11),)}, "seconds without progress 1 to"),
    ],
)
def test_number_that_no_reader_of_the_stored_job_accepts_is_refused(
    rig: Rig, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        rig.client.submit(replace(job(), **changes))
    with pytest.raises((TooNew, Malformed)):
        json_format.job_from_json(json_format.job_to_json(replace(job(), **changes)))


def test_a_job_is_followed_to_its_end(rig: Rig) -> None:
    name = rig.submit(job(tasks=3))
    rig.work(name, 3)
    view = rig.ended(name)
    assert (view["state"], view["reason"]) == ("SUCCEEDED", "")
    (stage,) = view["stages"]
    assert (stage["planned"], stage["succeeded"], stage["running"]) == (3, 3, 0)
    assert rig.client.why(name) == "The job ended SUCCEEDED: 3 tasks succeeded."


def test_a_cancelled_job_takes_no_second_cancellation(rig: Rig) -> None:
    name = rig.submit(job())
    assert rig.client.cancel(name)["id"] == name
    # The cancellation is acknowledged, so no worker may start a task any more (I4).
    control = rig.run(rig.objects.get(f"jobs/{name}/control.json"))
    assert json_format.control_from_bytes(control).control.value == "cancel"
    assert rig.ended(name)["state"] == "CANCELLED"
    for verb in (rig.client.cancel, rig.client.pause, rig.client.resume):
        with pytest.raises(Refused, match="is not running"):
            verb(name)


def test_a_job_that_only_the_bucket_has_can_be_cancelled(rig: Rig) -> None:
    made = job()
    with pytest.raises(NotFound):
        rig.client.cancel(made.id)
    rig.run(rig.objects.put(object_keys.spec(made.id), commit_keys.to_bytes(made)))
    with pytest.raises(NotFound):
        rig.client.job(made.id)
    assert rig.client.cancel(made.id)["id"] == made.id
    assert rig.ended(made.id)["state"] == "CANCELLED"


def test_paused_job_is_shown_as_paused_and_resumes(rig: Rig) -> None:
    name = rig.submit(job(tasks=1))
    rig.outstanding(name, 1)
    assert rig.client.pause(name)["state"] == "PAUSED"
    assert "A user has paused the job" in rig.client.why(name)
    assert rig.client.resume(name)["state"] == "RUNNABLE"
    rig.work(name, 1)
    assert rig.ended(name)["state"] == "SUCCEEDED"


def test_a_retry_runs_what_failed_and_forgets_its_failures(rig: Rig) -> None:
    """Only the failed tasks run again."""
    name = rig.submit(job(tasks=3))
    with pytest.raises(Refused, match="still"):
        rig.client.retry(name)
    rig.work(name, 3, bad=[0, 2])
    assert rig.ended(name)["state"] == "FAILED"
    failures = rig.client.failures(name)
    assert [failure["task"] for failure in failures] == [0, 2]
    assert failures[0]["fingerprint"] == failures[1]["fingerprint"]
    assert failures[0] == {
        "seq": failures[0]["seq"],
        "stage": "map",
        "task": 0,
        "attempt": 1,
        "kind": "exception",
        "reason": "task 0 is bad",
        "error": "ValueError",
        "traceback": "Traceback",
        "exit_code": None,
        "fingerprint": failures[1]["fingerprint"],
    }
    assert len(rig.client.failures(name, limit=1)) == 1
    assert "task 0 is bad" in rig.client.why(name)

    assert rig.client.retry(name)["round"] == 1
    rig.work(name, 2, bad=[2])
    assert rig.ended(name)["state"] == "FAILED"
    assert [failure["task"] for failure in rig.client.failures(name)] == [2]


# --- Dependencies --------------------------------------------------------------------------------


def _next(name: str, condition: Condition = Condition.SUCCEEDED, token: str = "next") -> JobDef:
    return replace(job("next", token, tasks=1), after=(Dependency(JobId(name), condition),))


def test_a_job_waits_for_another_job_and_then_runs(rig: Rig) -> None:
    first = rig.submit(job(tasks=2))
    waiting = rig.submit(_next(first))
    rig.until(lambda: rig.client.job(waiting)["state"] == "PENDING", "the job waits")
    view = rig.client.job(waiting)
    assert view["after"] == [{"job": first, "condition": "succeeded"}]
    assert f"The job waits for job {first}, which is " in rig.client.why(waiting)
    assert rig.client.eta(waiting)["text"] == "unknown: the job has not started"
    with pytest.raises(Refused, match="only an ended job can be deleted"):
        rig.client.delete(first)
    rig.work(first, 2)
    rig.ended(first)
    with pytest.raises(Refused, match=f"Job {waiting} depends on job {first}"):
        rig.client.delete(first)
    rig.work(waiting, 1)
    assert rig.ended(waiting)["state"] == "SUCCEEDED"
    rig.client.delete(first)


def test_a_job_fails_with_the_reason_if_its_dependency_fails(rig: Rig) -> None:
    first = rig.submit(job(tasks=1))
    waiting, anyway = rig.submit(_next(first)), rig.submit(_next(first, Condition.ENDED, "anyway"))
    rig.work(first, 1, bad=[0])
    told = f"job {first} is a dependency that must succeed, and ended FAILED"
    view = rig.ended(waiting)
    assert (view["state"], view["reason"]) == ("FAILED", told)
    assert told in rig.client.why(waiting)
    with pytest.raises(Refused, match=f"{first} is a dependency that must succeed, and ended FAILED"):
        rig.client.retry(waiting)
    with pytest.raises(Refused, match=f"`batchlab job retry {first}` runs its remaining tasks"):
        rig.client.submit(_next(first, token="late"))
    rig.work(anyway, 1)
    assert rig.ended(anyway)["state"] == "SUCCEEDED"


def test_dependencies_that_cannot_be_are_refused(rig: Rig) -> None:
    first = rig.submit(job(tasks=1))
    with pytest.raises(Refused, match="Job no-such-job is a dependency and does not exist on this grid"):
        rig.client.submit(_next("no-such-job"))
    with pytest.raises(UsageError, match="cannot be a dependency"):
        rig.client.submit(_next(_next(first).id))
    many = tuple(Dependency(JobId(f"j{n}")) for n in range(21))
    with pytest.raises(UsageError, match="depends on 21 jobs"):
        rig.client.submit(replace(_next(first), after=many))
    with pytest.raises(UsageError, match="twice"):
        rig.client.submit(replace(_next(first), after=(Dependency(JobId(first)),) * 2))


# --- Results of tasks ----------------------------------------------------------------------------


def test_outcomes_are_listed_once_in_fold_order(rig: Rig) -> None:
    name = rig.submit(job(tasks=4))
    rig.work(name, 4, bad=[1])
    rig.ended(name)
    seen: list[Any] = []
    after, ended = None, False
    while not ended:
        page = rig.client.outcomes(name, after=after, limit=3, wait_s=5)
        seen += page["outcomes"]
        after, ended = seen[-1]["seq"], page["ended"]
    assert [one["seq"] for one in seen] == sorted({one["seq"] for one in seen})
    by_task = sorted(seen, key=lambda one: one["bundle"])
    tasks = [(one["tasks"], one["failed"]) for one in by_task]
    assert tasks == [([[0, 1]], 0), ([], 1), ([[2, 3]], 0), ([[3, 4]], 0)]
    outcome = json_format.outcome_from_json(json_format.loads(rig.run(rig.objects.get(by_task[2]["key"]))))
    assert outcome.values == (2,)
    assert rig.client.outcomes(name, stage="other")["outcomes"] == []


def test_waiting_reader_wakes_at_the_next_outcome(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    rig.outstanding(name, 2)
    assert rig.client.outcomes(name) == {"outcomes": [], "ended": False}
    answer = later(lambda: rig.client.outcomes(name, wait_s=30))
    rig.work(name, 2)
    page = answer()
    assert page["outcomes"]
    last = rig.client.outcomes(name)["outcomes"][-1]["seq"]
    assert rig.client.outcomes(name, after=last, wait_s=30) == {"outcomes": [], "ended": True}


def test_log_of_every_attempt_is_stored(rig: Rig) -> None:
    """The log of a failed attempt is kept, not only that of the last attempt."""
    name = rig.submit(job(tasks=2, retry=RetryRule(attempts=2, backoff_s=0.0)))
    rig.work(name, 2, bad=[1])
    rig.work(name, 1)
    rig.ended(name)
    assert [(log["attempt"], log["text"]) for log in rig.client.logs(name, task=1)] == [
        (1, "task 1, try 1\n"),
        (2, "task 1, try 2\n"),
    ]
    every = rig.client.logs(name, stage="map")
    assert [(log["task"], log["attempt"]) for log in every] == [(0, 1), (1, 1), (1, 2)]
    assert len(rig.client.logs(name, limit=2)) == 2
    assert rig.client.logs(name, failed=True) == []
    assert rig.client.logs(name, since_s=3600.0)
    assert [log["state"] for log in every] == ["SUCCEEDED", "RETRIED", "SUCCEEDED"]


def test_logs_are_streamed(rig: Rig) -> None:
    name = rig.submit(job(tasks=3, retry=RetryRule(attempts=1)))
    rig.outstanding(name, 3)
    answer = later(lambda: rig.client.logs_after(name, None, wait_s=30))
    rig.work(name, 3, bad=[1])
    first = answer()
    seq, texts = first["seq"], [log["text"] for log in first["logs"]]
    while not (page := rig.client.logs_after(name, seq, wait_s=5))["ended"]:
        texts += [log["text"] for log in page["logs"]]
        seq = page["seq"]
    assert sorted(texts) == [f"task {task}, try 1\n" for task in range(3)]
    failed = rig.client.logs_after(name, None, failed=True)["logs"]
    assert [(log["task"], log["state"]) for log in failed] == [(1, "FAILED")]
    # The output ends with the end of the task, not only with the end of the job.
    one = rig.client.logs_after(name, None, task=2)
    assert (one["ended"], [log["task"] for log in one["logs"]]) == (True, [2])


def test_log_answer_is_bounded_and_reports_omissions(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = rig.submit(job(tasks=4, bundle=2))
    rig.work(name, 2)
    size = len("task 0, try 1\n")
    monkeypatch.setattr(logs, "MAX_BYTES", size * 3)
    texts = {log["task"]: log["text"] for log in rig.client.logs(name)}
    assert [texts[n] for n in (0, 1, 2)] == [f"task {n}, try 1\n" for n in (0, 1, 2)]
    assert "This log is omitted" in texts[3]
    monkeypatch.setattr(logs, "MAX_BYTES", size)
    assert [log["text"] for log in rig.client.logs(name, task=3)] == ["task 3, try 1\n"]
    monkeypatch.setattr(logs, "MAX_BYTES", size * 2)
    # The first bundle fills the answer to the last byte, but the second bundle is still named.
    texts = {log["task"]: log["text"] for log in rig.client.logs(name)}
    assert [texts[n] for n in (0, 1)] == [f"task {n}, try 1\n" for n in (0, 1)]
    assert all("This log is omitted" in texts[n] for n in (2, 3))
    # With both options, nothing is left out.
    monkeypatch.setattr(logs, "MAX_BYTES", size * 4)
    assert [log["text"] for log in rig.client.logs(name)] == [f"task {n}, try 1\n" for n in range(4)]
    monkeypatch.setattr(logs, "MAX_BYTES", size * 2)
    # A client that follows the log gets the rest in the next answer.
    followed: list[str] = []
    seq = None
    while not (page := rig.client.logs_after(name, seq))["ended"] and page["logs"]:
        assert len(page["logs"]) == 2
        followed += [log["text"] for log in page["logs"]]
        seq = page["seq"]
    assert sorted(followed) == [f"task {n}, try 1\n" for n in range(4)]


def test_live_logs_are_requested_through_the_control_object(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    bundles = rig.outstanding(name, 2)
    key = object_keys.control(JobId(name))

    def word() -> json_format.ControlCommand:
        return json_format.control_from_bytes(rig.run(rig.objects.get(key)))

    tails = [Tail("map", o.bundle.tasks.first, 1, 0, o.bundle.id, "x", 0, 5, "hello") for o in bundles]
    rig.run(rig.objects.put(object_keys.tail(JobId(name), "w-1"), to_bytes(tails)))
    rig.until(lambda: rig.client.tails(name)["tails"], "the tails")
    assert replace(word(), tail_s=None) == json_format.ControlCommand(Control.RUN, tail=1)
    # The number of clients and of requests does not matter.
    for _ in range(20):
        rig.client.tails(name)
    assert word().tail == 1
    rig.client.pause(name)
    rig.client.resume(name)
    assert word() == json_format.ControlCommand(Control.RUN)
    # The live log of a bundle that has ended is not reported.
    rig.work(name, 2)
    rig.ended(name)
    assert rig.client.tails(name)["tails"] == []
    with pytest.raises(NotFound):
        rig.client.tails("nobody-0123456789")


def test_asking_for_tails_never_undoes_a_cancellation(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    rig.outstanding(name, 2)
    key = object_keys.control(JobId(name))
    # The outcome is of another leader, and not yet in the ledger.
    cancel = json_format.control_to_bytes(json_format.ControlCommand(Control.CANCEL, reason="enough"))
    rig.run(rig.objects.put(key, cancel))
    rig.client.tails(name)
    assert rig.run(rig.objects.get(key)) == cancel
