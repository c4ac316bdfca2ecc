"""Jobs and their stages as rows: what each call of the port does within its transaction.

Invariant: a job's state follows the table of moves, and each cut, reopening and end changes the
counters once, since the row itself says how far it has come.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    Connection,
    RowMapping,
    bindparam,
    func,
    insert,
    select,
    tuple_,
    update,
)

from batchlab.adapters.sql.tables import Upserts, bundles, jobs, stages
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import (
    ENDED,
    Control,
    JobId,
    JobState,
    StageCounts,
    StageName,
    TaskSet,
    may_move,
)
from batchlab.core.ports import Cut, Ending, JobRecord, JobRows, Reopening, StageRecord, Written
from batchlab.core.protocol import json_format

US = 1_000_000
"""Microseconds in a second."""

_NO_TASKS = json_format.dumps(json_format.tasks_to_json(TaskSet()))

_job = select(jobs).where(jobs.c.id == bindparam("job"))
_newest = (
    select(jobs).order_by(jobs.c.submitted_s.desc(), jobs.c.id.desc()).limit(bindparam("limit"))
)
_active = _newest.where(jobs.c.state.not_in(sorted(ENDED)))
_change_job = update(jobs).where(jobs.c.id == bindparam("b_job"))
_make_runnable = _change_job.where(
    jobs.c.state.in_([JobState.SUBMITTED.value, JobState.PENDING.value])
).values(state=JobState.RUNNABLE.value, reason="")
_WAITING = (JobState.SUBMITTED, JobState.PENDING, JobState.RUNNABLE, JobState.STARTING)
_move = _change_job.values(state=bindparam("state"), reason="")
_control = _change_job.values(control=bindparam("control"))
_end = (
    _move.where(jobs.c.round == bindparam("b_round"), jobs.c.state.not_in(sorted(ENDED)))
    .values(reason=bindparam("reason"), control=Control.RUN.value, ended_s=bindparam("ended_s"))
    .returning(jobs)
)
_make_running = _change_job.values(state=JobState.RUNNING.value, reason="")
_stages = select(stages).where(stages.c.job == bindparam("job")).order_by(stages.c.position)
_stage = _stages.where(stages.c.stage == bindparam("stage"))
_insert_stages = insert(stages)
_change_stage = update(stages).where(
    stages.c.job == bindparam("b_job"), stages.c.stage == bindparam("b_stage")
)
_count = _change_stage.values(
    succeeded=stages.c.succeeded + bindparam("d_succeeded"),
    failed=stages.c.failed + bindparam("d_failed"),
    cancelled=stages.c.cancelled + bindparam("d_cancelled"),
)
_set_planned = _change_stage.values(planned=bindparam("planned"))
_take_cut = _set_planned.values(
    {name: bindparam(name) for name in ("plan_round", "cut_seq", "uncut")}
)
_close = _change_stage.values(
    cancelled=stages.c.cancelled + bindparam("closed"),
    planned=func.coalesce(stages.c.planned, bindparam("closed")),
)
_make_void = (
    update(bundles)
    .where(bundles.c.job == bindparam("b_job"), bundles.c.stage == bindparam("b_stage"))
    .values(void=1)
)


def add_job(
    connection: Connection, upserts: Upserts, job: JobDef, state: JobState, cut: Cut | None
) -> Written:
    if cut:
        state = JobState.RUNNABLE
    row = {
        "id": job.id,
        "token": job.token or None,
        "submitted_s": job.submitted_s,
        "spec": json_format.dumps(json_format.job_to_json(job)),
        "state": state.value,
        "reason": "",
        "control": Control.RUN.value,
        "round": 0,
    }
    if connection.execute(upserts.add_job, row).first() is None:
        return Written(_existing(connection, job), is_new=False)
    records = {stage.name: StageRecord(StageCounts(stage.name)) for stage in job.stages}
    if cut:
        counts = StageCounts(cut.stage, cut.planned)
        records[cut.stage] = StageRecord(counts, cut.round, cut.seq, cut.left)
    connection.execute(
        _insert_stages,
        [
            {
                "job": job.id,
                "stage": name,
                "position": position,
                "planned": record.counts.planned,
                "succeeded": 0,
                "failed": 0,
                "cancelled": 0,
                "retried": 0,
                "run_us": 0,
                "plan_round": record.plan_round,
                "cut_seq": record.cut_seq,
                "uncut": json_format.dumps(json_format.tasks_to_json(record.left)),
            }
            for position, (name, record) in enumerate(records.items())
        ],
    )
    # Not read again, which would take longer than to write them.
    return Written(JobRows(JobRecord(job, state), tuple(records.values())), is_new=True)


def _existing(connection: Connection, job: JobDef) -> JobRows:
    found = connection.execute(_job, {"job": job.id}).mappings().first()
    if found is None:
        by_token = select(jobs).where(jobs.c.token == job.token)
        found = connection.execute(by_token).mappings().one()
    return rows_of(connection, JobId(found["id"]))


def find_job(connection: Connection, job: JobId) -> JobRecord:
    return _job_record(_job_row(connection, job))


def page_of_jobs(
    connection: Connection, active: bool, limit: int, before: str | None
) -> list[JobRecord]:
    query, values = _active if active else _newest, {"limit": limit}
    if before is not None:
        last = _job_row(connection, JobId(before))
        query = query.where(
            tuple_(jobs.c.submitted_s, jobs.c.id) < (last["submitted_s"], last["id"])
        )
    return [_job_record(row) for row in connection.execute(query, values).mappings()]


def move_job(connection: Connection, job: JobId, state: JobState, round: int) -> bool:
    row = _job_row(connection, job)
    if row["round"] != round or not may_move(JobState(row["state"]), state):
        return False
    connection.execute(_move, {"b_job": job, "state": state.value})
    return True


def set_running(connection: Connection, found: Iterable[JobId]) -> dict[JobId, JobRows]:
    """These jobs, of which a task has ended; one that waited is RUNNING now."""
    rows: dict[JobId, JobRows] = {}
    for job in found:
        one = rows_of(connection, job)
        if one.job.state in _WAITING:
            connection.execute(_make_running, {"b_job": job})
            one = replace(one, job=replace(one.job, state=JobState.RUNNING, reason=""))
        rows[job] = one
    return rows


def set_control(connection: Connection, job: JobId, control: Control, round: int) -> bool:
    row = _job_row(connection, job)
    if row["round"] != round or JobState(row["state"]).ended:
        return False
    if row["control"] in (control.value, Control.CANCEL.value):
        return False
    connection.execute(_control, {"b_job": job, "control": control.value})
    return True


def reopen(connection: Connection, job: JobId, round: int, reopened: Sequence[Reopening]) -> bool:
    row = _job_row(connection, job)
    state = JobState(row["state"])
    if round <= row["round"] or not state.ended or not may_move(state, JobState.PENDING):
        return False
    connection.execute(
        _change_job.values(
            round=round,
            state=JobState.PENDING.value,
            reason="",
            control=Control.RUN.value,
            ended_s=None,
        ),
        {"b_job": job},
    )
    for one in reopened:
        values: dict[str, Any] = {}
        if one.replan:
            # The round too, or a cut of the void plan that comes once more would pass as new.
            values = {"planned": None, "plan_round": round, "cut_seq": -1, "uncut": _NO_TASKS}
            values["run_us"] = 0
            connection.execute(_make_void, {"b_job": job, "b_stage": one.stage})
        connection.execute(
            _count.values(values),
            {
                "b_job": job,
                "b_stage": one.stage,
                "d_succeeded": -one.succeeded,
                "d_failed": -one.failed,
                "d_cancelled": -one.cancelled,
            },
        )
    return True


def finish(connection: Connection, job: JobId, round: int, end: Ending) -> Written:
    values = {
        "b_job": job,
        "b_round": round,
        "state": end.state.value,
        "reason": _plain(end.reason),
        "ended_s": end.ended_s,
    }
    row = connection.execute(_end, values).mappings().first()
    if row is None:
        return Written(rows_of(connection, job), is_new=False)
    found = _stages_of(connection, job)
    closed = [
        {"b_job": job, "b_stage": name, "closed": end.closed.get(name, 0)}
        for name, planned in ((s.counts.stage, s.counts.planned) for s in found)
        if planned is None or end.closed.get(name)
    ]
    if closed:
        connection.execute(_close, closed)
        found = _stages_of(connection, job)
    return Written(JobRows(_job_record(row), found), is_new=True)


# --- Stages --------------------------------------------------------------------------------------


def rows_of(connection: Connection, job: JobId) -> JobRows:
    return JobRows(find_job(connection, job), _stages_of(connection, job))


def _stages_of(connection: Connection, job: JobId) -> tuple[StageRecord, ...]:
    found = connection.execute(_stages, {"job": job}).mappings()
    return tuple(_stage_record(row) for row in found)


def set_planned(
    connection: Connection, job: JobId, stage: StageName, planned: int, round: int
) -> Written:
    is_new = _stage_row(connection, job, stage)["planned"] is None
    is_new = is_new and _job_row(connection, job)["round"] == round
    if is_new:
        where = {"b_job": job, "b_stage": stage}
        connection.execute(_set_planned, {**where, "planned": planned})
    return Written(rows_of(connection, job), is_new)


def take_cut(connection: Connection, cut: Cut) -> bool:
    """Note on the stage's row that `cut` has been made; False where it or a later one has been,
    and where the job is in another round."""
    row = _stage_row(connection, cut.job, cut.stage)
    if (cut.round, cut.seq) <= (row["plan_round"], row["cut_seq"]):
        return False
    if _job_row(connection, cut.job)["round"] != cut.round:
        return False
    values: dict[str, Any] = {
        "b_job": cut.job,
        "b_stage": cut.stage,
        "plan_round": cut.round,
        "cut_seq": cut.seq,
        "uncut": json_format.dumps(json_format.tasks_to_json(cut.left)),
        "planned": row["planned"] if cut.planned is None else cut.planned,
    }
    connection.execute(_take_cut, values)
    connection.execute(_make_runnable, {"b_job": cut.job})
    return True


# --- Rows ----------------------------------------------------------------------------------------


def _job_row(connection: Connection, job: JobId) -> RowMapping:
    row = connection.execute(_job, {"job": job}).mappings().first()
    if row is None:
        raise NotFound(f"The ledger has no job {job}.")
    return row


def _stage_row(connection: Connection, job: JobId, stage: StageName) -> RowMapping:
    row = connection.execute(_stage, {"job": job, "stage": stage}).mappings().first()
    if row is None:
        raise NotFound(f"The ledger has no stage {stage} of a job {job}.")
    return row


def _job_record(row: RowMapping) -> JobRecord:
    return JobRecord(
        _job_def(row["spec"]),
        JobState(row["state"]),
        row["reason"],
        Control(row["control"]),
        row["round"],
        row["ended_s"],
    )


@lru_cache(256)
def _job_def(spec: str) -> JobDef:
    """Read again and again along with counters, while a job's definition never changes."""
    return json_format.job_from_json(json_format.loads(spec))


def _stage_record(row: RowMapping) -> StageRecord:
    counts = StageCounts(
        StageName(row["stage"]),
        row["planned"],
        row["succeeded"],
        row["failed"],
        row["cancelled"],
        row["retried"],
        row["run_us"] / US,
        row["first_start_s"],
        row["last_end_s"],
    )
    left = json_format.tasks_from_json(json.loads(row["uncut"]))
    return StageRecord(counts, row["plan_round"], row["cut_seq"], left)


def _plain(reason: str) -> str:
    # PostgreSQL's text holds no NUL, and an exception's message may hold anything: a job must not
    # fail to end because of how it ended.
    return reason.replace("\0", "\N{REPLACEMENT CHARACTER}")
