"""Functions that load and store the rows of jobs, stages, and bundles.

Invariants: a writing transaction excludes other writers, so a loaded row cannot change before the row is stored. The
ledger projection decides which rows a change alters. The row of a bundle changes once, from planned to done, because
the statement that stores rows does not change a done row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import Connection, RowMapping, Select, bindparam, case, func, insert, select, tuple_, update

from batchlab.adapters.sql.tables import Upserts, bundles, jobs, stages
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.ledger_projection import BundleRow, Key, Known, Projection, Stage
from batchlab.core.model import ENDED, BundleId, Control, JobId, JobState, StageName
from batchlab.core.ports import BundleRecord, BundleResult, JobRecord, JobRows
from batchlab.core.protocol import json_format

MAX_NAMES = 1000
"""Maximum number of jobs in one query of stages, because databases limit the number of parameters of a query."""
_JOB = ("state", "reason", "control", "round", "ended_s")
_PLAN = ("planned", "plan_round", "cut_seq", "uncut")
_COUNTERS = ("succeeded", "failed", "cancelled", "retried", "run_us", "first_start_s", "last_end_s")

_job = select(jobs).where(jobs.c.id == bindparam("job"))
_by_token = select(jobs.c.id).where(jobs.c.token == bindparam("token"))
_newest = select(jobs).order_by(jobs.c.submitted_s.desc(), jobs.c.id.desc()).limit(bindparam("limit"))
_active = _newest.where(jobs.c.state.not_in(sorted(ENDED)))
_STAGE = [field.name for field in fields(Stage) if field.name in stages.c and field.name != "uncut"]
"""Columns of a stage, in the order of the arguments of Stage. `uncut` is not included."""
_STAGE_COLUMNS = (stages.c.stage, stages.c.uncut, *(stages.c[name] for name in _STAGE))
"""Columns of a stage, in the order of the arguments of `_add_stage`."""
_stages_of_jobs = (
    select(stages.c.job, *_STAGE_COLUMNS)
    .where(stages.c.job.in_(bindparam("jobs", expanding=True)))
    .order_by(stages.c.job, stages.c.position)
)
_job_with_stages = (
    select(
        # The definition of the job may be long, so only the row of the first stage contains the definition.
        case((stages.c.position == 0, jobs.c.spec)),
        *(jobs.c[name] for name in _JOB),
        *_STAGE_COLUMNS,
    )
    .join_from(jobs, stages)
    .where(jobs.c.id == bindparam("job"))
    .order_by(stages.c.position)
)
_last_seq = select(func.max(bundles.c.seq)).where(bundles.c.job == bindparam("job"))
_insert_stages = insert(stages)
_update_job = update(jobs).where(jobs.c.id == bindparam("b_job")).values({name: bindparam(name) for name in _JOB})
_stage = update(stages).where(stages.c.job == bindparam("b_job"), stages.c.stage == bindparam("b_stage"))
_get_job = attrgetter(*_JOB)
_GROUPS = tuple((attrgetter(*columns), columns) for columns in (_PLAN, _COUNTERS))
"""Columns of a stage that change together, and a function that returns their values."""
_STORE = {columns: _stage.values({name: bindparam(name) for name in columns}) for _, columns in _GROUPS}


# --- Loading --------------------------------------------------------------------------------------


def load_job(connection: Connection, name: JobId) -> Projection:
    """Load the rows of a job with its stages. Raise NotFound if the job does not exist."""
    rows = connection.execute(_job_with_stages, {"job": name}).all()
    if not rows:
        raise _no_job(name)
    spec, *job = rows[0][: 1 + len(_JOB)]
    projection = _projection(spec, *job)
    for row in rows:
        _add_stage(projection, *row[1 + len(_JOB) :])
    return projection


def _add_stage(projection: Projection, name: str, uncut: str, *values: Any) -> None:
    tasks = json_format.tasks_from_json(json.loads(uncut))
    projection.stages[StageName(name)] = Stage(*(*values, tasks))


def rows_of(connection: Connection, name: JobId) -> JobRows:
    """Return the rows of a job with their stamp. Raise NotFound if the job does not exist."""
    projection = load_job(connection, name)
    # The newest seq identifies the version of a job, because some completions do not change a counter.
    last = connection.execute(_last_seq, {"job": name}).scalar_one()
    return projection.rows(-1 if last is None else last)


def find_job(connection: Connection, name: JobId) -> JobRecord:
    return _projection_of(_row(connection, name)).rows().job


def page_of_jobs(connection: Connection, active: bool, limit: int, before: str | None) -> list[JobRows]:
    query, values = _active if active else _newest, {"limit": limit}
    if before is not None:
        last = _row(connection, JobId(before))
        query = query.where(tuple_(jobs.c.submitted_s, jobs.c.id) < (last["submitted_s"], last["id"]))
    page = {row["id"]: _projection_of(row) for row in connection.execute(query, values).mappings()}
    names = list(page)
    for first in range(0, len(names), MAX_NAMES):
        batch = names[first : first + MAX_NAMES]
        for job, *stage in connection.execute(_stages_of_jobs, {"jobs": batch}):
            _add_stage(page[job], *stage)
    return [projection.rows() for projection in page.values()]


def _row(connection: Connection, name: JobId) -> RowMapping:
    row = connection.execute(_job, {"job": name}).mappings().first()
    if row is None:
        raise _no_job(name)
    return row


def _no_job(name: JobId) -> NotFound:
    return NotFound(f"The ledger does not have a job {name}.")


def _projection(spec: str, state: str, reason: str, control: str, round_: int, ended_s: float | None) -> Projection:
    return Projection(_job_def(spec), JobState(state), reason, Control(control), round_, ended_s)


def _projection_of(row: RowMapping) -> Projection:
    return _projection(row["spec"], *(row[name] for name in _JOB))


_job_defs: WeakValueDictionary[str, JobDef] = WeakValueDictionary()
"""Definitions that other objects hold, such as the live jobs of a manager, by their JSON text."""


@lru_cache(256)
def _job_def(spec: str) -> JobDef:
    """Parse the definition of a job.

    Parsed definitions are cached, because every read of a job's counters also reads the job's definition. The
    definition of a job never changes.
    """
    job = _job_defs.get(spec)
    if job is None:
        job = _job_defs[spec] = json_format.job_from_json(json_format.loads(spec))
    return job


# --- Storing --------------------------------------------------------------------------------------


def add_job(connection: Connection, upserts: Upserts, projection: Projection) -> JobId | None:
    """Insert the rows of a job with its stages.

    Return the id of an existing job with the same id or client token, or None after the insert.
    """
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
            {"job": job.id, "stage": name, "position": position} | _values(stage, _PLAN) | _values(stage, _COUNTERS)
            for position, (name, stage) in enumerate(projection.stages.items())
        ],
    )
    return None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Values of a job at the time of loading, for a comparison after a change."""

    job: tuple[Any, ...]
    stages: Mapping[StageName, Sequence[tuple[Any, ...]]]

    @classmethod
    def of(cls, projection: Projection) -> Snapshot:
        return cls(
            _get_job(projection),
            {name: [get(stage) for get, _ in _GROUPS] for name, stage in projection.stages.items()},
        )


