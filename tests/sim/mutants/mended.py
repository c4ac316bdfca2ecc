"""Planted bugs in mended inputs: which input a task of a retry runs with.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, BundleId, Follow, JobId, JobState, Json, TaskSet
from batchlab.core.ports import Cut, JobRecord, Round
from batchlab.core.protocol import settlement
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.mended_inputs import TaskInputs, is_mended
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.core.retry_rule import RetryRule
from batchlab.manager import job_commands, ledger_rebuild, retry_rounds
from batchlab.manager.job_commands import JobCommands
from batchlab.manager.ledger_rebuild import _JobObjects
from batchlab.manager.retry_rounds import RetriedTasks, Retry, RetryPlanner, Sources, TaskSelection
from batchlab.manager.state import Ports
from tests.sim.mutants.kit import Plant, planted
from tests.sim.mutants.retries import run_own_retry


def _without_mended_inputs(cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """Return the cuts with bundles that take their inputs from the plan."""
    return tuple(
        replace(cut, bundles=tuple(replace(b, source=None) if is_mended(b) else b for b in cut.bundles)) for cut in cuts
    )


@planted("mended", weather="mended")
def retry_that_runs_the_old_input(plant: Plant) -> None:
    """A retry ignores the mended inputs of its request. The tasks run with their old inputs (mended)."""

    @plant.method(RetryPlanner, "_store")
    async def _store(
        self: RetryPlanner, record: JobRecord, failed: Sequence[tuple[Bundle, TaskSet]], inputs: TaskInputs
    ) -> Sources:
        return {}


@planted("mended", weather="mended")
def next_retry_that_forgets_mended_inputs(plant: Plant) -> None:
    """A retry does not read the mended inputs of earlier retries. A task that fails again runs with its first input
    (mended).
    """

    @plant.method(RetriedTasks, "mended")
    def mended(self: RetriedTasks) -> Sources:
        return {}


@planted("mended", "retries", weather="mended")
def mended_input_lost_by_the_next_leader(plant: Plant) -> None:
    """A manager that finds a retry in the bucket executes its own retry, without the mended inputs of the stored retry
    (mended).
    """
    original = JobCommands.retry

    @plant.method(JobCommands, "retry")
    async def retry(
        self: JobCommands, job: JobId, chosen: TaskSelection | None = None, inputs: TaskInputs | None = None
    ) -> JobRecord:
        record = await self._ledger.job(job)
        if chosen is not None or not record.state.ended or record.state is JobState.SUCCEEDED:
            return await original(self, job, chosen, inputs)
        return await run_own_retry(self, record, await self._retries.plan(record, chosen, {}))


@planted("mended", weather="mended")
def adoption_that_forgets_mended_inputs(plant: Plant) -> None:
    """A manager that adopts a retried job adds its bundles without the mended inputs to the ledger, and sends silent
    bundles again from there (mended).
    """
    original = retry_rounds.cuts_of_round

    @plant.everywhere(retry_rounds.cuts_of_round)
    async def cuts_of_round(ports: Ports, record: JobRecord) -> tuple[Cut, ...]:
        return _without_mended_inputs(await original(ports, record))


@planted("I3", weather="mended")
def rebuild_that_forgets_mended_inputs(plant: Plant) -> None:
    """A rebuild of the ledger ends at the first retry with mended inputs, because it does not know the format of the
    retry (I3).
    """
    original = ledger_rebuild._rounds

    @plant.everywhere(ledger_rebuild._rounds)
    async def _rounds(ports: Ports, job: JobDef, job_objects: _JobObjects) -> Sequence[Round]:
        rounds = await original(ports, job, job_objects)
        for number in range(1, len(rounds)):
            if (await retry_rounds.read_retry(ports, job, number)).mended():
                return rounds[:number]
        return rounds


@planted("mended", "I1", "I2", "I7", "retries", "waste", weather="mended")
def late_commit_of_the_old_input(plant: Plant) -> None:
    """The bundle of a mended input has the id of the bundle in which the task failed. The outcome of the old input then
    counts for the mended input (mended).
    """
    original = Bundle.id.fget  # type: ignore[attr-defined]

    @plant.property(Bundle, "id")
    def id_(self: Bundle) -> BundleId:
        if is_mended(self):
            return BundleId(f"{self.tasks.first:08d}-{self.tasks.last:08d}.{self.round - 1}.{self.attempt}")
        found: BundleId = original(self)
        return found


@planted("mended", "I1", weather="mended")
def second_attempt_with_the_old_input(plant: Plant) -> None:
    """The automatic retry of a task takes its input from the plan, and not from the user (mended)."""
    plant.unchecked_parts()
    original = settlement._again

    @plant.everywhere(settlement._again)
    def _again(bundle: Bundle, tasks: TaskSet, rule: RetryRule, ended_s: float) -> Follow:
        return original(replace(bundle, source=None) if is_mended(bundle) else bundle, tasks, rule, ended_s)


@planted("mended", weather="mended")
def retry_that_reports_lost_inputs_as_used(plant: Plant) -> None:
    """A retry that finds the retry of another request reports success, although the other retry does not use its mended
    input (mended).
    """

    @plant.everywhere(job_commands._check_used)
    def _check_used(job: JobId, wanted: Sources, retry: Retry) -> None:
        pass


@planted("mended", "I1", weather="mended")
def worker_that_reads_the_plan(plant: Plant) -> None:
    """A worker reads the input of a mended task from the plan of the stage (mended)."""
    original = Inputs.resolve

    @plant.method(Inputs, "resolve")
    async def resolve(self: Inputs, job: JobDef, bundle: Bundle, key: CommitKey) -> Sequence[Json]:
        stage = job.stage(bundle.stage)
        if is_mended(bundle) and not stage.chained:
            bundle = replace(bundle, source=None)
        return await original(self, job, bundle, key)
