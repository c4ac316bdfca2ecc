"""The bill of a run, compared with sums computed by hand."""

from __future__ import annotations

import random
from dataclasses import astuple
from decimal import Decimal

import pytest

from batchlab.core.model import Instance, JobId, LifecycleState, Machine, Market, Pool
from batchlab.core.pricing import price_book
from batchlab.core.pricing.bill import PoolFacts, StageUse, bill, burn_usd_h, spent_usd
from batchlab.core.pricing.hourly import hourly_cost
from batchlab.core.pricing.request_costs import RequestCounter, Requests, TransferredData
from batchlab.core.pricing.usage import Account, Budget, CapBudget, EqualParts, Kind, Meter, launch_usd, launches

BOOK = price_book.load()
POOL = Pool("default", 0, 4, 2, instance_type="m7i.large")
ON_DEMAND = Kind("default", "m7i.large")
SPOT = Kind("default", "m7i.large", Market.SPOT)
FACTS = {"default": PoolFacts(2, "m7i.large", disk_gb=0.0)}
A, B = JobId("a"), JobId("b")
UP = LifecycleState.IN_SERVICE


def up(name: str, launched_s: float = 0.0, **more: object) -> Instance:
    return Instance(name, "default", UP, launched_s, **more)  # type: ignore[arg-type]


def see(
    meter: Meter,
    instance: Instance,
    at_s: float,
    shares: dict[JobId, float] | None = None,
    accounts: dict[JobId, Account] | None = None,
) -> None:
    meter.bill_instance(POOL, instance, now_s=at_s, monotonic_s=at_s, shares=shares or {}, accounts=accounts or {})


# --- The meter -----------------------------------------------------------------------------------


def test_an_instance_is_billed_a_minute_at_once_and_by_the_second_after_it() -> None:
    meter = Meter()
    billed = []
    for at_s in (0.0, 10.0, 59.0, 61.5, 100.0):
        see(meter, up("i"), at_s)
        billed.append(meter.total.billed_s[ON_DEMAND])
    assert billed == [60.0, 60.0, 60.0, 61.5, 100.0]
    assert meter.nobody.billed_s == meter.total.billed_s


def test_billing_starts_at_the_launch_even_if_it_is_seen_late() -> None:
    meter = Meter()
    see(meter, up("i", launched_s=-200.0), 0.0)
    assert meter.total.billed_s[ON_DEMAND] == 200.0


def test_a_clock_that_jumps_takes_nothing_back_and_adds_nothing() -> None:
    meter = Meter()
    for now_s, monotonic_s in ((0.0, 0.0), (9000.0, 100.0), (-50.0, 200.0)):
        meter.bill_instance(POOL, up("i"), now_s=now_s, monotonic_s=monotonic_s, shares={}, accounts={})
    assert meter.total.billed_s[ON_DEMAND] == 200.0


def test_stopped_and_terminated_instances_are_not_billed() -> None:
    meter = Meter()
    for state in (LifecycleState.TERMINATED, LifecycleState.WARMED_STOPPED):
        see(meter, Instance("i", "default", state, 0.0), 1000.0)
    assert meter.total.billed_s == {}


def test_seconds_are_split_among_jobs_by_share() -> None:
    meter, accounts = Meter(), {A: Account(), B: Account()}
    see(meter, up("i"), 0.0, {A: 1.0}, accounts)
    see(meter, up("i"), 100.0, {A: 0.25, B: 0.5, JobId("gone"): 0.25}, accounts)
    assert accounts[A].billed_s[ON_DEMAND] == 60.0 + 0.25 * 40
    assert accounts[B].billed_s[ON_DEMAND] == 20.0
    assert meter.nobody.billed_s[ON_DEMAND] == 10.0
    assert meter.total.billed_s[ON_DEMAND] == 100.0


def test_instance_type_of_the_machine_is_used_if_known() -> None:
    meter = Meter()
    machine = Machine("c7g.large", "us-east-1a", Market.SPOT)
    see(meter, up("i", machine=machine), 0.0)
    assert list(meter.total.billed_s) == [Kind("default", "c7g.large", Market.SPOT)]


def test_instance_is_billed_as_spot_after_its_report() -> None:
    """A group's description does not mark Spot instances, so an instance has the on-demand price until its worker
    reports."""
    meter = Meter()
    see(meter, up("i"), 0.0)
    meter.bill_instance(POOL, up("i"), now_s=100.0, monotonic_s=100.0, shares={}, accounts={}, is_spot=True)
    assert meter.total.billed_s == {ON_DEMAND: 60.0, SPOT: 40.0}


