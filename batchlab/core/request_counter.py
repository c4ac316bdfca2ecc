"""Counts of requests to S3 and SQS as AWS bills them.

Invariant: a count never decreases, so the last reported count is the total.
"""

from __future__ import annotations

import threading
from dataclasses import astuple, dataclass

STEP_BYTES = 64 * 1024
"""SQS bills each started step of this size in a payload as a request
(aws.amazon.com/sqs/pricing)."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Numbers of billed requests.

    `sqs` counts every step of 64 KiB, and `sqs_empty` the receives without messages. `s3_puts`
    counts PUT, COPY, POST, and LIST, and `s3_gets` GET, HEAD, and all other requests. DELETE is
    free and is counted for information only. `sqs_bytes` are the bytes of the messages' bodies in
    both directions, for which a NAT gateway or a VPC endpoint is billed.
    """

    sqs: float = 0
    sqs_empty: float = 0
    s3_puts: float = 0
    s3_gets: float = 0
    s3_deletes: float = 0
    sqs_bytes: float = 0

    def __add__(self, other: Requests) -> Requests:
        return Requests(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Requests) -> Requests:
        return Requests(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> Requests:
        return Requests(*(one * factor for one in astuple(self)))

    def __bool__(self) -> bool:
        return any(astuple(self))


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests of a worker to S3 and SQS since its start."""

    worker: str
    instance: str
    requests: Requests
    is_spot: bool = False
    """True if its instance is a Spot Instance. The description of a group does not contain this."""


def steps(payload_bytes: int) -> int:
    """Return the number of requests that SQS bills for one call with this payload."""
    return max(1, -(-payload_bytes // STEP_BYTES))


class Tally:
    """Thread-safe counter of requests. `is_spot` is true on a Spot Instance."""

    def __init__(self, *, is_spot: bool = False) -> None:
        self.is_spot = is_spot
        self._lock = threading.Lock()
        self._sqs = self._empty = self._puts = self._gets = self._deletes = self._sqs_bytes = 0

    def sqs(self, payload_bytes: int = 0) -> None:
        """Count one call of SQS with this payload in its request or response."""
        with self._lock:
            self._sqs += steps(payload_bytes)
            self._sqs_bytes += payload_bytes

    def received(self, payload_bytes: int, messages: int) -> None:
        """Count one receive. AWS bills it even if it returns no message."""
        with self._lock:
            self._sqs += steps(payload_bytes)
            self._sqs_bytes += payload_bytes
            self._empty += not messages

    def put(self, requests: int = 1) -> None:
        """Count requests billed as PUT: PUT, COPY, POST, or LIST."""
        with self._lock:
            self._puts += requests

    def get(self, requests: int = 1) -> None:
        """Count requests billed as GET: GET, HEAD, or a conditional GET without new content."""
        with self._lock:
            self._gets += requests

    def delete(self) -> None:
        """Count a DELETE, or a DeleteObjects call, which is a POST but also free."""
        with self._lock:
            self._deletes += 1

    def read(self) -> Requests:
        """Return the current counts."""
        with self._lock:
            return Requests(
                self._sqs, self._empty, self._puts, self._gets, self._deletes, self._sqs_bytes
            )
