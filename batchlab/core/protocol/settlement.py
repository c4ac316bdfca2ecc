"""What an execution of a bundle comes to, and what follows from it: pure functions.

Invariant (I1, I2): every task of the bundle is in exactly one of the outcome's succeeded, final
failed, cancelled, or one follow of the same stage; every succeeded task is in one follow of each
chained stage. Everything is decided here once, before the commit, and read back by whoever
repeats the forwarding.

The failure policy: when failed tasks fail the job, and when they stop it at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from batchlab.core.job_definition import JobDef, RetryRule
from batchlab.core.model import (
    Bundle,
    Completion,
    Failure,
    FailureKind,
    Follow,
    Outcome,
    Ran,
    StageCounts,
    StageName,
    TaskSet,
)

LOSS_LIMIT = 3
"""Starts of a task alone that ended without an outcome before it is FAILED as poison."""

_task = attrgetter("task")
_NO_TASKS = TaskSet()
_HOPELESS = frozenset({FailureKind.IMPORT, FailureKind.RESULT, FailureKind.LOST})


def retries(rule: RetryRule, failure: Failure, attempt: int) -> bool:
    """Whether `rule` gives this failure of the `attempt`-th try another one."""
    if attempt >= rule.attempts:
        return False
    if not rule.kinds and failure.kind in _HOPELESS:
        return False
    if rule.kinds and failure.kind not in rule.kinds:
        return False
    if rule.exit_codes and failure.kind is FailureKind.EXIT:
        return failure.exit_code in rule.exit_codes
    if rule.exceptions and failure.kind is FailureKind.EXCEPTION:
        return failure.error in rule.exceptions
    return True


def backoff_s(rule: RetryRule, bundle: Bundle) -> float:
    """Wait before the try after `bundle`'s, seconds; the jitter is derived from the bundle's id,
    so that whoever computes it gets the same."""
    base = _base_s(rule, bundle.attempt)
    digest = hashlib.sha256(f"{bundle.job}/{bundle.stage}/{bundle.id}".encode()).digest()
    unit = int.from_bytes(digest[:4]) / 2**32
    return float(base * (1 + rule.jitter * (2 * unit - 1)))


def _base_s(rule: RetryRule, attempt: int) -> float:
    try:
        # As a float: a whole factor to the power of a forged attempt would fill the memory.
        return min(rule.max_backoff_s, rule.backoff_s * float(rule.factor) ** (attempt - 1))
    except OverflowError:
        return rule.max_backoff_s if rule.backoff_s else 0.0


def wait_s(job: JobDef, bundle: Bundle, now_s: float) -> float:
    """Return how long a retry still waits for the end of its backoff, seconds. It is never longer
    than the backoff, whatever the clocks of two machines say."""
    if bundle.due_s is None:
        return 0.0
    return min(max(0.0, bundle.due_s - now_s), _longest_s(job, bundle))


def delay_s(job: JobDef, follow: Follow) -> float:
    """Return the delay of a follow, seconds. It is never longer than the backoff, whatever the
    outcome says."""
    return min(follow.delay_s, _longest_s(job, follow.bundle)) if follow.delay_s else 0.0


def _longest_s(job: JobDef, bundle: Bundle) -> float:
    rule = job.stage(bundle.stage).retry
    return _base_s(rule, bundle.attempt - 1) * (1 + rule.jitter)


def settle(
    job: JobDef,
    bundle: Bundle,
    ran: Sequence[Ran],
    *,
    execution: str,
    worker: str,
    started_s: float,
    ended_s: float,
    cancelled: bool = False,
    kept: TaskSet = TaskSet(),
    log: str = "",
    log_spans: Sequence[tuple[int, int, int]] = (),
) -> Outcome:
    """The outcome of an execution that ran `ran` and did not get to the rest.

    With `cancelled` (the job is being cancelled) the rest and all retries are CANCELLED and
    nothing follows; otherwise the rest goes on as halves, so that others can help. What is `kept`
    still runs and goes on as a bundle of its own.
    """
    stage = job.stage(bundle.stage)
    good = sorted((r for r in ran if r.failure is None), key=_task)
    succeeded = TaskSet.of([r.task for r in good])
    failed: list[Failure] = []
    again: list[int] = []
    for r in ran if len(good) < len(ran) else ():
        if r.failure is not None:
            retry = not cancelled and retries(stage.retry, r.failure, bundle.attempt)
            failed.append(replace(r.failure, task=r.task, run_s=r.run_s, final=not retry))
            if retry:
                again.append(r.task)
    ended = succeeded if len(good) == len(ran) else TaskSet.of([r.task for r in ran])
    rest = bundle.tasks - ended
    follows: list[Follow] = []
    if not cancelled:
        if kept:
            follows.append(Follow(replace(bundle, tasks=kept)))
        follows += _split(bundle, rest - kept)
        if again:
            follows.append(_again(bundle, TaskSet.of(again), stage.retry, ended_s))
        follows += chain(job, bundle, succeeded)
    return Outcome(
        bundle,
        execution,
        worker,
        started_s,
        ended_s,
        succeeded,
        tuple([r.value for r in good]),
        # Rounded here, once: a rebuild sums what was written and must come to the same.
        tuple([round(r.run_s, 6) for r in good]),
        tuple(failed),
        rest if cancelled else TaskSet(),
        tuple(follows),
        log,
        tuple(log_spans),
    )


def _again(bundle: Bundle, tasks: TaskSet, rule: RetryRule, ended_s: float) -> Follow:
    delay_s = backoff_s(rule, bundle)
    due_s = round(ended_s + delay_s, 3) if delay_s else None
    retried = replace(bundle, tasks=tasks, attempt=bundle.attempt + 1, losses=0, due_s=due_s)
    return Follow(retried, delay_s)


def _split(bundle: Bundle, rest: TaskSet) -> list[Follow]:
    parts = rest.halves() if len(rest) > 1 else (rest,)
    return [Follow(replace(bundle, tasks=part)) for part in parts if part]


def fits(job: JobDef, bundle: Bundle, follows: Sequence[Follow]) -> bool:
    """Whether an outcome of `bundle` with these follows can be one of the job: each follow is in
    the bundle's own stage, or in a stage that is fed by it item by item."""
    unknown = {bundle.stage, *[follow.bundle.stage for follow in follows]}
    for stage in job.stages:
        if stage.name == bundle.stage or (stage.chained and stage.after == (bundle.stage,)):
            unknown.discard(stage.name)
    return not unknown


