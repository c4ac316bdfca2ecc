"""Counts and estimates of requests to S3 and SQS, and the costs of requests and data transfer.

Estimates use the model of `benchmarks/request_counts.py`. The number of most requests is proportional to the number of
bundles. The number of polls is proportional to time, because workers poll their job's control object and the manager
polls its queues.

Invariants: a count of requests never decreases, so the last reported count is the total. The cost of data transfer
covers only counted bytes. The bill lists the kinds of data transfer that are not counted.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, sub

from batchlab.core import visibility_timeouts
from batchlab.core.pricing.price_book import GB, Item, PriceBook, Usd, shown

STEP_BYTES = 64 * 1024
"""Number of bytes of a payload that SQS bills as one request (aws.amazon.com/sqs/pricing)."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Numbers of billed requests.

    `sqs` counts every started 64 KiB of a payload as a request, and `sqs_empty` counts the receives without messages.
    `s3_puts` counts PUT, COPY, POST, and LIST, and `s3_gets` counts GET, HEAD, and all other requests. DELETE requests
    are free and are counted for information only. `sqs_bytes` is the number of bytes of sent and received message
    bodies, which AWS bills for a NAT gateway or a VPC endpoint.
    """

    sqs: float = 0
    sqs_empty: float = 0
    s3_puts: float = 0
    s3_gets: float = 0
    s3_deletes: float = 0
    sqs_bytes: float = 0

    def __add__(self, other: Requests) -> Requests:
        return Requests(*map(add, self.counts, other.counts))

    def __sub__(self, other: Requests) -> Requests:
        return Requests(*map(sub, self.counts, other.counts))

    def times(self, factor: float) -> Requests:
        return Requests(*(count * factor for count in self.counts))

    def __bool__(self) -> bool:
        return any(self.counts)

    @property
    def counts(self) -> tuple[float, ...]:
        """Return all fields in order. `dataclasses.astuple` takes ten times as long."""
        return self.sqs, self.sqs_empty, self.s3_puts, self.s3_gets, self.s3_deletes, self.sqs_bytes


@dataclass(frozen=True, slots=True)
class WorkerRequests:
    """Requests of a worker to S3 and SQS since its start."""

    worker: str
    instance: str
    requests: Requests
    is_spot: bool = False
    """Whether the worker's instance is a Spot Instance. The description of an Auto Scaling group does not say which
    instances are Spot Instances.
    """


def steps(payload_bytes: int) -> int:
    """Return the number of requests that SQS bills for one call with a payload of `payload_bytes`."""
    return max(1, -(-payload_bytes // STEP_BYTES))


class RequestCounter:
    """Thread-safe counter of requests. `is_spot` is true on a Spot Instance."""

    def __init__(self, *, is_spot: bool = False) -> None:
        self.is_spot = is_spot
        self._lock = threading.Lock()
        self._sqs = self._empty = self._puts = self._gets = self._deletes = self._sqs_bytes = 0

    def sqs(self, payload_bytes: int = 0) -> None:
        """Count one call of SQS whose request or response has a payload of `payload_bytes`."""
        with self._lock:
            self._sqs += steps(payload_bytes)
            self._sqs_bytes += payload_bytes

    def received(self, payload_bytes: int, messages: int) -> None:
        """Count one receive, which AWS bills even if the receive does not return messages."""
        with self._lock:
            self._sqs += steps(payload_bytes)
            self._sqs_bytes += payload_bytes
            self._empty += not messages

    def put(self, requests: int = 1) -> None:
        """Count requests that AWS bills as PUT (PUT, COPY, POST, or LIST)."""
        with self._lock:
            self._puts += requests

    def get(self, requests: int = 1) -> None:
        """Count requests that AWS bills as GET (GET, HEAD, or a conditional GET without new content)."""
        with self._lock:
            self._gets += requests

    def delete(self) -> None:
        """Count a free request, which is a DELETE or a POST of DeleteObjects."""
        with self._lock:
            self._deletes += 1

    def read(self) -> Requests:
        """Return the current counts of requests."""
        with self._lock:
            return Requests(self._sqs, self._empty, self._puts, self._gets, self._deletes, self._sqs_bytes)


PER_BUNDLE = Requests(sqs=6.0, s3_puts=1.5, s3_gets=1.0)
"""Requests per bundle by the manager and the workers, measured on `ministack` with two workers.

