"""Plans of job retries: the tasks that run again, and the results that a retry revokes.

Invariant: a retry is one object in the bucket, computed from the ledger's state. A manager that finds a stored retry
object carries out the stored retry instead of its own retry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batchlab.core.errors import Deleted, Malformed, Refused, Unreachable
from batchlab.core.job_definition import JobDef, StageDef, task_name
from batchlab.core.model import Bundle, BundleId, JobId, StageCounts, StageName, TaskSet
from batchlab.core.ports import Cut, JobRecord, Reopening, StageRecord
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, list_items
from batchlab.core.protocol.mended_inputs import TaskInputs, is_mended, mended_input
from batchlab.core.protocol.settlement import judge
from batchlab.core.text import count
from batchlab.manager.mended_inputs import MendedInputs
from batchlab.manager.quarantine import UnreadableObject, read_stored
from batchlab.manager.stage_plans import StagePlans, successful_bundles
from batchlab.manager.state import Ports

TaskSelection = Mapping[StageName, TaskSet]
Sources = Mapping[tuple[StageName, int], BundleId]
"""Source of the bundle of each task with a mended input, by stage and index of the task."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Content of a retry object: the results that the retry revokes, and the cuts that run again.

    The bundle of each task with a mended input is in the cuts, and names the mended input as its source.
    """

    reopened: tuple[Reopening, ...]
    cuts: tuple[Cut, ...]

    def to_bytes(self) -> bytes:
        return json_format.to_bytes(
            {
                "v": json_format.MENDED if self.mended() else json_format.VERSION,
                "reopened": [json_format.reopening_to_json(r) for r in self.reopened],
                "cuts": [json_format.cut_to_json(c) for c in self.cuts],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Retry:
        return cls.from_json(json_format.loads(data, known=json_format.MENDED))

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Retry:
        """Return the retry in a retry object. Raise Deleted if a user deletes the job instead."""
        if json_format.is_deleted(doc):
            raise Deleted("The job is being deleted.")
        try:
            return cls(
                tuple([json_format.reopening_from_json(r) for r in list_items(doc["reopened"])]),
                tuple([json_format.cut_from_json(c) for c in list_items(doc["cuts"])]),
            )
        except UNREADABLE as error:
            raise Malformed(f"A retry cannot be read: {json_format.brief(error)}.") from error

    def rerun_tasks(self, stage: StageName) -> TaskSet:
        """Return the tasks of the stage that this retry runs again or plans again."""
        cuts = [cut for cut in self.cuts if cut.stage == stage]
        return TaskSet.union([*(cut.left for cut in cuts), *(b.tasks for cut in cuts for b in cut.bundles)])

    def mended(self) -> dict[tuple[StageName, int], BundleId]:
        """Return the source of each task that this retry runs with a mended input."""
        bundles = [bundle for cut in self.cuts for bundle in cut.bundles if is_mended(bundle)]
        return {(bundle.stage, bundle.tasks.first): bundle.source for bundle in bundles if bundle.source}


async def cuts_of_round(ports: Ports, record: JobRecord) -> tuple[Cut, ...]:
    """Return the cuts of the retry that began the job's current round."""
    if not record.round:
        return ()
    return (await read_retry(ports, record.job, record.round)).cuts


async def read_retry(ports: Ports, job: JobDef, round_: int) -> Retry:
    """Return the retry that began a round of the job. Raise NotFound if the retry object does not exist, or
    UnreadableObject if the object is unreadable or belongs to another job or round."""
    key = object_keys.retry(job.id, round_)
    retry = await read_stored(ports, key, Retry.from_bytes)
    stages = {stage.name for stage in job.stages}
    for cut in retry.cuts:
        if (cut.job, cut.round) != (job.id, round_) or cut.stage not in stages:
            raise UnreadableObject(key, "It has a cut of another job, stage or round.")
    try:
        for cut in retry.cuts:
            for bundle in cut.bundles:
                mended_input(bundle)
    except Malformed as error:
        raise UnreadableObject(key, error.message) from error
    if any(reopening.stage not in stages for reopening in retry.reopened):
        raise UnreadableObject(key, "It takes back a stage that the job does not have.")
    return retry


