"""A job's rows made anew, as what the bucket says of it would have made them.

Invariant: within one transaction, so nobody sees a job half restored; and by the same statements
as it came to them in the first place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, bindparam, delete, func, select

from batchlab.adapters.sql import bundle_rows, job_rows
from batchlab.adapters.sql.tables import Upserts, bundles, jobs, stages
from batchlab.core.errors import NotFound
from batchlab.core.model import Control, JobId, JobState
from batchlab.core.ports import JobRows, Past, Round

_FOLDED_AT_ONCE = 100

_last = select(func.max(bundles.c.seq)).where(bundles.c.job == bindparam("job"))


def rows_of(connection: Connection, job: JobId) -> JobRows:
    # Some completions change no counter, so the newest seq tells the versions of a job apart.
    last = connection.execute(_last, {"job": job}).scalar_one()
    return replace(job_rows.rows_of(connection, job), stamp=-1 if last is None else last)


def restore(connection: Connection, upserts: Upserts, past: Past, over: JobRows | None) -> bool:
    job = past.job.id
    try:
        is_same = rows_of(connection, job).is_version(over)
    except NotFound:
        is_same = over is None
    if not is_same:
        return False
    forget(connection, [job])
    job_rows.add_job(connection, upserts, past.job, past.state, None)
    for number, one in enumerate(past.rounds):
        if number:
            job_rows.reopen(connection, job, number, one.reopened)
        _restore_round(connection, upserts, job, number, one)
    last = len(past.rounds) - 1
    job_rows.set_control(connection, job, past.control, last)
    if past.control is Control.PAUSE:
        job_rows.move_job(connection, job, JobState.PAUSED, last)
    return True


def _restore_round(
    connection: Connection, upserts: Upserts, job: JobId, number: int, one: Round
) -> None:
    for cut in one.cuts:
        if job_rows.take_cut(connection, cut):
            bundle_rows.plan(connection, upserts, cut.bundles)
    for stage, planned in one.planned.items():
        job_rows.set_planned(connection, job, stage, planned, number)
    for i in range(0, len(one.completions), _FOLDED_AT_ONCE):
        some = slice(i, i + _FOLDED_AT_ONCE)
        bundle_rows.fold(connection, upserts, one.completions[some], one.casualties[some])
    if one.ending:
        job_rows.finish(connection, job, number, one.ending)


def forget(connection: Connection, which: Sequence[JobId] | None) -> None:
    for table, column in ((bundles, bundles.c.job), (stages, stages.c.job), (jobs, jobs.c.id)):
        if which is None:
            connection.execute(delete(table))
        else:
            connection.execute(delete(table).where(column.in_(which)))
