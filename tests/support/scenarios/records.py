"""Records of runs with known results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from batchlab.scenarios.record import InstanceRun, JobRun, PoolSample, Record, Sample
from batchlab.scenarios.verdicts import MEASURES


def measured(record: Record, name: str, template: str = "") -> float:
    """Return a measure of a run that has a number for it."""
    found = MEASURES[name].of(record, template)
    assert isinstance(found, float | int)
    return found


def a_job(index: int = 0, **more: Any) -> JobRun:
    """Return a job that is due at 0, begins at 5, and ends at 60 with ten succeeded tasks."""
    job = JobRun(
        index=index,
        id=f"job-{index}",
        template="claims",
        tenant="",
        due_s=0.0,
        submitted_s=0.0,
        started_s=5.0,
        ended_s=60.0,
        state="SUCCEEDED",
        planned=10,
        succeeded=10,
        failed=0,
        cancelled=0,
    )
    return replace(job, **more)


def a_sample(at_s: float, desired: int, in_service: int | None = None, waiting: int = 0) -> Sample:
    there = desired if in_service is None else in_service
    pool = PoolSample(desired, there, max(0, desired - there), waiting, float(waiting))
    return Sample(at_s, {"default": pool}, waiting, 0)


def an_instance(index: int = 0, **more: Any) -> InstanceRun:
    """Return an instance that is launched at 0, is in service from 10, and ends at 70."""
    one = InstanceRun(
        id=f"i-{index}",
        pool="default",
        type="m7i.large",
        market="on-demand",
        zone="a",
        launched_s=0.0,
        ready_s=10.0,
        ended_s=70.0,
    )
    return replace(one, **more)


def a_record(*jobs: JobRun, **more: Any) -> Record:
    record = Record(
        scenario="a",
        digest="",
        seed=1,
        backend="local",
        compressed=1.0,
        pools={"default": (0, 4, 2)},
        jobs=jobs or (a_job(),),
        stages=(),
        samples=(),
        instances=(),
        settings={"cooldown_in_s": 10.0},
    )
    return replace(record, **more)