def test_next_process_continues_the_bill() -> None:
    meter = Meter()
    see(meter, up("i", launched_s=1000.0), 1100.0)
    again = Meter.from_json(meter.to_json())
    again.bill_instance(POOL, up("i", launched_s=1000.0), now_s=1300.0, monotonic_s=5.0, shares={}, accounts={})
    assert again.total.billed_s[ON_DEMAND] == 300.0
    assert again.retain({"i"}) is False
    assert again.retain(set()) is True


@pytest.mark.parametrize("stood_s", [0.0, 150.0])
def test_time_billed_by_another_leader_is_not_billed_again(stood_s: float) -> None:
    """The test includes a leader that was frozen for a long time."""
    frozen, accounts = Meter(), {A: Account()}
    see(frozen, up("i"), 100.0, {A: 1.0}, accounts)
    other = Meter.from_json(frozen.to_json())
    other.bill_instance(POOL, up("i"), now_s=300.0, monotonic_s=7.0, shares={}, accounts={})
    frozen.merge(other)
    assert frozen.lives["i"].prepaid_s == 0.0
    for later_s in (0.0, 1.0):
        frozen.bill_instance(
            POOL,
            up("i"),
            now_s=309.0 + later_s,
            monotonic_s=309.0 + later_s - stood_s,
            shares={A: 1.0},
            accounts=accounts,
        )
    assert frozen.total.billed_s[ON_DEMAND] == 310.0
    assert accounts[A].billed_s[ON_DEMAND] == 110.0


def test_request_totals_are_not_counted_twice() -> None:
    meter, accounts = Meter(), {A: Account()}
    for so_far in (Requests(sqs=10), Requests(sqs=25), Requests(sqs=10), Requests(sqs=25)):
        meter.count_requests("w", so_far, {A: 1.0}, accounts)
    meter.count_requests("v", Requests(sqs=5, s3_gets=2), {}, accounts)
    assert accounts[A].requests == Requests(sqs=25)
    assert meter.nobody.requests == Requests(sqs=5, s3_gets=2)
    assert meter.total.requests == Requests(sqs=30, s3_gets=2)


def test_a_tally_counts_steps_and_empty_receives() -> None:
    tally = RequestCounter()
    tally.sqs(200_000)  # 4 steps of 64 KiB
    tally.sqs()
    tally.received(0, 0)
    tally.received(70_000, 3)
    tally.put(3)
    tally.get()
    tally.delete()
    assert tally.read() == Requests(sqs=8, sqs_empty=1, s3_puts=3, s3_gets=1, s3_deletes=1, sqs_bytes=270_000)


# --- The bill ------------------------------------------------------------------------------------


def test_bill_matches_a_hand_computation() -> None:
    """The run has two hours of on-demand and one hour of Spot instances. Tasks used 8,000 s of 3 × 2 slot hours, failed
    attempts took 1,000 s, and 800 s were lost with an instance. In instance time, these are 4,000 s and 900 s. The
    remaining time is idle. The requests are 1.5 million SQS requests, half of them empty, 100,000 PUT, and 200,000 GET.
    """
    account = Account(
        {ON_DEMAND: 7200.0, SPOT: 3600.0},
        {"default": 1000.0},
        {"default": 800.0},
        Requests(sqs=1.5e6, sqs_empty=7e5, s3_puts=1e5, s3_gets=2e5),
        bundles=1000,
    )
    stages = [StageUse("parse", "default", 5000.0, 1), StageUse("total", "default", 1500.0, 2)]
    found = bill(stages, account, FACTS, BOOK, stored_bytes=10 * 1024**3)
    lines = {item.what: item.usd for item in found.items}
    second = (2 * 0.1008 + 0.1008 * 0.4) / 10_800
    assert lines["compute, pool default"].typical == pytest.approx(4000 * second)
    assert lines["wasted work, pool default"].typical == pytest.approx(900 * second)
    assert lines["idle, pool default"].typical == pytest.approx((10_800 - 4900) * second)
    assert lines["SQS requests"].typical == pytest.approx(1.5 * 0.40)
    assert lines["S3 requests"].typical == pytest.approx(100 * 0.005 + 200 * 0.0004)
    assert {item.what: item.usd.typical for item in found.further} == {"S3 storage": pytest.approx(10 * 0.023)}
    whole = 2 * 0.1008 + 0.1008 * 0.4 + 0.6 + 0.58
    assert found.usd.typical == pytest.approx(whole)
    assert found.usd.low == pytest.approx(whole - 0.1008 * 0.3)
    assert found.notes == ()


