"""A retry that does not read the retry of another request, as several planted bugs need it."""

from __future__ import annotations

from contextlib import suppress

from batchlab.core import commit
from batchlab.core.errors import AlreadyExists
from batchlab.core.ports import ChangeResult, JobRecord, Reopen
from batchlab.core.protocol import object_keys
from batchlab.manager.job_commands import JobCommands
from batchlab.manager.retry_rounds import Retry


async def run_own_retry(commands: JobCommands, record: JobRecord, made: Retry) -> JobRecord:
    """Run the retry `made`, even if the bucket already contains another retry of the same round."""
    objects, patience, ledger, job = commands._objects, commands._patience, commands._ledger, record.job.id
    round_ = record.round + 1
    await commit.permit_round(objects, job, round_, patience)
    key = object_keys.retry(job, round_)
    commands._unfinished.add(job)
    with suppress(AlreadyExists):
        await patience(lambda: objects.put(key, made.to_bytes(), if_absent=True))
    await ledger.apply(Reopen(job, round_, made.reopened))
    live = await commands._adoption.adopt(ChangeResult(await ledger.rows(job), is_new=False), concurrent=True)
    commands._unfinished.discard(job)
    await commands._coordinator.send(live.job, [b for cut in made.cuts for b in cut.bundles])
    return live.record
