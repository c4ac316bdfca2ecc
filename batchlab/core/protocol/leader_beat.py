"""Leader beat: the object that the leading manager renews, so that workers notice the end of the last manager."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.core.errors import Malformed
from batchlab.core.protocol import json_format
from batchlab.core.protocol.field_checks import MAX_COUNT, MAX_S, UNREADABLE, decode, figure, integer

ROUNDS = 6
"""Number of rounds in `orphan_s`. In each round, the leading manager renews the leader beat, and a worker reads it."""
UNLIMITED_ROUND_S = 300.0
"""Interval in seconds between two rounds if `orphan_s` is 0."""


def round_s(orphan_s: float) -> float:
    """Return the interval in seconds at which the manager renews the leader beat and a worker reads it."""
    return orphan_s / ROUNDS if orphan_s else UNLIMITED_ROUND_S


@dataclass(frozen=True, slots=True)
class LeaderBeat:
    """Content of the leader beat. `number` makes each content of one manager different.

    An idle worker ends if the leader beat does not change for `orphan_s` seconds, or never if `orphan_s` is 0.
    """

    owner: str
    number: int
    orphan_s: float

    def to_bytes(self) -> bytes:
        return json_format.to_bytes({"v": json_format.VERSION, **json_format.fields(self)})


def from_bytes(data: bytes) -> LeaderBeat:
    """Return the leader beat in an object. Raise Malformed if the leader beat cannot be read."""
    try:
        beat = decode(LeaderBeat, json_format.loads(data))
        integer(beat.number, MAX_COUNT)
        figure(beat.orphan_s, MAX_S)
    except UNREADABLE as error:
        raise Malformed(f"The leader beat cannot be read: {json_format.brief(error)}.") from error
    return beat
