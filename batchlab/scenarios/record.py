"""Record of a run of a scenario, with the same format for forecasts and replays.

Verdicts, comparisons, and calibrations depend only on records. Times are seconds from the start of
the run; in a compressed run they are compressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from batchlab.core.errors import UsageError
from batchlab.core.text import count

VERSION = 1


@dataclass(frozen=True, slots=True)
class JobRun:
    """Result of one job. `due_s` is its planned arrival, `submitted_s` its submission, and
    `started_s` the start of its first task. Counts are tasks of all stages.
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
    """Time of the deadline."""
    label: str = ""
    """Its name in the trace."""
    tasks: int | None = None
    """Tasks of its first stage. None if this was not recorded."""
    done_s: float | None = None
    """End of its last task, which is before the end of the job. None if this was not observed."""


@dataclass(frozen=True, slots=True)
class StageRun:
    """Totals of one stage of one template.

    `run_s` is the measured time of the succeeded tasks, and `declared_s` their time in the
    scenario. `span_s` is the sum of the bundles' times in their workers.
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
    """Upstream stages and the gather value, as in a job's stage."""
    over_s: tuple[float, ...] = ()
    """Even samples of the time that bundles took beyond their tasks, and of the ratio of measured
    to declared time. Both are empty if they were not recorded.
    """
    stretch: tuple[float, ...] = ()


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
    """State of the grid at one time. `waiting` and `in_flight` are messages of all task queues."""

    at_s: float
    pools: Mapping[str, PoolSample]
    waiting: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class InstanceRun:
    """Life of one instance. `ready_s` is the time at which it was first seen InService."""

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
        """Return the time from launch to InService.

        None if this was not observed, as for instances that were ready at the start.
        """
        if self.ready_s is None or self.ready_s <= 0.0:
            return None
        return self.ready_s - self.launched_s

    def lived_s(self, end_s: float) -> float:
        """Return the seconds from its launch to its end, or to the run's end at `end_s`."""
        return max(0.0, (end_s if self.ended_s is None else self.ended_s) - self.launched_s)


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """Injected fault. `evidence` describes the observed effect.

    `impossible` has the reason why the fault could not be injected. `trouble` has a failure: of the
    injection, of the observation in time, or of the rollback.
    """

    name: str
    at_s: float
    targets: tuple[str, ...] = ()
    evidence: str = ""
    impossible: str = ""
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One run. `usd` is its cost on AWS at list prices, and `usd_items` has the parts of the cost.

    `lost` counts tasks of ended jobs without a terminal state and tasks of jobs that never ended.
    `duplicates` counts tasks with several committed results. `settings` has the seconds of the
    manager's and the workers' settings, and `cores`, the number of shared cores (0: unlimited).
    `again_s` is the slot time of failed and lost executions, or None if it is unknown.
    """

    scenario: str
    digest: str
    seed: int
    backend: str
    compressed: float
    pools: Mapping[str, tuple[int, int, int]]
    """(min, max, slots)."""
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
    simulated: bool = False
    wall_s: float = 0.0
    """Wall time of the run."""
    log_digest: str = ""
    """SHA-256 of the event log, if there is one."""
    cut: str = ""
    """Reason why it ended before its jobs."""
    version: int = VERSION


_ADAPTER: TypeAdapter[Record] = TypeAdapter(Record)
_REMEDY = "Name the file that `scenario simulate` or `scenario replay` has written."
_VERSIONED: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def to_json(record: Record) -> bytes:
    return _ADAPTER.dump_json(record, indent=1) + b"\n"


def write(record: Record, path: Path) -> None:
    """Write the record. Raise UsageError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_json(record))
    except OSError as error:
        raise UsageError(
            f"The record {path} cannot be written: {error.strerror}.", remedy="Name another file."
        ) from error


def read(path: Path) -> Record:
    """Read a record. Raise UsageError if the file is missing or is not a record of this version."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"The record {path} cannot be read: {error.strerror}.", remedy=_REMEDY) from error
    return parse(data, path)


def parse(data: bytes, path: Path) -> Record:
    """Parse the record in `path`. Raise UsageError as in `read`."""
    try:
        record = _ADAPTER.validate_json(data)
    except ValidationError as error:
        _check_version(_version(data), path)
        raise UsageError(
            f"{path} is not a record of a scenario's run ({count(error.error_count(), 'mistake')} in it).",
            remedy=_REMEDY,
        ) from error
    _check_version(record.version, path)
    return record


def _version(data: bytes) -> int:
    """Return the document's version, or this version if it has none."""
    try:
        version = _VERSIONED.validate_json(data).get("version")
    except ValidationError:
        return VERSION
    return version if isinstance(version, int) else VERSION


def _check_version(version: int, path: Path) -> None:
    if version != VERSION:
        raise UsageError(
            f"{path} is a record of version {version}; this batchlab reads version {VERSION}.",
            remedy="Read it with the batchlab that has written it, or make the run again.",
        )
