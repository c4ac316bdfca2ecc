"""Situations of jobs for the tests of `why()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from batchlab.core.job_definition import Dependency, InputDef, JobDef, StageDef
from batchlab.core.model import (
    Activity,
    Bundle,
    Control,
    GroupView,
    Instance,
    JobId,
    JobState,
    LifecycleState,
    Pool,
    StageCounts,
    StageName,
    TaskSet,
)
from batchlab.core.ports import JobRecord, StageRecord
from batchlab.core.protocol.messages import Beat, HeldBundle
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager.state import LiveJob, WorkerStatus
from batchlab.server.job_facts import Facts

NOW_S = 1_700_000_000.0
MONO_S = 5_000.0
JOB = JobId("job-1")
MAP, SUM = StageName("map"), StageName("sum")
STAGES = (StageDef(MAP, handler="m:f"), StageDef(SUM, after=(MAP,), gather="*", handler="m:g"))
CPU = Pool("default", max_size=4, slots=2)


def bundle(job: JobId = JOB, *tasks: int, stage: StageName = MAP) -> Bundle:
    return Bundle(job, stage, TaskSet.from_indices(tasks or (0,)))


def instance(
    name: str, state: LifecycleState = LifecycleState.IN_SERVICE, note: str = "", age_s: float = 9.0
) -> Instance:
    healthy = state is not LifecycleState.TERMINATED
    return Instance(name, "default", state, NOW_S - age_s, healthy=healthy, note=note)


def worker(name: str, *runs: Bundle, since_s: float = MONO_S - 14.0) -> WorkerStatus:
    held = tuple(HeldBundle("tasks-default", b.id, b.job, b.stage, b.id, True) for b in runs)
    beat = Beat(f"w-{name}", name, "default", NOW_S, CPU.slots, len(runs), held, 1)
    return WorkerStatus(beat, MONO_S, dict.fromkeys(held, since_s))


def failed_launch(number: int, description: str, cause: str) -> Activity:
    return Activity(number, "default", NOW_S, description, cause, "Failed")


@dataclass
class Situation:
    """A job of two stages with 10 planned tasks in the first stage, and without a worker."""

    state: JobState = JobState.RUNNABLE
    control: Control = Control.RUN
    reason: str = ""
    counts: Sequence[StageCounts] = (StageCounts(MAP, planned=10), StageCounts(SUM))
    left: TaskSet = TaskSet()
    stages: Sequence[StageDef] = STAGES
    start_at_s: float | None = None
    after: Sequence[Dependency] = ()
    out: Sequence[tuple[Bundle, float]] = ()
    """Pairs of a bundle and the seconds since its last sign of life. A negative number is the time until the bundle is
    due."""
    pool: Pool = CPU
    desired: int = 0
    instances: Sequence[Instance] = ()
    workers: Mapping[str, WorkerStatus] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    activities: Sequence[Activity] = ()
    stopped: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[LiveJob] = ()
    conducted: bool = True
    forbidden: bool = False
    trouble: str = ""
    tick_trouble: str = ""
    outage: tuple[float, str] | None = None

    def facts(self) -> Facts:
        job = JobDef(
            JOB,
            "job",
            tuple(self.stages),
            NOW_S - 100,
            input=InputDef(keys=("raw/a", "raw/b")),
            start_at_s=self.start_at_s,
            after=tuple(self.after),
        )
        record = JobRecord(job, self.state, self.reason, self.control)
        first, *rest = self.counts
        stages = [StageRecord(first, left=self.left), *(StageRecord(c) for c in rest)]
        live = LiveJob(record, {s.counts.stage: s for s in stages}, forbidden=self.forbidden)
        live.add_outstanding((b, MONO_S - heard_s) for b, heard_s in self.out)
        live.trouble = self.trouble
        return Facts(
            record,
            stages,
            NOW_S,
            MONO_S,
            ManagerSettings(),
            live=live if self.conducted else None,
            lives={one.id: one for one in (live, *self.others)},
            groups={self.pool.name: GroupView(self.pool, self.desired, tuple(self.instances))},
            workers=self.workers,
            held=self.held,
            activities={"default": self.activities},
            stopped=self.stopped,
            trouble=self.tick_trouble,
            outage=self.outage,
        )


def other(name: str, priority: int = 0, *, waiting: int = 5) -> LiveJob:
    """Another running job with work for the same pool."""
    job = JobDef(JobId(name), name, (StageDef(MAP, handler="m:f"),), NOW_S, priority=priority)
    counts = StageCounts(MAP, planned=10)
    stage = StageRecord(counts, left=TaskSet.span(0, waiting))
    return LiveJob(JobRecord(job, JobState.RUNNING), {MAP: stage})


QUEUED = [(bundle(), 3.0)]
PENDING = instance("w-2", LifecycleState.PENDING)
DEAD = instance("w-1", LifecycleState.TERMINATED, note="exit 1", age_s=20.0)
CRASHES = [
    failed_launch(4, "Waiting 2 s before the next launch", "3 instances in a row ended: exit 1"),
    failed_launch(3, "Launching a new instance: w-1", "an instance was started; exit 1"),
    Activity(2, "default", NOW_S, "Setting desired capacity to 1", "policy"),
]
UP = Activity(9, "default", NOW_S, "Launching a new instance: w-1", "policy")
BUSY_ELSEWHERE = worker("w-1", bundle(JobId("b"), 1), bundle(JobId("b"), 2))
DONE = (StageCounts(MAP, planned=10, succeeded=10), StageCounts(SUM))
