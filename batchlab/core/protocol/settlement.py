"""Outcomes of executions, their follow-ups, the failure policy, and the sizes of bundles, as pure functions.

Invariant (I1, I2): every task of the bundle is in exactly one of the outcome's `succeeded`, final `failed`,
`cancelled`, or one follow-up of the same stage. Every task that succeeded is in one follow-up of each chained stage.
The results and the follow-ups of an outcome are decided once, before its commit. A program that sends follow-ups again
reads the follow-ups from the committed outcome.

The failure policy of a job decides when failed tasks fail the job, and when failed tasks stop the job at once. The
fingerprint of a failure is equal for tasks that failed for the same reason. A fingerprint depends only on the failure
in the outcome, and not on the machine (folders, process ids) or on the item (numbers, quoted text).

Three effects determine the size of a bundle. The number of requests for a bundle does not depend on its size, so
bundles are large. A lost or slow bundle delays all of its tasks, so a bundle has at most 0.75 s of work. The last
bundles of a stage determine the duration of the job, so bundles shrink toward the end of the stage. With bundles of a
fixed size, the last bundles would take a quarter of the job's duration.

Task times are not known in advance, so workers correct wrong sizes of bundles. A worker splits a bundle that has taken
longer than BUDGET_S, and hands over the tasks that wait behind a long task (see `worker.commit_and_forward`). A long
task delays the other tasks of its bundle by at most BUDGET_S. A long task counts at most BUDGET_S when the sizes of
other bundles are computed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from batchlab.core.job_definition import JobDef
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
from batchlab.core.retry_rule import RetryRule

LOSS_LIMIT = 3
"""Number of starts of a single task without an outcome after which the task is FAILED as a poison task."""

_task = itemgetter(0)
_NO_TASKS = TaskSet()


def wait_s(job: JobDef, bundle: Bundle, now_s: float) -> float:
    """Return the remaining wait in seconds until the end of a retry's backoff.

    The remaining wait is never longer than the backoff, even if the clocks of two machines differ.
    """
    if bundle.due_s is None:
        return 0.0
    return min(max(0.0, bundle.due_s - now_s), _longest_s(job, bundle))


def delay_s(job: JobDef, follow: Follow) -> float:
    """Return the delay of a follow-up in seconds.

    The delay is at most the backoff, even if a worker wrote a longer delay into the outcome.
    """
    return min(follow.delay_s, _longest_s(job, follow.bundle)) if follow.delay_s else 0.0


def _longest_s(job: JobDef, bundle: Bundle) -> float:
    return job.stage(bundle.stage).retry.wait_range_s(bundle.attempt - 1)[1]


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
    """Return the outcome of an execution with the results `ran`.

    `cancelled` is true if the job is being canceled. With `cancelled`, tasks without a result are CANCELLED, failed
    tasks are not retried, and follow-ups are not created. Without `cancelled`, tasks without a result are split into
    two bundles, so that two workers can run the bundles in parallel. The tasks in `kept` are still running and become a
    separate bundle.
    """
    stage = job.stage(bundle.stage)
    good = sorted((r for r in ran if r.failure is None), key=_task)
    succeeded = TaskSet.from_indices([r.task for r in good])
    failed: list[Failure] = []
    again: list[int] = []
    for r in ran if len(good) < len(ran) else ():
        if r.failure is not None:
            retry = not cancelled and stage.retry.allows_retry(r.failure, bundle.attempt)
            failed.append(replace(r.failure, task=r.task, run_s=r.run_s, final=not retry))
            if retry:
                again.append(r.task)
    ended = succeeded if len(good) == len(ran) else TaskSet.from_indices([r.task for r in ran])
    rest = bundle.tasks - ended
    follows: list[Follow] = []
    if not cancelled:
        if kept:
            follows.append(Follow(replace(bundle, tasks=kept)))
        follows += _split(bundle, rest - kept)
        if again:
            follows.append(_again(bundle, TaskSet.from_indices(again), stage.retry, ended_s))
        follows += chain(job, bundle, succeeded)
    return Outcome(
        bundle,
        execution,
        worker,
        started_s,
        ended_s,
        succeeded,
        tuple([r.value for r in good]),
        # Round the run times before they are summed, because a rebuild sums the written run times and must get the same
        # sum.
        tuple([round(r.run_s, 6) for r in good]),
        tuple(failed),
        rest if cancelled else TaskSet(),
        tuple(follows),
        log,
        tuple(log_spans),
        tuple([(r.task, r.metrics) for r in ran if r.metrics is not None]),
    )


def _again(bundle: Bundle, tasks: TaskSet, rule: RetryRule, ended_s: float) -> Follow:
    delay_s = rule.wait_s(bundle)
    due_s = round(ended_s + delay_s, 3) if delay_s else None
    retried = replace(bundle, tasks=tasks, attempt=bundle.attempt + 1, losses=0, due_s=due_s)
    return Follow(retried, delay_s)


def _split(bundle: Bundle, rest: TaskSet) -> list[Follow]:
    parts = rest.halves() if len(rest) > 1 else (rest,)
    return [Follow(replace(bundle, tasks=part)) for part in parts if part]


def fits(job: JobDef, bundle: Bundle, follows: Sequence[Follow]) -> bool:
    """Return whether an outcome of `bundle` with the follow-ups `follows` is consistent with the job's definition.

    Each follow-up must be in the bundle's own stage, or in a stage that the bundle's stage feeds item by item.
    """
    unknown = {bundle.stage, *[follow.bundle.stage for follow in follows]}
    for stage in job.stages:
        if stage.name == bundle.stage or (stage.chained and stage.after == (bundle.stage,)):
            unknown.discard(stage.name)
    return not unknown


def chain(job: JobDef, bundle: Bundle, succeeded: TaskSet) -> list[Follow]:
    """Return the follow-ups that pass the results of the tasks in `succeeded` to each chained stage."""
    if not succeeded:
        return []
    return [
        Follow(Bundle(bundle.job, s.name, succeeded, round=bundle.round, source=bundle.id))
        for s in job.chained_after(bundle.stage)
    ]


def bisect(bundle: Bundle, *, execution: str, worker: str, now_s: float) -> Outcome:
    """Return an outcome without results that splits a bundle into two halves, because workers that ran the bundle died
    repeatedly.

    A bundle with one task cannot be split, so `poisoned` returns the outcome of a bundle with one task.
    """
    first, second = bundle.tasks.halves()
    halves = [replace(bundle, tasks=part, losses=1) for part in (first, second)]
    return Outcome(bundle, execution, worker, now_s, now_s, follows=tuple(Follow(half) for half in halves))


def poisoned(bundle: Bundle, reason: str, *, execution: str, worker: str, now_s: float) -> Outcome:
    """Return the outcome of an abandoned bundle. All tasks of the bundle are FAILED with `reason`."""
    failed = tuple(Failure(t, FailureKind.LOST, reason, error="WorkerLost") for t in bundle.tasks)
    return Outcome(bundle, execution, worker, now_s, now_s, failed=failed)


def unreadable(job: JobDef, bundle: Bundle, reason: str, *, now_s: float) -> Outcome:
    """Return the outcome that replaces the unreadable outcome object of a bundle.

    The tasks of the bundle count as crashed with `reason`, and are retried if the stage's retry rule allows it.
    """
    ran = [
        Ran(task, 0.0, failure=Failure(task, FailureKind.CRASH, reason, error="UnreadableOutcome"))
        for task in bundle.tasks
    ]
    who = "manager"
    return settle(job, bundle, ran, execution=who, worker=who, started_s=now_s, ended_s=now_s)


def vanished_runs(bundle: Bundle, error: str) -> list[Ran]:
    """Return the results of tasks whose input does not exist."""
    reason = f"its input no longer exists: {error}"
    return [Ran(task, 0.0, failure=Failure(task, FailureKind.INPUT, reason, error="NotFound")) for task in bundle.tasks]


def seal(bundle: Bundle, *, execution: str, worker: str, now_s: float) -> Outcome:
    """Return the outcome that the manager commits for an unfinished bundle of a canceled job."""
    return Outcome(bundle, execution, worker, now_s, now_s, cancelled=bundle.tasks)


def completion(outcome: Outcome) -> Completion:
    """Return an outcome without its values, for the ledger."""
    return Completion(
        outcome.bundle,
        outcome.worker,
        outcome.started_s,
        outcome.ended_s,
        outcome.succeeded,
        TaskSet.from_indices([f.task for f in outcome.failed if f.final]) if outcome.failed else _NO_TASKS,
        outcome.cancelled,
        sum(outcome.run_s),
        outcome.follows,
        sum(not f.final for f in outcome.failed),
    )


def casualties(job: JobDef, done: Completion) -> dict[StageName, int]:
    """Return, by stage, the number of tasks of later stages that cannot run because of failures in `done`.

    Only the tasks of chained stages are counted.
    """
    lost = len(done.failed) + len(done.cancelled)
    if not lost:
        return {}
    return {stage.name: lost for stage in job.fed_by(done.bundle.stage)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of applying a job's failure policy.

    `failed` is true if too many tasks have failed for the job to succeed. `stop` is true if the job must stop at once.
    """

    failed: bool = False
    stop: bool = False
    reason: str = ""