def chain(job: JobDef, bundle: Bundle, succeeded: TaskSet) -> list[Follow]:
    """The bundles that hand `succeeded` on to each stage that follows item by item."""
    if not succeeded:
        return []
    return [
        Follow(Bundle(bundle.job, s.name, succeeded, round=bundle.round, source=bundle.id))
        for s in job.chained_after(bundle.stage)
    ]


def bisect(bundle: Bundle, *, execution: str, worker: str, now_s: float) -> Outcome:
    """The outcome of a bundle that keeps losing its workers: two halves, no task touched.

    A bundle of one cannot be halved; `poisoned` ends it.
    """
    first, second = bundle.tasks.halves()
    halves = [replace(bundle, tasks=part, losses=1) for part in (first, second)]
    return Outcome(
        bundle, execution, worker, now_s, now_s, follows=tuple(Follow(half) for half in halves)
    )


def poisoned(bundle: Bundle, reason: str, *, execution: str, worker: str, now_s: float) -> Outcome:
    """The outcome of a bundle whose tasks are given up on: FAILED with `reason`."""
    failed = tuple(Failure(t, FailureKind.LOST, reason, error="WorkerLost") for t in bundle.tasks)
    return Outcome(bundle, execution, worker, now_s, now_s, failed=failed)


def unreadable(job: JobDef, bundle: Bundle, reason: str, *, now_s: float) -> Outcome:
    """Return the outcome that replaces an object that cannot be read: its tasks have crashed for
    that reason, and are tried again where the stage's retry rule allows it."""
    ran = [
        Ran(task, 0.0, failure=Failure(task, FailureKind.CRASH, reason, error="UnreadableOutcome"))
        for task in bundle.tasks
    ]
    who = "manager"
    return settle(job, bundle, ran, execution=who, worker=who, started_s=now_s, ended_s=now_s)


def vanished(bundle: Bundle, error: str) -> list[Ran]:
    """How the tasks end whose input is not there."""
    reason = f"its input is gone: {error}"
    return [
        Ran(task, 0.0, failure=Failure(task, FailureKind.INPUT, reason, error="NotFound"))
        for task in bundle.tasks
    ]


def sealed(bundle: Bundle, *, execution: str, worker: str, now_s: float) -> Outcome:
    """The outcome that a cancelled job's manager commits for a bundle nobody has finished."""
    return Outcome(bundle, execution, worker, now_s, now_s, cancelled=bundle.tasks)


def completion(outcome: Outcome) -> Completion:
    """An outcome without its values, for the ledger."""
    return Completion(
        outcome.bundle,
        outcome.worker,
        outcome.started_s,
        outcome.ended_s,
        outcome.succeeded,
        TaskSet.of([f.task for f in outcome.failed if f.final]) if outcome.failed else _NO_TASKS,
        outcome.cancelled,
        sum(outcome.run_s),
        outcome.follows,
        sum(not f.final for f in outcome.failed),
    )


def casualties(job: JobDef, done: Completion) -> dict[StageName, int]:
    """Tasks of later stages, fed item by item, that `done` has made impossible."""
    lost = len(done.failed) + len(done.cancelled)
    if not lost:
        return {}
    return {stage.name: lost for stage in job.fed_by(done.bundle.stage)}


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
