"""Deletion of ended jobs: their objects in the bucket, and their rows in the ledger.

The manager deletes a job in six steps:

1. The object at `object_keys.deletion` stores the user's request, so the next leader finishes an interrupted deletion.
2. A conditional PUT of a note at the key of the job's next retry commits the deletion. A job is therefore either
   retried or deleted, also if another manager retries the job at the same time.
3. A note replaces the job's definition, by a conditional PUT. The note stays forever. A rebuild of the ledger does not
   restore the job, a late submission with the job's id is refused, and workers drop late messages of the job.
4. The manager deletes the job's other objects, and then the job's rows in the ledger.
5. The manager deletes the note of step 2, and replaces the request of step 1 with the time of a sweep.
6. A sweep deletes the objects that workers have written since then, and the request. Such a worker was suspended during
   the deletion, with a bundle in flight. If an event names a deleted job, an earlier sweep follows the event.

A manager that plans a job checks whether a deleted job owns the input. The request is therefore written before the
check for active jobs that read the job's objects: the deletion finds the reader, or the reader finds the request.

Invariant: each step may be repeated, and a job's id is never used again, because no step deletes the object at the key
of the definition. A call of a suspended manager that arrives late therefore deletes only objects of the deleted job.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

from batchlab.core import commit
from batchlab.core.errors import AlreadyExists, BackendError, Deleted, NotFound, Refused
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId
from batchlab.core.port_retries import raise_if_cancelled, set_after
from batchlab.core.ports import JobRecord
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager import admission
from batchlab.manager.context import Context, Part
from batchlab.manager.ledger_rebuild import lost_jobs
from batchlab.manager.retry_rounds import Retry
from batchlab.manager.spending import Spending
from batchlab.manager.state import pages_of_jobs

log = logging.getLogger(__name__)

SWEEP_S = 3600.0
"""Seconds from a deletion to its sweep. The grid replaces the instance of a suspended worker much earlier."""


class JobDeletion(Part):
    def __init__(
        self,
        context: Context,
        job_record: Callable[[JobId], Awaitable[JobRecord]],
        is_awaited: Callable[[JobId], Awaitable[bool]],
        spending: Spending | None = None,
    ) -> None:
        """`job_record` returns a job from the ledger or the bucket, or raises NotFound. `is_awaited` returns whether a
        schedule has not recorded the end of the job yet."""
        super().__init__(context)
        self._job_record = job_record
        self._is_awaited = is_awaited
        self._spending = spending
        self.is_search_due = asyncio.Event()
        """Event that is set if the bucket may have a deletion that was not finished."""
        self.is_search_due.set()
        self._sweeps: dict[JobId, float] = {}
        """Time of the next sweep of each deleted job."""
        self._lost: Sequence[JobDef] | None = None
        """Jobs that have an input or a dependency, and that the ledger did not contain at the first deletion, or None
        before the first deletion."""
        self._lock = asyncio.Lock()
        """Lock of the deletions and sweeps of this manager. Without it, a refused deletion would remove the request of
        a concurrent deletion of the same job, and a sweep would drop the request of an unfinished deletion."""

    def reload(self) -> None:
        """Search for unfinished deletions and lost jobs again, because another manager has led, or the ledger has lost
        the lease together with jobs."""
        self._lost = None
        self.is_search_due.set()

    async def delete(self, job: JobId) -> int:
        """Delete an ended job, and return the number of deleted objects. If the job was deleted before, delete the
        objects that workers have written since then. Raise Refused if the job has not ended, and NotFound if the job
        does not exist."""
        async with self._lock:
            return await self._delete(job)

    async def _delete(self, job: JobId) -> int:
        try:
            record = await self._job_record(job)
        except NotFound:
            # If the bucket has lost the definition, the request shows that the deletion is not finished.
            stored = await self._patience(partial(self._objects.head, object_keys.deletion(job)))
            if not await self._is_defined(job) and (stored or await self._is_deleted(job)):
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
        request, key = object_keys.deletion(job), object_keys.retry(job, record.round + 1)
        try:
            await self._patience(partial(self._objects.put, request, json_format.deleted_job(job)))
            try:
                if not await self._is_committed(key):
                    await self._check_readers(job)
                    await self._commit(job, key)
            except Refused:
                await self._patience(partial(self._objects.delete, [request]))
                raise
            return await self._finish(job)
        except BaseException:
            self.is_search_due.set()
            raise

    async def _commit(self, job: JobId, key: str) -> None:
        """Write the note that commits the deletion, or raise Refused if the key has a retry of the job."""
        try:
            await self._patience(partial(self._objects.put, key, json_format.deleted_job(job), if_absent=True))
        except AlreadyExists:
            if not await self._is_committed(key):
                raise Refused(
                    f"Job {job} is retried at the moment, so it cannot be deleted.",
                    remedy=f"`batchlab job show {job}` shows its state.",
                ) from None

    async def _check_readers(self, job: JobId) -> None:
        """Raise Refused if a job that has not ended reads objects of the job or depends on the job.

        Another manager may have accepted the reader, so the check reads the ledger. The ledger may have lost the
        reader, so the check also reads the bucket.
        """
        if self._lost is None:
            self._lost = [lost for lost in await lost_jobs(self._ports) if lost.input or lost.after]
        for lost in self._lost:
            if (use := _use(lost, job)) and await self._is_lost(lost.id):
                raise Refused(
                    f"The ledger has lost job {lost.id}, which {use} job {job}, so job {job} cannot be deleted.",
                    remedy="`batchlab grid rebuild-ledger` restores lost jobs.",
                )
        async for page in pages_of_jobs(self._ports, active=True):
            for rows in page:
                reader = rows.job.job
                if reader.id != job and (use := _use(reader, job)):
                    raise Refused(
                        f"Job {reader.id} {use} job {job}, so job {job} cannot be deleted.",
                        remedy=f"Wait for the end of job {reader.id}.",
                    )

    async def _is_lost(self, job: JobId) -> bool:
        try:
            await self._ledger.job(job)
        except NotFound:
            return await self._is_defined(job)
        return False

    async def _is_defined(self, job: JobId) -> bool:
        return await self._patience(partial(commit.is_defined, self._objects, job))

    async def _is_deleted(self, job: JobId) -> bool:
        return await self._patience(partial(commit.is_deleted, self._objects, job))

    async def _is_committed(self, key: str) -> bool:
        """Return whether the object at the key of a retry commits the deletion of the job."""
        try:
            Retry.from_bytes(await self._patience(partial(self._objects.get, key)))
        except Deleted:
            return True
        except NotFound:
            pass
        return False

    async def run(self) -> None:
        """Finish interrupted deletions and sweep deleted jobs, in an endless loop."""
        while True:
            if self._sweeps:
                due_s = min(self._sweeps.values()) - self._clock.now_s()
                await set_after(self.is_search_due, max(0.0, due_s))
            else:
                await self.is_search_due.wait()
            self.is_search_due.clear()
            try:
                await self.finish_interrupted()
                await self._sweep()
            except BackendError as error:
                raise_if_cancelled()
                log.warning("an unfinished deletion waits for the backend: %s", error)
                self.is_search_due.set()
                await asyncio.sleep(self._settings.silence_s)

    async def finish_interrupted(self) -> None:
        """Finish the deletions that an earlier leader, or a failed request, has begun, and schedule the sweeps of the
        other deletions. Raise BackendError if the backend prevents the end of a deletion."""
        failed: BackendError | None = None
        for job in [job async for job in commit.deletions(self._objects)]:
            if job in self._sweeps:
                continue
            try:
                async with self._lock:
                    await self._continue(job)
            except BackendError as error:
                raise_if_cancelled()
                log.warning("the deletion of %s waits for the backend: %s", job, error, extra={"job": job})
                failed = error
        if failed:
            raise failed

    async def _sweep_time(self, job: JobId) -> float | None:
        return await self._patience(partial(commit.sweep_time, self._objects, job))

    async def _sweep(self) -> None:
        """Delete the objects that workers have written since the deletion of their job."""
        now_s = self._clock.now_s()
        for job in [job for job, due_s in self._sweeps.items() if due_s <= now_s]:
            async with self._lock:
                await self._sweep_job(job, now_s)

    async def _sweep_job(self, job: JobId, now_s: float) -> None:
        due_s = await self._sweep_time(job)
        if due_s is None and await self._has_request(job):
            # An event caused this sweep before the end of an interrupted deletion, which keeps the note of the retry.
            del self._sweeps[job]
            await self._continue(job)
            return
        if deleted := await self._delete_objects(job):
            log.warning("%d late objects of the deleted job are deleted", deleted, extra={"job": job})
        del self._sweeps[job]
        if due_s is None:
            return  # An event caused this sweep after the last sweep of the job.
        if due_s > now_s:  # an event caused this sweep
            self._sweeps[job] = due_s
        else:
            await self._patience(partial(self._objects.delete, [object_keys.deletion(job)]))

    async def sweep_late(self, job: JobId) -> None:
        """Schedule a sweep if the job was deleted, because an event reports late objects of the job."""
        soon_s = self._clock.now_s() + self._settings.silence_s
        if self._sweeps.get(job, math.inf) > soon_s and admission.is_name(job) and await self._is_deleted(job):
            log.warning("an event names a deleted job", extra={"job": job})
            self._sweeps[job] = soon_s
            self.is_search_due.set()

    async def _has_request(self, job: JobId) -> bool:
        return await self._patience(partial(self._objects.head, object_keys.deletion(job))) is not None

    async def _continue(self, job: JobId) -> None:
        """Finish a deletion, or remember the time of its sweep. A request may have finished the deletion meanwhile."""
        request = object_keys.deletion(job)
        if not await self._has_request(job):
            return
        if due_s := await self._sweep_time(job):
            self._sweeps[job] = due_s
            return
        log.warning("the deletion of %s was not finished", job, extra={"job": job})
        try:
            await self._finish_begun(job)
        except Refused as error:
            log.warning("job %s is kept: %s", job, error, extra={"job": job})
            await self._patience(partial(self._objects.delete, [request]))

    async def _finish_begun(self, job: JobId) -> None:
        try:
            record = await self._job_record(job)
        except NotFound:
            # No object is deleted while the bucket has the definition, so the job can be kept.
            if await self._is_defined(job):
                raise Refused("The ledger has lost the job, and the job cannot be restored.") from None
            is_committed = True
        else:
            is_committed = record.state.ended and await self._is_committed(object_keys.retry(job, record.round + 1))
        await (self._finish(job) if is_committed else self._delete(job))

    async def _finish(self, job: JobId) -> int:
        if self._spending:
            await self._spending.forget(job)
        await self._context.reports.forget(job)
        await self._replace_definition(job)
        # The note at the key of the retry stays until the ledger forgets the job.
        deleted = await self._delete_objects(job, keeps=object_keys.retries(job))
        await self._ledger.forget([job])
        await self._delete_objects(job)
        await self._patience(partial(self._objects.delete, [object_keys.reference_key(job)]))
        due_s = self._clock.now_s() + max(SWEEP_S, 12 * self._settings.silence_s)
        await self._patience(partial(self._objects.put, object_keys.deletion(job), json_format.due_sweep(job, due_s)))
        self._sweeps[job] = due_s
        self.is_search_due.set()
        log.info("deleted", extra={"job": job})
        return deleted

    async def _delete_objects(self, job: JobId, keeps: str = "") -> int:
        """Delete the objects of a job except the note in place of its definition and the objects with the prefix
        `keeps`. Return the number of deleted objects."""
        kept = (object_keys.spec(job), keeps or object_keys.spec(job))
        deleted = 0
        for prefix in (*object_keys.everything_of(job), object_keys.addresses_of(job)):
            async for page in self._objects.list(prefix):
                keys = [info.key for info in page if not info.key.startswith(kept)]
                await self._patience(partial(self._objects.delete, keys))
                deleted += len(keys)
        return deleted

    async def _replace_definition(self, job: JobId) -> None:
        """Replace the definition of the job with a note, by one conditional PUT. The key of the definition is never
        without an object, because a submission would otherwise create a new job with the same id."""
        key, note = object_keys.spec(job), json_format.deleted_job(job)
        while (info := await self._patience(partial(self._objects.head, key))) is None or await self._is_defined(job):
            # The condition fails if another manager has written the note, or if the response to an earlier write was
            # lost.
            put = partial(self._objects.put, key, note, if_absent=info is None, if_match=info.etag if info else None)
            with suppress(AlreadyExists, NotFound):
                await self._patience(put)


def _use(reader: JobDef, job: JobId) -> str:
    """Return how `reader` needs the job, as a verb phrase, or an empty text if `reader` does not need the job."""
    if reader.input and object_keys.reads(reader.input.keys, job):
        return "reads objects of"
    return "depends on" if any(dependency.job == job for dependency in reader.after) else ""