@dataclass(frozen=True, slots=True)
class RetriedTasks:
    """Tasks that the retries of a job have run again, by the number of the round, which starts at 1."""

    by_round: tuple[Retry, ...]
    _rerun: dict[tuple[int, StageName], TaskSet] = field(default_factory=dict, compare=False, repr=False)
    """Cache of `rerun_after`, because a job may have as many failed bundles as tasks that run again."""

    @classmethod
    async def read(cls, ports: Ports, record: JobRecord) -> RetriedTasks:
        rounds = range(1, record.round + 1)
        return cls(tuple([await read_retry(ports, record.job, number) for number in rounds]))

    def rerun_after(self, round_: int, stage: StageName) -> TaskSet:
        """Return the tasks of the stage that rounds after `round_` run again."""
        key = round_, stage
        if key not in self._rerun:
            self._rerun[key] = TaskSet.union(retry.rerun_tasks(stage) for retry in self.by_round[round_:])
        return self._rerun[key]

    def remaining(self, round_: int, stage: StageName, failed: TaskSet) -> TaskSet:
        """Return the failed tasks of a bundle of the round and stage that no later retry runs again."""
        return failed - self.rerun_after(round_, stage) if self.by_round else failed

    def mended(self) -> Sources:
        """Return the source of each task whose next run has a mended input. A stage that is planned again gets new
        inputs, so its mended inputs no longer count."""
        sources: dict[tuple[StageName, int], BundleId] = {}
        for retry in self.by_round:
            replanned = {reopening.stage for reopening in retry.reopened if reopening.replan}
            sources = {task: source for task, source in sources.items() if task[0] not in replanned}
            sources |= retry.mended()
        return sources


async def _failed_bundles(ports: Ports, job: JobId, retried: RetriedTasks) -> list[tuple[Bundle, TaskSet]]:
    """Return the bundles with failed tasks that no retry has run again, and these tasks."""
    found = [
        (row.bundle, retried.remaining(row.bundle.round, row.bundle.stage, row.completion.failed))
        for row in await ports.ledger.bundles(job, failed=True)
        if row.completion
    ]
    return [(bundle, tasks) for bundle, tasks in found if tasks]


async def failed_tasks(ports: Ports, record: JobRecord) -> dict[StageName, TaskSet]:
    """Return the failed tasks that no retry has run again, by stage."""
    return _by_stage(await _failed_bundles(ports, record.job.id, await RetriedTasks.read(ports, record)))


def _by_stage(failed: Iterable[tuple[Bundle, TaskSet]]) -> dict[StageName, TaskSet]:
    sets_by_stage: dict[StageName, list[TaskSet]] = {}
    for bundle, tasks in failed:
        sets_by_stage.setdefault(bundle.stage, []).append(tasks)
    return {stage: TaskSet.union(sets) for stage, sets in sets_by_stage.items()}


@dataclass(slots=True)
class _PlanState:
    """Decisions of the retry planner about the stages that it has already planned."""

    kept: TaskSelection
    mended: Sources
    void: set[StageName] = field(default_factory=set)
    redone: set[StageName] = field(default_factory=set)
    out: dict[StageName, TaskSet] = field(default_factory=dict)
    """Tasks that will not have a result after the retry: failed tasks that are not retried, and tasks that depend on
    them."""