def test_bill_without_an_account_is_derived_and_marked() -> None:
    """The work of 8,500 s on two slots takes 4,250 s, which is 85% of the billed time."""
    found = bill([StageUse("a", "default", 8500.0, 1)], None, FACTS, BOOK)
    instances = sum(i.usd.typical for i in found.items if "pool" in i.what)
    assert instances == pytest.approx(5000 / 3600 * 0.1008)
    assert "derived" in found.notes[0]


def test_requests_of_a_backend_without_any_are_derived_from_bundles() -> None:
    account = Account({ON_DEMAND: 3600.0}, bundles=100)
    found = bill([StageUse("a", "default", 3600.0, 1)], account, FACTS, BOOK)
    sqs = next(item for item in found.items if item.what == "SQS requests")
    assert "derived" in sqs.how
    assert sqs.usd.typical > 0
    assert any("derived from bundles" in note for note in found.notes)


def test_work_beyond_the_billed_time_gives_no_negative_idle_time() -> None:
    account = Account({ON_DEMAND: 60.0}, bundles=1)
    found = bill([StageUse("a", "default", 130.0, 1)], account, FACTS, BOOK)
    assert all(item.usd.low >= 0 for item in found.items)


@pytest.mark.parametrize("seed", range(20))
def test_total_depends_on_the_billed_time_and_not_on_its_split(seed: int) -> None:
    """The report sums run times in another order than the ledger, and both must show the same cost."""
    draw = random.Random(seed)
    runs_s = [round(draw.uniform(0, 9), 6) for _ in range(500)]
    account = Account({ON_DEMAND: draw.uniform(3_000, 9_000), SPOT: draw.uniform(0, 900)}, bundles=7)
    facts = {"default": PoolFacts(2)}
    found = bill([StageUse("a", "default", sum(runs_s), 1)], account, facts, BOOK)
    again = bill([StageUse("a", "default", sum(reversed(runs_s)), 1)], account, facts, BOOK)
    assert (found.usd, found.items) == (again.usd, again.items)
    other = bill([StageUse("a", "default", sum(runs_s) / 3, 1)], account, facts, BOOK)
    instances = [sum(Decimal(repr(i.usd.typical)) for i in one.items if "pool" in i.what) for one in (found, other)]
    assert instances[0] == instances[1]
    assert sum(Decimal(repr(i.usd.typical)) for i in found.items) == Decimal(repr(found.usd.typical))


# --- Transferred data ----------------------------------------------------------------------------

GB = 1024**3
TALKED = Account({ON_DEMAND: 3600.0}, requests=Requests(sqs=1e6, sqs_bytes=20 * GB), bundles=1)


def moved(moved: TransferredData) -> tuple[dict[str, tuple[float, float, float]], list[str]]:
    """Return the lines of a bill for transferred data, and the bill's notes. The job's cost does not contain them."""
    stages = [StageUse("a", "default", 3600.0, 1)]
    without = bill(stages, TALKED, FACTS, BOOK)
    found = bill(stages, TALKED, FACTS, BOOK, moved=moved)
    assert (found.items, found.usd) == (without.items, without.usd)
    return {i.what: (i.usd.low, i.usd.typical, i.usd.high) for i in found.further}, list(found.notes)


def test_downloaded_results_count_as_egress() -> None:
    lines, notes = moved(TransferredData(fetched_bytes=5 * GB))
    assert lines == {"data out of AWS": pytest.approx((0.45, 0.45, 0.45))}
    assert notes == []


def test_downloads_are_not_guessed() -> None:
    lines, (note,) = moved(TransferredData())
    assert lines == {}
    assert "data out of AWS is not included" in note


def test_messages_through_a_nat_gateway_may_cross_zones() -> None:
    """A NAT gateway costs 0.045 USD per GB. A GB that crosses zones costs 0.01 USD at the sender and at the receiver.
    The bounds are: all, half, or none of the instances are in the gateway's zone."""
    lines, notes = moved(TransferredData(GB, "nat"))
    assert lines["data through the NAT gateway"] == pytest.approx((0.90, 1.10, 1.30))
    assert any("messages alone are counted" in note for note in notes)


def test_messages_through_endpoints_are_billed_by_the_gb() -> None:
    lines, notes = moved(TransferredData(GB, "endpoints"))
    assert lines["data through VPC endpoints"] == pytest.approx((0.20, 0.20, 0.20))
    assert any("messages alone are counted" in note for note in notes)