def judge(job: JobDef, stages: Sequence[StageCounts]) -> Verdict:
    """Apply the failure policy of a job to the counters of its stages.

    A `max_failures` number is the permitted number of failed tasks in the whole job. A `max_failures` percentage
    applies to the planned tasks of each stage.
    """
    failed = sum(s.failed for s in stages)
    if not failed:
        return Verdict()
    counts = ", ".join(f"{s.failed} of {s.planned} in stage {s.stage}" for s in stages if s.failed)
    reason = f"{failed} task{'s' if failed > 1 else ''} failed ({counts})"
    if job.max_failures_percent:
        over = any(s.failed * 100 > job.max_failures * (s.planned or 0) for s in stages if s.failed)
    else:
        over = failed > job.max_failures
    return Verdict(over, over and job.fail_fast, reason)


LENGTH = 12
"""Length of a fingerprint in hexadecimal digits.

The probability that two of a million different reasons have equal fingerprints is 0.2%.
"""

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in ([^\n]+)')
_COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")
"""Names of the traceback frames of comprehensions. Only Python before 3.12 creates such frames."""
_QUOTED = re.compile(r"""'[^'\n]*'|"[^"\n]*"|`[^`\n]*`""")
_PATH = re.compile(r"(?:[\w.~-]*/)+[\w.~-]*")
_NUMBERED = re.compile(r"[\w-]*\d[\w.-]*")
_INSTALLED = re.compile(r"^.*/(?:site|dist)-packages/|^.*/lib/python3[^/]*/")


