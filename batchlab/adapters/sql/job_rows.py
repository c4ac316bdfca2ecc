"""Loads and stores the rows of jobs and their stages.

Invariant: a transaction that writes excludes others, so a row that it loaded has not changed when
it stores it. What a change does is decided by the ledger projection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, func, insert, select, tuple_, update

from batchlab.adapters.sql.tables import Upserts, bundles, jobs, stages
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.ledger_projection import Projection, Stage
from batchlab.core.model import ENDED, Control, JobId, JobState, StageName
from batchlab.core.ports import JobRecord, JobRows
from batchlab.core.protocol import json_format

_PLAN = ("planned", "plan_round", "cut_seq", "uncut")
_COUNTERS = (
    "succeeded",
    "failed",
    "cancelled",
    "retried",
    "run_us",
    "first_start_s",
    "last_end_s",
)

_job = select(jobs).where(jobs.c.id == bindparam("job"))
_by_token = select(jobs.c.id).where(jobs.c.token == bindparam("token"))
_newest = (
    select(jobs).order_by(jobs.c.submitted_s.desc(), jobs.c.id.desc()).limit(bindparam("limit"))
)
_active = _newest.where(jobs.c.state.not_in(sorted(ENDED)))
_stages = select(stages).where(stages.c.job == bindparam("job")).order_by(stages.c.position)
_last_seq = select(func.max(bundles.c.seq)).where(bundles.c.job == bindparam("job"))
_insert_stages = insert(stages)
_store_job = (
    update(jobs)
    .where(jobs.c.id == bindparam("b_job"))
    .values({name: bindparam(name) for name in ("state", "reason", "control", "round", "ended_s")})
)
_stage = update(stages).where(
    stages.c.job == bindparam("b_job"), stages.c.stage == bindparam("b_stage")
)
_GROUPS = tuple((attrgetter(*columns), columns) for columns in (_PLAN, _COUNTERS))
"""Columns of a stage that change together, and a function that gets their values."""
_STORE = {
    columns: _stage.values({name: bindparam(name) for name in columns}) for _, columns in _GROUPS
}


# --- Loading --------------------------------------------------------------------------------------


def load(connection: Connection, name: JobId) -> Projection:
    """Load a job with its stages; NotFound."""
    projection = _projection(_row(connection, name))
    for row in connection.execute(_stages, {"job": name}).mappings():
        projection.stages[StageName(row["stage"])] = _stage_of(row)
    return projection


def rows_of(connection: Connection, name: JobId) -> JobRows:
    """Return the rows of a job with their stamp; NotFound."""
    projection = load(connection, name)
    # Some completions change no counter, so the newest seq tells the versions of a job apart.
    last = connection.execute(_last_seq, {"job": name}).scalar_one()
    return projection.rows(-1 if last is None else last)


def find_job(connection: Connection, name: JobId) -> JobRecord:
    return _record(_row(connection, name))


def page_of_jobs(
    connection: Connection, active: bool, limit: int, before: str | None
) -> list[JobRecord]:
    query, values = _active if active else _newest, {"limit": limit}
    if before is not None:
        last = _row(connection, JobId(before))
        query = query.where(
            tuple_(jobs.c.submitted_s, jobs.c.id) < (last["submitted_s"], last["id"])
        )
    return [_record(row) for row in connection.execute(query, values).mappings()]


def _row(connection: Connection, name: JobId) -> RowMapping:
    row = connection.execute(_job, {"job": name}).mappings().first()
    if row is None:
        raise _no_job(name)
    return row


def _no_job(name: JobId) -> NotFound:
    return NotFound(f"The ledger has no job {name}.")


def _projection(row: RowMapping) -> Projection:
    return Projection(
        _job_def(row["spec"]),
        JobState(row["state"]),
        row["reason"],
        Control(row["control"]),
        row["round"],
        row["ended_s"],
    )


def _record(row: RowMapping) -> JobRecord:
    return _projection(row).rows().job


@lru_cache(256)
def _job_def(spec: str) -> JobDef:
    """Cached, because the definition is read with the counters and never changes."""
    return json_format.job_from_json(json_format.loads(spec))


def _stage_of(row: RowMapping) -> Stage:
    values = {name: row[name] for name in (*_PLAN, *_COUNTERS)}
    return Stage(**{**values, "uncut": json_format.tasks_from_json(json.loads(values["uncut"]))})


# --- Storing --------------------------------------------------------------------------------------


def add(connection: Connection, upserts: Upserts, projection: Projection) -> JobId | None:
    """Insert a job with its stages. Return the id of the job that already has its id or token."""
    job = projection.job
    row = {
        "id": job.id,
        "token": job.token or None,
        "submitted_s": job.submitted_s,
        "spec": json_format.dumps(json_format.job_to_json(job)),
        **_job_values(projection),
    }
    if connection.execute(upserts.add_job, row).first() is None:
        if connection.execute(_job, {"job": job.id}).first() is not None:
            return job.id
        return JobId(connection.execute(_by_token, {"token": job.token}).scalar_one())
    connection.execute(
        _insert_stages,
        [
            {"job": job.id, "stage": name, "position": position}
            | _values(stage, _PLAN)
            | _values(stage, _COUNTERS)
            for position, (name, stage) in enumerate(projection.stages.items())
        ],
    )
    return None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The values of a job as they were loaded, to find out what a change has changed."""

    job: Mapping[str, Any]
    stages: Mapping[StageName, Sequence[tuple[Any, ...]]]

    @classmethod
    def of(cls, projection: Projection) -> Snapshot:
        return cls(
            _job_values(projection),
            {name: [get(stage) for get, _ in _GROUPS] for name, stage in projection.stages.items()},
        )


def store(connection: Connection, projection: Projection, before: Snapshot) -> None:
    """Store the values that have changed since `before`."""
    name = projection.job.id
    values = _job_values(projection)
    if values != before.job:
        connection.execute(_store_job, {"b_job": name, **values})
    for group, (get, columns) in enumerate(_GROUPS):
        changed = [
            {"b_job": name, "b_stage": stage, **_values(one, columns)}
            for stage, one in projection.stages.items()
            if get(one) != before.stages[stage][group]
        ]
        if changed:
            connection.execute(_STORE[columns], changed)


def _job_values(projection: Projection) -> dict[str, Any]:
    return {
        "state": projection.state.value,
        "reason": projection.reason,
        "control": projection.control.value,
        "round": projection.round,
        "ended_s": projection.ended_s,
    }


def _values(stage: Stage, columns: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(stage, name) for name in columns}
    if "uncut" in values:
        values["uncut"] = json_format.dumps(json_format.tasks_to_json(stage.uncut))
    return values
