"""Limits that every adapter checks before a request (object keys and SQS limits), and the description of a bucket.

Invariant: all backends refuse the same calls with the same errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.core.atomic_write import Sync
from batchlab.core.atomic_write import check_key as check_key
from batchlab.core.atomic_write import check_prefix as check_prefix
from batchlab.core.errors import TooLarge
from batchlab.core.ports import MAX_BATCH, MAX_DELAY_S, MAX_MESSAGE_BYTES, MAX_WAIT_S, Outgoing
from batchlab.core.pricing.request_costs import RequestCounter
from batchlab.core.service_settings import MAX_VISIBILITY_S

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint

MAX_IN_FLIGHT = 120_000

_QUEUE_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")


def check_size(key: str, size: int, limit: int | None) -> None:
    """Raise TooLarge if an object has more than `limit` bytes."""
    if limit is not None and size > limit:
        raise TooLarge(f"Object {key!r} has {size} bytes, but at most {limit} are allowed.")


def check_queue_name(name: str) -> None:
    """Raise ValueError for a queue name that SQS would refuse."""
    if not _QUEUE_NAME.fullmatch(name):
        raise ValueError(f"queue name {name!r} must be 1 to 80 letters, digits, '-' or '_'")


def check_batch(entries: Sequence[object]) -> None:
    """Raise TooLarge for more than 10 entries in a queue call."""
    if len(entries) > MAX_BATCH:
        raise TooLarge(f"A call has {len(entries)} entries, and a queue allows {MAX_BATCH}.")


def check_send(messages: Sequence[Outgoing]) -> None:
    """Raise TooLarge for a send of more than 10 messages or 256 KiB, and ValueError for an invalid delay."""
    check_batch(messages)
    size = sum(body_bytes(message.body) for message in messages)
    if size > MAX_MESSAGE_BYTES:
        raise TooLarge(f"A call has {size} bytes, and a queue allows {MAX_MESSAGE_BYTES}.")
    for message in messages:
        if not 0 <= message.delay_s <= MAX_DELAY_S:
            raise ValueError(f"delay_s must be 0 to {MAX_DELAY_S:.0f} s, not {message.delay_s}")


def check_receive(
    max_messages: int, wait_s: float, visibility_s: float | None, *, max_wait_s: float = MAX_WAIT_S
) -> None:
    """Raise ValueError for a receive that SQS would refuse or that exceeds `max_wait_s`."""
    if not 1 <= max_messages <= MAX_BATCH:
        raise ValueError(f"max_messages must be 1 to {MAX_BATCH}, not {max_messages}")
    if not 0 <= wait_s <= max_wait_s:
        raise ValueError(f"wait_s must be 0 to {max_wait_s:.0f} s, not {wait_s}")
    if visibility_s is not None and not 0 <= visibility_s <= MAX_VISIBILITY_S:
        raise ValueError(f"visibility_s must be 0 to {MAX_VISIBILITY_S:.0f} s")


def check_changes(changes: Sequence[tuple[str, float]]) -> None:
    """Raise TooLarge for more than 10 visibility changes, and ValueError for a negative visibility timeout.

    A visibility timeout over 12 hours is not an error in `check_changes`. The adapter refuses a receipt whose
    visibility timeout would end more than 12 hours after the receive.
    """
    check_batch(changes)
    for _, visibility_s in changes:
        if visibility_s < 0:
            raise ValueError(f"visibility_s must not be negative: {visibility_s}")


def body_bytes(body: str) -> int:
    """Return the size of a message body as SQS counts it."""
    return len(body) if body.isascii() else len(body.encode())


@dataclass(frozen=True, slots=True)
class Bucket:
    """Location of a bucket: a folder, or a name at a service. Each adapter uses only the fields that it needs."""

    name: str = ""
    folder: Path = Path()
    sync: Sync = Sync.JOBS
    endpoint: Endpoint | None = None
    tally: RequestCounter | None = None
    """Counter of the requests to S3 and SQS."""
