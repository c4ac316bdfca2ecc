"""The fair-share policy, and the places of shares compared with a reference that gives away one place at a time."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.fair_share import MAX_ENTRIES, ShareAttributes, ShareLoad, SharePolicy, places
from batchlab.sim.share_checks import Claim, reference_places


@pytest.mark.parametrize("seed", range(200))
def test_places_equal_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    names = ["a", "b", "c", "d", "e"][: rng.randint(1, 5)]
    # Powers of two make the weighted uses exact, so that ties are ties in both computations.
    loads = {
        name: ShareLoad(
            2.0 ** rng.randint(-3, 3),
            rng.choice([0, 0, 1, 8, 100]) / 2,
            rng.choice([0.5, 1.0, 4.0]),
            rng.randint(0, 40),
        )
        for name in names
    }
    window = rng.randint(0, 90)
    claims = {name: Claim(load.weight, load.use_s, load.place_s, load.max_places) for name, load in loads.items()}
    assert places(loads, window) == reference_places(claims, window)


def test_equal_use_gives_places_by_the_inverse_weight() -> None:
    loads = {"a": ShareLoad(0.125, 0.0, 1.0, 1000), "b": ShareLoad(1.0, 0.0, 1.0, 1000)}
    assert places(loads, 900) == {"a": 800, "b": 100}


def test_the_share_with_less_use_catches_up_first() -> None:
    loads = {"a": ShareLoad(1.0, 500.0, 1.0, 1000), "b": ShareLoad(1.0, 0.0, 1.0, 1000)}
    assert places(loads, 100) == {"a": 0, "b": 100}
    assert places(loads, 600) == {"a": 50, "b": 550}


def test_free_places_go_to_the_share_with_work() -> None:
    loads = {"a": ShareLoad(1.0, 500.0, 1.0, 1000), "b": ShareLoad(1.0, 0.0, 1.0, 3)}
    assert places(loads, 100) == {"a": 97, "b": 3}


def test_a_large_window_takes_no_time() -> None:
    loads = {f"s{n}": ShareLoad(1.0 + n, float(n), 1.0, 10**9) for n in range(20)}
    assert sum(places(loads, 10**8).values()) == 10**8


def test_an_entry_applies_to_its_prefix() -> None:
    policy = SharePolicy((ShareAttributes("team*", 0.5, 4), ShareAttributes("one", 2.0)))
    assert policy.attributes("teamA") == ShareAttributes("teamA", 0.5, 4)
    assert policy.attributes("one") == ShareAttributes("one", 2.0)
    assert policy.attributes("other") == ShareAttributes("other", 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_entry_of_a_share_is_found_among_all_entries(seed: int) -> None:
    rng = random.Random(seed)
    entries: list[ShareAttributes] = []
    for _ in range(60):
        name = "".join(rng.choices("abC1", k=rng.randint(1, 4)))
        entry = ShareAttributes(name + rng.choice(["", "*"]), rng.choice([0.5, 2.0]))
        if not any(entry.overlaps(other) for other in entries):
            entries.append(entry)
    policy = SharePolicy(tuple(entries))
    for _ in range(300):
        share = "".join(rng.choices("abC1", k=rng.randint(1, 5)))
        expected = [entry for entry in entries if entry.covers(share)]
        assert policy.entry(share) == (expected[0] if expected else None)


def test_a_lookup_does_not_read_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = SharePolicy(tuple(ShareAttributes(f"s{n:03}") for n in range(MAX_ENTRIES)))
    calls, covers = [], ShareAttributes.covers

    def counted(self: ShareAttributes, share: str) -> bool:
        calls.append(share)
        return covers(self, share)

    monkeypatch.setattr(ShareAttributes, "covers", counted)
    assert policy.attributes("s499").identifier == "s499"
    assert policy.attributes("zzz").weight == 1.0
    assert len(calls) <= 4


def test_only_listed_shares_are_permitted() -> None:
    policy = SharePolicy((ShareAttributes("team*"),), only_listed=True)
    policy.check_share("teamA")
    policy.check_share("default")
    with pytest.raises(UsageError, match="does not list the share 'other'"):
        policy.check_share("other")
    replace(policy, only_listed=False).check_share("other")


@pytest.mark.parametrize(
    ("first", "second"), [("UserA*", "UserA1"), ("UserA1", "UserA*"), ("User*", "UserA*"), ("*", "a")]
)
def test_entries_may_not_overlap(first: str, second: str) -> None:
    """AWS Batch has the same rule."""
    with pytest.raises(UsageError, match="overlap"):
        SharePolicy((ShareAttributes(first),)).with_share(ShareAttributes(second))


@pytest.mark.parametrize("percent_active_usable", [(50, 1, 50), (50, 2, 75), (25, 1, 75), (25, 2, 93), (0, 1, 100)])
def test_the_reservation_shrinks_with_each_active_share(percent_active_usable: tuple[int, int, int]) -> None:
    """The numbers are those of the documentation of AWS Batch, for 100 slots."""
    percent, active, usable = percent_active_usable
    assert SharePolicy(reservation=percent).usable_slots(100, active) == usable


def test_use_decays_and_one_bundle_counts_at_most_one_decay() -> None:
    policy = SharePolicy(decay_s=100.0)
    assert policy.decayed(10.0, 100.0) == pytest.approx(10.0 / 2.718281828)
    assert policy.decayed(10.0, -5.0) == 10.0
    assert policy.use_of(2, 1.0) == pytest.approx(2.0, rel=0.01)
    assert policy.use_of(2, 1e9) == pytest.approx(200.0)
    assert policy.use_of(2, -1.0) == 0.0


def test_a_policy_survives_its_json() -> None:
    policy = SharePolicy((ShareAttributes("a*", 0.5, 3), ShareAttributes("b", 2.0)), 60.0, 20, only_listed=True)
    assert SharePolicy.from_json(policy.to_json()) == policy
    older = {key: value for key, value in policy.to_json().items() if key != "only_listed"}
    assert SharePolicy.from_json(older) == replace(policy, only_listed=False)
    assert policy.without_share("b").shares == policy.shares[:1]
    with pytest.raises(UsageError, match="no entry"):
        policy.without_share("c")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShareAttributes("two words"),
        lambda: ShareAttributes(""),
        lambda: ShareAttributes("a" * 256),
        lambda: ShareAttributes("a", 0.0),
        lambda: ShareAttributes("a", float("nan")),
        lambda: ShareAttributes("a", 1.0, 0),
        lambda: SharePolicy(decay_s=0.0),
        lambda: SharePolicy(decay_s=1e9),
        lambda: SharePolicy(reservation=100),
    ],
)
def test_values_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize("key", ["decay_s", "reservation", "shares", "only_listed"])
def test_a_damaged_policy_cannot_be_read(key: str) -> None:
    doc = replace(SharePolicy(), shares=(ShareAttributes("a"),)).to_json()
    with pytest.raises((ValueError, UsageError)):
        SharePolicy.from_json({**doc, key: "x"})
