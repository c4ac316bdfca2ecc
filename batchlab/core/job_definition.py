"""A job as the grid runs it: what `jobs/<job>/spec.json` says.

Frozen and pure like the other nouns in model.py. The spec package makes it from a job file, the
Python API makes it itself; nothing in it depends on the machine that submitted it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from batchlab.core.model import FailureKind, JobId, Json, StageName


@dataclass(frozen=True, slots=True)
class RetryRule:
    """When and how often a failed task is tried again.

    `attempts` counts the first try. The wait before attempt n+1 is
    `backoff_s · factor^(n-1)`, at most `max_backoff_s`, times a jitter within ±`jitter`.
    Empty `kinds` means every kind but IMPORT and RESULT, which no second try can mend; LOST is
    final by any rule. Non-empty `exit_codes` or `exceptions` narrow EXIT and EXCEPTION to those
    named.
    """

    attempts: int = 3
    backoff_s: float = 1.0
    factor: float = 2.0
    max_backoff_s: float = 900.0
    jitter: float = 0.25
    kinds: tuple[FailureKind, ...] = ()
    exit_codes: tuple[int, ...] = ()
    exceptions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageDef:
    """One step of the job's list.

    Without `after` it is a root and its items come from the job's input. `gather` None means
    chain (item by item); "*" means all upstream results make one task; any other text names the
    field of the upstream results (or of their elements, where a result is a list) to group by.
    Exactly one of `handler` ("module:function", or "pickle:<object key>") and `command` is set.
    `bundle` None means sizes follow the measured task time.
    """

    name: StageName
    after: tuple[StageName, ...] = ()
    gather: str | None = None
    handler: str | None = None
    command: tuple[str, ...] = ()
    stdout: str | None = None
    """Name of the output file that a command's standard output goes to; None: to the log."""
    timeout_s: float | None = None
    retry: RetryRule = RetryRule()
    slots: int = 1
    memory_bytes: int | None = None
    bundle: int | None = None
    pool: str = "default"

    @property
    def chained(self) -> bool:
        """Fed item by item by the workers of one upstream stage, without the manager."""
        return self.gather is None and len(self.after) == 1


class SplitBy(StrEnum):
    """How raw data becomes tasks."""

    FILE = "file"
    LINES = "lines"
    BYTES = "bytes"
    ITEMS = "items"


@dataclass(frozen=True, slots=True)
class InputDef:
    """Where the root stages' items come from.

    `keys` are objects of the bucket (uploaded raw data) in order; one that ends in "/" stands for
    every object under it. `size` is lines per task for
    LINES, bytes for BYTES, items for ITEMS (1: the item itself; more: a list of them).
    `header` repeats the first line of each file in every part (LINES and BYTES).
    """

    keys: tuple[str, ...] = ()
    split: SplitBy = SplitBy.FILE
    size: int = 1
    header: bool = False


@dataclass(frozen=True, slots=True)
class NotifyDef:
    """Whom to tell of a job, and of which moments (see `notification.MOMENTS`).

    `kind` is "webhook", "sns" or "target", `to` the URL, the topic's ARN or the name of one of the
    grid's own targets. `secret` names where the key is
    that signs what is sent, never the key itself: "env:NAME", of the manager's environment.
    `failures` is how many failed tasks are too many, `stuck_s` how long a job may stand still.
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

    `max_failures` is a number of tasks, or with `max_failures_percent` a percentage of the tasks
    planned in a stage; beyond it the job is FAILED, and with `fail_fast` stopped at once.
    `items` is the input of a job that came with its items (Python API) instead of `input`.
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
    """Client token: a second submission with it is the same job."""
    start_at_s: float | None = None
    max_cost_usd: float | None = None
    """Beyond this nothing is launched for it any more (see manager.caps)."""
    notify: tuple[NotifyDef, ...] = ()
    """Whom to tell of it, beside whom the grid itself tells."""
    trace: str = ""
    """W3C traceparent of its submission, where it is traced."""
    commit_hash: str = ""
    """SHA-256 of the job's commit key (see protocol.sealing); "" for a job of release 0.1.0."""

    @property
    def is_single_call(self) -> bool:
        """Whether it is one call of the Python API, of which only its caller has the id."""
        return self.items == 1 and not self.token

    def stage(self, name: str) -> StageDef:
        """The stage of that name; KeyError where there is none."""
        for one in self.stages:
            if one.name == name:
                return one
        raise KeyError(name)

    def roots(self) -> tuple[StageDef, ...]:
        return tuple(s for s in self.stages if not s.after)

    def chained_after(self, name: str) -> tuple[StageDef, ...]:
        """Stages fed item by item from `name` by its own workers."""
        return tuple(s for s in self.stages if s.chained and s.after == (name,))

    def fed_by(self, name: str) -> tuple[StageDef, ...]:
        """Stages whose tasks are those of `name`, item by item, directly or not."""
        fed = {name}
        found: list[StageDef] = []
        for one in self.stages:
            if one.chained and one.after[0] in fed:
                fed.add(one.name)
                found.append(one)
        return tuple(found)
