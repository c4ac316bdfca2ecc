"""Definition of a job as the grid runs it: the content of `jobs/<job>/spec.json`.

A job definition is a frozen value, as in `core.model`. A job file or the Python API creates the job definition. A job
definition does not depend on the machine that submitted the job.

Task 3 of stage `parse` is named `parse/3`, and several tasks of the stage are named `parse/3,7-9`.

Invariant: `parse_task` reads every name that `task_name` writes. No other module combines the name of a stage and the
index of a task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from batchlab.core.errors import UsageError
from batchlab.core.model import JobId, Json, StageName
from batchlab.core.retry_rule import RetryRule


@dataclass(frozen=True, slots=True)
class StageDef:
    """One stage of a job.

    A stage without `after` is a root, and its items come from the job's input. If `gather` is None, the stage is a
    chain, which processes its input item by item. If `gather` is "*", all upstream results are the input of one task.
    Any other value of `gather` is the field by which upstream results, or the elements of results that are lists, are
    grouped. Exactly one of `handler` ("module:function", or "pickle:<object key>") and `command` is set. If `bundle` is
    None, the size of bundles is computed from the measured task time.
    """

    name: StageName
    after: tuple[StageName, ...] = ()
    gather: str | None = None
    handler: str | None = None
    command: tuple[str, ...] = ()
    stdout: str | None = None
    """Name of the output file for a command's standard output.

    If `stdout` is None, the standard output is written to the log.
    """
    timeout_s: float | None = None
    retry: RetryRule = RetryRule()
    slots: int = 1
    memory_bytes: int | None = None
    bundle: int | None = None
    pool: str = "default"
    side_effects: bool = False
    """Whether tasks of the stage have side effects that must not happen in two places at once."""
    speculative_copies: bool = False
    """Whether the manager may send speculative copies of the stage's tasks.

    A definition of a release without speculative copies lacks the field, and its tasks are never copied.
    """
    gpus: int = 0
    """Number of GPUs that each task of the stage has for itself."""

    @property
    def may_be_copied(self) -> bool:
        """Return whether tasks of the stage may get speculative copies."""
        # A copy of a task with a GPU would hold a second GPU, which is worth more than the task's delay.
        return self.speculative_copies and not self.side_effects and not self.gpus

    @property
    def chained(self) -> bool:
        """Return whether the stage receives the results of one upstream stage item by item from workers."""
        return self.gather is None and len(self.after) == 1


class SplitBy(StrEnum):
    """Ways to split raw data into tasks."""

    FILE = "file"
    LINES = "lines"
    BYTES = "bytes"
    ITEMS = "items"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rules and texts for one way to split a job's input into tasks.

    `meaning` describes the input of one task. `size` describes the unit of a job file's key `size`, and `item`
    describes the argument of a handler. If `Split.size` is "", a job file cannot contain the key `size`. If `in_bytes`
    is true, the key `size` may also be text such as `8 MiB`. If `has_header` is true, the input of each task may begin
    with the header of its file.
    """

    meaning: str
    size: str = ""
    default_size: int = 1
    in_bytes: bool = False
    has_header: bool = False
    item: str = "a `File` with the task's part"


SPLITS: dict[SplitBy, Split] = {
    SplitBy.FILE: Split(meaning="a whole file"),
    SplitBy.LINES: Split(
        meaning="some lines of a file", size="a number of lines (1000 by default)", default_size=1000, has_header=True
    ),
    SplitBy.BYTES: Split(
        meaning="a part of a file with about `size` bytes, which begins and ends between lines",
        size="a number of bytes, or a size such as `16 MiB` (`8 MiB` by default). A line that is "
        "longer than `size` is a part of its own",
        default_size=8 * 1024 * 1024,
        in_bytes=True,
        has_header=True,
    ),
    SplitBy.ITEMS: Split(
        meaning="one or several JSON values of a JSON Lines file (items)",
        size="a number of items (1 by default). With `split: items` and `size: 1`, a task receives "
        "the item itself. With `split: items` and a larger `size`, a task receives a list of "
        "items",
        item="the JSON value, or a list of `size` JSON values",
    ),
}
"""Table of all ways to split the input of a job.

The schema of the job file, its checks, and its reference page are generated from the table SPLITS.
`manager.input_split` has a function for each way to split input, which reads the input.
"""


