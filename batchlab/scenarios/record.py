"""Record of a run of a scenario, with the same format for forecasts and replays.

Times in a record are seconds from the start of the run. In a compressed run, the recorded times are compressed.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from batchlab.core.errors import UsageError
from batchlab.core.fair_share import SharePolicy
from batchlab.core.job_definition import Condition, Dependency
from batchlab.core.model import JobState
from batchlab.core.text import count

if TYPE_CHECKING:
    from batchlab.scenarios.model.values import Job

VERSION = 1


@dataclass(frozen=True, slots=True)
class JobRun:
    """Result of one job. Counts refer to the tasks of all stages.

    `due_s` is the planned arrival, `submitted_s` the submission, and `started_s` the start of the first task. `tasks`
    is the number of tasks of a root stage. `done_s` is the end of the last task, which is before the end of the job. A
    field is None if its event was not observed.
    """

    index: int
    id: str
    template: str
    tenant: str
    due_s: float
    submitted_s: float
    started_s: float | None
    ended_s: float | None
    state: str
    planned: int
    succeeded: int
    failed: int
    cancelled: int
    retried: int = 0
    deadline_s: float | None = None
    label: str = ""
    """Name of the job in the trace."""
    tasks: int | None = None
    done_s: float | None = None
    share: str = ""

    @classmethod
    def of(cls, job: Job, *, job_id: str = "", tasks: int | None = None, **measured: Any) -> JobRun:
        """Return the result of the scenario's job with the values in `measured`.

        `job_id` is the id of the job on the grid.
        """
        deadline_s = None if job.template.deadline_s is None else job.due_s + job.template.deadline_s
        return cls(
            index=job.index,
            id=job_id or job.id,
            template=job.template.name,
            tenant=job.tenant,
            share=job.template.share,
            due_s=job.due_s,
            deadline_s=deadline_s,
            label=job.label,
            tasks=job.tasks if tasks is None else tasks,
            **measured,
        )

    @classmethod
    def refused(cls, job: Job, at_s: float) -> JobRun:
        """Return the result of a job whose submission was refused, because a dependency had failed."""
        return cls.of(
            job,
            submitted_s=at_s,
            started_s=None,
            ended_s=at_s,
            state=JobState.FAILED.value,
            planned=0,
            succeeded=0,
            failed=0,
            cancelled=0,
        )


def unrefused(after: Sequence[Dependency], refused: Container[str]) -> tuple[Dependency, ...]:
    """Return the dependencies without the refused jobs that must only end, because a refused job has ended."""
    return tuple(other for other in after if other.condition is not Condition.ENDED or other.job not in refused)


@dataclass(frozen=True, slots=True)
class StageRun:
    """Totals of one stage of one template.

    `run_s` is the measured time of the succeeded tasks, and `declared_s` is the time of the same tasks in the scenario.
    `span_s` is the sum of the bundles' times in their workers.
    """

    template: str
    stage: str
    pool: str
    slots: int
    tasks: int
    bundles: int
    run_s: float
    declared_s: float
    span_s: float
    task_s: tuple[float, ...] = ()
    """Even sample of at most 200 sorted task times."""
    after: tuple[str, ...] = ()
    gather: str | None = None
    """Upstream stages and the gather value of the stage, as in a job definition."""
    over_s: tuple[float, ...] = ()
    """Sample of the bundles' overhead in seconds. `stretch` is a sample of the ratio of measured to declared task time.

    A sample is empty if the run did not record the sampled values.
    """
    stretch: tuple[float, ...] = ()
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class PoolSample:
    """State of a pool at one time. `in_service` and `pending` are numbers of instances."""

    desired: int
    in_service: int
    pending: int
    backlog_tasks: int
    backlog_s: float


@dataclass(frozen=True, slots=True)
class Sample:
    """State of the grid at one time. `waiting` and `in_flight` are numbers of messages in all task queues."""

    at_s: float
    pools: Mapping[str, PoolSample]
    waiting: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class InstanceRun:
    """Life of one instance. `ready_s` is the time at which the instance was first seen InService."""

    id: str
    pool: str
    type: str
    market: str
    zone: str
    launched_s: float
    ready_s: float | None
    ended_s: float | None
    note: str = ""

    @property
    def boot_s(self) -> float | None:
        """Return the seconds from launch to InService, or None if the boot was not observed, as for instances that were
        ready at the start.
        """
        if self.ready_s is None or self.ready_s <= 0.0:
            return None
        return self.ready_s - self.launched_s

    def lived_s(self, end_s: float) -> float:
        """Return the seconds from the instance's launch to its end, or to the run's end at `end_s`."""
        return max(0.0, (end_s if self.ended_s is None else self.ended_s) - self.launched_s)


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """Injected fault.

    `evidence` describes the observed effect of the fault. `impossible` has the reason why the fault could not be
    injected. `trouble` describes a failure of the fault's injection, observation, or rollback.
    """

    name: str
    at_s: float
    targets: tuple[str, ...] = ()
    evidence: str = ""
    impossible: str = ""
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """Record of one run. `usd` is the cost of the run on AWS at list prices, and `usd_items` has the parts of the cost.

    `lost` counts tasks without a terminal state in ended jobs, and tasks without a success in jobs that never ended.
    `duplicates` counts tasks with several committed results. `settings` has the settings of the manager and the workers
    in seconds, and under `cores` the number of shared cores (0: unlimited). `again_s` is the slot seconds of failed and
    lost executions, or None if the slot seconds are unknown.
    """

    scenario: str
    digest: str
    seed: int
    backend: str
    compressed: float
    pools: Mapping[str, tuple[int, int, int]]
    """Minimum size, maximum size, and slots of each pool."""
    jobs: tuple[JobRun, ...]
    stages: tuple[StageRun, ...]
    samples: tuple[Sample, ...]
    instances: tuple[InstanceRun, ...]
    faults: tuple[InjectedFault, ...] = ()
    lost: int = 0
    duplicates: int = 0
    instance_s: float = 0.0
    again_s: float | None = 0.0
    usd: float | None = None
    usd_items: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    shares: SharePolicy | None = None
    """Fair-share policy of the run."""
    simulated: bool = False
    wall_s: float = 0.0
    """Wall-clock duration of the run in seconds."""
    gpus: Mapping[str, int] = field(default_factory=dict)
    """GPUs of each instance, for each pool with GPUs."""
    log_digest: str = ""
    """SHA-256 of the event log, or "" if the run did not write an event log."""
    cut: str = ""
    """Reason why the run ended before its jobs ended, or ""."""
    version: int = VERSION


_ADAPTER: TypeAdapter[Record] = TypeAdapter(Record)
_REMEDY = "Name the file that `scenario simulate` or `scenario replay` has written."
_VERSIONED: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def to_json(record: Record) -> bytes:
    return _ADAPTER.dump_json(record, indent=1) + b"\n"


def write(record: Record, path: Path) -> None:
    """Write the record. Raise UsageError if the file cannot be written."""
    write_file(path, to_json(record), "record")


def write_file(path: Path, data: bytes, what: str) -> None:
    """Write a file, and create its folder if necessary.

    If the file cannot be written, raise UsageError with `what` as the name of the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UsageError(
            f"The {what} {path} cannot be written: {error.strerror}.", remedy="Name another file."
        ) from error


def read_file(path: Path, what: str, remedy: str) -> bytes:
    """Read a file. If the file cannot be read, raise UsageError with `what` as the name of the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"The {what} {path} cannot be read: {error.strerror}.", remedy=remedy) from error


def read(path: Path) -> Record:
    """Read a record. Raise UsageError if the file is missing, or is not a record in the current format version."""
    return parse(read_file(path, "record", _REMEDY), path)


def parse(data: bytes, path: Path) -> Record:
    """Parse the record in `path`. Raise UsageError under the same conditions as `read`."""
    try:
        record = _ADAPTER.validate_json(data)
        version: object = record.version
    except ValidationError as error:
        try:
            version = _VERSIONED.validate_json(data).get("version")
        except ValidationError:
            version = VERSION
        if version == VERSION or not isinstance(version, int):
            mistakes = count(error.error_count(), "mistake")
            raise UsageError(
                f"{path} is not a record of a scenario's run ({mistakes} in it).", remedy=_REMEDY
            ) from error
    if version != VERSION:
        raise UsageError(
            f"{path} is a record of version {version}; this batchlab reads version {VERSION}.",
            remedy="Read it with the batchlab that has written it, or make the run again.",
        )
    return record