def fingerprint(failure: Failure) -> str:
    """Return the fingerprint of a failure, which has twelve hexadecimal digits.

    The fingerprint of an exception depends on the exception's class and on the lines of the user's code in the
    traceback. The fingerprint of a failure without a traceback depends on its kind and its reason, without numbers,
    quoted text, and paths.
    """
    parts = [failure.kind.value, failure.error, str(failure.exit_code or "")]
    frames = _frames(failure.traceback)
    if frames:
        parts += frames
    else:
        parts.append(shape(failure.reason))
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:LENGTH]


def shape(text: str) -> str:
    """Return an error text without the parts that differ between tasks."""
    for pattern, mark in ((_QUOTED, "'…'"), (_PATH, "/…"), (_NUMBERED, "#")):
        text = pattern.sub(mark, text)
    return " ".join(text.split())


def _frames(traceback: str) -> list[str]:
    """Return the traceback's frames in the job's own code as `file:line:function`, outermost frame first.

    If the traceback does not contain code of the job, return all frames. A frame that a recursion repeats is returned
    once.
    """
    frames = [frame for frame in _FRAME.findall(traceback) if frame[2] not in _COMPREHENSIONS]
    # A relative path belongs to the job's own code, because the worker writes paths relative to the code folder.
    own = [frame for frame in frames if not frame[0].startswith(("/", "<"))] or frames
    names = [f"{_INSTALLED.sub('', path)}:{line}:{name}" for path, line, name in own]
    return list(dict.fromkeys(names))


