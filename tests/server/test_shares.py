"""The fair-share policy over the HTTP API and its client, and the reason that a job waits for its share."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import Refused, UsageError
from batchlab.core.model import JobId
from batchlab.server import metrics
from tests.support.server.api import Rig, job
from tests.support.server.page import Visitor


def test_policy_is_set_shown_and_removed(rig: Rig) -> None:
    client = rig.client
    assert client.shares() == {"policy": None, "shares": []}
    client.set_share({"identifier": "research", "weight": 0.5})
    client.set_share({"identifier": "research", "max_slots": 3})
    view = client.set_share_policy({"decay_s": 3600.0, "reservation": 10})
    entry = {"identifier": "research", "weight": 0.5, "max_slots": 3}
    assert view["policy"] == {"decay_s": 3600.0, "reservation": 10, "shares": [entry]}
    assert [(one["share"], one["pool"], one["weight"]) for one in view["shares"]] == [("research", "default", 0.5)]
    assert client.set_share({"identifier": "research", "max_slots": 0})["shares"][0]["max_slots"] is None
    with pytest.raises(UsageError, match="overlap"):
        client.set_share({"identifier": "re*", "weight": 2.0})
    with pytest.raises(UsageError, match="no entry for share 'other'"):
        client.remove_share("other")
    assert client.remove_share("research")["shares"] == []
    assert client.remove_share(None) == {"policy": None, "shares": []}


@pytest.mark.parametrize(
    "entry",
    [{"identifier": "a b"}, {"identifier": "a", "weight": 0}, {"identifier": "a", "max_slots": -1}, {"weight": 1}],
)
def test_impossible_entries_are_refused(rig: Rig, entry: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        rig.client.set_share(entry)
    assert rig.client.shares()["policy"] is None


def test_a_job_waits_for_its_share(rig: Rig) -> None:
    """The limit of one slot lets only one bundle of the share be outstanding."""
    rig.client.set_share({"identifier": "research", "max_slots": 1})
    name = rig.submit(replace(job(), share="research"))
    assert rig.client.job(name)["share"] == "research"
    rig.outstanding(name, 1)
    (view,) = [one for one in rig.client.shares()["shares"] if one["share"] == "research"]
    assert (view["slots"], view["jobs"]) == (1, 1)
    live = rig.manager.lives[JobId(name)]
    reason = rig.manager.fair_share.wait_reason(live, "default")
    assert reason == "share research uses 1 of at most 1 slot in pool default"
    rig.client.remove_share(None)
    rig.until(lambda: len(live.all_outstanding()) > 1, "the bundles that the limit prevented")


def test_an_impossible_share_identifier_is_refused(rig: Rig) -> None:
    with pytest.raises(UsageError, match="not a share identifier"):
        rig.submit(replace(job(), share="two words"))


def test_a_manager_without_shares_refuses_a_policy(rig: Rig) -> None:
    rig.manager.fair_share.is_enabled = False
    with pytest.raises(Refused, match="does not divide its pools"):
        rig.client.set_share({"identifier": "a", "weight": 0.5})


def test_the_page_of_the_grid_shows_the_shares_of_a_policy(rig: Rig) -> None:
    visitor = Visitor(rig)
    with visitor.http:
        visitor.log_in()
        assert 'id="shares"' not in visitor.get("/grid").text
        rig.client.set_share({"identifier": "research", "weight": 0.5, "max_slots": 1})
        rig.outstanding(rig.submit(replace(job(), share="research")), 1)
        (row,) = re.findall(r"<tr>\s*<td class=\"break\">research<.*?</tr>", visitor.get("/grid").text, re.DOTALL)
        (view,) = rig.client.shares()["shares"]
        cells = re.findall(r"<td[^>]*>([^<]*)", row)
        assert cells == ["research", "default", "0.5", "0", "1", "1", str(view["waiting_tasks"])]
        assert view["waiting_tasks"] > 0


def test_metrics_count_shares_by_the_entries_of_the_policy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(name: str) -> dict[str, float]:
        found = [one for one in metrics.families(rig.manager, "memory") if one.name == f"batchlab_share_{name}"]
        return {sample.labels["share"]: sample.value for one in found for sample in one.samples}

    assert samples("waiting_tasks") == {}
    rig.client.set_share({"identifier": "team*", "max_slots": 1})
    for number, share in enumerate(("teama", "teamb", "stranger")):
        rig.outstanding(rig.submit(replace(job(f"j{number}", f"t{number}"), share=share)), 1)
    slots = {one["share"]: one["slots"] for one in rig.client.shares()["shares"]}
    assert samples("outstanding_slots") == {"default": 0, "team*": 2, "*": slots["stranger"]}
    assert samples("waiting_tasks")["team*"] > 0
    assert set(samples("use_slot_seconds")) == {"default", "team*", "*"}
    monkeypatch.setattr(metrics, "MAX_SHARES", 2)
    assert set(samples("outstanding_slots")) == {"default", "*"}
    assert samples("outstanding_slots")["*"] == 2 + slots["stranger"]


def test_changes_of_the_policy_are_recorded_with_their_share(rig: Rig) -> None:
    rig.client.set_share({"identifier": "research", "weight": 0.5})
    rig.client.set_share_policy({"reservation": 10})
    with pytest.raises(UsageError):
        rig.client.remove_share("other")
    rig.client.remove_share("research")
    rig.client.remove_share(None)
    rig.client.drain()
    rig.client.drain("default")
    records = [one for one in rig.client.audit(outcome="allowed") if one["action"] != "job submit"]
    assert [(one["action"], one["object"], one["reason"]) for one in reversed(records)] == [
        ("share set", "research", "weight 0.5"),
        ("share policy", "", "reservation 10"),
        ("share remove", "other", ""),
        ("share remove", "research", ""),
        ("share remove", "the whole policy", ""),
        ("grid drain", "all pools", ""),
        ("grid drain", "default", ""),
    ]
    (failed,) = rig.client.audit(outcome="failed")
    assert failed["reason"].startswith("422: The policy has no entry")
