"""Bundles as rows: cuts and follows plan them, completions are folded into them.

Invariant: a bundle's row goes from planned to done once. The same statement that makes it done
answers whether it was the one, and only then do the stage's counters grow, in the same
transaction. So neither order nor repetition of completions shows in what is left.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, bindparam, case, or_, select, update

from batchlab.adapters.sql.job_rows import US, set_running
from batchlab.adapters.sql.tables import BundleRow, Upserts, bundles, stages
from batchlab.core.model import Bundle, Completion, JobId, StageName
from batchlab.core.ports import BundleRecord, Folded
from batchlab.core.protocol import json_format

_first, _last = stages.c.first_start_s, stages.c.last_end_s
_grow = (
    update(stages)
    .where(stages.c.job == bindparam("b_job"), stages.c.stage == bindparam("b_stage"))
    .values(
        {
            **{
                column: column + bindparam(f"d_{column.name}")
                for column in (
                    stages.c.succeeded,
                    stages.c.failed,
                    stages.c.cancelled,
                    stages.c.retried,
                    stages.c.run_us,
                )
            },
            # CASE, because the two databases name the smaller of two values differently.
            _first: case(
                (or_(_first.is_(None), _first > bindparam("start_s")), bindparam("start_s")),
                else_=_first,
            ),
            _last: case(
                (or_(_last.is_(None), _last < bindparam("end_s")), bindparam("end_s")),
                else_=_last,
            ),
        }
    )
)


@dataclass(slots=True)
class _Growth:
    """What one call adds to one stage's row."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    run_us: int = 0
    start_s: float | None = None
    end_s: float | None = None

    def add(self, c: Completion) -> None:
        self.succeeded += len(c.succeeded)
        self.failed += len(c.failed)
        self.cancelled += len(c.cancelled)
        self.retried += c.retried
        self.run_us += round(c.run_s * US)
        self.start_s = c.started_s if self.start_s is None else min(self.start_s, c.started_s)
        self.end_s = c.ended_s if self.end_s is None else max(self.end_s, c.ended_s)

    def parameters(self, job: JobId, stage: StageName) -> dict[str, Any]:
        return {
            "b_job": job,
            "b_stage": stage,
            "d_succeeded": self.succeeded,
            "d_failed": self.failed,
            "d_cancelled": self.cancelled,
            "d_retried": self.retried,
            "d_run_us": self.run_us,
            "start_s": self.start_s,
            "end_s": self.end_s,
        }


def plan(connection: Connection, upserts: Upserts, planned: Iterable[Bundle]) -> None:
    """Insert these as planned; one that is there stays as it is."""
    rows: list[BundleRow] = [
        (one.job, one.stage, one.id, None, 0, json_format.dumps(json_format.bundle_to_json(one)))
        for one in planned
    ]
    if rows:
        upserts.plan(connection, rows)


def fold(
    connection: Connection,
    upserts: Upserts,
    completions: Sequence[Completion],
    casualties: Sequence[Mapping[StageName, int]],
) -> Folded:
    last = connection.execute(upserts.take_seqs, {"count": len(completions)}).scalar_one()
    first_seq = last - len(completions) + 1
    new = _complete(connection, upserts, completions, first_seq)
    growth: dict[tuple[JobId, StageName], _Growth] = defaultdict(_Growth)
    for c, lost, is_new in zip(completions, casualties, new, strict=True):
        if is_new:
            growth[c.bundle.job, c.bundle.stage].add(c)
            for stage, count in lost.items():
                growth[c.bundle.job, stage].cancelled += count
    follows = (
        f.bundle for c, is_new in zip(completions, new, strict=True) if is_new for f in c.follows
    )
    # After the completions: one of them may be a follow's.
    plan(connection, upserts, follows)
    if growth:
        connection.execute(_grow, [growth[key].parameters(*key) for key in sorted(growth)])
    jobs = set_running(connection, dict.fromkeys(c.bundle.job for c in completions))
    return Folded(new, first_seq, jobs)


def _complete(
    connection: Connection, upserts: Upserts, completions: Sequence[Completion], first_seq: int
) -> list[bool]:
    """Make the rows done; answers which completions did."""
    numbers: dict[tuple[str, str, str], int] = {}
    rows: list[BundleRow] = []
    for i, c in enumerate(completions):
        key = c.bundle.job, c.bundle.stage, c.bundle.id
        if numbers.setdefault(key, i) == i:
            body = json_format.dumps(json_format.completion_to_json(c))
            rows.append((*key, first_seq + i, len(c.failed), body))
    new = [False] * len(completions)
    for job, stage, name in upserts.complete(connection, rows):
        new[numbers[job, stage, name]] = True
    return new


def select_bundles(
    job: JobId, stage: StageName | None, done: bool | None, after_seq: int | None, failed: bool
) -> Select[int | None, str]:
    query = (
        select(bundles.c.seq, bundles.c.body)
        .where(bundles.c.job == job, bundles.c.void == 0)
        .order_by(bundles.c.seq.nulls_last(), bundles.c.stage, bundles.c.id)
    )
    if stage is not None:
        query = query.where(bundles.c.stage == stage)
    if done is not None:
        query = query.where(bundles.c.seq.is_not(None) if done else bundles.c.seq.is_(None))
    if after_seq is not None:
        query = query.where(bundles.c.seq > after_seq)
    if failed:
        query = query.where(bundles.c.failed > 0)
    return query


def records(connection: Connection, query: Select[int | None, str]) -> list[BundleRecord]:
    return [_record(seq, body) for seq, body in connection.execute(query)]


def _record(seq: int | None, body: str) -> BundleRecord:
    doc = json.loads(body)
    if seq is None:
        return BundleRecord(json_format.bundle_from_json(doc))
    completion = json_format.completion_from_json(doc)
    return BundleRecord(completion.bundle, completion, seq)
