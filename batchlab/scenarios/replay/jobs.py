"""Jobs of a replay: stand-in tasks with the drawn task times, or the real work of a job file.

All objects of a job are in the bucket before the job is due, so the submission of the job is one request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from batchlab.core.errors import AlreadyExists
from batchlab.core.job_definition import Dependency, JobDef, StageDef
from batchlab.core.model import JobId, Json, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, Objects
from batchlab.core.protocol import object_keys, values
from batchlab.jobs import job_file, submission
from batchlab.manager.stage_plans import MAX_STORED_BYTES, MAX_STORED_ITEMS, PartWriter
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.values import TENANT_TAG, Job, JobTemplate, StageTemplate
from batchlab.scenarios.replay import standin
from batchlab.worker import code_cache

HANDLER = "standins:work"
SCENARIO_TAG = "scenario"
"""Key of the job tag whose value is the name of the job's scenario."""


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """Job that is ready for submission. The items of a small job are part of the submission."""

    due: Job
    job: JobDef
    items: list[Json] | None = None


@dataclass
class JobPreparer:
    """Preparer of the jobs of one run for submission.

    `run` is an id that distinguishes the jobs of one run from the jobs of other runs of the same scenario.
    """

    scenario: str
    seed: int
    run: str
    objects: Objects
    clock: Clock
    patience: Patience
    _stored: set[str] = field(default_factory=set)
    _files: dict[Path, tuple[job_file.JobFile, tuple[bytes, str]]] = field(default_factory=dict)
    _ids: dict[str, JobId] = field(default_factory=dict)
    """Ids of the prepared jobs on the grid, by the ids in the scenario."""

    async def prepare(self, due: Job) -> PreparedJob:
        """Prepare a job for submission. The jobs on which the job depends must be prepared before it.

        Raise JobFileErrors if the template's job file cannot be read. The function may also raise UsageError or
        BackendError.
        """
        file = due.template.file
        prepared = await (self._prepare_file(due, file) if file else self._prepare_standin(due))
        self._ids[due.id] = prepared.job.id
        after = tuple(Dependency(self._ids[other.job], other.condition) for other in due.after)
        return replace(prepared, job=replace(prepared.job, after=after))

    async def _prepare_standin(self, due: Job) -> PreparedJob:
        template = due.template
        token = f"{due.id}@{self.run}"
        items = list(job_items(self.seed, due))
        job = JobDef(
            object_keys.job_id(template.name, token),
            template.name,
            tuple(stage_def(stage) for stage in template.stages),
            self.clock.now_s(),
            items=due.tasks,
            code=await self._code(),
            params=(("stages", stage_parameters(self.seed, due)),),
            max_failures=template.max_failures,
            priority=template.priority,
            share=template.share,
            tags=self._tags(due),
            token=token,
        )
        if len(items) <= MAX_STORED_ITEMS and sum(map(values.roughly, items)) <= MAX_STORED_BYTES:
            return PreparedJob(due, job, items)
        for stage in job.roots():
            writer = PartWriter(self.objects, self.patience, job.id, stage.name, 0)
            await writer.add(*items)
            await writer.commit(TaskSet())
        return PreparedJob(due, job)

    def _tags(self, due: Job) -> tuple[tuple[str, str], ...]:
        tenant = ((TENANT_TAG, due.tenant),) if due.tenant else ()
        return ((SCENARIO_TAG, self.scenario), *tenant)

    @cached_property
    def _package(self) -> bytes:
        return code_cache.pack(Path(standin.__file__).parent)

    async def _code(self) -> str:
        key = code_cache.key(self._package)
        if key not in self._stored:
            with suppress(AlreadyExists):  # the key is a hash of the code, so the stored object is equal
                await self.patience(partial(self.objects.put, key, self._package, if_absent=True))
            self._stored.add(key)
        return key

    async def _prepare_file(self, due: Job, file: Path) -> PreparedJob:
        if file not in self._files:
            jobfile = job_file.load(file, {})
            self._files[file] = (jobfile, submission.code_digest(jobfile))
        jobfile, packed = self._files[file]
        job = await submission.prepare(
            jobfile,
            objects=self.objects,
            clock=self.clock,
            patience=self.patience,
            token=f"{due.id}@{self.run}",
            packed=packed,
        )
        tags = {**dict(job.tags), **dict(self._tags(due))}
        template = due.template
        job = replace(
            job, tags=tuple(tags.items()), priority=template.priority or job.priority, share=template.share or job.share
        )
        if template.max_failures:  # without a limit in the scenario, the job file's limit applies
            job = replace(job, max_failures=template.max_failures, max_failures_percent=False)
        return PreparedJob(due, job)


