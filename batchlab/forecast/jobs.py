"""A scenario's jobs as the grid takes them: its templates as definitions, its tasks as items.

Invariant: an item is its task's number, and all that a task does follows from that; so a forecast
needs no data and no code.
"""

from __future__ import annotations

from batchlab.jobdef import JobDef, StageDef
from batchlab.manager.plans import FEW, PartWriter
from batchlab.model import JobId, Json, StageName, TaskSet
from batchlab.patience import Patience
from batchlab.ports import Objects
from batchlab.scenario.model import TENANT, Job, StageTemplate

HANDLER = "scenario:declared"
_AT_ONCE = 4096


def job_def(job: Job, submitted_s: float) -> JobDef:
    """The job's definition; `submitted_s` in epoch seconds."""
    template = job.template
    return JobDef(
        JobId(job.id),
        template.name,
        tuple(map(_stage_def, template.stages)),
        submitted_s,
        items=job.tasks,
        max_failures=template.max_failures,
        priority=template.priority,
        tags=((TENANT, job.tenant),) if job.tenant else (),
        token=job.id,
    )


def _stage_def(stage: StageTemplate) -> StageDef:
    return StageDef(
        StageName(stage.name),
        tuple(map(StageName, stage.after)),
        # Results carry one field for each stage that gathers by key: its name.
        gather=stage.name if stage.gather == "key" else stage.gather,
        handler=HANDLER,
        retry=stage.retry,
        slots=stage.slots,
        memory_bytes=stage.memory_bytes,
        bundle=stage.bundle,
        pool=stage.pool,
    )


def value_of(stages: tuple[StageTemplate, ...], stage: str, task: int) -> Json:
    """What a task of the stage returns: for each stage that gathers it by key, the group."""
    return {
        one.name: f"{task % one.groups:06d}"
        for one in stages
        if one.gather == "key" and stage in one.after
    } or None


async def bring(job: JobDef, objects: Objects, patience: Patience) -> list[Json] | None:
    """The job's items where they are few; else they are in the bucket now."""
    count = job.items or 0
    if count <= FEW:
        return list(range(count))
    for stage in job.roots():
        writer = PartWriter(objects, patience, job.id, stage.name, 0)
        for start in range(0, count, _AT_ONCE):
            await writer.add(*range(start, min(start + _AT_ONCE, count)))
        await writer.commit(TaskSet())
    return None
