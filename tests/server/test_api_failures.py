"""Failed tasks by cause and by page, selective retries, and the details of one task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from batchlab.core.errors import NotFound, Refused, UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Failure, FailureKind, StageName
from batchlab.server.http import failures
from tests.support.server.api import MAP, Rig, job
from tests.support.waiting import until

NEXT = StageName("next")
SUM = StageName("sum")


def fail(task: int) -> Failure:
    """Return a failure with one cause for even tasks and another cause for odd tasks."""
    if task % 2:
        return Failure(task, FailureKind.EXIT, f"ended with {task}", "SystemExit", "", 3)
    return Failure(task, FailureKind.EXCEPTION, f"task {task} is bad", "ValueError", "Traceback")


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(failure=fail) as made:
        yield made


def failed(rig: Rig, name: str) -> list[int]:
    return sorted(failure["task"] for failure in rig.client.failures(name))


# --- Grouped -------------------------------------------------------------------------------------


def test_failures_of_one_cause_are_one_group(rig: Rig) -> None:
    name = rig.submit(job(token="groups", tasks=6))
    rig.work(name, 6, bad=[0, 1, 2, 4])
    even, odd = rig.client.failure_groups(name)
    assert (even["count"], even["stage"], even["first"]["task"]) == (3, "map", 0)
    assert (odd["count"], odd["first"]["exit_code"]) == (1, 3)
    of_one = rig.client.failures(name, fingerprint=odd["fingerprint"])
    assert [one["task"] for one in of_one] == [1]
    assert rig.client.failures(name, fingerprint="nothing") == []
    assert rig.client.failure_groups(rig.submit(job(token="none"))) == []


def test_failures_are_paged_once_each(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MAX_OUTCOMES_READ", 2)
    name = rig.submit(job(token="pages", tasks=12, bundle=3))
    rig.work(name, 4, bad=range(11))
    found: list[int] = []
    after: str | None = None
    for _ in range(20):
        page = rig.http.get(
            f"/v1/jobs/{name}/failures",
            params={"limit": 4, **({"after": after} if after else {})},
            headers={"Authorization": "Bearer correct horse"},
        ).json()
        assert len(page["failures"]) <= 4
        found += [one["task"] for one in page["failures"]]
        after = page["next"]
        if after is None:
            break
    assert sorted(found) == list(range(11))
    assert failed(rig, name) == list(range(11))
    assert [group["count"] for group in rig.client.failure_groups(name)] == [6, 5]


@pytest.mark.parametrize("after", ["", "x", "1", "1.", ".1", "-1.0", "1.-1", "9" * 30 + ".0", "²."])
def test_page_marker_is_validated(rig: Rig, after: str) -> None:
    name = rig.submit(job(token="ends"))
    answer = rig.http.get(
        f"/v1/jobs/{name}/failures", params={"after": after}, headers={"Authorization": "Bearer correct horse"}
    )
    assert answer.status_code == 422
    assert answer.json()["remedy"] == "Use `next` of the previous page."


# --- Partial retries -----------------------------------------------------------------------------


def test_only_the_chosen_cause_runs_again(rig: Rig) -> None:
    name = rig.submit(job(token="cause", tasks=4))
    rig.work(name, 4, bad=[0, 1, 2])
    rig.ended(name)
    even, _ = rig.client.failure_groups(name)
    assert rig.client.retry(name, fingerprints=[even["fingerprint"]])["round"] == 1
    rig.work(name, 2, bad=[2])
    view = rig.ended(name)
    stage = view["stages"][0]
    assert (view["state"], stage["succeeded"], stage["failed"]) == ("FAILED", 2, 2)
    assert failed(rig, name) == [1, 2]
    assert [group["count"] for group in rig.client.failure_groups(name)] == [1, 1]

    rig.client.retry(name)  # all remaining failures, of both rounds
    rig.work(name, 2)
    assert rig.ended(name)["state"] == "SUCCEEDED"
    assert failed(rig, name) == []
    assert rig.client.failure_groups(name) == []


def test_only_the_chosen_tasks_run_again_and_what_follows_from_them(rig: Rig) -> None:
    after = StageDef(NEXT, after=(MAP,), handler="m:f", bundle=1)
    total = StageDef(SUM, after=(NEXT,), gather="*", handler="m:f", bundle=1)
    one = replace(job(token="tasks", tasks=4, after=[after, total]), max_failures=1)
    name = rig.submit(one)
    rig.work(name, 4, bad=[0, 1, 2])
    rig.work(name, 1)
    assert rig.ended(name)["state"] == "FAILED"
    rig.client.retry(name, tasks={"map": [(0, 1), (2, 3)]})
    rig.work(name, 2)
    rig.work(name, 2)
    rig.work(name, 1)  # the sum over the tasks that the failure policy allows
    view = rig.ended(name)
    assert view["state"] == "SUCCEEDED"
    counts = {s["name"]: (s["succeeded"], s["failed"], s["cancelled"]) for s in view["stages"]}
    assert counts == {"map": (3, 1, 0), "next": (3, 0, 1), "sum": (1, 0, 0)}
    assert failed(rig, name) == [1]


def test_canceled_tasks_are_retried_with_any_selection(rig: Rig) -> None:
    one = replace(job(token="cancelled", tasks=6), fail_fast=True, max_failures=1)
    name = rig.submit(one)
    rig.work_on(name, 6, [0, 1], bad=[0, 1])
    view = rig.ended(name)
    assert (view["stages"][0]["failed"], view["stages"][0]["cancelled"]) == (2, 4)
    rig.client.retry(name, tasks={"map": [(0, 1)]})
    rig.work(name, 5)
    view = rig.ended(name)
    assert (view["state"], failed(rig, name)) == ("SUCCEEDED", [1])
    assert view["stages"][0]["succeeded"] == 5


def test_a_choice_that_would_stop_the_job_at_once_is_refused(rig: Rig) -> None:
    name = rig.submit(replace(job(token="fast", tasks=2, bundle=2), fail_fast=True))
    rig.work(name, 1, bad=[0, 1])
    rig.ended(name)
    with pytest.raises(Refused, match=r"stop job .* at once"):
        rig.client.retry(name, tasks={"map": [(0, 1)]})
    rig.client.retry(name, tasks={"map": [(0, 2)]})
    rig.work(name, 1)
    assert rig.ended(name)["state"] == "SUCCEEDED"


def test_a_choice_of_what_has_not_failed_is_refused(rig: Rig) -> None:
    name = rig.submit(job(token="wrong", tasks=3))
    rig.work(name, 3, bad=[0])
    rig.ended(name)
    with pytest.raises(Refused, match=r"Task map/1 of job .* has not failed"):
        rig.client.retry(name, tasks={"map": [(0, 2)]})
    with pytest.raises(Refused, match="does not have a stage nowhere"):
        rig.client.retry(name, tasks={"nowhere": [(0, 1)]})
    with pytest.raises(Refused, match="fingerprint 'x'"):
        rig.client.retry(name, fingerprints=["x"])
    with pytest.raises(Refused, match="does not match a failed task"):
        rig.client.retry(name, tasks={"map": [(5, 5)]})
    assert rig.client.job(name)["state"] == "FAILED"


def test_rebuilt_ledger_knows_the_outcomes(rig: Rig) -> None:
    """The rebuilt ledger equals the original one after a partial retry (I3)."""
    name = rig.submit(job(token="rebuilt", tasks=4))
    rig.work(name, 4, bad=[0, 1, 2])
    rig.ended(name)
    rig.client.retry(name, tasks={"map": [(0, 1)]})
    rig.work(name, 1, bad=[0])
    before = rig.ended(name)
    rig.client.rebuild()
    assert rig.client.job(name) == before
    assert failed(rig, name) == [0, 1, 2]
    rig.client.retry(name, tasks={"map": [(1, 2)]})
    rig.work(name, 1)
    rig.ended(name)
    assert failed(rig, name) == [0, 2]


def test_the_reason_of_a_job_names_a_task_that_has_not_succeeded_since(rig: Rig) -> None:
    name = rig.submit(job(token="reason", tasks=4))
    rig.work(name, 4, bad=[0, 2])
    assert "task map/0: " in rig.ended(name)["reason"]
    rig.client.retry(name, tasks={"map": [(0, 1)]})
    rig.work(name, 1)
    assert "1 of 4 in stage map); task map/2: " in rig.ended(name)["reason"]


def test_a_failure_that_the_policy_allows_cannot_be_retried(rig: Rig) -> None:
    name = rig.submit(replace(job(token="allowed", tasks=3), max_failures=1))
    rig.work(name, 3, bad=[0])
    assert rig.ended(name)["state"] == "SUCCEEDED"
    with pytest.raises(Refused, match="SUCCEEDED, although 1 task failed, so its tasks cannot run again"):
        rig.client.retry(name, tasks={"map": [(0, 1)]})


# --- One task ------------------------------------------------------------------------------------


def test_a_task_is_shown_with_its_input_and_log(rig: Rig) -> None:
    name = rig.submit(job(token="task", tasks=2))
    rig.work(name, 2, bad=[1])
    rig.ended(name)
    found = rig.client.task(name, "map", 1)
    assert (found["state"], found["attempt"], found["worker"]) == ("failed", 1, "w")
    assert found["failure"] == rig.client.failures(name)[0]
    assert found["log"] == "task 1, try 1\n"
    assert (found["input"], found["input_of"]) == ("data", "1, 4 bytes")
    good = rig.client.task(name, "map", 0)
    assert (good["state"], good["failure"]) == ("succeeded", None)


def test_last_attempt_of_a_retried_task_counts(rig: Rig) -> None:
    name = rig.submit(job(token="twice", tasks=1))
    rig.work(name, 1, bad=[0])
    first = rig.client.failures(name)[0]["seq"]
    rig.ended(name)
    rig.client.retry(name)
    rig.work(name, 1)
    rig.ended(name)
    assert rig.client.task(name, "map", 0)["state"] == "succeeded"
    path = f"/v1/jobs/{name}/stages/map/tasks/0?seq={first}"
    earlier = rig.http.get(path, headers={"Authorization": "Bearer correct horse"}).json()
    assert earlier["state"] == "failed"


def test_task_without_a_trace_is_not_found(rig: Rig) -> None:
    name = rig.submit(job(token="untold", tasks=1))
    # The task exists as soon as the stage is planned. Other tasks never exist.
    until(lambda: rig.client.job(name)["stages"][0]["planned"] == 1)
    assert rig.client.task(name, "map", 0)["state"] == "waiting"
    for stage, task in (("map", 5), ("nowhere", 0)):
        with pytest.raises(NotFound, match=f"Task {stage}/{task} of job"):
            rig.client.task(name, stage, task)
    with pytest.raises(UsageError):
        rig.client.task(name, "map", -1)


# --- Durations -----------------------------------------------------------------------------------


def test_remaining_time_is_estimated_after_a_measurement(rig: Rig) -> None:
    name = rig.submit(job(token="eta", tasks=4))
    assert rig.client.eta(name)["low_s"] is None
    assert "measured" in rig.client.eta(name)["text"]
    rig.work_on(name, 4, [0, 1])
    found = rig.client.eta(name)
    assert found["low_s"] is not None
    assert found["high_s"] is not None
    assert 0 <= found["low_s"] <= found["high_s"] < 60
    rig.client.pause(name)
    assert rig.client.eta(name)["text"] == "unknown: the job is paused"
    rig.client.cancel(name)
    rig.ended(name)
    assert "ended" in rig.client.eta(name)["text"]