class RetryPlanner:
    def __init__(self, ports: Ports, plans: StagePlans) -> None:
        self._ports = ports
        self._plans = plans

    async def plan(self, record: JobRecord, chosen: TaskSelection | None, inputs: TaskInputs) -> Retry:
        """Return the retry of the job's next round. The retry includes all cancelled tasks, and either the failed tasks
        in `chosen` or all failed tasks. The tasks in `inputs` run with these inputs, and all tasks with the mended
        inputs of earlier retries. Raise Refused if `chosen` or `inputs` does not match the failed tasks."""
        round_ = record.round + 1
        rows = await self._ports.ledger.rows(record.job.id)
        stages = {s.counts.stage: s for s in rows.stages}
        retried = await RetriedTasks.read(self._ports, record)
        kept: TaskSelection = {}
        failures: list[tuple[Bundle, TaskSet]] = []
        if chosen is not None:
            failures = await _failed_bundles(self._ports, record.job.id, retried)
            kept = _remaining_failures(record.job, stages, chosen, _by_stage(failures))
        new = await self._store(record, failures, inputs)
        walk = _PlanState(kept, {**retried.mended(), **new})
        reopened: list[Reopening] = []
        cuts: list[Cut] = []
        for stage in record.job.stages:
            before = stages[stage.name]
            if _needs_replan(stage, before, walk):
                walk.void.add(stage.name)
                counts = before.counts
                reopened.append(Reopening(counts.stage, counts.succeeded, counts.failed, counts.cancelled, replan=True))
                continue
            upstream = walk.out.get(stage.after[0], TaskSet()) if stage.chained else TaskSet()
            task_set = walk.kept.get(stage.name, TaskSet())
            walk.out[stage.name] = TaskSet.union((upstream, task_set))
            counts = before.counts
            # The numbers of failed and cancelled tasks are at least 0, because forged outcomes may have counted more
            # tasks than exist.
            failed = max(0, counts.failed - len(task_set))
            cancelled = max(0, counts.cancelled - len(upstream))
            if counts.planned is not None and not failed and not cancelled:
                continue
            walk.redone.add(stage.name)
            reopened.append(Reopening(stage.name, failed=failed, cancelled=cancelled))
            cut = await self._cut_again(record, stage, stages, round_, walk)
            if cut:
                cuts.append(cut)
        for stage_name, task in new:
            if stage_name in walk.void:
                raise Refused(
                    f"Task {task_name(stage_name, task)} of job {record.job.id} cannot have a new input, because this "
                    f"retry plans stage {stage_name} again from new results.",
                    remedy="Retry it without a new input.",
                )
        if rows.job != record or await self._ports.ledger.rows(record.job.id) != rows:
            raise Unreachable(f"The ledger changed while job {record.job.id} was read from it.")
        return Retry(tuple(reopened), tuple(cuts))

    async def _store(self, record: JobRecord, failed: Sequence[tuple[Bundle, TaskSet]], inputs: TaskInputs) -> Sources:
        """Store the mended inputs of failed tasks, and return the source of each task."""
        writer, sources = MendedInputs(self._ports, record.job), {}
        for (stage, task), data in inputs.items():
            bundle = next(bundle for bundle, tasks in failed if bundle.stage == stage and task in tasks)
            sources[stage, task] = await writer.store(bundle, task, data)
        return sources

    async def _cut_again(
        self, record: JobRecord, stage: StageDef, stages: Mapping[StageName, StageRecord], round_: int, walk: _PlanState
    ) -> Cut | None:
        job, before, now_s = record.job, stages[stage.name], self._ports.clock.now_s()
        out = walk.out[stage.name]
        task_set = await self._succeeded(job.id, before.counts)
        sources = {task: source for (name, task), source in walk.mended.items() if name == stage.name}

        def mended_bundles(tasks: TaskSet) -> list[Bundle]:
            """Return a bundle for each of the tasks that has a mended input."""
            return [
                Bundle(job.id, stage.name, TaskSet.from_indices([task]), round=round_, source=source)
                for task, source in sorted(sources.items())
                if task in tasks
            ]

        with_mended_input = TaskSet.from_indices(sources)
        if not stage.chained:
            planned = await self._planned_tasks(record, stage, before.counts)
            again = planned - task_set - out
            mended = tuple(mended_bundles(again))
            return Cut(job.id, stage.name, round_, 0, mended, again - with_mended_input, at_s=now_s)
        # The bundles of the retry contain the tasks that have an input but not a result. Tasks without an input start
        # as follow-ups of the upstream bundles that run again.
        bundles: list[Bundle] = []
        for row in await successful_bundles(self._ports, job.id, stages[stage.after[0]].counts):
            tasks = (row.completion.succeeded if row.completion else TaskSet()) - task_set - out
            bundles += mended_bundles(tasks)
            if tasks := tasks - with_mended_input:
                source = row.bundle.id
                bundles.append(Bundle(job.id, stage.name, tasks, round=round_, source=source))
        if not bundles:
            return None
        return Cut(job.id, stage.name, round_, 0, tuple(bundles), TaskSet(), at_s=now_s)

    async def _succeeded(self, job: JobId, counts: StageCounts) -> TaskSet:
        rows = await successful_bundles(self._ports, job, counts)
        return TaskSet.union(r.completion.succeeded for r in rows if r.completion)

    async def _planned_tasks(self, record: JobRecord, stage: StageDef, counts: StageCounts) -> TaskSet:
        for earlier in range(record.round, -1, -1):
            manifest = await self._plans.read(record.job, stage.name, earlier)
            if manifest:
                return TaskSet.span(0, manifest.count) - manifest.skipped
        return TaskSet.span(0, counts.planned or 0)


