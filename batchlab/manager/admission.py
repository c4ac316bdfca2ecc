"""Whether a grid can run a job at all: told before it is accepted, not found out by waiting.

Invariant: a job that is admitted names only pools that there are, with slots for its tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from batchlab import notification
from batchlab.errors import UsageError
from batchlab.jobdef import JobDef, StageDef

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def admit(job: JobDef, pools: Mapping[str, int]) -> None:
    """UsageError where the job could never run in a grid whose `pools` have so many slots."""
    if not job.stages:
        raise UsageError(f"Job {job.name} has no stages.", remedy="Give it at least one.")
    for text in (job.id, *(stage.name for stage in job.stages)):
        # They become parts of object keys.
        if not _NAME.fullmatch(text):
            raise UsageError(
                f"{text!r} cannot name a job or a stage.",
                remedy="Use letters, digits, - and _, beginning with a letter or digit.",
            )
    earlier: set[str] = set()
    for stage in job.stages:
        _admit_stage(stage, earlier)
        _admit_to_pool(stage, pools)
        earlier.add(stage.name)
    if len(job.notify) > notification.MOST_TARGETS:
        raise UsageError(
            f"Job {job.name} notifies {len(job.notify)} targets.",
            remedy=f"It may name {notification.MOST_TARGETS}.",
        )
    for one in job.notify:
        if wrong := notification.problem(one):
            raise UsageError(wrong, remedy="Mend `notify` of the job.")


def _admit_stage(stage: StageDef, earlier: set[str]) -> None:
    if stage.name in earlier:
        raise UsageError(
            f"Two stages are named {stage.name!r}.", remedy="Give each a name of its own."
        )
    for upstream in stage.after:
        if upstream not in earlier:
            raise UsageError(
                f"Stage {stage.name} comes after {upstream!r}, which is no stage before it.",
                remedy="List the stages in an order in which they can run.",
            )
    if (stage.handler is None) != bool(stage.command):
        raise UsageError(
            f"Stage {stage.name} must have either a handler or a command.",
            remedy="Give it exactly one of the two.",
        )
    if stage.bundle is not None and stage.bundle < 1:
        raise UsageError(
            f"Stage {stage.name} asks for bundles of {stage.bundle} tasks.",
            remedy="Write 1 or more, or leave it out.",
        )


def _admit_to_pool(stage: StageDef, pools: Mapping[str, int]) -> None:
    if stage.pool not in pools:
        raise UsageError(
            f"Stage {stage.name} names the pool {stage.pool!r}, which this grid does not have.",
            remedy=f"Its pools are {', '.join(sorted(pools))}.",
        )
    if not 1 <= stage.slots <= pools[stage.pool]:
        raise UsageError(
            f"Stage {stage.name} asks for {stage.slots} slots per task, but an instance of pool "
            f"{stage.pool!r} has {pools[stage.pool]}.",
            remedy="Ask for as many at the most, or name a pool with larger instances.",
        )
