"""The grid over the HTTP API: its pools, their capacity, and the reasons why a job waits."""

from __future__ import annotations

import pytest

from batchlab.core.errors import NotFound, Refused, Unreachable, UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import GroupView, JobId, Pool, StageName
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.state import LiveJob
from tests.support.server.api import MAP, Rig, job, post

# --- The grid ------------------------------------------------------------------------------------


def test_the_grid_shows_pools_instances_and_queues(rig: Rig) -> None:
    name = rig.submit(job(tasks=2))
    bundles = rig.outstanding(name, 2)
    ids = rig.instances(1, "Pending")
    rig.beat(ids[0], bundles[0])
    rig.instances(1)
    grid = rig.client.grid()
    assert (grid["backend"], grid["leader"], grid["owner"]) == ("memory", True, "manager-1")
    (pool,) = grid["pools"]
    assert (pool["name"], pool["min"], pool["max"], pool["slots"]) == ("default", 0, 2, 2)
    assert (pool["backlog_tasks"], pool["held_by_hand"]) == (2, False)
    (instance,) = pool["instances"]
    assert (instance["worker"], instance["busy"], instance["held"]) == (f"w-{ids[0]}", 1, 1)
    depths = {queue["name"]: queue["visible"] for queue in grid["queues"]}
    assert depths.keys() == {"events", "tasks-default", "tasks-default-dead"}
    assert depths["tasks-default"] == 2


def test_capacity_is_held_by_hand_until_its_release(rig: Rig) -> None:
    pool = rig.client.scale("default", min=1, max=3, desired=2)
    assert (pool["min"], pool["max"], pool["desired"]) == (1, 3, 2)
    assert pool["held_by_hand"]
    rig.instances(2, "Pending")
    assert not rig.client.scale("default", auto=True)["held_by_hand"]
    assert rig.client.scale("default", auto=False)["held_by_hand"]
    causes = [activity["cause"] for activity in rig.client.activities(pool="default")]
    assert any("a user request" in cause for cause in causes)
    assert len(rig.client.activities(limit=1)) == 1


def test_capacity_outside_of_the_limits_is_refused_and_changes_nothing(rig: Rig) -> None:
    with pytest.raises(Refused, match="outside"):
        rig.client.scale("default", desired=9)
    with pytest.raises(Refused, match="min: 5"):
        rig.client.scale("default", min=5)
    with pytest.raises(UsageError, match="either"):
        rig.client.scale("default", desired=1, auto=True)
    with pytest.raises(NotFound, match="The pools are default"):
        rig.client.scale("gpu", desired=1)
    assert post(rig, "/v1/grid/pools/default", {"desird": 1}).status_code == 422
    (pool,) = rig.client.grid()["pools"]
    assert (pool["min"], pool["max"], pool["desired"]) == (0, 2, 0)
    assert not pool["held_by_hand"]


def test_a_refused_capacity_leaves_an_earlier_one_held(rig: Rig) -> None:
    rig.client.scale("default", desired=1)
    with pytest.raises(Refused):
        rig.client.scale("default", desired=9)
    assert rig.manager.autoscaler.user_capacity == {"default": 1}


def test_drain_ends_busy_instances_and_launches_none(rig: Rig) -> None:
    name = rig.submit(job(tasks=4))
    bundles = rig.outstanding(name, 4)
    rig.client.scale("default", min=1, desired=2)
    ids = rig.instances(2, "Pending")
    rig.beat(ids[0], bundles[0])
    rig.beat(ids[1])

    def protected() -> bool:
        instances = rig.client.grid()["pools"][0]["instances"]
        return [instance["protected"] for instance in instances if instance["id"] == ids[0]] == [True]

    rig.until(protected, "the protection of the busy")
    (pool,) = rig.client.drain("default")["pools"]
    assert (pool["min"], pool["desired"], pool["held_by_hand"]) == (0, 0, True)
    rig.instances(2, "Terminated")
    answer = rig.client.why(name)
    assert "a user has set pool default to 0 instances" in answer
    rig.client.scale("default", auto=True)
    rig.until(lambda: rig.client.grid()["pools"][0]["desired"], "the policy to ask for capacity")


def test_all_pools_are_drained_where_none_is_named() -> None:
    with Rig(pools=(Pool("a", min_size=1), Pool("b", min_size=1))) as rig:
        assert [pool["desired"] for pool in rig.client.drain()["pools"]] == [0, 0]
        with pytest.raises(NotFound):
            rig.client.drain("c")


def test_rebuilt_ledger_knows_every_job(rig: Rig) -> None:
    names = [rig.submit(job(token=token, tasks=1)) for token in "ab"]
    for name in names:
        rig.work(name, 1)
        rig.ended(name)
    before = rig.client.jobs()
    assert rig.client.rebuild() == 2
    assert rig.client.jobs() == before


def test_a_shutdown_is_passed_on_after_its_answer(rig: Rig) -> None:
    rig.client.shutdown()
    rig.until(lambda: rig.shutdowns == 1, "the shutdown")


# --- Why -----------------------------------------------------------------------------------------


def test_why_follows_a_job_through_its_life(rig: Rig) -> None:
    """At every moment, the answer contains the correct reason."""
    last = StageDef(StageName("sum"), after=(MAP,), gather="*", handler="m:g")
    name = rig.submit(job(tasks=1, after=[last], retry=RetryRule(attempts=2, backoff_s=600.0, jitter=0.0)))
    rig.outstanding(name, 1)
    (instance,) = rig.instances(1, "Pending")
    assert "pool default has 0 of max 2 instances in service. The group has launched 1 instance" in rig.client.why(name)
    rig.beat(instance)
    rig.instances(1)
    assert "on the way to 1 worker of pool default" in rig.client.why(name)
    rig.work(name, 1, bad=[0])
    answer = rig.client.why(name)
    assert "1 task waits for its retry, the next in 10 min" in answer
    assert "Stage sum waits for stage map (0 of 1 tasks ended)" in answer


def test_why_reports_failed_launches() -> None:
    """The failed launches of the fleet are the reason."""
    with Rig() as rig:
        rig.launcher.refuse = lambda _pool, _instance: "the image is missing"
        name = rig.submit(job(tasks=1))
        answer = rig.until(lambda: text if "missing" in (text := rig.client.why(name)) else "", "the failure")
        assert "The job waits for capacity: workers of pool default do not start" in answer
        assert "its launch failed: the image is missing" in answer


def test_why_reports_an_unreachable_backend(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> GroupView:
        raise Unreachable("Docker does not answer.")

    monkeypatch.setattr(rig.manager.autoscaler, "scale", broken)
    name = rig.submit(job(tasks=1))
    rig.outstanding(name, 1)
    rig.until(lambda: "Docker does not answer" in rig.client.why(name), "the trouble")
    live: LiveJob = rig.manager.lives[JobId(name)]
    assert live.trouble == ""
