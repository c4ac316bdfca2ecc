"""What a run came to, and where its time went.

Invariant: every second of the wall time is in exactly one of the phases; what ran beside another
phase is said beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from batchlab.cli import BEGUN_S, output
from batchlab.core.api_types import FailureView, JobView, StageView
from batchlab.core.task_names import task_name, without_task
from batchlab.jobs.results import Fetched

SHOWN_FAILURES = 5
SHOWN_LINES = 12  # of a traceback: its end, where it was raised
NEGLIGIBLE_S = 0.05

_PHASES = {
    "load": "load batchlab",
    "data": "make the data",
    "check": "check the job file",
    "start": "start the grid",
    "upload": "upload",
    "wait": "plan, wait for workers",
    "run": "run",
    "fetch": "fetch the results",
    "stop": "stop the grid",
    "else": "all else",
}


@dataclass(slots=True)
class Phases:
    """The stopwatch of one command, in seconds."""

    begun_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    spent_s: dict[str, float] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    """Remarks by phase: what went on at the same time."""

    @classmethod
    def of_process(cls) -> Self:
        """From when this process began."""
        phases = cls(BEGUN_S)
        phases.add("load", time.monotonic() - BEGUN_S)
        return phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time within belongs to phase `name`."""
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begun_s)

    def add(self, name: str, seconds: float) -> None:
        self.spent_s[name] = self.spent_s.get(name, 0.0) + seconds

    @property
    def wall_s(self) -> float:
        """From the beginning until `end`, or until now."""
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.begun_s

    def end(self) -> None:
        """It is over; what belongs to no phase becomes one."""
        self.ended_s = time.monotonic()
        self.add("else", self.wall_s - sum(self.spent_s.values()))

    def split(self, name: str, earlier: str, seconds: float) -> None:
        """Take the first `seconds` out of phase `name`, as far as it goes, into `earlier`."""
        part_s = min(max(0.0, seconds), self.spent_s.get(name, 0.0))
        self.add(name, -part_s)
        self.add(earlier, part_s)


@dataclass(slots=True)
class Summary:
    """Everything there is to say at the end of a run. `slots` is the most seen in service by
    pool, `per_task` the slots that one task of a stage takes."""

    job: JobView
    phases: Phases
    slots: Mapping[str, int]
    per_task: Mapping[str, int]
    failures: Sequence[FailureView] = ()
    fetched: Fetched | None = None

    def to_json(self) -> dict[str, Any]:
        fetched = self.fetched
        return {
            "job": self.job,
            "wall_s": self.phases.wall_s,
            "phases_s": self.phases.spent_s,
            "stages": [self._stage(stage) for stage in self.job["stages"]],
            "failures": self.failures,
            "results": fetched
            and {
                "folder": str(fetched.folder),
                "results": dict(fetched.results),
                "files": fetched.files,
                "size_bytes": fetched.size_bytes,
            },
        }

    def _stage(self, stage: StageView) -> dict[str, Any]:
        first_s, last_s = stage["first_start_s"], stage["last_end_s"]
        span_s = last_s - first_s if first_s is not None and last_s is not None else 0.0
        slots = self.slots.get(stage["pool"], 0)
        used_s = stage["run_s"] * self.per_task.get(stage["name"], 1)
        return {
            "name": stage["name"],
            "tasks": stage["planned"],
            "span_s": span_s,
            "run_s": stage["run_s"],
            "slots": slots,
            "utilisation": min(1.0, used_s / (span_s * slots)) if span_s and slots else None,
        }

    def text(self) -> str:
        """The summary for a person."""
        return "\n".join([*self._outcome(), "", *self._times(), *self._results()])

    def _outcome(self) -> Iterator[str]:
        stages = self.job["stages"]
        tasks = sum(stage["planned"] or 0 for stage in stages)
        failed = sum(stage["failed"] for stage in stages)
        cancelled = sum(stage["cancelled"] for stage in stages)
        retried = sum(stage["retried"] for stage in stages)
        told = [output.count(tasks, "task"), f"{failed:,} failed"]
        told += [f"{cancelled:,} cancelled"] if cancelled else []
        told += [f"{retried:,} retried"]
        wall = output.span(self.phases.wall_s)
        yield f"{self.job['id']} {self.job['state']} in {wall}: {', '.join(told)}"
        # Of each cause one task: the others of it say the same.
        causes = {(one["stage"], one["fingerprint"]): one for one in reversed(self.failures)}
        reason = self.job["reason"]
        for one in causes.values():
            reason = without_task(reason, one["stage"], one["task"], one["reason"])
        if reason:
            yield f"  {output.clean(reason)}"
        for one in reversed(causes.values()):
            name = task_name(one["stage"], one["task"])
            yield f"  {name} {one['kind']}: {output.clean(one['reason'])}"
            yield from (f"    {line}" for line in _raised(one)[-SHOWN_LINES:])
        if causes:
            job, more = self.job["id"], failed - len(causes)
            rest = f"{more:,} more: `batchlab job failures {job}`; " if more > 0 else ""
            yield (
                f"  {rest}what tasks printed: `batchlab job logs {job}`; while a grid is up "
                f"(`batchlab grid up`)"
            )

    def _times(self) -> Iterator[str]:
        yield "Where the time went"
        for phase, words in _PHASES.items():
            spent_s = self.phases.spent_s.get(phase)
            if spent_s is None or (phase in ("upload", "else") and spent_s < NEGLIGIBLE_S):
                continue
            beside = self.phases.beside.get(phase)
            yield f"  {words:<24}{output.span(spent_s):>9}" + (f"   {beside}" if beside else "")
            if phase == "run":
                yield from (self._stage_text(self._stage(one)) for one in self.job["stages"])

    def _stage_text(self, stage: dict[str, Any]) -> str:
        used = stage["utilisation"]
        share = f", {used:.0%} of {output.count(stage['slots'], 'slot')}" if used else ""
        return (
            f"    {stage['name']:<22}{output.span(stage['span_s']):>9}   "
            f"{output.count(stage['tasks'] or 0, 'task')}, "
            f"{output.span(stage['run_s'])} of task time{share}"
        )

    def _results(self) -> Iterator[str]:
        if self.fetched is None:
            return
        yield ""
        yield f"Results in {self.fetched.folder}"
        for stage, number in self.fetched.results.items():
            yield f"  {stage}.jsonl: {output.count(number, 'result')}"
        if self.fetched.files:
            files = output.count(self.fetched.files, "file")
            yield f"  files/: {files}, {output.size(self.fetched.size_bytes)}"


def _raised(failure: FailureView) -> Sequence[str]:
    """The lines of a traceback but for those at its end that are the reason once more."""
    lines = output.visible(failure["traceback"]).rstrip("\n").splitlines()
    reason = output.clean(failure["reason"])
    for end in reversed(range(len(lines))):
        last = output.clean("\n".join(lines[end:]))
        if last == reason:
            return lines[:end]
        if len(last) > len(reason):
            break
    return lines
