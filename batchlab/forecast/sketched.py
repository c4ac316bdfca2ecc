"""What a sketch keeps of its instances and jobs, and how it tells of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from batchlab.forecast.pieces import Piece, Work
from batchlab.model import JobState, Pool
from batchlab.scenario.model import LASTING, FaultName, Scenario, StageTemplate
from batchlab.scenario.record import JobRun, StageRun


@dataclass(slots=True, eq=False)
class Instance:
    """An instance; so many slots of it are `free`."""

    name: str
    pool: Group
    free: int
    ready_s: float
    is_spot: bool
    leaving: bool = False
    running: dict[Piece, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Group:
    """A pool's group."""

    pool: Pool
    desired: int
    alive: dict[str, Instance] = field(default_factory=dict)
    open: dict[str, Instance] = field(default_factory=dict)
    """Those that have a slot free."""
    ready: dict[int, dict[int, deque[Piece]]] = field(default_factory=dict)
    """By priority and job, whose turn it is first: pieces that can run."""
    shrunk_s: float | None = None
    idle_since_s: float | None = None


@dataclass(slots=True)
class StageDone:
    """Of one job: what of it is done."""

    planned: bool
    left: int
    pieces: int
    waits: list[int]
    """For each piece how many others must be done first."""
    began_s: float | None = None
    done: int = 0
    done_s: float = 0.0


@dataclass(slots=True)
class JobDone:
    """What of a job is done."""

    work: Work
    stages: list[StageDone]
    started_s: float | None = None
    ended_s: float | None = None


def stage_runs(scenario: Scenario, works: Sequence[Work]) -> Iterator[StageRun]:
    """By template and stage."""
    sums: dict[tuple[str, int], tuple[int, int, float]] = {}
    for work in works:
        for number, pieces in enumerate(work.stages):
            tasks, bundles, run_s = sums.get((work.job.template.name, number), (0, 0, 0.0))
            sums[work.job.template.name, number] = (
                tasks + sum(one.tasks for one in pieces),
                bundles + sum(one.bundles for one in pieces),
                run_s + sum(one.run_s for one in pieces),
            )
    for (name, number), (tasks, bundles, run_s) in sums.items():
        stage = scenario.jobs[name].stages[number]
        yield StageRun(
            *(name, stage.name, stage.pool, stage.slots, tasks, bundles),
            *(run_s, run_s, run_s),
        )


def known(stages: Iterable[StageTemplate]) -> set[str]:
    """Those whose tasks are known from the beginning: of what gathers, and of what follows such a
    stage, nobody knows them before all that is gathered is done."""
    found: set[str] = set()
    for stage in stages:
        if stage.gather is None and found.issuperset(stage.after):
            found.add(stage.name)
    return found


def ends_s(scenario: Scenario) -> list[float]:
    """When each pre-warming and each fault is over: a run is not over before."""
    found = [warm.until_s for warm in scenario.prewarm]
    for fault in scenario.faults:
        lasts_s = fault.for_s if fault.name in LASTING else 0.0
        found.append(
            fault.at_s + (fault.notice_s if fault.name is FaultName.SPOT_WAVE else lasts_s)
        )
    return found


def job_run(job: JobDone) -> JobRun:
    """As a record has it."""
    of, deadline_s = job.work.job, job.work.job.template.deadline_s
    done = sum(stage.done for stage in job.stages)
    state = JobState.RUNNING if job.ended_s is None else JobState.SUCCEEDED
    return JobRun(
        index=of.index,
        id=of.id,
        template=of.template.name,
        tenant=of.tenant,
        due_s=of.due_s,
        submitted_s=of.due_s,
        started_s=job.started_s,
        ended_s=job.ended_s,
        state=state.value,
        planned=done,
        succeeded=done,
        failed=0,
        cancelled=0,
        deadline_s=None if deadline_s is None else of.due_s + deadline_s,
        tasks=of.tasks,
    )
