"""The promise that no task starts before its time: the start time of its job, or a backoff's end.

Invariant: this module computes the earliest start itself, from definitions and outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from batchlab.jobdef import JobDef
from batchlab.model import Bundle, Outcome
from batchlab.tasknames import task_name

Require = Callable[[bool, str, str, str], None]
"""A check with the arguments (holds, promise, facts, job)."""

EARLY_S = 0.6
"""Seconds by which a worker may start a task before its time."""

Try = tuple[str, str, int, int, int]
"""One attempt of a task: (job, stage, round, attempt, task)."""


@dataclass(slots=True)
class StartTimes:
    """The earliest start of each further attempt. All times are seconds since the epoch."""

    require: Require
    is_exact: bool = False
    """Whether the clocks of all processes agree. If not, starts are not checked."""
    _jobs: dict[str, JobDef] = field(default_factory=dict)
    _due_s: dict[Try, float] = field(default_factory=dict)

    def defined(self, job: JobDef) -> None:
        """Record the definition of a job."""
        self._jobs[job.id] = job

    def committed(self, outcome: Outcome) -> None:
        """Record the further attempts that follow from an outcome."""
        bundle = outcome.bundle
        job = self._jobs.get(bundle.job)
        again = [
            follow.bundle
            for follow in outcome.follows
            if follow.bundle.stage == bundle.stage and follow.bundle.attempt == bundle.attempt + 1
        ]
        if job is None or not again:
            return
        rule = job.stage(bundle.stage).retry
        backoff_s = min(rule.max_backoff_s, rule.backoff_s * rule.factor ** (bundle.attempt - 1))
        due_s = outcome.ended_s + backoff_s * (1 - rule.jitter)
        for one in again:
            for task in one.tasks:
                self._due_s[one.job, one.stage, one.round, one.attempt, task] = due_s

    def started(self, bundle: Bundle, task: int, now_s: float) -> None:
        """Check the start of a task."""
        if not self.is_exact:
            return
        job = self._jobs.get(bundle.job)
        # The start time applies to round 0 only: a job that its user retries begins at once.
        start_s = (job.start_at_s or 0.0) if job and not bundle.round else 0.0
        name = bundle.job, bundle.stage, bundle.round, bundle.attempt, task
        due_s = max(start_s, self._due_s.get(name, 0.0))
        self.require(
            now_s >= due_s - EARLY_S,
            "start times",
            f"{task_name(bundle.stage, task)} of {bundle.job} starts {due_s - now_s:.1f} s early "
            f"(attempt {bundle.attempt}, round {bundle.round})",
            bundle.job,
        )
