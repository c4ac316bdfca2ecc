"""What is to be told and what came of the rest, as one object of the bucket.

Invariant: an id is in it once, on its way or over; what is over never comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from batchlab.core import notifications
from batchlab.core.notifications import Notification
from batchlab.core.protocol import json_format

LOGGED = 200
REMEMBERED = 1000
"""Ids of what is over, so that it is not told once more by who begins anew."""


@dataclass(slots=True)
class Book:
    """What is in the bucket: what is on its way, and what came of the rest, the newest last."""

    pending: dict[str, Notification] = field(default_factory=dict)
    log: list[Notification] = field(default_factory=list)
    done: dict[str, None] = field(default_factory=dict)

    def close(self, one: Notification) -> None:
        self.pending.pop(one.id, None)
        self.log.append(replace(one, body=""))
        del self.log[:-LOGGED]
        self.done[one.id] = None
        while len(self.done) > REMEMBERED:
            del self.done[next(iter(self.done))]

    def knows(self, id_: str) -> bool:
        return id_ in self.pending or id_ in self.done

    def merge(self, other: Book) -> None:
        """Take over what another manager has written meanwhile."""
        for one in other.log:
            if one.id not in self.done:
                self.close(one)
        for id_ in other.done:
            self.pending.pop(id_, None)
            self.done[id_] = None
        for id_, one in other.pending.items():
            if not self.knows(id_):
                self.pending[id_] = one

    def to_bytes(self) -> bytes:
        return json_format.to_bytes(
            {
                "v": json_format.VERSION,
                "pending": [notifications.to_json(one) for one in self.pending.values()],
                "log": [notifications.to_json(one) for one in self.log],
                "done": list(self.done),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Book:
        doc = json_format.loads(data)
        pending = [notifications.from_json(one) for one in doc["pending"]]
        return cls(
            {one.id: one for one in pending},
            [notifications.from_json(one) for one in doc["log"]],
            dict.fromkeys(doc["done"]),
        )
