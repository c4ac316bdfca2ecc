"""Which column of a trace says what: the one map that all formats share.

A column is named as the format has it: by the header of a table, by the fields' names of the
Standard Workload Format (see `swf.FIELDS`), by the keys of a JSON object, dotted where nested.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from batchlab.scenario.traces.moments import check_unit


@dataclass(frozen=True, slots=True)
class Take:
    """A number of a record: the sum of its `columns`, divided by `per`.

    `Take(("duration_ms",), per=1000)` is seconds; `Take(("input", "shuffle"), per=64 * 2**20)`
    is tasks of 64 MiB each. Where it is not `needed`, a record without any of them is as good.
    """

    columns: tuple[str, ...]
    per: float = 1.0
    needed: bool = True

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("there must be at least one column")
        if not (isfinite(self.per) and self.per > 0):
            raise ValueError(f"per must be a number above 0, not {self.per}")


@dataclass(frozen=True, slots=True)
class Columns:
    """What is taken from a record, and from where; what is not, the job's template says.

    `at` is when it arrives, a number or a timestamp; `minus` a column of seconds before that, for
    traces that note when something ended. `unit` is that of a number in `at`, one of
    moments.UNITS, or a format of strptime (with a %) for timestamps that are not ISO 8601.

    With `count` a record is no job but an interval from `at` on, `every_s` long, in which as many
    arrive, times `scale`; None: as long as records are mostly apart.

    `tasks` are a job's root tasks, rounded up, at least one; `task_s` what each of them takes.
    `label`, `tenant` and `template` are columns of text.
    """

    at: str
    minus: str = ""
    unit: str = "s"
    count: str = ""
    every_s: float | None = None
    scale: float = 1.0
    tasks: Take | None = None
    task_s: Take | None = None
    label: str = ""
    tenant: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        if not self.at:
            raise ValueError("a trace needs a column that says when")
        check_unit(self.unit)
        if self.every_s is not None and not (isfinite(self.every_s) and self.every_s > 0):
            raise ValueError(f"an interval must be longer than 0 s, not {self.every_s}")
        if not (isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a number above 0, not {self.scale}")

    def used(self) -> tuple[str, ...]:
        """The columns that a trace must have."""
        numbers = (name for take in self._takes() for name in take.columns)
        return _once(*self.needed(), *numbers, self.label, self.tenant)

    def needed(self) -> tuple[str, ...]:
        """Those without which a record is of no use."""
        found = [self.at, self.minus, self.count, self.template]
        for take in self._takes():
            found += take.columns if take.needed else ()
        return _once(*found)

    def _takes(self) -> tuple[Take, ...]:
        return tuple(take for take in (self.tasks, self.task_s) if take)


def _once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


SWF = Columns("submit", task_s=Take(("run",)), label="job")
"""A job of the log is a job of the scenario, each of its tasks as long as its run time."""

RUNS = Columns(
    "due_s",
    tasks=Take(("tasks",), needed=False),
    label="label",
    tenant="tenant",
    template="template",
)
"""The jobs of a record, as a forecast or a replay writes it; lines of one's own may say less."""
