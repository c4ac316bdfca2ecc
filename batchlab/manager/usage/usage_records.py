"""What has been used, as it is in the bucket: the grid's books, and the account of one job.

Invariant: of two leaders that went on from the same account each figure of the larger one counts,
so what was counted is never taken back, whoever writes last.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from batchlab.core.model import JobId
from batchlab.core.pricing.usage_meter import Account, Meter
from batchlab.core.protocol import json_format
from batchlab.core.request_counter import Requests
from batchlab.manager.recording.recorded_data import Doc, united
from batchlab.manager.versioned_document import UNREADABLE

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Books:
    """The grid's. `own` is what managers have asked of S3 and SQS, `cap` (USD) the grid's, `caps`
    those of jobs that were set by hand, `jobs` the accounts of those that had not ended."""

    meter: Meter = field(default_factory=Meter)
    own: Requests = field(default_factory=Requests)
    cap: float | None = None
    caps: dict[JobId, float | None] = field(default_factory=dict)
    jobs: Mapping[JobId, Account] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        doc: dict[str, Any] = {
            "v": json_format.VERSION,
            "meter": self.meter.to_json(),
            "own": list(astuple(self.own)),
            "cap": self.cap,
            "caps": dict(self.caps),
            "jobs": {job: account.to_json() for job, account in self.jobs.items()},
        }
        return json_format.to_bytes(doc)

    @classmethod
    def from_bytes(cls, data: bytes) -> Books | None:
        """None, and a line in the log, where they cannot be read."""
        try:
            doc = json_format.loads(data)
            return cls(
                Meter.from_json(doc["meter"]),
                Requests(*doc["own"]),
                doc["cap"],
                {JobId(job): usd for job, usd in doc["caps"].items()},
                {JobId(job): Account.from_json(one) for job, one in doc["jobs"].items()},
            )
        except UNREADABLE as error:
            log.warning("the grid's account cannot be read and begins anew: %r", error)
            return None


@dataclass(slots=True)
class Used:
    """What a job has used, and what was recorded of it: `took_s` is how long its last round was
    seen, or one before that which has not been written down."""

    account: Account
    record: Doc | None = None
    took_s: float = 0.0

    def to_bytes(self) -> bytes:
        doc: dict[str, Any] = {"v": json_format.VERSION, "account": self.account.to_json()}
        if self.record is not None:
            doc["record"] = self.record
        return json_format.to_bytes(doc)

    @classmethod
    def from_bytes(cls, data: bytes) -> Used:
        """One of UNREADABLE where it cannot be read."""
        doc = json_format.loads(data)
        return cls(Account.from_json(doc["account"]), doc.get("record"))

    def take_in(self, other: Used) -> None:
        """What another leader has written down of the same job."""
        self.account.keep_most(other.account)
        if self.record is not None and other.record is not None:
            self.record = united(other.record, self.record)
        elif self.record is None:
            self.record = other.record
