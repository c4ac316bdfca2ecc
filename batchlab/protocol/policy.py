"""The failure policy: when failed tasks fail the job, and when they stop it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.jobdef import JobDef
from batchlab.model import StageCounts


@dataclass(frozen=True, slots=True)
class Verdict:
    """`failed`: too many tasks have failed for the job to succeed; `stop`: end it at once."""

    failed: bool = False
    stop: bool = False
    reason: str = ""


def judge(job: JobDef, stages: Sequence[StageCounts]) -> Verdict:
    """The verdict on the job as its counters stand.

    A number allows that many failed tasks in the whole job; a percentage is of each stage's
    planned tasks.
    """
    failed = sum(s.failed for s in stages)
    if not failed:
        return Verdict()
    told = ", ".join(f"{s.failed} of {s.planned} in stage {s.stage}" for s in stages if s.failed)
    reason = f"{failed} task{'s' if failed > 1 else ''} failed ({told})"
    if job.max_failures_percent:
        over = any(s.failed * 100 > job.max_failures * (s.planned or 0) for s in stages if s.failed)
    else:
        over = failed > job.max_failures
    return Verdict(over, over and job.fail_fast, reason)
