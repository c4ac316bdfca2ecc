"""Whether a grid can run a job at all: told before it is accepted, not found out by waiting.

Invariant: a job that is admitted names only pools that there are, with slots for its tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from batchlab import notification
from batchlab.directory import Directory
from batchlab.errors import UsageError
from batchlab.jobdef import JobDef, StageDef

LONGEST_NAME = 200
LONGEST_TAG = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def admit(job: JobDef, pools: Mapping[str, int], directory: Directory | None = None) -> None:
    """UsageError where the job could never run in a grid whose `pools` have so many slots, or
    names somebody to tell whom its `directory` does not let it name."""
    if not job.stages:
        raise UsageError(f"Job {job.name} has no stages.", remedy="Give it at least one.")
    for text in (job.id, *(stage.name for stage in job.stages)):
        # They become parts of object keys.
        if not _NAME.fullmatch(text):
            raise UsageError(
                f"{text!r} cannot name a job or a stage.",
                remedy="Use letters, digits, - and _, beginning with a letter or digit.",
            )
    _admit_texts(job)
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
        if directory and (wrong := directory.refusal(one)):
            raise UsageError(wrong, remedy="Ask who runs the grid, or leave it out of `notify`.")


def _admit_texts(job: JobDef) -> None:
    """What people read in listings, logs and messages, where a control character could make it look
    like something else."""
    for what, text, most in (
        ("The job's name", job.name, LONGEST_NAME),
        *(("A tag", text, LONGEST_TAG) for pair in job.tags for text in pair),
    ):
        if not text.isprintable():
            raise UsageError(
                f"{what} holds characters that cannot be printed: {text[:200]!r}.",
                remedy="Leave out line breaks, escape sequences and the like.",
            )
        if len(text) > most:
            raise UsageError(
                f"{what} has {len(text):,} characters.", remedy=f"Write {most} at the most."
            )


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
