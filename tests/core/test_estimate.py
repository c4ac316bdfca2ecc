"""The estimated cost of a run, compared with sums computed by hand from AWS's published prices."""

from __future__ import annotations

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import StageName
from batchlab.core.pricing import price_book, request_costs
from batchlab.core.pricing.estimate import Policy, PoolPlan, StageLoad, bundles_of, estimate, loads
from batchlab.core.pricing.request_costs import PER_BUNDLE, Pace, Requests, steps
from batchlab.core.protocol import settlement

BOOK = price_book.load()
POOL = PoolPlan("default", "m7i.large", slots=2, max_size=10, boot_s=60.0, disk_gb=0.0)


def same(value: float) -> tuple[float, float, float]:
    return (value, value, value)


def stage(tasks: float, seconds: float, **more: object) -> StageLoad:
    return StageLoad("a", same(tasks), same(seconds), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("payload_bytes", "billed"), [(0, 1), (1, 1), (65_536, 1), (65_537, 2), (262_144, 4)])
def test_sqs_bills_every_64_kib_and_never_less_than_one(payload_bytes: int, billed: int) -> None:
    assert steps(payload_bytes) == billed


def test_price_of_a_million_requests_matches_the_pricing_pages() -> None:
    """A million requests cost 0.40 USD for SQS, 5 USD for PUT, and 0.40 USD for GET. DELETE requests are free."""
    assert request_costs.usd_of(Requests(sqs=1e6), BOOK) == pytest.approx((0.40, 0.0))
    assert request_costs.usd_of(Requests(s3_puts=1e6), BOOK) == pytest.approx((0.0, 5.0))
    assert request_costs.usd_of(Requests(s3_gets=1e6), BOOK) == pytest.approx((0.0, 0.40))
    assert request_costs.usd_of(Requests(s3_deletes=1e6), BOOK) == (0.0, 0.0)
    # An empty receive is already included in `sqs` and is not billed twice.
    assert request_costs.usd_of(Requests(sqs=1e6, sqs_empty=1e6), BOOK) == pytest.approx((0.40, 0.0))


def test_compute_and_idle_cost_match_a_hand_computation() -> None:
    """1,000 tasks of 60 s are 60,000 s on slots, or 30,000 s on instances with two slots. The policy wants 60,000 /
    (300 × 2) = 100 instances, so the pool's maximum of ten starts. Typically, 90% of the instances' time is used:
    33,333 s, and 60 s each of boot and of tail. An m7i.large costs 0.1008 USD per hour."""
    found = estimate([stage(1000, 60.0)], [POOL], BOOK, Policy(drain_target_s=300, idle_s=60))
    assert found.instances == {"default": 10}
    compute, idle = found.items[:2]
    assert compute.usd.typical == pytest.approx(30_000 / 3600 * 0.1008)
    by_hand = (30_000 / 0.9 - 30_000 + 10 * (60 + 60)) / 3600 * 0.1008
    assert idle.usd.typical == pytest.approx(by_hand)
    assert idle.usd.low == pytest.approx(10 * 120 / 3600 * 0.1008)
    assert found.usd.low <= found.usd.typical <= found.usd.high
    assert found.span_s[1] == pytest.approx(60 + 30_000 / 0.9 / 10)
    assert found.usd.typical == pytest.approx(sum(item.usd.typical for item in found.items))


def test_an_instance_is_billed_for_a_minute_however_short_it_lives() -> None:
    """A task of one second without boot and tail is billed for 60 s, of which 59 s are idle."""
    pool = PoolPlan("default", "m7i.large", 2, boot_s=1e-9, disk_gb=0.0)
    found = estimate([stage(1, 1.0)], [pool], BOOK, Policy(idle_s=0.0))
    compute, idle = found.items[:2]
    assert compute.usd.low + idle.usd.low == pytest.approx(60 / 3600 * 0.1008)


def test_spot_is_cheaper_and_its_losses_are_a_line_of_their_own() -> None:
    on_demand = estimate([stage(1000, 60.0)], [POOL], BOOK)
    half = PoolPlan("default", "m7i.large", 2, 0, 10, 60.0, spot_share=0.5, disk_gb=0.0)
    mixed = estimate([stage(1000, 60.0)], [half], BOOK)
    assert mixed.usd.typical < on_demand.usd.typical
    wasted = next(item for item in mixed.items if item.what.startswith("wasted"))
    # The loss is 2% of the Spot half, at half of 0.1008 USD and half of 40% of it.
    rate = 0.1008 * (0.5 + 0.5 * 0.4)
    assert wasted.usd.typical == pytest.approx(30_000 * 0.01 / 3600 * rate)
    assert not any(item.what.startswith("wasted") for item in on_demand.items)


