"""Deletion of ended jobs: their objects in the bucket, and their rows in the ledger.

The manager deletes a job in five steps:

1. The object at `object_keys.deletion` stores the user's request, so the next leader finishes an interrupted deletion.
2. A conditional PUT of a note at the key of the job's next retry commits the deletion. A job is therefore either
   retried or deleted, also if another manager retries the job at the same time.
3. A note replaces the job's definition. The note stays forever. A rebuild of the ledger does not restore the job, a
   late submission with the job's id is refused, and workers drop late messages of the job.
4. The manager deletes the job's other objects, and then the job's rows in the ledger.
5. The manager deletes the notes of the steps 1 and 2.

Invariant: each step may be repeated, and a job's id is never used again. A call of a suspended manager that arrives
late therefore deletes only objects of the deleted job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from batchlab.core import commit
from batchlab.core.errors import AlreadyExists, Deleted, NotFound, Refused
from batchlab.core.model import JobId
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.context import Context, Part
from batchlab.manager.retry_rounds import Retry

log = logging.getLogger(__name__)


class JobDeletion(Part):
    def __init__(self, context: Context, is_awaited: Callable[[JobId], bool]) -> None:
        """`is_awaited` returns whether a schedule has not recorded the end of the job yet."""
        super().__init__(context)
        self._is_awaited = is_awaited

    async def delete(self, job: JobId) -> int:
        """Delete an ended job, and return the number of deleted objects. Raise Refused if the job has not ended, and
        NotFound if the ledger does not have the job."""
        record = await self._ledger.job(job)
        live = self._lives.get(job)
        if not record.state.ended or (live is not None and not live.ended.is_set()):
            raise Refused(
                f"Job {job} is {record.state}, and only an ended job can be deleted.",
                remedy=f"`batchlab job cancel {job}` ends the job.",
            )
        if self._is_awaited(job):
            raise Refused(
                f"The schedule of job {job} has not recorded the end of the job.", remedy="Try again in some seconds."
            )
        request = object_keys.deletion(job)
        await self._patience(partial(self._objects.put, request, json_format.deleted_job(job)))
        key = object_keys.retry(job, record.round + 1)
        try:
            await self._patience(partial(self._objects.put, key, json_format.deleted_job(job), if_absent=True))
        except AlreadyExists:
            if not await self._is_committed(key):
                await self._patience(partial(self._objects.delete, [request]))
                raise Refused(
                    f"Job {job} is retried at the moment, so it cannot be deleted.",
                    remedy=f"`batchlab job show {job}` shows its state.",
                ) from None
        return await self._finish(job)

    async def _is_committed(self, key: str) -> bool:
        try:
            Retry.from_bytes(await self._patience(partial(self._objects.get, key)))
        except Deleted:
            return True
        return False

    async def finish_interrupted(self) -> None:
        """Finish the deletions that an earlier leader has begun."""
        begun: list[JobId] = []
        async for page in self._objects.list(object_keys.DELETIONS):
            begun += [JobId(info.key.removeprefix(object_keys.DELETIONS).removesuffix(".json")) for info in page]
        for job in begun:
            log.warning("the deletion of %s was not finished", job, extra={"job": job})
            try:
                await self.delete(job)
            except NotFound:
                await self._finish(job)
            except Refused as error:
                log.warning("job %s is kept: %s", job, error, extra={"job": job})
                await self._patience(partial(self._objects.delete, [object_keys.deletion(job)]))

    async def _finish(self, job: JobId) -> int:
        self._context.reports.forget(job)
        await self._replace_definition(job)
        spec, retries = object_keys.spec(job), object_keys.retries(job)
        deleted = 0
        for prefix in (*object_keys.everything_of(job), object_keys.addresses_of(job)):
            async for page in self._objects.list(prefix):
                # The note at the key of the retry stays until the ledger forgets the job.
                keys = [info.key for info in page if info.key != spec and not info.key.startswith(retries)]
                await self._patience(partial(self._objects.delete, keys))
                deleted += len(keys)
        await self._ledger.forget([job])
        rest = [object_keys.reference_key(job), object_keys.deletion(job)]
        async for page in self._objects.list(retries):
            rest[:0] = [info.key for info in page]
        await self._patience(partial(self._objects.delete, rest))
        log.info("deleted", extra={"job": job})
        return deleted

    async def _replace_definition(self, job: JobId) -> None:
        """Replace the definition of the job with a note. A policy of the bucket may forbid to overwrite a definition,
        so the definition is deleted first."""
        key, is_defined = object_keys.spec(job), partial(commit.is_defined, self._objects, job)
        if await self._patience(is_defined):
            await self._patience(partial(self._objects.delete, [key]))
        try:
            await self._patience(partial(self._objects.put, key, json_format.deleted_job(job), if_absent=True))
        except AlreadyExists:
            if await self._patience(is_defined):
                raise Refused(f"Job {job} was submitted again meanwhile.", remedy="Delete the job again.") from None
