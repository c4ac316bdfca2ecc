"""Planted bugs in the dependencies between jobs.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchlab.core.errors import Refused
from batchlab.core.job_definition import Condition, Dependency, JobDef
from batchlab.core.model import Json
from batchlab.core.protocol import commit_keys
from batchlab.manager.bundling import Bundler
from batchlab.manager.dependencies import Dependencies
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.state import LiveJob
from tests.sim.mutants.kit import Plant, planted


@planted("dependencies", weather="dependent")
def dependency_met_by_its_plan(plant: Plant) -> None:
    """A dependency counts as ended when its first stage is planned. A job starts before its dependency has ended
    (dependencies).
    """
    original = Dependencies._holds

    @plant.method(Dependencies, "_holds")
    async def _holds(self: Dependencies, dependency: Dependency) -> bool:
        live = self._lives.get(dependency.job)
        if live is not None and any(counts.planned is not None for counts in live.counts):
            return True
        return await original(self, dependency)


@planted("dependencies", weather="dependent")
def success_of_a_dependency_ignored(plant: Plant) -> None:
    """The manager treats each condition as `ended`. A job starts although its dependency failed (dependencies)."""
    original = Dependencies._holds

    @plant.method(Dependencies, "_holds")
    async def _holds(self: Dependencies, dependency: Dependency) -> bool:
        return await original(self, replace(dependency, condition=Condition.ENDED))


@planted("dependencies", weather="dependent")
def first_bundles_sent_before_the_dependency(plant: Plant) -> None:
    """The definition of a job with items contains the first bundles even if the job must wait. A job starts when it is
    submitted (dependencies).
    """
    original = Bundler.opening

    @plant.method(Bundler, "opening")
    def opening(self: Bundler, job: JobDef, items: Sequence[Json]) -> commit_keys.Opening:
        return original(self, replace(job, after=()), items)


@planted("I7", weather="dependent")
def dependency_forgotten_by_a_new_leader(plant: Plant) -> None:
    """A manager checks only the dependencies of the jobs that it has accepted itself. After a change of leader, a
    waiting job never starts (I7).
    """
    original = JobCoordinator._may_begin

    @plant.method(JobCoordinator, "_may_begin")
    async def _may_begin(self: JobCoordinator, live: LiveJob) -> bool:
        return live.complete_after is not None and await original(self, live)


@planted("I7", weather="dependent")
def failed_dependency_waited_for(plant: Plant) -> None:
    """A dependency that failed counts as a dependency that has not ended. The waiting job never ends (I7)."""
    original = Dependencies.unmet

    @plant.method(Dependencies, "unmet")
    async def unmet(self: Dependencies, job: JobDef) -> tuple[Dependency, ...]:
        try:
            return await original(self, job)
        except Refused:
            return job.after


@planted("dependencies", weather="dependent")
def retry_without_dependencies(plant: Plant) -> None:
    """A retried job does not wait for its dependencies, even if no task of the job has ever run. The retried job starts
    while its dependency is retried (dependencies).
    """
    original = LiveJob.__post_init__

    @plant.method(LiveJob, "__post_init__")
    def post_init(self: LiveJob) -> None:
        original(self)
        if self.round:
            self.waits_for = ()