def test_own_network_is_listed_without_a_price() -> None:
    lines, notes = moved(TransferredData(GB, "own"))
    assert lines.keys() == {"data out of AWS"}
    assert any("your own network" in note for note in notes)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({}, "0.09 USD per GB out of AWS, 0.01 USD through endpoints"),
        ({"Egress": "nat"}, "0.045 USD through NAT and 0.065 USD where it comes from another zone"),
        ({"Egress": "nat", "VpcId": "vpc-1"}, "(0.09 USD per GB out of AWS) are billed by use"),
    ],
)
def test_plan_gives_the_price_of_a_gb(parameters: dict[str, str], told: str) -> None:
    found = hourly_cost({"PoolInstanceTypes": "m7i.large", **parameters}, BOOK)
    assert told in found.text()
    assert told in str(found.to_json()["by_use"])


def test_burn_and_what_was_spent() -> None:
    now = burn_usd_h({ON_DEMAND: 3, SPOT: 2}, {}, BOOK)
    disk = 50 * 0.08 / 730
    assert now.typical == pytest.approx(3 * 0.1008 + 2 * 0.1008 * 0.4 + 5 * disk)
    nameless = Kind("default")
    assert burn_usd_h({nameless: 1}, {"default": "c7g.large"}, BOOK).typical == pytest.approx(0.0725 + disk)
    # The unnamed type counts as an m7i.large.
    assert burn_usd_h({nameless: 1}, {}, BOOK).typical == pytest.approx(0.1008 + disk)
    account = Account({ON_DEMAND: 3600.0}, requests=Requests(sqs=1e6))
    assert spent_usd(account, {}, BOOK).typical == pytest.approx(0.1008 + disk + 0.40)


# --- Purses --------------------------------------------------------------------------------------


def test_a_launch_costs_a_minute_or_its_boot_and_tail() -> None:
    assert launch_usd(0.6) == pytest.approx(0.01)
    assert launch_usd(0.6, tail_s=120.0) == pytest.approx(0.02)


def test_only_as_many_are_launched_as_every_purse_pays_for() -> None:
    grid, job = CapBudget("the grid", 1.0, spent_usd=0.5), CapBudget("it", 0.25)
    assert launches(10, 0.1, [grid, job]) == 2
    assert job.left_usd == pytest.approx(0.05)
    assert grid.left_usd == pytest.approx(0.3)
    assert launches(10, 0.1, [grid, job]) == 0
    assert launches(10, 0.1, []) == 10


def test_bundles_are_cut_as_far_as_they_are_paid_for() -> None:
    cap = CapBudget("it", 1.0)
    budget = Budget((cap,), {"default": 0.01}, {"default": 4})
    assert budget.afford([10, 10, 10], "default", task_s=5.0) == [10, 10]
    assert budget.afford([1], "default", task_s=5.0) == []
    half = Budget((CapBudget("it", 0.3),), {"default": 0.01}, {"default": 4})
    assert half.afford([10], "default", task_s=5.0) == [6]


def test_before_a_task_is_measured_one_instance_probes() -> None:
    small = Budget((CapBudget("it", 0.001),), {"default": 0.01}, {"default": 4})
    assert small.probe([1] * 20, "default", float("inf"), out=0) == [1, 1, 1, 1]
    assert small.probe([1] * 20, "default", float("inf"), out=3) == [1]
    large = Budget((CapBudget("it", 500.0),), {"default": 0.01}, {"default": 4})
    assert len(large.probe([1] * 20, "default", float("inf"), out=0)) == 13  # the tasks take an hour each
    assert len(large.probe([1] * 20, "default", 60.0, out=0)) == 20


@pytest.mark.parametrize("seed", range(10))
def test_equal_parts_come_to_the_same_as_explicit_shares(seed: int) -> None:
    """Members join and leave at any time, and each receives its part of the requests and the seconds in between."""
    rng = random.Random(seed)
    kind, parts = Kind("default"), EqualParts()
    accounts = {JobId(f"j{n}"): Account() for n in range(6)}
    expected = {job: Account() for job in accounts}
    members: dict[JobId, None] = {}
    ours, theirs, reported = Meter(), Meter(), Requests()
    for _ in range(100):
        job = rng.choice(list(accounts))
        if job in members:
            del members[job]
            accounts[job].leave(parts)
        else:
            members[job] = None
            accounts[job].join(parts)
        reported += Requests(sqs=rng.randrange(9), s3_gets=rng.randrange(9))
        shares = dict.fromkeys(members, 1 / len(members)) if members else {}
        ours.count_requests("m", reported, parts, accounts)
        theirs.count_requests("m", reported, shares, expected)
        if members:
            parts.bill(kind, 60.0)
            for member in members:
                expected[member].bill(kind, 60.0 / len(members))
    for job, account in accounts.items():
        account.settle()
        assert astuple(account.requests) == pytest.approx(astuple(expected[job].requests))
        assert account.billed_s == pytest.approx(expected[job].billed_s)
    assert astuple(ours.nobody.requests) == pytest.approx(astuple(theirs.nobody.requests))
