"""What requests cost, and how many a run makes, from counts that were measured.

The model is that of `benchmarks/request_counts.py`, taken apart: requests follow bundles, and
what polls (workers at their job's control object, the manager at its queues) follows time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.costs.money import Item, Usd
from batchlab.costs.prices import PriceBook
from batchlab.tally import Requests

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