@dataclass(frozen=True, slots=True)
class InputDef:
    """Source of the items of the root stages.

    `keys` are the keys of the objects in the bucket that contain the input, in order. A key that ends in "/" is a
    prefix and selects every object under the prefix. `size` is the number of lines per task for LINES, of bytes for
    BYTES, and of items for ITEMS. The input of a task is a list of items, or the item itself if `size` is 1. If
    `header` is true, the input of every task begins with the first line of its file (LINES and BYTES).
    """

    keys: tuple[str, ...] = ()
    split: SplitBy = SplitBy.FILE
    size: int = 1
    header: bool = False


@dataclass(frozen=True, slots=True)
class NotifyDef:
    """A notification target of a job, and the events that the target receives (see `core.notifications.MOMENTS`).

    `kind` is "webhook", "sns", or "target". `to` is the URL, the topic's ARN, or the name of one of the grid's own
    targets. `secret` has the form "env:NAME" and names the variable of the manager's environment that contains the
    signing key. `failures` is the number of failed tasks at which a notification is sent. `stuck_s` is the time in
    seconds without progress after which a notification is sent.
    """

    kind: str
    to: str
    on: tuple[str, ...] = ("ended",)
    secret: str = ""
    failures: int = 1
    stuck_s: float = 600.0


MAX_GPUS = 16
"""Maximum number of GPUs of an instance. The largest EC2 instance types have 16 GPUs."""

MAX_DEPENDENCIES = 20
"""Maximum number of jobs that a job depends on. AWS Batch has the same limit."""


class Condition(StrEnum):
    """Conditions of a dependency."""

    SUCCEEDED = "succeeded"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Dependency:
    """An earlier job of the same grid that must have succeeded or ended before a job begins."""

    job: JobId
    condition: Condition = Condition.SUCCEEDED

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return f"{self.job}:{self.condition}"

    @classmethod
    def parse(cls, text: str) -> Dependency:
        """Return the dependency in a text such as `ID` or `ID:ended`. Raise UsageError for an unknown condition."""
        job, colon, condition = text.partition(":")
        if not job or (colon and condition not in [known.value for known in Condition]):
            raise UsageError(
                f"{text!r} is not a dependency.",
                remedy="Write a name, and :ended if the job may also fail, such as sums-0123456789:ended.",
            )
        return cls(JobId(job), Condition(condition) if colon else Condition.SUCCEEDED)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class JobDef:
    """Definition of a job, independent of the machine that submitted the job.

    `max_failures` is a number of tasks or, with `max_failures_percent`, a percentage of the tasks planned in a stage. A
    job with more failures than `max_failures` is FAILED. With `fail_fast`, a job stops as soon as it has more failures
    than `max_failures`. `items` is the number of items of a job that was submitted with items (Python API) instead of
    `input`.
    """

    id: JobId
    name: str
    stages: tuple[StageDef, ...]
    submitted_s: float
    input: InputDef | None = None
    items: int | None = None
    code: str | None = None
    """Key of the code zip, `code/<sha256>.zip`."""
    params: tuple[tuple[str, Json], ...] = ()
    max_failures: float = 0
    max_failures_percent: bool = False
    fail_fast: bool = False
    priority: int = 0
    tags: tuple[tuple[str, str], ...] = ()
    token: str = ""
    """Client token of the submission. A second submission with the same token returns the same job."""
    start_at_s: float | None = None
    after: tuple[Dependency, ...] = ()
    """Dependencies of the job. The job begins when the conditions of all dependencies hold."""
    max_cost_usd: float | None = None
    """Cap on the cost of the job.

    The manager launches instances and cuts bundles for a job only while the job's cap covers their cost (see
    `manager.cost_caps`).
    """
    notify: tuple[NotifyDef, ...] = ()
    """Notification targets of the job, in addition to the notification targets of the grid."""
    trace: str = ""
    """W3C traceparent of the submission, or "" if the job is not traced."""
    owner: str = ""
    """Name of the user that submitted the job, or "" for the user with the grid's token. The manager sets the owner."""
    commit_hash: str = ""
    """SHA-256 of the job's commit key (see `core.protocol.object_keys`), or "" for a job of release 0.1.0."""
    share: str = ""
    """Share identifier of the job in the fair-share policy of the grid, or "" for the default share."""

    @property
    def is_single_call(self) -> bool:
        """Return whether the job is a single call of the Python API, whose job id only the caller has."""
        return self.items == 1 and not self.token and not self.after

    def stage(self, name: str) -> StageDef:
        """Return the stage `name`. Raise KeyError if the stage does not exist."""
        for stage_def in self.stages:
            if stage_def.name == name:
                return stage_def
        raise KeyError(name)

    def roots(self) -> tuple[StageDef, ...]:
        return tuple(s for s in self.stages if not s.after)

    def chained_after(self, name: str) -> tuple[StageDef, ...]:
        """Return the stages that the workers of stage `name` feed item by item."""
        return tuple(s for s in self.stages if s.chained and s.after == (name,))

    def fed_by(self, name: str) -> tuple[StageDef, ...]:
        """Return the stages that stage `name` feeds item by item, directly or indirectly."""
        fed = {name}
        stage_defs: list[StageDef] = []
        for stage in self.stages:
            if stage.chained and stage.after[0] in fed:
                fed.add(stage.name)
                stage_defs.append(stage)
        return tuple(stage_defs)


