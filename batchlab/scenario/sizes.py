"""How many tasks the stages of a job have, by how many it begins with.

Invariant: of jobs whose tasks all succeed, with groups as the template says.
"""

from __future__ import annotations

from batchlab.scenario.model import JobTemplate, StageTemplate


def of(template: JobTemplate, tasks: int) -> dict[str, int]:
    """By stage; ValueError where the stages cannot be put into an order."""
    found: dict[str, int] = {}
    left = list(template.stages)
    while left:
        ready = [stage for stage in left if all(name in found for name in stage.after)]
        for stage in ready:
            found[stage.name] = _size(stage, found, tasks)
        left = [stage for stage in left if stage not in ready]
        if not ready:
            raise ValueError("the stages run in a circle")
    return found


def _size(stage: StageTemplate, found: dict[str, int], tasks: int) -> int:
    if not stage.after:
        return tasks
    if stage.gather == "*":
        return 1
    before = max(found[name] for name in stage.after)
    return before if stage.gather is None else min(stage.groups, before)


def joins(template: JobTemplate) -> list[StageTemplate]:
    """The stages that follow several item by item, which must have equally many tasks."""
    return [stage for stage in template.stages if stage.gather is None and len(stage.after) > 1]


def unequal(template: JobTemplate, tasks: int) -> StageTemplate | None:
    """The first of the joins that follows stages with unequal numbers of tasks; ValueError as
    in `of`."""
    joined = joins(template)
    sizes = of(template, tasks) if joined else {}
    return next((one for one in joined if len({sizes[name] for name in one.after}) > 1), None)


def said(stage: StageTemplate) -> str:
    """What is wrong with an unequal join."""
    which = " and ".join(f"'{name}'" for name in stage.after)
    return (
        f"The stage '{stage.name}' takes the results of {which} item by item, and those have not "
        "equally many tasks."
    )


REMEDY = "Write gather: all, or let it follow stages with as many tasks."
