"""How tasks are named: `parse/3`, and several of a stage `parse/3,7-9`.

Invariant: what is written here is read here; no other place puts a stage and an index together.
"""

from __future__ import annotations

import re

from batchlab.core.errors import UsageError
from batchlab.core.model import StageName

_TASK = re.compile(r"(?:(?P<stage>[^/]+)/)?(?P<index>[0-9]{1,15})")
_RANGE = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))?")


def task_name(stage: str, task: int) -> str:
    """As `parse/3`."""
    return f"{stage}/{task}"


def attempt_name(stage: str, task: int, attempt: int) -> str:
    """As `parse/3#2`; the first attempt is called as its task is."""
    return task_name(stage, task) + (f"#{attempt}" if attempt > 1 else "")


def with_task(reason: str, stage: str, task: int, why: str) -> str:
    """A job's `reason` and a task's own, as `1 task failed; task parse/3: ValueError: bad`."""
    return f"{reason}; task {task_name(stage, task)}: {why}"


def without_task(reason: str, stage: str, task: int, why: str) -> str:
    """What `with_task` was given, where it was given this task."""
    return reason.removesuffix(with_task("", stage, task, why))


def parse_task(text: str) -> tuple[StageName | None, int]:
    """Stage and index of `parse/3`; None and the index of `3`. UsageError."""
    found = _TASK.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"{text!r} names no task.", remedy="Write the stage and the index, such as parse/3."
        )
    return StageName(found["stage"]) if found["stage"] else None, int(found["index"])


def parse_tasks(text: str) -> tuple[StageName, list[tuple[int, int]]]:
    """Stage and ranges [first, beyond the last) of `parse/3,7-9`; UsageError."""
    stage, _, ranges = text.strip().rpartition("/")
    found: list[tuple[int, int]] = []
    for one in ranges.split(","):
        match = _RANGE.fullmatch(one.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if not stage or "/" in stage or last < first:
            raise UsageError(f"{text!r} names no tasks.", remedy="Write for example parse/3,7-9.")
        found.append((first, last + 1))
    return StageName(stage), found
