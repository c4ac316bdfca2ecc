"""Loading and storing of bundle rows.

Invariant: the row of a bundle changes once, from planned to done. The statement that stores rows
leaves a done row unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, Select, bindparam, select, update

from batchlab.adapters.sql.tables import Upserts, bundles
from batchlab.core.ledger_projection import BundleRow, Key, Known, Projection
from batchlab.core.model import BundleId, JobId, StageName
from batchlab.core.ports import BundleRecord
from batchlab.core.protocol import json_format

_make_void = (
    update(bundles)
    .where(bundles.c.job == bindparam("b_job"), bundles.c.stage == bindparam("b_stage"))
    .values(void=1)
)


def load_known(
    connection: Connection, upserts: Upserts, keys: Sequence[tuple[JobId, Key]]
) -> dict[JobId, Known]:
    """Return which of these bundles exist, and whether each is done."""
    known: dict[JobId, Known] = {job: {} for job, _ in keys}
    rows = upserts.known(connection, [(job, *key) for job, key in keys])
    for job, stage, name, is_done in rows:
        known[JobId(job)][StageName(stage), BundleId(name)] = bool(is_done)
    return known


def make_void(connection: Connection, job: JobId, names: Iterable[StageName]) -> None:
    """Mark the bundles of these stages as void."""
    for name in names:
        connection.execute(_make_void, {"b_job": job, "b_stage": name})


def store(
    connection: Connection, upserts: Upserts, projection: Projection, rows: Iterable[BundleRow]
) -> None:
    """Store these rows. Leave a row that is done or that would be planned a second time."""
    job = projection.job.id
    values = []
    for row in rows:
        void = int(projection.is_void(row))
        if row.completion:
            body, failed = (
                json_format.completion_to_json(row.completion),
                len(row.completion.failed),
            )
        else:
            assert row.planned
            body, failed = json_format.bundle_to_json(row.planned), 0
        values.append((job, row.stage, row.id, row.seq, failed, void, json_format.dumps(body)))
    if values:
        upserts.store_bundles(connection, values)


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
