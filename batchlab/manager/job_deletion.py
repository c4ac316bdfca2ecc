"""Deletion of ended jobs: their objects in the bucket, and their rows in the ledger.

The manager deletes a job in five steps:

1. The object at `object_keys.deletion` stores the user's request, so the next leader finishes an interrupted deletion.
2. A conditional PUT of a note at the key of the job's next retry commits the deletion. A job is therefore either
   retried or deleted, also if another manager retries the job at the same time.
3. A note replaces the job's definition, by a conditional PUT. The note stays forever. A rebuild of the ledger does not
   restore the job, a late submission with the job's id is refused, and workers drop late messages of the job.
4. The manager deletes the job's other objects, and then the job's rows in the ledger.
5. The manager deletes the notes of the steps 1 and 2.

Invariant: each step may be repeated, and a job's id is never used again, because no step deletes the object at the key
of the definition. A call of a suspended manager that arrives late therefore deletes only objects of the deleted job.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from batchlab.core import commit
from batchlab.core.errors import AlreadyExists, BackendError, Deleted, NotFound, Refused
from batchlab.core.model import JobId
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.context import Context, Part
from batchlab.manager.retry_rounds import Retry
from batchlab.manager.spending import Spending

log = logging.getLogger(__name__)


class JobDeletion(Part):
    def __init__(
        self, context: Context, is_awaited: Callable[[JobId], Awaitable[bool]], spending: Spending | None = None
    ) -> None:
        """`is_awaited` returns whether a schedule has not recorded the end of the job yet."""
        super().__init__(context)
        self._is_awaited = is_awaited
        self._spending = spending
        self.is_search_due = asyncio.Event()
        """Event that is set if the bucket may have a deletion that was not finished."""
        self.is_search_due.set()

    async def delete(self, job: JobId) -> int:
        """Delete an ended job, and return the number of deleted objects. If the job was deleted before, delete the
        objects that workers have written since then. Raise Refused if the job has not ended, and NotFound if the job
        does not exist."""
        try:
            record = await self._ledger.job(job)
        except NotFound:
            if await self._is_deleted(job):
                return await self._finish(job)
            raise
        live = self._lives.get(job)
        if not record.state.ended or (live is not None and not live.ended.is_set()):
            raise Refused(
                f"Job {job} is {record.state}, and only an ended job can be deleted.",
                remedy=f"`batchlab job cancel {job}` ends the job.",
            )
        if await self._is_awaited(job):
            raise Refused(
                f"The schedule of job {job} has not recorded the end of the job.", remedy="Try again in some seconds."
            )
        self._check_readers(job)
        request, key = object_keys.deletion(job), object_keys.retry(job, record.round + 1)
        try:
            await self._patience(partial(self._objects.put, request, json_format.deleted_job(job)))
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
        except BaseException:
            self.is_search_due.set()
            raise

    def _check_readers(self, job: JobId) -> None:
        """Raise Refused if a job that has not ended reads objects of the job."""
        prefixes = object_keys.everything_of(job)
        for live in self._lives.values():
            keys = live.job.input.keys if live.job.input else ()
            if live.id != job and not live.ended.is_set() and any(key.startswith(prefixes) for key in keys):
                raise Refused(
                    f"Job {live.id} reads objects of job {job}, so job {job} cannot be deleted.",
                    remedy=f"Wait for the end of job {live.id}.",
                )

    async def _is_deleted(self, job: JobId) -> bool:
        """Return whether a note has replaced the definition of the job."""
        if await self._patience(partial(self._objects.head, object_keys.spec(job))) is None:
            return False
        return not await self._patience(partial(commit.is_defined, self._objects, job))

    async def _is_committed(self, key: str) -> bool:
        """Return whether the object at the key of a retry commits the deletion of the job."""
        try:
            Retry.from_bytes(await self._patience(partial(self._objects.get, key)))
        except Deleted:
            return True
        except NotFound:
            pass
        return False

    async def finish_interrupted(self) -> None:
        """Finish the deletions that an earlier leader, or a failed request, has begun. Raise BackendError if the
        backend prevents the end of a deletion."""
        begun: list[JobId] = []
        async for page in self._objects.list(object_keys.DELETIONS):
            begun += [JobId(info.key.removeprefix(object_keys.DELETIONS).removesuffix(".json")) for info in page]
        failed: BackendError | None = None
        for job in begun:
            log.warning("the deletion of %s was not finished", job, extra={"job": job})
            try:
                await self._continue(job)
            except Refused as error:
                log.warning("job %s is kept: %s", job, error, extra={"job": job})
                await self._patience(partial(self._objects.delete, [object_keys.deletion(job)]))
            except BackendError as error:
                raise_if_cancelled()
                log.warning("the deletion of %s waits for the backend: %s", job, error, extra={"job": job})
                failed = error
        if failed:
            raise failed

    async def _continue(self, job: JobId) -> None:
        try:
            record = await self._ledger.job(job)
        except NotFound:
            is_committed = True
        else:
            is_committed = record.state.ended and await self._is_committed(object_keys.retry(job, record.round + 1))
        await (self._finish(job) if is_committed else self.delete(job))

    async def _finish(self, job: JobId) -> int:
        if self._spending:
            await self._spending.forget(job)
        await self._context.reports.forget(job)
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
        """Replace the definition of the job with a note, by one conditional PUT. The key of the definition is never
        without an object, because a submission would otherwise create a new job with the same id."""
        key, note = object_keys.spec(job), json_format.deleted_job(job)
        while (info := await self._patience(partial(self._objects.head, key))) is None or await self._patience(
            partial(commit.is_defined, self._objects, job)
        ):
            # The condition fails if another manager has written the note, or if the response to an earlier write was
            # lost.
            put = partial(self._objects.put, key, note, if_absent=info is None, if_match=info.etag if info else None)
            with suppress(AlreadyExists, NotFound):
                await self._patience(put)