The SQS requests of a bundle are a send, a receive, and a delete of the bundle's message, and the same three requests
for the message with its event and the worker's heartbeat. The S3 requests of a bundle are a PUT of the outcome, half a
PUT of the cut, and a GET of the inputs. A bundle whose tasks write output needs another PUT for the log.
"""

BILLED_POLL_S = 5.0
"""Interval in seconds at which a long poll of an empty queue costs one request on AWS (see `adapters.aws.sqs`).

AWS bills one request per 20 s on a quiet queue, so an estimate with BILLED_POLL_S is too high for long waits.
"""
LOOKS_A_LEASE = 2
"""Highest number of times that a worker reads a job's control object in each control lease."""
EVENT_REQUESTS = 3
"""Number of SQS requests per heartbeat, which are a send, a receive, and a delete."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Intervals of a grid's regular requests in seconds, from the backend's descriptor."""

    control_lease_s: float = 1.0
    visibility_s: float = 30.0
    beat_s: float = 10.0
    tick_s: float = 1.0


def of_bundles(bundles: float) -> Requests:
    """Return the estimated numbers of requests for `bundles` bundles."""
    return PER_BUNDLE.times(bundles)


def of_workers(busy_s: float, bundle_s: float, pace: Pace) -> Requests:
    """Return the estimated numbers of requests of workers that run bundles of `bundle_s` seconds for `busy_s` seconds
    in total.

    The estimate covers the reads of control objects and, for long bundles, the heartbeats and the extensions of
    visibility timeouts, which follow measured run times.
    """
    extended = busy_s / bundle_s * visibility_timeouts.extensions(bundle_s, pace.visibility_s) if bundle_s else 0.0
    beats = busy_s / pace.beat_s if bundle_s > pace.beat_s else 0.0
    return Requests(sqs=extended + beats * EVENT_REQUESTS, s3_gets=busy_s * LOOKS_A_LEASE / pace.control_lease_s)


def of_idle_workers(idle_s: float) -> Requests:
    """Return the estimated numbers of requests of workers that wait for work for `idle_s` seconds in total."""
    polls = idle_s / BILLED_POLL_S
    return Requests(sqs=polls, sqs_empty=polls)


def of_manager(span_s: float, pools: int, pace: Pace) -> Requests:
    """Return the estimated numbers of requests of a manager that has jobs for `span_s` seconds.

    The manager reads the depth of each pool's queue at every tick, at most once a second, and polls the events queue.
    """
    polls = span_s / BILLED_POLL_S
    return Requests(sqs=span_s / max(pace.tick_s, 1.0) * pools + polls, sqs_empty=polls)


def usd_of(requests: Requests, prices: PriceBook) -> tuple[float, float]:
    """Return the cost in USD of the requests to SQS and to S3, as a pair."""
    sqs = requests.sqs * prices.price("sqs", "usd_per_million_requests") / 1e6
    puts = requests.s3_puts * prices.price("s3", "usd_per_1000_puts") / 1000
    gets = requests.s3_gets * prices.price("s3", "usd_per_1000_gets") / 1000
    return sqs, puts + gets