_TASK = re.compile(r"(?:(?P<stage>[^/]+)/)?(?P<index>[0-9]{1,15})")
_RANGE = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))?")


def task_name(stage: str, task: int) -> str:
    """Return a task's name, such as `parse/3`."""
    return f"{stage}/{task}"


def attempt_name(stage: str, task: int, attempt: int) -> str:
    """Return an attempt's name, such as `parse/3#2`. The first attempt has the name of its task."""
    return task_name(stage, task) + (f"#{attempt}" if attempt > 1 else "")


def with_task(reason: str, stage: str, task: int, why: str) -> str:
    """Return a job's `reason` followed by the name of a task and the reason `why` the task failed."""
    return f"{reason}; task {task_name(stage, task)}: {why}"


def without_task(reason: str, stage: str, task: int, why: str) -> str:
    """Return the `reason` that was passed to `with_task`, given the result of `with_task`."""
    return reason.removesuffix(with_task("", stage, task, why))


def parse_task(text: str) -> tuple[StageName | None, int]:
    """Return the stage and the index in a name such as `parse/3`, or None and the index for a text such as `3`.

    Raise UsageError if the text is not the name of a task.
    """
    match = _TASK.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not the name of a task.", remedy="Write the stage and the index, such as parse/3."
        )
    return StageName(match["stage"]) if match["stage"] else None, int(match["index"])


def parse_tasks(text: str) -> tuple[StageName, list[tuple[int, int]]]:
    """Return the stage and the index ranges [first, last + 1) in a text such as `parse/3,7-9`.

    Raise UsageError if the text is not a name of tasks.
    """
    stage, _, ranges = text.strip().rpartition("/")
    spans: list[tuple[int, int]] = []
    for text_range in ranges.split(","):
        match = _RANGE.fullmatch(text_range.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if not stage or "/" in stage or last < first:
            raise UsageError(f"{text!r} is not a list of tasks.", remedy="Write for example parse/3,7-9.")
        spans.append((first, last + 1))
    return StageName(stage), spans
