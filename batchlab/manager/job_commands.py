"""User commands for jobs: submit, cancel, pause, resume, and retry.

Invariant: the manager stores each command in the bucket first (as a spec, control object, or retry object) and in the
ledger second. A rebuild of the ledger therefore finds the command. The manager responds after the bucket and the ledger
have stored the command. A client may repeat a command.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from batchlab.core import commit
from batchlab.core.atomic_write import of_single_call
from batchlab.core.errors import AlreadyExists, BackendError, Deleted, Malformed, NotFound, Refused, TooNew, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import ENDED, Control, JobId, JobState, Json, TaskSet
from batchlab.core.port_retries import STEP_BACK_S
from batchlab.core.ports import MAX_BATCH, AddJob, ChangeResult, JobRecord, Reopen
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.core.protocol.mended_inputs import TaskInputs
from batchlab.core.text import count
from batchlab.core.tracing import Subject, ending
from batchlab.core.users import owner_name
from batchlab.manager import admission
from batchlab.manager.adoption import Adoption
from batchlab.manager.audit_log import DONE, SUBMIT
from batchlab.manager.bundling import Bundler
from batchlab.manager.context import Context, Part
from batchlab.manager.dependencies import Dependencies
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.mended_inputs import check_sizes
from batchlab.manager.quarantine import UnreadableObject, read_stored
from batchlab.manager.retry_rounds import Retry, RetryPlanner, Sources, TaskSelection
from batchlab.manager.state import LiveJob, Superseded, pages_of_jobs, set_job_state

log = logging.getLogger(__name__)


class JobCommands(Part):
    def __init__(
        self,
        context: Context,
        coordinator: JobCoordinator,
        bundler: Bundler,
        adoption: Adoption,
        dependencies: Dependencies,
    ) -> None:
        super().__init__(context)
        self._dependencies = dependencies
        self._coordinator = coordinator
        self._bundler = bundler
        self._adoption = adoption
        self._retries = RetryPlanner(context.ports, coordinator.plans)
        self._unfinished: set[JobId] = set()
        """Jobs whose retry may be in the bucket but not in the ledger."""

    async def submit(
        self,
        job: JobDef,
        items: Sequence[Json] | None = None,
        *,
        is_sent: bool = False,
        role: str = "",
        reason: str = "",
    ) -> ChangeResult:
        """Accept a job. A job with few items is submitted together with its encoded items. For a repeated client token,
        return the existing job, or raise Refused if the two jobs differ. The accepted job continues the trace of its
        definition. With `is_sent`, the client of a direct call has already committed the job and sent its message. The
        audit log gets the role of the job's owner, and the reason."""
        written = await self._seal_and_submit(job, items, is_sent=is_sent)
        if written.is_new and (audit := self._context.audit):
            record = audit.record(owner_name(job.owner), role, SUBMIT, job.id, outcome=DONE, reason=reason)
            (audit.note_call if job.is_single_call and not reason else audit.note)(record)
        return written

    async def _seal_and_submit(self, job: JobDef, items: Sequence[Json] | None, *, is_sent: bool) -> ChangeResult:
        with ending(self._tracer.root("submit", Subject(job.id), parent=job.trace)) as submitting:
            sealed = await self._keys.seal(job)
            sealed = replace(sealed, trace=submitting.context)
            if not is_sent:
                return await self._submit(sealed, items)
            # Completions of the job wait until the job is adopted, because its message was sent before this request.
            with self._context.pending_submissions.of(job.id):
                return await self._submit(sealed, items, is_sent=True)

    async def add_calls(self, jobs: Sequence[JobId]) -> int:
        """Add direct calls that the ledger lacks because their events are late or lost, and fold their outcomes. Return
        the number of added calls."""
        added = 0
        for job in jobs:
            with self._context.pending_submissions.of(job):
                try:
                    await self._ledger.job(job)
                except NotFound:
                    added += await self._adoption.restore(job, concurrent=True) is not None
                if live := self._lives.get(job):
                    # The worker may send the event later, and the client expects to find the call with its result.
                    await self._coordinator.fetch_missing_outcomes(live)
                    live.wake.set()
        return added

    async def _submit(self, job: JobDef, items: Sequence[Json] | None, *, is_sent: bool = False) -> ChangeResult:
        if job.after:
            await self._check_dependencies(job, object_keys.spec(job.id))
        opening = self._bundler.opening(job, items) if items is not None else None
        job, opening, is_ours = await self._define(job, opening)
        if is_sent and not is_ours:
            return await self._accept(job, opening, is_ours=False, is_sent=True)
        if not is_ours or not opening or not self._may_begin(job, opening):
            return await self._accept(job, opening, is_ours=is_ours)
        with self._context.pending_submissions.of(job.id):
            return await self._accept(job, opening, is_sent=await self._send_opening(job, opening))

    async def _check_dependencies(self, job: JobDef, key: str) -> None:
        """Raise Refused if the conditions of the job's dependencies can no longer hold. A request is not refused if
        `key` shows that an earlier attempt of the same request was accepted."""
        try:
            await self._dependencies.unmet(job)
        except Refused:
            if await self._patience(partial(self._objects.head, key)) is None:
                raise

    def _may_begin(self, job: JobDef, opening: commit_keys.Opening) -> bool:
        """Return whether the job's first bundles may be sent while the manager writes the job to the ledger. An early
        send requires a new job without a client token, few bundles, and a slot that no other bundle needs."""
        cut = opening.cut
        if cut is None or not 0 < len(cut.bundles) <= MAX_BATCH:
            return False
        if job.token or job.id in self._lives:
            return False
        pool = job.stage(cut.stage).pool
        return self._context.slots_in_service(pool) > self._lives.pool(pool).bundles

    async def _send_opening(self, job: JobDef, opening: commit_keys.Opening) -> bool:
        try:
            await self._coordinator.send_opening(job, opening)
        except BackendError as error:
            # No bundle is lost, because the manager sends the bundles again after the ledger has the job.
            log.warning("the first bundles are not sent yet: %s", error, extra={"job": job.id})
            return False
        await asyncio.sleep(STEP_BACK_S)
        return True

    async def _accept(
        self, job: JobDef, opening: commit_keys.Opening | None, *, is_ours: bool = True, is_sent: bool | None = None
    ) -> ChangeResult:
        """Write the job to the ledger, adopt the job, and send its first bundles unless `is_sent` (None without an
        earlier attempt). If the first send failed, or another request created the job, the bundles are sent as copies,
        which workers first check for an outcome."""
        now_s = self._clock.now_s()
        later = job.start_at_s is not None and job.start_at_s > now_s
        state = JobState.SCHEDULED if later else JobState.SUBMITTED
        cut = opening.cut if opening else None
        # The message of a direct call is sent before its request, so only a live call shows that the ledger lost it.
        if not is_ours and (not is_sent or job.id in self._lives) and (restored := await self._restore_lost(job)):
            return restored
        with of_single_call(job.is_single_call):
            written = await self._ledger.apply(AddJob(job, state, cut))
            if is_ours and not written.is_new and written.rows.job.state.ended:
                # The ledger has an ended job with this id, but the bucket has lost the ended job, because this call
                # could create the job's definition.
                await self._refuse_deleted(job, written.rows.job.round)
                log.warning("the bucket lost this job, so it begins anew", extra={"job": job.id})
                await self._ledger.forget([job.id])
                written = await self._ledger.apply(AddJob(job, state, cut))
        if written.is_new:
            self._counts.submitted += 1
            log.info("accepted", extra={"job": job.id})
        if not written.rows.job.state.ended and job.id not in self._lives:
            # If another manager created the job, the job's completions may already be in the events queue.
            is_new = written.is_new and is_ours
            begun = cut if written.is_new else None
            await self._adoption.adopt(replace(written, is_new=is_new), cut=begun, concurrent=True)
            if opening and begun and not is_sent:
                await self._coordinator.send_opening(job, opening, again=is_sent is False or not is_ours)
        return written

    async def _restore_lost(self, job: JobDef) -> ChangeResult | None:
        """Restore a job that the ledger has lost, and return its rows. Return None if the ledger has the job, or if an
        earlier request has committed only the job's definition."""
        try:
            await self._ledger.job(job.id)
            return None
        except NotFound:
            if job.id not in self._lives and await self._adoption.is_fresh(job.id):
                return None
        # A new row would contradict the job's cuts and commands in the bucket, and the memory of the manager.
        if live := self._lives.get(job.id):
            await self._adoption.readopt(live)
        elif await self._adoption.restore(job.id, concurrent=True) is None:
            raise Refused(
                f"The ledger lost job {job.id}, and the job cannot be restored from the bucket.",
                remedy="See the manager's log for the reason, or submit the job under another name.",
            )
        return ChangeResult(await self._ledger.rows(job.id), is_new=False)

    async def _refuse_deleted(self, job: JobDef, round_: int) -> None:
        """Raise Refused if the deletion of an ended job is committed. The deletion replaces the new definition."""
        try:
            Retry.from_bytes(await self._patience(partial(self._objects.get, object_keys.retry(job.id, round_ + 1))))
        except Deleted as error:
            raise _deleted(job) from error
        except (NotFound, Malformed, TooNew):
            return

    async def _define(
        self, job: JobDef, opening: commit_keys.Opening | None
    ) -> tuple[JobDef, commit_keys.Opening | None, bool]:
        """Commit the job's definition. Return the committed job, the committed opening, and whether this call committed
        both."""
        hidden = admission.hide_addresses(job)
        key = object_keys.spec(job.id)
        try:
            data = commit_keys.to_bytes(hidden, opening)
        except ValueError as error:
            raise UsageError(
                f"Job {job.name} contains a value that JSON cannot represent: {error}.",
                remedy="Leave out NaN, infinity and halves of UTF-16 pairs.",
            ) from error
        await admission.store_addresses(self._ports, job)
        try:
            with of_single_call(job.is_single_call):
                await self._patience(lambda: self._objects.put(key, data, if_absent=True))
        except AlreadyExists:
            try:
                job_def, committed_opening = await read_stored(self._ports, key, _read_definition)
            except Deleted as error:
                raise _deleted(job) from error
            except UnreadableObject as error:
                raise Refused(
                    f"A job with the id {job.id} is in the bucket, and its definition cannot be read: {error.message}",
                    remedy=f"Remove the object {key}, or submit the job under another name.",
                ) from error
            if _comparable(admission.hide_addresses(job_def), committed_opening) != _comparable(hidden, opening):
                by = "client token" if job.token else "id"
                raise Refused(
                    f"Job {job.id} is another one, submitted with the same {by}.",
                    remedy=f"Give each job {'a token' if job.token else 'an id'} of its own.",
                ) from None
            return await admission.restore_addresses(self._ports, job_def), committed_opening, False
        return job, opening, True

    async def cancel(self, job: JobId) -> None:
        """Cancel the job, and return when no further task of the job can start (promise I4). Raise Refused if the job
        has ended."""
        live = self.running(job, "cancelled")
        word = json_format.ControlCommand(Control.CANCEL, JobState.CANCELLED, "cancelled by its user")
        await self._coordinator.forbid(live, word)
        live.wake.set()

    async def pause(self, job: JobId) -> None:
        """Pause the job: running tasks finish, and no further task starts until `resume`."""
        live = self.running(job, "paused")
        await self._control(live, Control.PAUSE)
        await set_job_state(self._ports, live, JobState.PAUSED)

    async def resume(self, job: JobId) -> None:
        """Continue the job. Workers delete the messages of a paused job, so `resume` sends all outstanding bundles
        again."""
        live = self.running(job, "resumed")
        if live.record.control is Control.RUN:
            raise Refused(f"Job {job} is not paused.", remedy="`batchlab job why` shows its state.")
        await self._control(live, Control.RUN)
        await set_job_state(self._ports, live, JobState.RUNNABLE)
        # The bundles are sent as copies, because some of the old messages may still be in the queue. Before a worker
        # runs a copy of a bundle, the worker checks whether the bundle has an outcome.
        again = [replace(outstanding.bundle, losses=1) for outstanding in live.all_outstanding()]
        await self._coordinator.send(live.job, again)
        live.wake.set()

    async def retry(
        self, job: JobId, chosen: TaskSelection | None = None, inputs: TaskInputs | None = None
    ) -> JobRecord:
        """Run unsuccessful tasks again in a new round. With `chosen` or `inputs`, run only the selected failed tasks.
        The tasks in `inputs` run with these mended inputs. Raise Refused if the job still runs or has SUCCEEDED, if the
        selection does not match the failed tasks, or if another retry without these inputs began first."""
        inputs = inputs or {}
        check_sizes(inputs)
        if inputs:
            chosen = _with_tasks(chosen or {}, inputs)
        record = await self._ledger.job(job)
        if not record.state.ended:
            raise Refused(f"Job {job} is still {record.state}.", remedy="Wait, or cancel it first.")
        if record.state is JobState.SUCCEEDED:
            failed = sum(stage.counts.failed for stage in (await self._ledger.rows(job)).stages)
            why = f"although {count(failed, 'task')} failed, so its tasks cannot run again"
            raise Refused(
                f"Job {job} SUCCEEDED, {why}." if failed else f"Job {job} SUCCEEDED: there is nothing to run again.",
                remedy="Submit its file again to run all of it anew.",
            )
        round_ = record.round + 1
        key = object_keys.retry(job, round_)
        if record.job.after and not any(stage.counts.planned for stage in (await self._ledger.rows(job)).stages):
            await self._check_dependencies(record.job, key)
        retry = await self._retries.plan(record, chosen, inputs)
        wanted = {task: source for task, source in retry.mended().items() if task in inputs}
        # The control object permits the new round before the retry object is written, because a manager that finds the
        # retry object must not find the round forbidden.
        await commit.permit_round(self._objects, job, round_, self._patience)
        self._unfinished.add(job)
        try:
            await self._patience(lambda: self._objects.put(key, retry.to_bytes(), if_absent=True))
        except AlreadyExists:
            retry = Retry.from_bytes(await self._patience(lambda: self._objects.get(key)))
        await self._ledger.apply(Reopen(job, round_, retry.reopened))
        live = await self._adoption.adopt(ChangeResult(await self._ledger.rows(job), is_new=False), concurrent=True)
        self._unfinished.discard(job)
        await self._coordinator.send(live.job, [b for cut in retry.cuts for b in cut.bundles])
        _check_used(job, wanted, retry)
        return live.record

    async def find_unfinished_retries(self) -> None:
        """Collect the jobs that ended without success, because an earlier leader may have begun a retry of one of the
        jobs."""
        async for page in pages_of_jobs(self._ports):
            unsuccessful = ENDED - {JobState.SUCCEEDED}
            self._unfinished.update(rows.id for rows in page if rows.job.state in unsuccessful)

    async def finish_retries(self) -> None:
        """Complete retries that are in the bucket but not in the ledger, because their manager crashed or returned an
        error."""
        for job in sorted(self._unfinished):
            # The job may be removed from the ledger, or another manager may have completed the retry.
            with suppress(NotFound, Refused):
                round_ = (await self._ledger.job(job)).round + 1
                head = partial(self._objects.head, object_keys.retry(job, round_))
                if await self._patience(head):
                    log.warning("the retry of %s was not finished", job, extra={"job": job})
                    await self.retry(job)
            self._unfinished.discard(job)

    def running(self, job: JobId, verb: str) -> LiveJob:
        """Return the live job. Raise Refused, with `verb` in the message, if the job has ended."""
        live = self._lives.get(job)
        if live is None or live.ended.is_set():
            raise Refused(
                f"Job {job} is not running, so it cannot be {verb}.", remedy="`batchlab job list` shows the jobs."
            )
        return live

    async def _control(self, live: LiveJob, wanted: Control) -> None:
        async with live.control_lock:
            while True:
                spoken = await commit.read_stored(self._objects, live.id, self._patience)
                if spoken and spoken.command.round > live.round:
                    raise Superseded(live)
                if spoken and spoken.command.control is Control.CANCEL:
                    live.must_read_control = True  # another leader may have written the cancellation
                    live.mark()
                    live.wake.set()
                if Control.CANCEL in (live.record.control, spoken and spoken.command.control):
                    raise Refused(
                        f"Job {live.id} is being cancelled.",
                        remedy="Once it has ended, `batchlab job retry` runs the remaining tasks.",
                    )
                word = json_format.ControlCommand(wanted, round=live.round)
                if await commit.replace_command(self._objects, live.id, word, self._patience, over=spoken):
                    break
            await self._coordinator.record_control(live, wanted)