def test_requests_follow_bundles_and_time() -> None:
    """The job has a hundred bundles of a minute each on one slot. Each bundle has PER_BUNDLE requests. Further requests
    are two looks at the control object per second, an extension of each message, and three requests per heartbeat every
    10 s."""
    pool = PoolPlan("default", "m7i.large", 1, max_size=1, boot_s=1e-9, disk_gb=0.0)
    pace = Pace(control_lease_s=1.0, visibility_s=30.0, beat_s=10.0, tick_s=1.0)
    found = estimate([stage(100, 60.0, bundle=1)], [pool], BOOK, Policy(300.0, 0.0, pace))
    assert found.bundles == 100
    run_s = 6000 / 0.9
    idle_s, span_s = run_s - 6000, run_s
    sqs = 100 * PER_BUNDLE.sqs + 100 + 600 * 3 + idle_s / 5 + span_s + span_s / 5
    lines = {item.what: item for item in found.items}
    assert lines["SQS requests"].usd.typical == pytest.approx(sqs * 0.40 / 1e6, rel=1e-6)
    gets = 100 * PER_BUNDLE.s3_gets + 6000 * 2
    puts = 100 * PER_BUNDLE.s3_puts + 2
    s3 = puts * 0.005 / 1000 + gets * 0.0004 / 1000
    assert lines["S3 requests"].usd.typical == pytest.approx(s3, rel=1e-6)


@pytest.mark.parametrize(
    ("tasks", "slots", "mean_s", "fixed"),
    [
        (1, 2, 0.1, None),
        (1000, 4, 0.05, None),
        (50_000, 8, 0.001, None),
        (300, 2, 10.0, None),
        (1000, 4, 0.05, 7),
        (0, 4, 1.0, None),
    ],
)
def test_bundles_are_counted_as_the_manager_cuts_them(tasks: int, slots: int, mean_s: float, fixed: int | None) -> None:
    window = 3 * slots + 1
    first = [] if fixed is not None else settlement.wave(tasks, slots, None, None, window)
    left, count = tasks - sum(first), len(first)
    while left:
        sizes = settlement.wave(left, slots, mean_s, fixed, window)
        left -= sum(sizes)
        count += len(sizes)
    assert bundles_of(tasks, slots, mean_s, fixed) == pytest.approx(count, abs=slots)


def test_ten_million_tasks_are_counted_at_once() -> None:
    assert bundles_of(10_000_000, 1000, 0.001, None) > 10_000_000 / 750


# --- Stages --------------------------------------------------------------------------------------

A, B, C = StageName("a"), StageName("b"), StageName("c")


def test_a_chain_has_as_many_tasks_and_bundles_and_a_gather_one() -> None:
    stages = [StageDef(A, bundle=1), StageDef(B, after=(A,)), StageDef(C, after=(B,), gather="*")]
    seconds = {str(name): same(1.0) for name in (A, B, C)}
    found, assumed = loads(stages, 500, seconds, {})
    assert [load.tasks[1] for load in found] == [500, 500, 1]
    assert [load.chained for load in found] == ["", "a", ""]
    assert not assumed
    estimated = estimate(found, [POOL], BOOK)
    alone = estimate(found[:1], [POOL], BOOK)
    assert estimated.bundles == 2 * alone.bundles + 1


def test_gather_by_a_field_is_estimated_as_a_range() -> None:
    stages = [StageDef(A), StageDef(B, after=(A,), gather="region")]
    seconds = {"a": same(1.0), "b": same(1.0)}
    found, assumed = loads(stages, 400, seconds, {})
    assert found[1].tasks == (1.0, 20.0, 400.0)
    assert "gathers by region" in assumed[0]
    found, assumed = loads(stages, 400, seconds, {"b": 12})
    assert found[1].tasks == same(12.0)
    assert not assumed


def test_unknown_quantities_are_requested() -> None:
    with pytest.raises(UsageError, match="time of a task is unknown for stage a") as caught:
        loads([StageDef(A)], 1, {}, {})
    assert "--seconds a=" in caught.value.remedy
    with pytest.raises(UsageError, match="pool 'big'"):
        estimate([stage(1, 1.0, pool="big")], [POOL], BOOK)
    nameless = PoolPlan("default", "m7i.largest", 2)
    with pytest.raises(UsageError, match="no instance type"):
        estimate([stage(1, 1.0)], [nameless], BOOK)


def test_download_is_priced_if_its_size_is_known() -> None:
    known = estimate([stage(1, 1.0)], [POOL], BOOK, result_bytes=10 * 1024**3)
    line = next(item for item in known.further if item.what == "data out of AWS")
    assert line.usd.low == line.usd.high == pytest.approx(0.90)
    assert not any("download of results" in one for one in known.assumed)
    unknown = estimate([stage(1, 1.0)], [POOL], BOOK)
    assert not any(item.what == "data out of AWS" for item in unknown.further)
    assert any("is not included (0.09 USD per GB" in one for one in unknown.assumed)
    for found in (known, unknown):
        assert any("NAT gateway" in one for one in found.assumed), "nobody knows it before"


def test_storage_is_priced_per_gb_and_month() -> None:
    found = estimate([stage(1, 1.0)], [POOL], BOOK, input_files=1, input_bytes=2 * 1024**3)
    storage = next(item for item in found.further if item.what == "S3 storage")
    assert storage.usd.typical == pytest.approx(2 * 0.023)
