"""Two large jobs in the ledger of a rig: one with many failures, and one with many bundles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from batchlab.core.commit import commit
from batchlab.core.job_definition import InputDef, JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, JobState, Outcome, StageName, TaskMetrics, TaskSet
from batchlab.core.ports import AddCut, AddJob, Cut, Fold
from batchlab.core.protocol import settlement
from batchlab.core.protocol.object_keys import UNSEALED
from tests.support.server.api import MAP, Rig

BUNDLES, TASKS, BAD = 2000, 50, 5
"""The number of bundles of the job JOB, of tasks per bundle, and of failed tasks in every second bundle."""
JOB = JobDef(
    JobId("large-0123456789"),
    "large",
    (StageDef(MAP, handler="m:f"), StageDef(StageName("sum"), after=(MAP,), gather="*", handler="m:g")),
    1_700_000_000.0,
    input=InputDef(keys=("raw/x",)),
    max_failures=10_000,
)
SINGLES = 10_000
"""The number of one-task bundles of the job FINE. One of 20 tasks fails, and the last task waits."""
FINE = replace(JOB, id=JobId("fine-0123456789"), name="fine", token="fine")


def add_failed_job(rig: Rig) -> None:
    """Add the job JOB with 100,000 tasks, of which 5,000 failed."""
    _add(rig, JOB, map(_outcome, range(BUNDLES)), BUNDLES * TASKS)


def add_fine_job(rig: Rig, bundles: int = SINGLES, job: JobDef = FINE) -> None:
    """Add a job with `bundles` bundles of one task each, and one more task."""
    _add(rig, job, (_single(job.id, number) for number in range(bundles)), bundles + 1)


def _outcome(number: int) -> Outcome:
    tasks = TaskSet.span(number * TASKS, (number + 1) * TASKS)
    bad = tasks.split_at(BAD)[0] if number % 2 else TaskSet()
    good = tasks - bad
    failures = tuple(
        Failure(task, FailureKind.EXCEPTION, f"row {task} of kind {'ab'[task % 2]}", "ValueError") for task in bad
    )
    return Outcome(
        Bundle(JOB.id, MAP, tasks),
        "x",
        "w",
        1_700_000_000.0,
        1_700_000_050.0,
        good,
        values=tuple(range(len(good))),
        run_s=(1.0,) * len(good),
        failed=failures,
    )


def _single(job: JobId, number: int) -> Outcome:
    tasks = TaskSet.span(number, number + 1)
    bad = number % 20 == 0
    begin_s = JOB.submitted_s + number // 2 * 0.05
    return Outcome(
        Bundle(job, MAP, tasks),
        "x",
        f"worker-{number % 2}",
        begin_s,
        begin_s + 0.04,
        TaskSet() if bad else tasks,
        values=() if bad else (number,),
        run_s=() if bad else (0.04,),
        failed=(Failure(number, FailureKind.EXCEPTION, f"row {number}", "ValueError"),) if bad else (),
        metrics=((number, TaskMetrics(0.03, 30_000_000, 100, 10, f"part-{number:05}.csv")),),
    )


def _add(rig: Rig, job: JobDef, made: Iterable[Outcome], planned: int) -> None:
    outcomes = list(made)

    async def add() -> None:
        ports = rig.manager.ports
        await ports.ledger.apply(AddJob(job, JobState.SUBMITTED))
        bundles = tuple(one.bundle for one in outcomes)
        await ports.ledger.apply(AddCut(Cut(job.id, MAP, 0, 0, bundles, TaskSet(), planned)))
        for one in outcomes:
            if one.failed or one.metrics:
                await commit(ports.objects, one, ports.patience, UNSEALED)
        for first in range(0, len(outcomes), 200):
            done = [settlement.completion(one) for one in outcomes[first : first + 200]]
            await ports.ledger.apply(Fold(done, [{} for _ in done]))

    rig.run(add())
