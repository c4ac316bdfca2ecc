"""Requests of S3 and SQS as AWS bills them, counted where they are made.

Invariant: a count never goes down, so that the last one heard is the whole.
"""

from __future__ import annotations

import threading
from dataclasses import astuple, dataclass

STEP_BYTES = 64 * 1024
"""Of a payload each such step is billed as a request of SQS (aws.amazon.com/sqs/pricing)."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Billed requests. `sqs` has every step of 64 KiB and `sqs_empty`, receives that brought
    nothing; `s3_puts` are PUT, COPY, POST and LIST, `s3_gets` GET, HEAD and all other; DELETE is
    free and only told. `sqs_bytes` are those of the messages' bodies, both ways: a NAT gateway or
    a VPC endpoint bills what passes."""

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
    """What a worker has asked of S3 and SQS since its start."""

    worker: str
    instance: str
    requests: Requests
    is_spot: bool = False
    """Its instance is a Spot one, which describing a group does not tell."""


def steps(payload_bytes: int) -> int:
    """Requests that SQS bills for one call with so much in its messages."""
    return max(1, -(-payload_bytes // STEP_BYTES))


class Tally:
    """Counts requests from any thread. `is_spot`: of a process on a Spot instance."""

    def __init__(self, *, is_spot: bool = False) -> None:
        self.is_spot = is_spot
        self._lock = threading.Lock()
        self._sqs = self._empty = self._puts = self._gets = self._deletes = self._sqs_bytes = 0

    def sqs(self, payload_bytes: int = 0) -> None:
        """One call of SQS that carries, or brings, so many bytes of messages."""
        with self._lock:
            self._sqs += steps(payload_bytes)
            self._sqs_bytes += payload_bytes

    def received(self, payload_bytes: int, messages: int) -> None:
        """One receive, billed also where it brings nothing."""
        with self._lock:
            self._sqs += steps(payload_bytes)
            self._sqs_bytes += payload_bytes
            self._empty += not messages

    def put(self, requests: int = 1) -> None:
        """PUT, COPY, POST or LIST."""
        with self._lock:
            self._puts += requests

    def get(self, requests: int = 1) -> None:
        """GET, HEAD, or a conditional GET that found nothing new."""
        with self._lock:
            self._gets += requests

    def delete(self) -> None:
        """DELETE, or DeleteObjects, which is a POST and free like it."""
        with self._lock:
            self._deletes += 1

    def read(self) -> Requests:
        """What has been counted so far."""
        with self._lock:
            return Requests(
                self._sqs, self._empty, self._puts, self._gets, self._deletes, self._sqs_bytes
            )
