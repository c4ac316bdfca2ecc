"""Planted bugs in pause, resume, cancel, retry, and backoff.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from dataclasses import replace

from batchlab.core.model import Bundle, Control, Follow, JobId, JobState, TaskSet
from batchlab.core.ports import JobRecord
from batchlab.core.protocol import settlement
from batchlab.core.protocol.mended_inputs import TaskInputs
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.job_commands import JobCommands
from batchlab.manager.retry_rounds import Retry, RetryPlanner, TaskSelection, failed_tasks
from batchlab.worker.job_cache import ControlPoller
from tests.sim.mutants.kit import Plant, planted
from tests.sim.mutants.retries import run_own_retry


@planted("lease")
def pause_only_between_bundles(plant: Plant) -> None:
    """A worker obeys a cancellation immediately, but a pause only before its next bundle. The remaining tasks of a
    running bundle start although the job is paused (lease).
    """
    original = ControlPoller._apply

    @plant.method(ControlPoller, "_apply")
    def _apply(self: ControlPoller, job: JobId, control: Control, until_s: float) -> None:
        original(self, job, Control.RUN if control is Control.PAUSE else control, until_s)


@planted("lease", "I4")
def control_lease_from_the_answer(plant: Plant) -> None:
    """The control lease starts when the answer with the control object arrives, and not when the worker sent the
    request. If the answer takes seconds, tasks start after the cancellation was acknowledged (I4).
    """
    original = ControlPoller.read

    @plant.method(ControlPoller, "read")
    async def read(self: ControlPoller, job: JobId, *, is_new: bool = False) -> tuple[Control, float]:
        await original(self, job, is_new=is_new)
        entry = self._entries[job]
        entry.read_s = self._clock.monotonic_s()
        until_s = entry.read_s + self._lease_s
        self._apply(job, entry.control, until_s)
        return entry.control, until_s


@planted("waste")
def resume_sends_bundles_as_new(plant: Plant) -> None:
    """A resume of a job sends all outstanding bundles as new work. If the event of a committed bundle was lost, the
    bundle runs again (waste).
    """

    @plant.method(JobCommands, "resume")
    async def resume(self: JobCommands, job: JobId) -> None:
        live = self.running(job, "resumed")
        await self._control(live, Control.RUN)
        again = [replace(one.bundle, losses=0) for one in live.all_outstanding()]
        await self._coordinator.send(live.job, again)
        live.wake.set()


@planted("start times")
def retry_without_its_due_time(plant: Plant) -> None:
    """The due time of a retry is stored only as the delay of the retry's message. A resume of the job and the next
    leader send the retry immediately (start times).
    """
    original = settlement._again

    @plant.everywhere(original)
    def _again(bundle: Bundle, tasks: TaskSet, rule: RetryRule, ended_s: float) -> Follow:
        made = original(bundle, tasks, rule, ended_s)
        return replace(made, bundle=replace(made.bundle, due_s=None))


@planted("retries", "step 3", "I1", "I2", "I3")
def retry_that_ignores_the_choice_of_another(plant: Plant) -> None:
    """If the bucket already contains a retry of the same round, a second retry ignores the first retry and continues
    with the tasks that its own user chose. The ledger re-opens other tasks than the tasks in the bucket (I3).
    """
    original = JobCommands.retry

    @plant.method(JobCommands, "retry")
    async def retry(
        self: JobCommands, job: JobId, chosen: TaskSelection | None = None, inputs: TaskInputs | None = None
    ) -> JobRecord:
        record = await self._ledger.job(job)
        if not record.state.ended or record.state is JobState.SUCCEEDED:
            return await original(self, job, chosen, inputs)
        return await run_own_retry(self, record, await self._retries.plan(record, chosen, inputs or {}))


@planted("retries")
def retry_that_keeps_failures(plant: Plant) -> None:
    """A retry of all failed tasks resets only the failed tasks of the first stage with failures. The failed tasks of
    later stages remain failed (retries).
    """
    original = RetryPlanner.plan

    @plant.method(RetryPlanner, "plan")
    async def plan(self: RetryPlanner, record: JobRecord, chosen: TaskSelection | None, inputs: TaskInputs) -> Retry:
        failed = await failed_tasks(self._ports, record)
        if chosen is None and failed:
            chosen = dict([next(iter(failed.items()))])
        return await original(self, record, chosen, inputs)
