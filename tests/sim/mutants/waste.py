"""Planted bugs that cost time, order, or trust, but do not lose a result by themselves.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from batchlab.core.job_definition import JobDef
from batchlab.core.model import BundleId, JobId, JobState, Json, StageCounts, StageName
from batchlab.core.ports import BundleRecord, ChangeResult, Ending, Message
from batchlab.core.protocol import json_format, settlement
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.core.protocol.settlement import Verdict
from batchlab.manager import stage_plans
from batchlab.manager.adoption import Adoption
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.state import LiveJob, Ports
from batchlab.worker.commit_and_forward import BundleFinisher
from batchlab.worker.inflight_message import InflightMessage
from tests.sim.mutants.kit import Plant, planted


@planted("dead letters")
def dead_letters_dropped(plant: Plant) -> None:
    """The manager logs and deletes a dead letter without running its tasks. The tasks of the dead letter wait until the
    reconciler finds their silent bundle (dead letters).
    """

    @plant.method(Reconciler, "_handle_dead_letter")
    async def _judge(self: Reconciler, message: Message) -> None:
        pass


@planted("I1")
def results_gathered_as_they_come(plant: Plant) -> None:
    """A gather uses results in the order in which the results were committed, and not in the order of the tasks. A
    handler that relies on the order of tasks commits a wrong result (I1).
    """
    original = stage_plans.successful_bundles

    @plant.everywhere(original)
    async def successes(ports: Ports, job: JobId, counts: StageCounts) -> list[BundleRecord]:
        found = await original(ports, job, counts)
        return sorted(found, key=lambda r: r.completion.ended_s if r.completion else 0.0)

    @plant.method(Inputs, "_gather")
    async def _gathered(self: Inputs, job: JobDef, item: dict[str, Any], key: CommitKey) -> Json:
        lists: dict[str, list[Json]] = {}
        for stage, bundles in item["$gather"].items():
            lists[stage] = []
            for name, ranges in bundles:
                tasks = json_format.tasks_from_json(ranges)
                found = await self.values(job, StageName(stage), BundleId(name), tasks, key)
                lists[stage] += found
        return next(iter(lists.values())) if len(lists) == 1 else lists


@planted("losses")
def losses_forgotten(plant: Plant) -> None:
    """A bundle that is sent again loses its count of lost workers. A bundle that kills its workers is not suspected,
    and a copy of a bundle runs although an outcome of the bundle exists (losses).
    """
    original = BundleFinisher.send_again

    @plant.method(BundleFinisher, "send_again")
    async def send_again(
        self: BundleFinisher, inflight: InflightMessage, *, delay_s: float = 0.0, watchdog: bool = False
    ) -> None:
        inflight.message = replace(inflight.message, receive_count=1)
        inflight.task = replace(inflight.task, bundle=replace(inflight.task.bundle, losses=0))
        await original(self, inflight, delay_s=delay_s, watchdog=watchdog)


@planted("waste")
def new_leader_sends_all_again(plant: Plant) -> None:
    """A new leader immediately sends the outstanding bundles of its jobs as new work. A committed bundle whose event
    was lost runs again (waste).
    """
    original = Adoption._prepare

    @plant.method(Adoption, "_prepare")
    async def _prepare(
        self: Adoption, result: ChangeResult, *, planned: Sequence[BundleRecord] | None = None, concurrent: bool = False
    ) -> LiveJob:
        live = await original(self, result, planned=planned, concurrent=concurrent)
        if not result.is_new:
            bundles = [one.bundle for one in live.all_outstanding()]
            await self._coordinator.send(live.job, bundles)
        return live


@planted("ends")
def percentage_of_the_whole_job(plant: Plant) -> None:
    """A percentage limit of failed tasks is applied to the tasks of all stages together, and not to the tasks of each
    stage. A stage in which nearly all tasks failed does not fail its job (ends).
    """

    @plant.everywhere(settlement.judge)
    def judge(job: JobDef, stages: Sequence[StageCounts]) -> Verdict:
        failed = sum(stage.failed for stage in stages)
        planned = sum(stage.planned or 0 for stage in stages)
        over = failed > job.max_failures
        if job.max_failures_percent:
            over = failed * 100 > job.max_failures * planned
        return Verdict(over, over and job.fail_fast, f"{failed} tasks failed" if failed else "")


@planted("notifications")
def notification_before_the_commit(plant: Plant) -> None:
    """The manager sends the notification about the end of a job before it writes the job's final object. If another
    manager has already written a different final object, the notification is wrong (notifications).
    """
    original = JobCoordinator._end

    @plant.method(JobCoordinator, "_end")
    async def _end(
        self: JobCoordinator, live: LiveJob, state: JobState, reason: str, closed: Mapping[StageName, int]
    ) -> None:
        if self._notifier:
            await self._notifier.ended(live, Ending(state, reason, self._ports.clock.now_s(), {}))
        await original(self, live, state, reason, closed)
