"""The fair-share policy over the HTTP API and its client, and the reason that a job waits for its share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import Refused, UsageError
from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.core.model import JobId
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.users import Role
from batchlab.server import metrics
from batchlab.server.http.permissions import RULES, Rule
from batchlab.server.web import views
from tests.support.cli import runner
from tests.support.server.api import TOKEN, Rig, job
from tests.support.server.page import NASTY, Visitor
from tests.support.server.users import add


def test_policy_is_set_shown_and_removed(rig: Rig) -> None:
    client = rig.client
    assert client.shares() == {"policy": None, "shares": [], "problem": ""}
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
    assert client.remove_share(None) == {"policy": None, "shares": [], "problem": ""}


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
    early = rig.submit(replace(job("early", "early"), share="other"))
    rig.client.set_share({"identifier": "research"})
    rig.client.set_share_policy({"only_listed": True})
    with pytest.raises(UsageError, match="does not list the share 'resaerch'"):
        rig.submit(replace(job(), share="resaerch"))
    rig.submit(replace(job(), share="research"))
    rig.submit(job("plain", "plain"))
    assert rig.submit(replace(job("early", "early"), share="other")) == early
    rig.client.set_share_policy({"only_listed": False})
    rig.submit(replace(job("typo", "typo"), share="resaerch"))


UNREADABLE = [b'{"v":1,"policy":{"decay_s":"long"}}', b'{"v":99,"policy":null}', b"{}", b"\xff"]


@pytest.mark.parametrize("content", UNREADABLE)
def test_an_unreadable_policy_stays_stored_and_the_last_policy_in_force(rig: Rig, content: bytes) -> None:
    """A manager of a later release may have written the stored policy, and may still need it."""
    fair_share, objects = rig.manager.fair_share, rig.manager.ports.objects
    rig.client.set_share({"identifier": "research", "weight": 0.5})
    rig.run(objects.put(object_keys.SHARES, content))
    for is_known in (False, True):  # the manager learns of the other policy from its write, or when it leads again
        if is_known:
            rig.run(fair_share.load())
        with pytest.raises(Refused, match="cannot read the stored fair-share policy") as refusal:
            rig.client.set_share({"identifier": "research", "weight": 2.0})
        assert "share remove --all" in (refusal.value.remedy or "")
        view = rig.client.shares()
        assert view["problem"].endswith("so the last policy that it has read stays in force.")
        assert [one["weight"] for one in view["shares"]] == [0.5]
        assert rig.run(objects.get(object_keys.SHARES)) == content
    rig.submit(replace(job(), share="research"))
    assert rig.client.remove_share(None)["policy"] is None
    assert rig.client.set_share({"identifier": "research"})["problem"] == ""


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_user_restores_a_policy_after_an_unreadable_one(rig: Rig, content: bytes) -> None:
    objects = rig.manager.ports.objects
    rig.run(objects.put(object_keys.SHARES, content))
    rig.run(rig.manager.fair_share.load())
    view = rig.client.shares()
    assert (view["policy"], view["problem"].partition(", ")[2]) == (None, "so no policy is in force.")
    rig.outstanding(rig.submit(replace(job(tasks=1), share="research")), 1)
    with pytest.raises(Refused, match="cannot read"):
        rig.client.set_share_policy({"reservation": 10})
    policy = SharePolicy((ShareAttributes("research", 0.5),))
    rig.run(objects.put(object_keys.SHARES, json_format.to_bytes({"v": 1, "policy": policy.to_json()})))
    stored = rig.client.set_share_policy({"reservation": 10})["policy"]
    assert stored is not None
    assert (stored["reservation"], stored["shares"][0]["weight"]) == (10, 0.5)


def test_running_slots_and_waiting_bundles_of_shares(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle that two workers run counts once. Bundles that a worker only holds, and ended bundles, do not run."""
    monkeypatch.setenv("BATCHLAB_URL", rig.url)
    monkeypatch.setenv("BATCHLAB_TOKEN", TOKEN)
    run = runner(monkeypatch, capsys)

    def listed() -> dict[str, dict[str, str]]:
        """Return the rows of `share list` by share, after a comparison with the output of `--json`."""
        code, out, err = run("share", "list")
        assert (code, err) == (0, "")
        head, *rows = (re.split("  +", line) for line in out.splitlines()[2:])
        found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
        code, out, _ = run("share", "list", "--json")
        assert code == 0
        for view in json.loads(out)["shares"]:
            row = found[view["share"]]
            assert row["RUNNING"] == str(view["running_slots"])
            assert row["WAITING BUNDLES"] == str(view["waiting_bundles"])
            assert row["WAITING TASKS"] == str(view["waiting_tasks"])
        return found

    rig.client.set_share({"identifier": "research", "weight": 0.5, "max_slots": 6})
    large = rig.submit(replace(job("large", "large", tasks=4, slots=2), share="research"))
    small = rig.submit(job("small", "small", tasks=2))
    first, second, third = rig.outstanding(large, 3)
    plain, _ = rig.outstanding(small, 2)
    one, other = rig.instances(2, "Pending")
    rig.beat(one, first, plain)
    rig.beat(other, first, second, waits=[third])
    rows = listed()
    names = ("LIMIT", "SLOTS", "RUNNING", "JOBS", "WAITING BUNDLES", "WAITING TASKS")
    assert [rows["research"][name] for name in names] == ["6", "6", "4", "1", "1", "1"]
    assert [rows["default"][name] for name in names] == ["-", "2", "1", "1", "1", "0"]
    rig.work(small, 2)
    rig.ended(small)
    assert listed()["default"]["RUNNING"] == "0"


