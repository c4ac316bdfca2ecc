"""A ledger with more active jobs than one page of a listing."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any, cast

from sqlalchemy import text

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.sql.ledger import open_memory
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, JobState, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import AddJob
from batchlab.manager.state import Ports, pages_of_jobs

JOBS = 10_200
JOB = JobDef(JobId("job-00000"), "job", (StageDef(StageName("s"), handler="a:b"),), 0.0, items=1)

COPIES = """
    WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :last)
    INSERT INTO jobs (id, token, submitted_s, spec, state, reason, control, round, ended_s)
    SELECT printf('job-%05d', n), NULL, submitted_s + n,
           replace(spec, 'job-00000', printf('job-%05d', n)), state, reason, control, round, ended_s
    FROM jobs, numbers
"""


def test_a_leader_reads_every_active_job_of_a_ledger_with_more_than_10_000() -> None:
    """Before, a new leader read at most the 10,000 newest jobs."""
    ledger, nothing = open_memory(), cast(Any, None)
    patience = Patience(Random(1))
    ports = Ports(SimObjects(), nothing, nothing, ledger, nothing, nothing, patience)

    async def main() -> set[str]:
        await ledger.apply(AddJob(JOB, JobState.SUBMITTED))
        with ledger._engine.begin() as connection:
            connection.execute(text(COPIES), {"last": JOBS - 1})
        found = {rows.id async for page in pages_of_jobs(ports, active=True) for rows in page}
        await ledger.close()
        return set(found)

    assert asyncio.run(main()) == {f"job-{n:05d}" for n in range(JOBS)}
