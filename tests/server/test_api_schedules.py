"""Schedules over the HTTP API and its client, with a real server, a real manager, and the real clock."""

from __future__ import annotations

import time
from typing import Any

import pytest

from batchlab.core.errors import NotFound, Refused, UsageError
from tests.support.server.api import Rig, job


def described(**more: Any) -> dict[str, Any]:
    return {"name": "nightly", "cron": "0 2 * * *", "timezone": "Europe/Berlin", **more}


def test_schedule_is_created_shown_changed_and_removed(rig: Rig) -> None:
    client = rig.client
    view = client.add_schedule(described(), job())
    assert (view["name"], view["job"], view["state"]) == ("nightly", "sums", "active")
    assert view["next_s"] == client.coming("nightly", count=1)[0]["at_s"]
    times = client.coming("nightly", count=400)
    assert len(times) == 400
    assert {time["local"][11:16] for time in times} <= {"02:00", "03:00"}
    assert client.add_schedule(described(), job()) == view
    with pytest.raises(Refused, match="when it is due"):
        client.add_schedule(described(cron="0 3 * * *"), job())
    assert client.add_schedule(described(cron="0 3 * * *"), job(), replace=True)["cron"] == "0 3 * * *"
    assert client.pause_schedule("nightly")["state"] == "paused"
    with pytest.raises(Refused, match="paused already"):
        client.pause_schedule("nightly")
    assert client.resume_schedule("nightly")["next_s"]
    assert [schedule["name"] for schedule in client.schedules()["schedules"]] == ["nightly"]
    client.remove_schedule("nightly")
    assert client.schedules() == {"schedules": [], "notes": []}
    with pytest.raises(NotFound, match="schedule 'nightly' does not exist"):
        client.schedule("nightly")


def test_a_schedule_waits_for_another_schedule(rig: Rig) -> None:
    rig.submit(job())
    with pytest.raises(NotFound, match="schedule 'nightly' does not exist"):
        rig.client.add_schedule(described(name="report", after=["nightly"]), job())
    rig.client.add_schedule(described(), job())
    view = rig.client.add_schedule(described(name="report", after=["nightly:ended"]), job())
    assert view["after"] == ["nightly:ended"]
    first, run = rig.client.run_schedule("nightly", "mine"), rig.client.run_schedule("report", "mine")
    assert first["job"]
    assert run["job"]
    assert rig.client.job(run["job"])["after"] == [{"job": first["job"], "condition": "ended"}]
    rig.work(first["job"], 4, bad=[0])
    rig.work(run["job"], 4)
    assert rig.ended(run["job"])["state"] == "SUCCEEDED"


def test_manual_run_is_tagged_with_its_schedule(rig: Rig) -> None:
    rig.submit(job())  # the job's input exists
    rig.client.add_schedule(described(), job())
    run = rig.client.run_schedule("nightly", "mine")
    assert run["job"]
    assert rig.client.run_schedule("nightly", "mine") == run
    rig.work(run["job"], 4)
    assert rig.ended(run["job"])["tags"]["schedule"] == "nightly"
    rig.until(lambda: rig.client.schedule("nightly")["runs"][0]["result"] == "SUCCEEDED", "its result")
    (seen,) = rig.client.schedule("nightly")["runs"]
    assert (seen["by_hand"], seen["tasks"]) == (True, 4)


def test_one_time_schedule_runs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.submit(job())
    at_s = time.time() + 3600
    rig.client.add_schedule({"name": "once", "at_s": at_s}, job())
    monkeypatch.setattr(type(rig.manager.ports.clock), "now_s", lambda _: at_s + 1)
    rig.until(lambda: rig.client.schedule("once")["runs"], "the due time")
    view = rig.client.schedule("once")
    assert view["state"] == "done"
    assert view["runs"][0]["due_s"] == at_s


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cron": "0 25 * * *"}, "Bad hour"),
        ({"cron": ""}, "either a cron expression or a time"),
        ({"at_s": 4e9}, "either a cron expression or a time"),
        ({"timezone": "Mars"}, "does not exist"),
        ({"name": "../x"}, "body.schedule.name"),
        ({"missed": "never"}, "body.schedule.missed"),
        ({"missed": "run-all", "overlap": "replace"}, "replaces each by the next one"),
        ({"capacity": 0}, "body.schedule.capacity"),
        ({"due_param": "month"}, "not have a parameter 'month'"),
        ({"after": ["nightly"]}, "Schedule nightly would wait for itself"),
        ({"after": ["other:soon"]}, "'other:soon' is not a dependency"),
        ({"after": ["other", "other:ended"]}, "names schedule other twice"),
        ({"after": ["x"] * 21}, "body.schedule.after"),
        ({"surprise": 1}, "body.schedule.surprise"),
        ({"cron": "", "at_s": 1.0}, "The time is in the past."),
    ],
)
def test_invalid_schedule_is_a_clear_error(rig: Rig, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        rig.client.add_schedule(described(**changes), job())
    assert told in str(caught.value)
    assert rig.client.schedules()["schedules"] == []
