"""Definition of a job as the grid runs it: the content of `jobs/<job>/spec.json`.

The values are frozen and pure, as in `core.model`. A job file or the Python API creates them. They do not depend on the
machine that submitted the job.

Names of tasks: `parse/3` for one, and `parse/3,7-9` for several of a stage.

Invariant: names that are written here can be read here. Only this module combines a stage and an index.
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
    """One stage of the job.

    A stage without `after` is a root, and its items come from the job's input. If `gather` is None, the stage is a
    chain (item by item). If it is "*", all upstream results make one task. Any other text names the field of the
    upstream results to group by. If a result is a list, it is the field of the list's elements. Exactly one of
    `handler` ("module:function", or "pickle:<object key>") and `command` is set. If `bundle` is None, the size of
    bundles follows the measured task time.
    """

    name: StageName
    after: tuple[StageName, ...] = ()
    gather: str | None = None
    handler: str | None = None
    command: tuple[str, ...] = ()
    stdout: str | None = None
    """Name of the output file for a command's standard output. If None, the output goes to the log."""
    timeout_s: float | None = None
    retry: RetryRule = RetryRule()
    slots: int = 1
    memory_bytes: int | None = None
    bundle: int | None = None
    pool: str = "default"

    @property
    def chained(self) -> bool:
        """Return whether the workers of one upstream stage feed this stage item by item.

        The manager does not take part in this.
        """
        return self.gather is None and len(self.after) == 1


class SplitBy(StrEnum):
    """Ways to split raw data into tasks."""

    FILE = "file"
    LINES = "lines"
    BYTES = "bytes"
    ITEMS = "items"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rules and texts of one way to split input.

    `meaning` describes the input of one task, `size` the unit of the key `size`, and `item` the argument of a handler.
    If `size` is "", a job file cannot contain the key. If `in_bytes` is true, the size may also be text such as `8
    MiB`. If `has_header` is true, each part may begin with the header of its file.
    """

    meaning: str
    size: str = ""
    default_size: int = 1
    in_bytes: bool = False
    has_header: bool = False
    item: str = "a `File` with the task's part"


SPLITS: dict[SplitBy, Split] = {
    SplitBy.FILE: Split(meaning="a whole `file`"),
    SplitBy.LINES: Split(
        meaning="some `lines` of a file", size="a number of lines, default 1000", default_size=1000, has_header=True
    ),
    SplitBy.BYTES: Split(
        meaning="a part of about `size` `bytes` that begins and ends between lines",
        size="bytes or a size, default `8 MiB`; a longer line is a part of its own",
        default_size=8 * 1024 * 1024,
        in_bytes=True,
        has_header=True,
    ),
    SplitBy.ITEMS: Split(
        meaning="or `items`, the JSON values of a JSON Lines file",
        size="a number of items. With 1 (default), the task receives the item itself, otherwise a list",
        item="the JSON value, or a list of `size` of them",
    ),
}
"""All ways to split input. The schema of the job file, its checks, and its reference page are made
from this table. `manager.input_split` has the function that reads the input for each way."""


@dataclass(frozen=True, slots=True)
class InputDef:
    """Source of the items of the root stages.

    `keys` are objects of the bucket (uploaded raw data) in order. A key that ends in "/" stands for every object under
    it. `size` is the number of lines per task for LINES, of bytes for BYTES, and of items for ITEMS. With 1 item per
    task, the input is the item itself, otherwise a list of items. `header` repeats the first line of each file in every
    part (LINES and BYTES).
    """

    keys: tuple[str, ...] = ()
    split: SplitBy = SplitBy.FILE
    size: int = 1
    header: bool = False


@dataclass(frozen=True, slots=True)
class NotifyDef:
    """A notification target of a job, and its moments (see `core.notifications.MOMENTS`).

    `kind` is "webhook", "sns", or "target". `to` is the URL, the topic's ARN, or the name of one of the grid's own
    targets. `secret` names the key that signs the messages, never the key itself. It is "env:NAME", a variable of the
    manager's environment. `failures` is the number of failed tasks at which a notification is sent. `stuck_s` is the
    time without progress after which one is sent.
    """

    kind: str
    to: str
    on: tuple[str, ...] = ("ended",)
    secret: str = ""
    failures: int = 1
    stuck_s: float = 600.0


@dataclass(frozen=True, slots=True)
class JobDef:
    """A job ready to run, independent of the machine that submitted it.

    `max_failures` is a number of tasks or, with `max_failures_percent`, a percentage of the tasks planned in a stage. A
    job with more failures is FAILED. With `fail_fast`, it stops at once. `items` is the number of items of a job that
    came with its items (Python API) instead of `input`.
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
    """Client token. A second submission with the same token returns the same job."""
    start_at_s: float | None = None
    max_cost_usd: float | None = None
    """Cap on the cost. Above it, nothing more is launched for the job (see `manager.cost_caps`)."""
    notify: tuple[NotifyDef, ...] = ()
    """Notification targets of the job, in addition to those of the grid."""
    trace: str = ""
    """W3C traceparent of the submission if the job is traced."""
    commit_hash: str = ""
    """SHA-256 of the job's commit key (see `core.protocol.seals`); "" for a job of release 0.1.0."""

    @property
    def is_single_call(self) -> bool:
        """Return whether the job is one call of the Python API, whose id only the caller has."""
        return self.items == 1 and not self.token

    def stage(self, name: str) -> StageDef:
        """Return the stage with that name. Raise KeyError if it does not exist."""
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
    """Return a job's `reason` with a task's own: `1 task failed; task parse/3: ValueError: bad`."""
    return f"{reason}; task {task_name(stage, task)}: {why}"


def without_task(reason: str, stage: str, task: int, why: str) -> str:
    """Return the reason that was passed to `with_task` with this task."""
    return reason.removesuffix(with_task("", stage, task, why))


def parse_task(text: str) -> tuple[StageName | None, int]:
    """Return stage and index of `parse/3`, or None and the index of `3`.

    Raise UsageError if the text is not such a name.
    """
    match = _TASK.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not the name of a task.", remedy="Write the stage and the index, such as parse/3."
        )
    return StageName(match["stage"]) if match["stage"] else None, int(match["index"])


def parse_tasks(text: str) -> tuple[StageName, list[tuple[int, int]]]:
    """Return stage and ranges [first, last + 1) of `parse/3,7-9`. Raise UsageError if the text is not such a name."""
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
