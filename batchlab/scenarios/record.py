"""What a run of a scenario came to: the same record from a forecast and from a replay.

Invariant: everything that verdict, comparison and calibration say is a function of records. Times
are seconds of the run from its beginning (a compressed scenario's are compressed ones).
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
    """One job. `due_s` is when it was to arrive, `submitted_s` when it did, `started_s` when its
    first task began. Counts are tasks of all its stages."""

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
    """When it was to have ended."""
    label: str = ""
    """Its name in the trace."""
    tasks: int | None = None
    """Of its first stage; None where that was not kept."""
    done_s: float | None = None
    """When its last task ended, which is before the job does; None where nobody noticed."""


@dataclass(frozen=True, slots=True)
class StageRun:
    """All bundles of one stage of one template together. `run_s` is what the succeeded tasks took,
    `declared_s` what those should have taken by the scenario; `span_s` sums each bundle's time from
    its start to its end in its worker."""

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
    """Measured task times: a sample of at most 200, evenly spread over the sorted ones."""
    after: tuple[str, ...] = ()
    gather: str | None = None
    """What it followed, and how, as in a job's stage."""
    over_s: tuple[float, ...] = ()
    """What bundles took beyond their tasks, and of tasks measured over declared time: samples like
    `task_s`, empty where that was not kept."""
    stretch: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolSample:
    """A pool at one moment; `in_service` and `pending` are instances."""

    desired: int
    in_service: int
    pending: int
    backlog_tasks: int
    backlog_s: float


@dataclass(frozen=True, slots=True)
class Sample:
    """The grid at one moment. `waiting` and `in_flight` are messages of all task queues."""

    at_s: float
    pools: Mapping[str, PoolSample]
    waiting: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class InstanceRun:
    """One instance; `ready_s` is when it was first seen InService."""

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
        """From its launch until it was InService; None where nobody has seen that, as of those
        that are ready when a run begins."""
        if self.ready_s is None or self.ready_s <= 0.0:
            return None
        return self.ready_s - self.launched_s

    def lived_s(self, end_s: float) -> float:
        """Seconds from its launch to its end, or to the run's, which is at `end_s`."""
        return max(0.0, (end_s if self.ended_s is None else self.ended_s) - self.launched_s)


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """A fault that was injected. `evidence` is what was seen that shows that it happened; a fault
    that could not be has `impossible` set to the reason. `trouble` is what did not go as it
    should: it failed, its effect was not seen in time, or something could not be undone."""

    name: str
    at_s: float
    targets: tuple[str, ...] = ()
    evidence: str = ""
    impossible: str = ""
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One run. `usd` is what it has cost or would have on AWS at list prices, `usd_items` its
    lines. `lost` are tasks of ended jobs without a terminal state and tasks of jobs that never
    ended; `duplicates` tasks with more than one committed result. `settings` are the manager's and
    worker's seconds by name, and `cores` how many all processes shared (0: that was no matter).
    `again_s` is slot time of runs that were thrown away or failed; None where nobody could be
    asked."""

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
    """What the run took on the clock of whoever waited for it."""
    log_digest: str = ""
    """sha256 of the event log, where one was kept."""
    cut: str = ""
    """Why it ended before its jobs had, where it did."""
    version: int = VERSION


_ADAPTER: TypeAdapter[Record] = TypeAdapter(Record)
_REMEDY = "Name the file that `scenario simulate` or `scenario replay` has written."
_VERSIONED: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def to_json(record: Record) -> bytes:
    return _ADAPTER.dump_json(record, indent=1) + b"\n"


def write(record: Record, path: Path) -> None:
    """UsageError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_json(record))
    except OSError as error:
        raise UsageError(
            f"The record {path} cannot be written: {error.strerror}.", remedy="Name another file."
        ) from error


def read(path: Path) -> Record:
    """UsageError where there is none, or where it is no record that this version understands."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"The record {path} cannot be read: {error.strerror}.", remedy=_REMEDY
        ) from error
    return parse(data, path)


def parse(data: bytes, path: Path) -> Record:
    """The record that is in `path`; UsageError as in `read`."""
    try:
        found = _ADAPTER.validate_json(data)
    except ValidationError as error:
        _check_version(_version(data), path)
        raise UsageError(
            f"{path} is no record of a scenario's run "
            f"({count(error.error_count(), 'mistake')} in it).",
            remedy=_REMEDY,
        ) from error
    _check_version(found.version, path)
    return found


def _version(data: bytes) -> int:
    """Of what may be no record; then this one's."""
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
