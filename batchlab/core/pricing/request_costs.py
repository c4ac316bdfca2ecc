"""What requests cost, and how many a run makes, from counts that were measured.

The model is that of `benchmarks/request_counts.py`, taken apart: requests follow bundles, and
what polls (workers at their job's control object, the manager at its queues) follows time.

What moving data costs: out of AWS, through a NAT gateway or VPC endpoints, between zones.

Invariant: only bytes that somebody has counted have a price here, and nothing is derived; what
nobody counts is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.core.pricing.money import GB, Item, Usd, shown
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.request_counter import Requests

PER_BUNDLE = Requests(sqs=7.5, s3_puts=1.5, s3_gets=1.0)
"""Of manager and workers together, measured on `ministack` with two workers: a send, a receive and
a delete each for the bundle and for its event, and for the beats that tell of it; a PUT of its
outcome, and half a one of the cut that it is from; a GET of the part of the plan that has its
items. What a task prints is another PUT for its bundle."""

BILLED_POLL_S = 5.0
"""A long poll of a queue with nothing in it is a request so often on AWS (adapters.sqs). Where
it is quiet it is one in 20 s, which is not reckoned: of what waits for long this is too much."""
LOOKS_A_LEASE = 3
"""A worker looks at its job's control object so often in a control lease."""
EVENT_REQUESTS = 3
"""A beat is sent, received and deleted."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a grid asks without being asked; seconds, of the backend's descriptor."""

    control_lease_s: float = 1.0
    visibility_s: float = 30.0
    beat_s: float = 10.0
    tick_s: float = 1.0


def of_bundles(bundles: float) -> Requests:
    """What so many bundles take."""
    return PER_BUNDLE.times(bundles)


def of_workers(busy_s: float, bundle_s: float, pace: Pace) -> Requests:
    """What workers ask for while they run bundles of `bundle_s` for `busy_s` in all: looks at
    control objects, extended visibility and beats of what takes longer than they wait."""
    extended = busy_s / (pace.visibility_s / 3) if bundle_s > pace.visibility_s / 3 else 0.0
    beats = busy_s / pace.beat_s if bundle_s > pace.beat_s else 0.0
    return Requests(
        sqs=extended + beats * EVENT_REQUESTS,
        s3_gets=busy_s * LOOKS_A_LEASE / pace.control_lease_s,
    )


def of_idle_workers(idle_s: float) -> Requests:
    """What workers ask for that wait for work."""
    polls = idle_s / BILLED_POLL_S
    return Requests(sqs=polls, sqs_empty=polls)


def of_manager(span_s: float, pools: int, pace: Pace) -> Requests:
    """What a manager asks for in `span_s` with jobs: a look at each pool's queue at every tick,
    though not more than once a second, and for events."""
    polls = span_s / BILLED_POLL_S
    return Requests(sqs=span_s / max(pace.tick_s, 1.0) * pools + polls, sqs_empty=polls)


def usd_of(requests: Requests, prices: PriceBook) -> tuple[float, float]:
    """What they cost in USD: SQS, S3."""
    sqs = requests.sqs * prices.of("sqs", "usd_per_million_requests") / 1e6
    puts = requests.s3_puts * prices.of("s3", "usd_per_1000_puts") / 1000
    gets = requests.s3_gets * prices.of("s3", "usd_per_1000_gets") / 1000
    return sqs, puts + gets


def items(cases: Sequence[Requests], prices: PriceBook, said: str) -> list[Item]:
    """The two lines of a bill; `cases` are the fewest, the usual and the most."""
    (q0, s0), (q1, s1), (q2, s2) = (usd_of(one, prices) for one in cases)
    typical = cases[1]
    how_sqs = f"{typical.sqs:,.0f} requests in steps of 64 KiB, {typical.sqs_empty:,.0f} empty"
    how_s3 = f"{typical.s3_puts:,.0f} PUT and LIST, {typical.s3_gets:,.0f} GET"
    return [
        Item("SQS requests", Usd(q0, q1, q2), f"{how_sqs}; {said}"),
        Item("S3 requests", Usd(s0, s1, s2), f"{how_s3}; {said}"),
    ]


ENDPOINTS, NAT, OWN = "endpoints", "nat", "own"
"""How instances reach AWS: by the stack's VPC endpoints, its NAT gateway, or a network of the
user's. S3 is reached free of charge in the first two, by a gateway endpoint."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What is known of a job's data on the move: bytes that were fetched from the bucket to where
    the bill is made, and how the stack's instances reach AWS, "" on no stack."""

    fetched_bytes: int = 0
    egress: str = ""


def out_of_aws(size_bytes: float, prices: PriceBook, how: str) -> Item:
    """The line of so many bytes that leave AWS."""
    usd = size_bytes / GB * prices.of("transfer", "internet_usd_per_gb")
    return Item("data out of AWS", Usd.exactly(usd), f"{size_bytes / GB:,.3f} GB of {how}")


def through(egress: str, size_bytes: float, prices: PriceBook) -> Item | None:
    """The line of so many bytes between instances and SQS; None where nobody bills them, or they
    go through a network that is not the stack's."""
    if egress not in (ENDPOINTS, NAT) or not size_bytes:
        return None
    size_gb = size_bytes / GB
    how = f"{size_gb:,.3f} GB of messages to and from SQS"
    if egress == ENDPOINTS:
        each = prices.of("network", "endpoint_usd_per_gb")
        return Item("data through VPC endpoints", Usd.exactly(size_gb * each), how)
    low, typical, high = (size_gb * each for each in nat_usd_gb(prices))
    how += "; the gateway is in one of two zones, the most is if all came from the other"
    return Item("data through the NAT gateway", Usd(low, typical, high), how)


def nat_usd_gb(prices: PriceBook) -> tuple[float, float, float]:
    """What a GB through the gateway costs: from its own zone, by half from the other, all from the
    other."""
    gateway = prices.of("network", "nat_usd_per_gb")
    crossing = 2 * prices.of("transfer", "zone_usd_per_gb_each_way")
    return gateway, gateway + crossing / 2, gateway + crossing


def not_counted(egress: str) -> list[str]:
    """What a bill on such a stack does not have, as sentences without their full stop."""
    if egress == OWN:
        return ["what goes through your own network's NAT or endpoints is not in it"]
    if egress not in (ENDPOINTS, NAT):
        return []
    what = "of data, messages alone are counted: not HTTP around them, logs, or what tasks fetch"
    return [f"{what} and send by themselves"]


def rates(prices: PriceBook, egress: str) -> str:
    """What a GB costs on its ways, for where bytes are not known."""
    internet = shown(prices.of("transfer", "internet_usd_per_gb"))
    said = f"{internet} per GB out of AWS"
    if egress == ENDPOINTS:
        return f"{said}, {shown(prices.of('network', 'endpoint_usd_per_gb'))} through endpoints"
    if egress == NAT:
        low, _, high = nat_usd_gb(prices)
        return (
            f"{said}, {shown(low)} through NAT and {shown(high)} where it comes from another zone"
        )
    return said