TARGET_S = 0.75
"""Target duration of a bundle in seconds once the mean task time is known."""

BUDGET_S = 2 * TARGET_S
"""Time in seconds after which a worker does not start further tasks of a bundle. The worker hands over the tasks that
it has not started. One task may still be running at the end of BUDGET_S.
"""

FIRST_WAVE = 2
"""Number of bundles per slot that are sent before the first measurement of the task time.

The first bundle for a slot is a single task, so that the first result arrives soon. The second bundle for a slot keeps
the slot busy until the next bundle arrives.
"""

FIRST_CAP = 8
FIRST_SHARES = 8
"""The second bundle for a slot has at most FIRST_CAP tasks, and at most 1/FIRST_SHARES of the slot's share of the
tasks, because the task time is not known yet.
"""

CAP = 4096
"""Maximum number of tasks in a bundle, which keeps outcome objects and messages well below their size limits."""

FLOOR_S = 0.05
"""Minimum duration of a bundle in seconds while every slot gets a bundle, because a smaller bundle would be mostly
overhead.
"""

SHARES = 2
"""A bundle has at most 1/SHARES of a slot's remaining work."""


def weight_s(tasks: int, run_s: float) -> float:
    """Return the run time of a bundle's tasks that counts in the calculation of the sizes of other bundles.

    A single task counts with at most BUDGET_S. All tasks of a bundle together count with at most 2 * BUDGET_S, because
    only a long last task can run past BUDGET_S.
    """
    return min(run_s, tasks * BUDGET_S, 2 * BUDGET_S)


def bundle_size(left: int, slots: int, mean_s: float | None, fixed: int | None) -> int:
    """Return the size of the next bundle of a stage with `left` uncut tasks and `slots` slots.

    `mean_s` is the measured time per task in seconds, or None before the first measurement. `fixed` is the bundle size
    that the user set, or None. A bundle size of the user takes precedence.
    """
    if left <= 0:
        return 0
    if fixed is not None:
        return min(fixed, CAP, left)
    if mean_s is None:
        return 1
    by_time = int(TARGET_S / mean_s) if mean_s > TARGET_S / CAP else CAP
    slots = max(1, slots)
    guided = left // (slots * SHARES)
    floor = min(int(FLOOR_S / mean_s) if mean_s > FLOOR_S / CAP else CAP, left // slots)
    return max(1, min(by_time, max(guided, floor), CAP, left))


def wave(left: int, slots: int, mean_s: float | None, fixed: int | None, room: int) -> list[int]:
    """Return the sizes of the next bundles of a stage, in order. The result has at most `room` sizes."""
    slots = max(1, slots)
    if fixed is None and mean_s is None:
        return _first_wave(left, slots, room)
    last_s = slots * FLOOR_S
    sizes: list[int] = []
    while left and len(sizes) < room:
        if fixed is None and mean_s is not None and left * mean_s <= last_s and left > slots:
            # The remaining tasks are cut into the smallest number of bundles of equal size, because smaller bundles
            # would be mostly overhead.
            count = slots * -(-left // (slots * CAP))
            even = -(-left // count)
            sizes += [min(even, left - at) for at in range(0, left, even)][: room - len(sizes)]
            break
        size = bundle_size(left, slots, mean_s, fixed)
        sizes.append(size)
        left -= size
    return sizes


def _first_wave(left: int, slots: int, room: int) -> list[int]:
    room = max(0, room)
    singles = min(left, slots, room)
    sizes = [1] * singles
    left -= singles
    size = max(1, min(FIRST_CAP, left // (slots * FIRST_SHARES)))
    more = min(left // size, (FIRST_WAVE - 1) * slots, room - singles)
    return sizes + [size] * more