def stage_def(stage: StageTemplate) -> StageDef:
    """Return the stage's definition."""
    return StageDef(
        StageName(stage.name),
        tuple(StageName(name) for name in stage.after),
        f"group_{stage.name}" if _gathers_by_key(stage) else stage.gather,
        handler=HANDLER,
        retry=stage.retry,
        slots=stage.slots,
        gpus=stage.gpus,
        memory_bytes=stage.memory_bytes,
        bundle=stage.bundle,
        pool=stage.pool,
        speculative_copies=stage.speculative_copies,
    )


def _gathers_by_key(stage: StageTemplate) -> bool:
    return stage.gather not in (None, "*")


def item_followers(template: JobTemplate, name: str) -> list[StageTemplate]:
    """Return the stages that follow `name` item by item, directly or indirectly.

    Stages that follow each other item by item have the same number of tasks.
    """
    names, followers = {name}, []
    for stage in template.stages:
        if stage.gather is None and names.intersection(stage.after):
            names.add(stage.name)
            followers.append(stage)
    return followers


def job_items(seed: int, due: Job) -> Iterator[Json]:
    """Yield the items of the root stages in task order."""
    roots = [stage for stage in due.template.stages if not stage.after]
    stages = {s.name: s for root in roots for s in (root, *item_followers(due.template, root.name))}
    columns = {name: _task_entries(seed, due, stage, due.tasks) for name, stage in stages.items()}
    for task in range(due.tasks):
        yield {"t": {name: column[task] for name, column in columns.items()}}


def stage_parameters(seed: int, due: Job) -> dict[str, Any]:
    """Return the parameters of the stand-in tasks of each stage (see standins)."""
    template = due.template
    counts = expansion.stage_sizes(template, due.tasks)
    parameters: dict[str, Any] = {}
    for stage in template.stages:
        followers = item_followers(template, stage.name)
        gathers = [after for after in template.stages if _gathers_by_key(after) and stage.name in after.after]
        parameters[stage.name] = {
            "kind": stage.kind.value,
            # A stand-in holds half of the memory limit, because the Python interpreter needs the other half.
            "hold": stage.memory_bytes // 2 if stage.memory_bytes else None,
            "passes": [follower.name for follower in followers],
            "groups": {f"group_{after.name}": after.groups for after in gathers},
        }
        if stage.gather is not None:
            count = counts[stage.name]
            columns = {s.name: _task_entries(seed, due, s, count) for s in (stage, *followers)}
            tasks = [{name: column[task] for name, column in columns.items()} for task in range(count)]
            parameters[stage.name]["tasks"] = tasks
    return parameters


def _task_entries(seed: int, due: Job, stage: StageTemplate, count: int) -> list[Json]:
    """Return an entry for each task: the task's seconds, its failing attempts, and whether the task kills its
    worker.
    """
    seconds = expansion.task_times_s(seed, due, stage, TaskSet.span(0, count))
    attempts = range(1, stage.retry.max_attempts + 1) if stage.fails else ()
    return [
        [
            round(task_s, 6),
            [attempt for attempt in attempts if expansion.attempt_fails(seed, due, stage, task, attempt)],
            expansion.kills_worker(due, stage, task),
        ]
        for task, task_s in enumerate(seconds)
    ]


def declared_s(seed: int, due: Job, stage: str, tasks: TaskSet) -> dict[int, float]:
    """Return the declared duration in seconds of each task, or an empty mapping for an unknown stage."""
    for template in due.template.stages:
        if template.name == stage:
            return dict(zip(tasks, expansion.task_times_s(seed, due, template, tasks), strict=True))
    return {}