def store_job(connection: Connection, projection: Projection, before: Snapshot) -> None:
    """Store the values of the job that differ from `before`."""
    name = projection.job.id
    if _get_job(projection) != before.job:
        connection.execute(_update_job, {"b_job": name, **_job_values(projection)})
    for group, (get, columns) in enumerate(_GROUPS):
        changed = [
            {"b_job": name, "b_stage": stage, **_values(loaded, columns)}
            for stage, loaded in projection.stages.items()
            if get(loaded) != before.stages[stage][group]
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


_make_void = (
    update(bundles).where(bundles.c.job == bindparam("b_job"), bundles.c.stage == bindparam("b_stage")).values(void=1)
)


def load_known(connection: Connection, upserts: Upserts, keys: Sequence[tuple[JobId, Key]]) -> dict[JobId, Known]:
    """Return, for each existing bundle of `keys`, whether the bundle is done."""
    known: dict[JobId, Known] = {job: {} for job, _ in keys}
    rows = upserts.known(connection, [(job, *key) for job, key in keys])
    for job, stage, name, is_done in rows:
        known[JobId(job)][StageName(stage), BundleId(name)] = bool(is_done)
    return known


def make_void(connection: Connection, job: JobId, names: Iterable[StageName]) -> None:
    """Mark the bundles of the given stages as void."""
    for name in names:
        connection.execute(_make_void, {"b_job": job, "b_stage": name})


def store_bundles(connection: Connection, upserts: Upserts, projection: Projection, rows: Iterable[BundleRow]) -> None:
    """Store the rows of the given bundles.

    The call does not change the row of a bundle that is done. The call does not plan a bundle a second time.
    """
    job = projection.job.id
    values = []
    for row in rows:
        void = int(projection.is_void(row))
        if row.completion:
            body, failed = (json_format.completion_to_json(row.completion), len(row.completion.failed))
        else:
            assert row.planned
            body, failed = json_format.bundle_to_json(row.planned), 0
        values.append((job, row.stage, row.id, row.seq, failed, void, json_format.dumps(body)))
    if values:
        upserts.store_bundles(connection, values)


def select_bundles(
    names: Sequence[JobId], stage: StageName | None, done: bool | None, after_seq: int | None, failed: bool
) -> Select[int | None, str]:
    query = (
        select(bundles.c.seq, bundles.c.body)
        .where(bundles.c.job == names[0] if len(names) == 1 else bundles.c.job.in_(names), bundles.c.void == 0)
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


def read_results(connection: Connection, query: Select[Any, str]) -> list[BundleResult]:
    """Return the results of the done bundles that the query selects."""
    # Pydantic is imported on first use, because a manager without readers of its page starts faster without it.
    from pydantic_core import from_json

    rows = connection.execute(query).all()
    # Pydantic parses one long text in half of the time that the module json needs for short texts.
    docs = from_json(f"[{','.join([body for _, body in rows])}]")
    return [_result(seq, doc["b"], doc) for (seq, _), doc in zip(rows, docs, strict=True)]


def _result(seq: int, bundle: Mapping[str, Any], done: Mapping[str, Any]) -> BundleResult:
    return BundleResult(
        seq,
        bundle["s"],
        bundle["t"],
        bundle["a"],
        bundle.get("r", 0),
        done["w"],
        done["t0"],
        done["t1"],
        done["ok"],
        done["no"],
        done["x"],
        done["re"],
    )


def read_bundles(connection: Connection, query: Select[int | None, str]) -> list[BundleRecord]:
    return [_bundle_record(seq, body) for seq, body in connection.execute(query)]


def _bundle_record(seq: int | None, body: str) -> BundleRecord:
    doc = json.loads(body)
    if seq is None:
        return BundleRecord(json_format.bundle_from_json(doc))
    completion = json_format.completion_from_json(doc)
    return BundleRecord(completion.bundle, completion, seq)