def items(cases: Sequence[Requests], prices: PriceBook, source: str) -> list[Item]:
    """Return two lines of a bill: the line for SQS and the line for S3.

    `cases` are the lowest, the typical, and the highest numbers of requests.
    """
    (q0, s0), (q1, s1), (q2, s2) = (usd_of(case, prices) for case in cases)
    typical = cases[1]
    how_sqs = f"{typical.sqs:,.0f} requests in steps of 64 KiB, {typical.sqs_empty:,.0f} empty"
    how_s3 = f"{typical.s3_puts:,.0f} PUT and LIST, {typical.s3_gets:,.0f} GET"
    return [
        Item("SQS requests", Usd(q0, q1, q2), f"{how_sqs}; {source}"),
        Item("S3 requests", Usd(s0, s1, s2), f"{how_s3}; {source}"),
    ]


ENDPOINTS, NAT, OWN = "endpoints", "nat", "own"
"""Routes from instances to AWS: the stack's VPC endpoints, the stack's NAT gateway, or the user's own network.

With ENDPOINTS and NAT, a gateway endpoint gives free access to S3.
"""


@dataclass(frozen=True, slots=True)
class TransferredData:
    """Known data transfer of a job.

    `fetched_bytes` is the number of bytes fetched from the bucket to the machine that creates the bill. `egress` is the
    route from the stack's instances to AWS, or "" without a stack.
    """

    fetched_bytes: int = 0
    egress: str = ""


def out_of_aws(size_bytes: float, prices: PriceBook, how: str) -> Item:
    """Return the line of the bill for `size_bytes` bytes that leave AWS."""
    usd = size_bytes / GB * prices.price("transfer", "internet_usd_per_gb")
    return Item("data out of AWS", Usd.exactly(usd), f"{size_bytes / GB:,.3f} GB of {how}")


def through(egress: str, size_bytes: float, prices: PriceBook) -> Item | None:
    """Return the line of the bill for `size_bytes` bytes between instances and SQS.

    Return None if AWS does not bill the bytes, or if the bytes pass through the user's own network.
    """
    if egress not in (ENDPOINTS, NAT) or not size_bytes:
        return None
    size_gb = size_bytes / GB
    how = f"{size_gb:,.3f} GB of messages to and from SQS"
    if egress == ENDPOINTS:
        each = prices.price("network", "endpoint_usd_per_gb")
        return Item("data through VPC endpoints", Usd.exactly(size_gb * each), how)
    low, typical, high = (size_gb * each for each in nat_usd_gb(prices))
    how += "; the gateway is in one of two zones, the most is if all came from the other"
    return Item("data through the NAT gateway", Usd(low, typical, high), how)


def nat_usd_gb(prices: PriceBook) -> tuple[float, float, float]:
    """Return the lowest, the typical, and the highest cost in USD of a GB through the NAT gateway.

    None, half, or all of the data comes from another availability zone than the zone of the gateway.
    """
    gateway = prices.price("network", "nat_usd_per_gb")
    crossing = 2 * prices.price("transfer", "zone_usd_per_gb_each_way")
    return gateway, gateway + crossing / 2, gateway + crossing


def not_counted(egress: str) -> list[str]:
    """Return sentences about the costs that a bill with the route `egress` does not include. The sentences do not end
    in a period.
    """
    if egress == OWN:
        return ["what goes through your own network's NAT or endpoints is not in it"]
    if egress not in (ENDPOINTS, NAT):
        return []
    what = "of data, messages alone are counted: not HTTP around them, logs, or what tasks fetch"
    return [f"{what} and send by themselves"]


def rates(prices: PriceBook, egress: str) -> str:
    """Return a text with the prices of data transfer per GB, for data of unknown size."""
    internet = shown(prices.price("transfer", "internet_usd_per_gb"))
    text = f"{internet} per GB out of AWS"
    if egress == ENDPOINTS:
        return f"{text}, {shown(prices.price('network', 'endpoint_usd_per_gb'))} through endpoints"
    if egress == NAT:
        low, _, high = nat_usd_gb(prices)
        return f"{text}, {shown(low)} through NAT and {shown(high)} where it comes from another zone"
    return text
