"""Planted bugs in the outcome of an execution and in ids: retries, chains, and ids.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from dataclasses import replace

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, BundleId, Completion, Follow, Outcome, StageName, TaskSet
from batchlab.core.protocol import settlement
from batchlab.worker.commit_and_forward import BundleFinisher
from batchlab.worker.inflight_message import InflightMessage
from tests.sim.mutants.kit import Plant, planted


@planted("I7", "losses", "ends")
def retry_under_the_same_id(plant: Plant) -> None:
    """The id of a bundle does not contain the number of the attempt. A retry finds the outcome of the first attempt and
    forwards this outcome again and again (I7).
    """

    @plant.property(Bundle, "id")
    def id_(self: Bundle) -> BundleId:
        t = self.tasks
        return BundleId(f"{t.first:08d}-{t.last:08d}.{self.round}.1")


@planted("I7", "ends")
def round_without_an_id(plant: Plant) -> None:
    """The id of a bundle does not contain the round of its job. A new round finds the outcomes of the previous round,
    so no task runs again (I7).
    """

    @plant.property(Bundle, "id")
    def id_(self: Bundle) -> BundleId:
        t = self.tasks
        return BundleId(f"{t.first:08d}-{t.last:08d}.0.{self.attempt}")


@planted("I1", "I2", "I3", "I7", "losses", "ends")
def id_by_the_first_task(plant: Plant) -> None:
    """The id of a bundle contains only the number of its first task. The first half of a split bundle has the same id
    as the whole bundle (I7).
    """

    @plant.property(Bundle, "id")
    def id_(self: Bundle) -> BundleId:
        first = f"{self.tasks.first:08d}"
        return BundleId(f"{first}-{first}.{self.round}.{self.attempt}")


@planted("Attempts")
def retry_counts_worker_loss(plant: Plant) -> None:
    """A delivery of a bundle that ended without an outcome counts as an attempt of each of its tasks. A task that would
    have succeeded at its next attempt is marked as FAILED (attempts).
    """
    original = BundleFinisher.commit

    @plant.method(BundleFinisher, "commit")
    async def commit(self: BundleFinisher, inflight: InflightMessage, *, cancelled: bool = False) -> Outcome:
        lost, job = inflight.suspicion, inflight.job
        stages = tuple(
            replace(stage, retry=replace(stage.retry, attempts=stage.retry.attempts - lost)) for stage in job.stages
        )
        inflight.definition = replace(job, stages=stages)
        try:
            return await original(self, inflight, cancelled=cancelled)
        finally:
            inflight.definition = job


@planted("I1", "I2", "I3", "I7")
def split_off_task_run_as_well(plant: Plant) -> None:
    """The follow-up with the remaining tasks of a split bundle begins with the task that ended last. The task that
    ended last then ends twice (I1, I2).
    """
    plant.unchecked_parts()
    original = settlement._split

    @plant.everywhere(original)
    def _split(bundle: Bundle, rest: TaskSet) -> list[Follow]:
        if rest and rest.first - 1 in bundle.tasks:
            rest = TaskSet.union([rest, TaskSet.span(rest.first - 1, rest.first)])
        return original(bundle, rest)


@planted("I1", "I2", "I3", "I7", "ends")
def rest_of_a_bundle_forgotten(plant: Plant) -> None:
    """A bundle that was stopped early commits its tasks that have run, and no follow-up contains the remaining tasks of
    the bundle. The remaining tasks never end (I7).
    """
    plant.unchecked_parts()

    @plant.everywhere(settlement._split)
    def _split(bundle: Bundle, rest: TaskSet) -> list[Follow]:
        return []


@planted("I1", "I2", "I3", "I7")
def chain_hands_on_failed_tasks(plant: Plant) -> None:
    """The follow-up bundle of the next stage also contains the tasks that failed in the previous stage. The next stage
    counts these tasks as canceled, and also runs the tasks (I2).
    """
    plant.unchecked_parts()
    original = settlement.chain

    @plant.everywhere(original)
    def chain(job: JobDef, bundle: Bundle, succeeded: TaskSet) -> list[Follow]:
        return original(job, bundle, bundle.tasks if succeeded else succeeded)


@planted("I7", "ends")
def casualties_not_counted(plant: Plant) -> None:
    """An outcome counts only tasks that ran, and does not count the canceled dependents of failed tasks. If a task
    failed, the next stage waits forever for the result of this task (I7).
    """

    @plant.everywhere(settlement.casualties)
    def casualties(job: JobDef, done: Completion) -> dict[StageName, int]:
        return {}


@planted("I1", "I2", "I3", "I7")
def failure_final_and_retried(plant: Plant) -> None:
    """A failed attempt is counted as the end of its task, although a retry of the task follows. The task ends twice
    (I1, I2).
    """
    plant.unchecked_parts()
    original = settlement.completion

    @plant.everywhere(original)
    def completion(outcome: Outcome) -> Completion:
        failed = TaskSet.from_indices(one.task for one in outcome.failed)
        return replace(original(outcome), failed=failed)
