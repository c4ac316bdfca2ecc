"""Format of live logs: the output of running tasks, stored while a client follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import Malformed
from batchlab.core.protocol import json_format
from batchlab.core.protocol.field_checks import UNREADABLE, fitted, known, listed

ASKED_S = 30.0
"""Time for which a worker stores live logs after a request. A client that follows a job repeats its
request twice in this time."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The latest output of a running attempt: bytes [start, stop) of its output."""

    stage: str
    task: int
    attempt: int
    round: int
    bundle: str
    execution: str
    start: int
    stop: int
    text: str


def to_bytes(tails: list[Tail]) -> bytes:
    return json_format.to_bytes(
        {"v": json_format.VERSION, "tails": [json_format.fields(one) for one in tails]}
    )


def from_bytes(data: bytes) -> list[Tail]:
    """Return the live logs in an object. Raise Malformed if they cannot be read."""
    doc: dict[str, Any] = json_format.loads(data)
    try:
        return [fitted(Tail(**known(Tail, one))) for one in listed(doc["tails"])]
    except UNREADABLE as error:
        raise Malformed(f"Live logs cannot be read: {json_format.brief(error)}.") from error