def _with_tasks(chosen: TaskSelection, inputs: TaskInputs) -> TaskSelection:
    """Return the selection together with the tasks in `inputs`."""
    sets = {stage: [tasks] for stage, tasks in chosen.items()}
    for stage, task in inputs:
        sets.setdefault(stage, []).append(TaskSet.from_indices([task]))
    return {stage: TaskSet.union(sets[stage]) for stage in sorted(sets)}


def _check_used(job: JobId, wanted: Sources, retry: Retry) -> None:
    """Raise Refused if the committed retry of another request does not use the mended inputs of this request."""
    if not wanted.items() <= retry.mended().items():
        raise Refused(
            f"Another retry of job {job} began first, and it does not use the new input of this request.",
            remedy="Wait for the end of the job, and retry the task again.",
        )


def _deleted(job: JobDef) -> Refused:
    return Refused(
        f"The job {job.id} was deleted, and its id cannot be used again.",
        remedy=f"Give the job another {'token' if job.token else 'id'}.",
    )


def _read_definition(data: bytes) -> tuple[JobDef, commit_keys.Opening | None]:
    doc = json_format.loads(data)
    return json_format.job_from_json(doc), commit_keys.opening_in(doc)


def _comparable(job: JobDef, opening: commit_keys.Opening | None) -> Json:
    """Return the job's content for a comparison, without times, trace, owner, and commit hash. The owner of a repeated
    submission does not count. A job of an earlier release does not have a commit hash. A client and the manager may
    write the same number as an integer and as a float."""
    timeless = replace(job, submitted_s=0.0, start_at_s=None, trace="", owner="", commit_hash="")
    return json_format.loads(commit_keys.to_bytes(timeless, commit_keys.Opening(opening.items) if opening else None))