def _remaining_failures(
    job: JobDef, stages: Mapping[StageName, StageRecord], chosen: TaskSelection, failed: Mapping[StageName, TaskSet]
) -> TaskSelection:
    """Return the failed tasks that a retry of the tasks in `chosen` does not run again. Raise Refused if `chosen` does
    not match the failed tasks in `failed`, or if the remaining failures would stop the job."""
    for name, before in stages.items():
        if len(failed.get(name, TaskSet())) != before.counts.failed:
            raise Unreachable(
                f"The ledger lacks failures of stage {name} of job {job.id}.",
                remedy="If nobody is rebuilding it, `batchlab grid rebuild-ledger` does.",
            )
    for name, tasks in chosen.items():
        _check_planned(job, name, stages, tasks)
        if others := tasks - failed.get(name, TaskSet()):
            raise Refused(
                f"Task {task_name(name, others.first)} of job {job.id} has not failed.",
                remedy="`batchlab job failures` lists the failed ones.",
            )
    if not any(chosen.values()):
        raise Refused(
            f"The request does not match a failed task of job {job.id}.",
            remedy="`batchlab job failures` lists the failed tasks.",
        )
    remaining = {name: tasks - chosen.get(name, TaskSet()) for name, tasks in failed.items()}
    counts = [
        replace(stage_record.counts, failed=len(remaining.get(name, TaskSet())))
        for name, stage_record in stages.items()
    ]
    if (verdict := judge(job, counts)).stop:
        raise Refused(
            f"The remaining failures would stop job {job.id} at once, by its own policy: {verdict.reason}.",
            remedy="Retry all of them together.",
        )
    return remaining


def _check_planned(job: JobDef, name: StageName, stages: Mapping[StageName, StageRecord], tasks: TaskSet) -> None:
    """Raise Refused if the job does not have one of the tasks."""
    if name not in stages:
        names = ", ".join(stage.name for stage in job.stages)
        raise Refused(f"Job {job.id} does not have a stage {name}.", remedy=f"Its stages are {names}.")
    planned = stages[name].counts.planned
    # The indices of a stage with several upstream stages may have gaps.
    if planned is not None and len(job.stage(name).after) < 2 and tasks and tasks.last >= planned:
        raise Refused(
            f"Job {job.id} does not have a task {task_name(name, tasks.last)}.",
            remedy=f"Stage {name} has {count(planned, 'task')}, counted from 0.",
        )


def _needs_replan(stage: StageDef, before: StageRecord, walk: _PlanState) -> bool:
    """Return whether the stage's plan depends on results that the retry changes."""
    changed = bool(walk.void.intersection(stage.after))
    if stage.gather is not None or len(stage.after) > 1:
        changed = changed or bool(walk.redone.intersection(stage.after))
    if not stage.chained:
        changed = changed or not before.counts.planned
    return changed
