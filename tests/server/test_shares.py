"""The fair-share policy over the HTTP API and its client, and the reason that a job waits for its share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import Refused, UsageError
from batchlab.core.model import JobId
from batchlab.core.protocol import object_keys
from tests.support.server.api import Rig, job


def test_policy_is_set_shown_and_removed(rig: Rig) -> None:
    client = rig.client
    assert client.shares() == {"policy": None, "shares": []}
    client.set_share({"identifier": "research", "weight": 0.5})
    client.set_share({"identifier": "research", "max_slots": 3})
    view = client.set_share_policy({"decay_s": 3600.0, "reservation": 10})
    entry = {"identifier": "research", "weight": 0.5, "max_slots": 3}
    assert view["policy"] == {"decay_s": 3600.0, "reservation": 10, "only_listed": False, "shares": [entry]}
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


def test_a_job_may_name_only_a_listed_share(rig: Rig) -> None:
    rig.client.set_share({"identifier": "research"})
    rig.client.set_share_policy({"only_listed": True})
    with pytest.raises(UsageError, match="does not list share 'resaerch'"):
        rig.submit(replace(job(), share="resaerch"))
    rig.submit(replace(job(), share="research"))
    rig.submit(job())


def test_an_unreadable_policy_is_not_replaced(rig: Rig) -> None:
    """A later release may have written the policy, so only its removal replaces it."""
    fair_share, objects = rig.manager.fair_share, rig.manager.ports.objects
    unreadable = b'{"v":1,"policy":{"decay_s":"long"}}'
    rig.run(objects.put(object_keys.SHARES, unreadable))
    rig.run(fair_share.load())
    for _ in range(2):
        with pytest.raises(Refused, match="cannot be read"):
            rig.client.set_share({"identifier": "research", "weight": 0.5})
        assert rig.client.shares()["policy"] is None
    assert rig.run(objects.get(object_keys.SHARES)) == unreadable
    rig.client.remove_share(None)
    assert rig.client.set_share({"identifier": "research"})["policy"] is not None


def test_a_policy_that_another_manager_made_unreadable_is_not_replaced(rig: Rig) -> None:
    rig.client.set_share({"identifier": "research", "weight": 0.5})
    rig.run(rig.manager.ports.objects.put(object_keys.SHARES, b"{}"))
    with pytest.raises(Refused, match="cannot be read"):
        rig.client.set_share({"identifier": "research", "weight": 2.0})
    assert rig.client.shares()["shares"][0]["weight"] == 0.5


def test_an_impossible_share_identifier_is_refused(rig: Rig) -> None:
    with pytest.raises(UsageError, match="not a share identifier"):
        rig.submit(replace(job(), share="two words"))


def test_a_manager_without_shares_refuses_a_policy(rig: Rig) -> None:
    rig.manager.fair_share.is_enabled = False
    with pytest.raises(Refused, match="does not divide its pools"):
        rig.client.set_share({"identifier": "a", "weight": 0.5})