def test_an_impossible_share_identifier_is_refused(rig: Rig) -> None:
    with pytest.raises(UsageError, match="not a share identifier"):
        rig.submit(replace(job(), share="two words"))


def test_a_manager_without_shares_refuses_a_policy(rig: Rig) -> None:
    rig.manager.fair_share.is_enabled = False
    with pytest.raises(Refused, match="does not divide its pools"):
        rig.client.set_share({"identifier": "a", "weight": 0.5})


@pytest.fixture
def visitor(rig: Rig) -> Iterator[Visitor]:
    made = Visitor(rig)
    with made.http:
        made.log_in()
        yield made


def _rows(text: str) -> list[list[str]]:
    """Return the texts of the cells in the table of shares on the page of the grid."""
    table = re.search(r'aria-labelledby="shares">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert table
    rows = re.findall(r"<tr>(.*?)</tr>", table[1], re.DOTALL)
    return [re.findall(r"<td[^>]*>([^<]*)", row) for row in rows]


def test_the_page_shows_the_shares_of_a_policy_and_of_jobs(rig: Rig, visitor: Visitor) -> None:
    assert 'id="shares"' not in visitor.get("/grid").text
    plain = rig.submit(job("plain", "plain"))
    assert 'id="share"' not in visitor.get(f"/jobs/{plain}").text
    assert "· share" not in visitor.get("/").text
    rig.client.set_share({"identifier": "research", "weight": 0.5, "max_slots": 1})
    name = rig.submit(replace(job(tasks=4), share="research"))
    rig.outstanding(name, 1)
    part = visitor.get("/grid?part=live", **{"hx-request": "true"}).text
    for text in (visitor.get("/grid").text, part):
        assert ["research", "default", "0.5", "1", "0", "1", "0", "1", "3"] in _rows(text)
    assert 'id="share">research<' in visitor.get(f"/jobs/{name}").text
    assert visitor.get("/").text.count("· share research") == 1
    rig.client.remove_share(None)
    assert 'id="shares"' not in visitor.get("/grid").text


def test_only_users_who_may_read_the_shares_see_them(
    rig: Rig, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.client.set_share({"identifier": "research", "weight": 0.5})
    stranger, viewer = Visitor(rig), Visitor(rig)
    with stranger.http, viewer.http:
        viewer.log_in(add(rig, "vera", "view"))
        assert "research" not in stranger.get("/grid").text
        assert "research" in viewer.get("/grid").text
        rules = {**RULES, ("GET", "/v1/shares"): Rule(Role.ADMINISTER)}
        monkeypatch.setattr(views, "RULES", rules)
        assert "research" not in viewer.get("/grid").text
        assert "research" in visitor.get("/grid").text


def test_the_page_shows_a_limited_number_of_shares(rig: Rig, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "SHOWN_SHARES", 2)
    for share in ("a", "b", "c", "d"):
        rig.client.set_share({"identifier": share, "weight": 1.0})
    rig.outstanding(rig.submit(replace(job(tasks=1), share="d")), 1)
    text = visitor.get("/grid").text
    assert [row[0] for row in _rows(text)] == ["a", "d"]
    assert "2 more rows" in text


def test_the_page_escapes_the_identifiers_of_shares(
    rig: Rig, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.client.set_share({"identifier": "research", "weight": 1.0})
    (view,) = rig.client.shares()["shares"]
    view["share"] = NASTY
    monkeypatch.setattr(rig.manager.fair_share, "status", lambda: [view])
    text = visitor.get("/grid").text
    assert NASTY not in text
    assert "&lt;script&gt;alert(1)" in text


def test_metrics_count_shares_by_the_entries_of_the_policy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(name: str) -> dict[str, float]:
        found = [one for one in metrics.families(rig.manager, "memory") if one.name == f"batchlab_share_{name}"]
        return {sample.labels["share"]: sample.value for one in found for sample in one.samples}

    assert samples("waiting_tasks") == {}
    rig.client.set_share({"identifier": "team*", "weight": 0.5, "max_slots": 1})
    jobs = []
    for number, (share, bundles) in enumerate({"teama": 1, "teamb": 1, "stranger": 4}.items()):
        jobs.append(rig.submit(replace(job(f"j{number}", f"t{number}", tasks=4), share=share)))
        rig.outstanding(jobs[-1], bundles)
    slots = {one["share"]: one["slots"] for one in rig.client.shares()["shares"]}
    assert samples("outstanding_slots") == {"default": 0, "team*": 2, "*": slots["stranger"]}
    assert samples("waiting_tasks")["team*"] == 6
    assert samples("weight_factor") == {"default": 1.0, "team*": 0.5}
    assert samples("use_slot_seconds") == {"default": 0, "team*": 0, "*": 0}
    rig.work(jobs[0], 1)
    rig.until(lambda: samples("use_slot_seconds")["team*"] > 0, "the use of the share")
    monkeypatch.setattr(metrics, "MAX_SHARES", 2)
    assert set(samples("use_slot_seconds")) == {"default", "*"}
    assert samples("use_slot_seconds")["*"] > 0
    assert samples("weight_factor") == {"default": 1.0}
