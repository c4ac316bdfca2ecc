"""Failures of a run by cause, with the traceback and the log of one failed attempt for each cause.

Invariants: the failed tasks of all groups, including hidden groups, add up to the failed tasks of the job. The page
reads at most two objects for each displayed attempt, and reads only the displayed part of a log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from batchlab.core.commit import outcome_at
from batchlab.core.errors import NotFound
from batchlab.core.job_definition import task_name
from batchlab.core.model import BundleId, JobId, Outcome, StageName
from batchlab.core.ports import Objects
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.core.text import count, join_list, span
from batchlab.jobs.attempts import log_end
from batchlab.reports.html.charts import Data
from batchlab.reports.html.source import ReportRun, Row, moment, visible, visible_lines

MAX_GROUPS = 20
"""Maximum number of groups of failures on the page. The page shows only sums of the other groups."""


@dataclass(frozen=True, slots=True)
class Case:
    """Failed attempt that represents its group of failures. The fields identify the attempt's outcome and log in the
    bucket.
    """

    stage: str
    task: int
    round: int
    attempt: int
    bundle: str
    execution: str


@dataclass(frozen=True, slots=True)
class Sample:
    """Traceback and log of a failed attempt."""

    traceback: str = ""
    log: str = ""


Samples = Callable[[Case], Sample | None]
"""Function that returns the sample of a case, or None if the case's objects no longer exist."""


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failures with one cause.

    `tasks` counts the tasks that failed permanently with the cause. `retried` counts failed attempts that another
    attempt followed.
    """

    fingerprint: str
    title: str
    reason: str
    kind: str
    tasks: int
    attempts: int
    retried: int
    run: str
    stages: str
    where: str
    when: str
    case: str
    traceback: str
    log: str
    missing: str


@dataclass(frozen=True, slots=True)
class Failures:
    """Failures section of the page.

    `groups` contains the shown groups, and `more` describes the hidden groups. `tasks` counts the tasks that failed
    permanently. `causes` counts all causes.
    """

    groups: tuple[FailureGroup, ...]
    tasks: int
    attempts: int
    causes: int
    more: str


def cases(run: ReportRun) -> list[Case]:
    """Return one representative attempt for each group of failures that the page shows."""
    return [_case(row["one"]) for row in run.rows(_GROUPS)[:MAX_GROUPS] if row["one"]]


def failures(run: ReportRun, samples: Samples | None = None) -> Failures:
    """Return the failures of the run. Groups are sorted by the number of failed tasks, then by the number of attempts,
    the largest first.
    """
    rows = run.rows(_GROUPS)
    shown = [_group(run, row, samples) for row in rows[:MAX_GROUPS]]
    rest = rows[MAX_GROUPS:]
    more = ""
    if rest:
        tasks, attempts = sum(r["tasks"] for r in rest), sum(r["attempts"] for r in rest)
        more = (
            f"{count(len(rest), 'more cause')}, with {count(tasks, 'failed task')} and "
            f"{count(attempts, 'failed attempt')}, not shown here."
        )
    return Failures(tuple(shown), sum(r["tasks"] for r in rows), sum(r["attempts"] for r in rows), len(rows), more)


_GROUPS = """
WITH tries AS (
  SELECT coalesce(a.fingerprint, '') AS print, a.stage, a.task, a.round, a.attempt, a.bundle,
         a.is_final, a.run_s, a.kind, a.error, a.reason, a.exit_code, b.ended_s, b.execution,
         coalesce(w.instance, a.worker) AS place
  FROM attempts a
  LEFT JOIN bundles b ON b.job = a.job AND b.stage = a.stage AND b.bundle = a.bundle
  LEFT JOIN workers w ON w.job = a.job AND w.worker = a.worker
  WHERE a.job = $job AND a.state = 'FAILED'
), of_tries AS (
  SELECT print, count(*) AS attempts, count(*) FILTER (NOT is_final) AS retried,
         sum(run_s) AS run_s, array_agg(DISTINCT stage ORDER BY stage) AS stages,
         count(DISTINCT place) AS places, min(place) AS place, min(ended_s) AS first_s,
         max(ended_s) AS last_s,
         arg_min({stage: stage, task: task, round: round, attempt: attempt, bundle: bundle,
                  execution: execution, kind: kind, error: error, reason: reason,
                  exit_code: exit_code},
                 (CASE WHEN is_final THEN 0 ELSE 1 END, stage, task, round, attempt)) AS one
  FROM tries GROUP BY print
), of_tasks AS (
  SELECT coalesce(fingerprint, '') AS print, count(*) AS tasks,
         array_agg(DISTINCT stage ORDER BY stage) AS stages
  FROM tasks WHERE job = $job AND state = 'FAILED' GROUP BY print
)
SELECT coalesce(t.print, f.print) AS print, coalesce(f.tasks, 0) AS tasks,
       coalesce(t.attempts, 0) AS attempts, coalesce(t.retried, 0) AS retried,
       coalesce(t.run_s, 0) AS run_s, coalesce(t.stages, f.stages) AS stages,
       coalesce(t.places, 0) AS places, t.place, t.first_s, t.last_s, t.one
FROM of_tries t FULL JOIN of_tasks f ON f.print = t.print
ORDER BY tasks DESC, attempts DESC, print
"""


def _group(run: ReportRun, row: Row, samples: Samples | None) -> FailureGroup:
    attempt: Mapping[str, object] = row["one"] or {}
    kind, error = str(attempt.get("kind") or ""), str(attempt.get("error") or "")
    reason = str(attempt.get("reason") or "No attempt of these tasks has a recorded reason.")
    case, missing, sample = "", "", Sample()
    if attempt:
        task = task_name(visible(str(attempt["stage"]), 60), int(str(attempt["task"])))
        round_text = f" of round {attempt['round']}" if run.job["rounds"] > 1 else ""
        case = f"task {task}, attempt {attempt['attempt']}{round_text}"
        found_sample = samples(_case(attempt)) if samples else None
        sample = found_sample or Sample()
        if found_sample is None:
            missing = "The traceback and the log were not available when this page was created."
        elif not (found_sample.traceback or found_sample.log):
            missing = "The attempt has neither a traceback nor a log."
    places = row["places"]
    where = f"{places:,} instances" if places > 1 else visible(str(row["place"] or ""), 60)
    return FailureGroup(
        row["print"],
        visible(error or kind or "unknown", 120),
        visible(reason, 500),
        visible(kind, 40),
        row["tasks"],
        row["attempts"],
        row["retried"],
        span(row["run_s"]),
        join_list([visible(stage, 40) for stage in row["stages"] or ()]),
        where,
        _when(row),
        case,
        visible_lines(sample.traceback),
        visible_lines(sample.log),
        missing,
    )


def _when(row: Row) -> str:
    first, last = moment(row["first_s"]), moment(row["last_s"])
    return first if first == last else f"{first} to {last}"


def _case(attempt: Mapping[str, object]) -> Case:
    task, round_, number = (int(str(attempt[name])) for name in ("task", "round", "attempt"))
    return Case(str(attempt["stage"]), task, round_, number, str(attempt["bundle"]), str(attempt["execution"] or ""))


# --- Duplicates ----------------------------------------------------------------------------------

_TWICE = {
    "message": "a bundle was delivered again, and no task ran",
    "event": "an outcome was reported again, and counted once",
    "execution": "a bundle ran again, and its second outcome was discarded",
    "copy": "a speculative copy ran, and the original run was committed",
    "original": "a run was stopped, because its speculative copy was committed",
    "result": "a task got a second result",
}


def twice(run: ReportRun) -> Data | None:
    """Return the table of duplicate messages and results by kind, or None for a run without duplicates."""
    rows = run.rows(
        """SELECT kind, sum(seen)::BIGINT AS seen, sum(harmless)::BIGINT AS harmless,
                  sum(harmful)::BIGINT AS harmful, sum(wasted_slot_s) AS wasted_s
           FROM duplicates WHERE job = $job GROUP BY kind ORDER BY kind"""
    )
    if not rows:
        return None
    return Data(
        ("what", "# seen", "# harmless", "# harmful", "# slot time"),
        tuple(
            (
                _TWICE.get(row["kind"], visible(row["kind"], 40)),
                *(f"{row[name]:,}" for name in ("seen", "harmless", "harmful")),
                span(row["wasted_s"] or 0.0),
            )
            for row in rows
        ),
    )


LOG_BYTES = 8000
"""Number of bytes at the end of a log that the page shows, because the error is usually at the end."""


async def samples(objects: Objects, job: str, cases: Iterable[Case]) -> dict[Case, Sample]:
    """Return a sample for each case in `cases` whose outcome is still in the bucket.

    Raise BackendError if the bucket does not respond.
    """
    samples: dict[Case, Sample] = {}
    try:
        key = await CommitKeys(objects).stored(JobId(job))
    except NotFound:
        key = UNSEALED  # the job has been removed
    for case in cases:
        name = object_keys.outcome_of(JobId(job), StageName(case.stage), BundleId(case.bundle), key)
        try:
            outcome = outcome_at(name, await objects.get(name), key)
        except NotFound:
            continue
        traceback = next((failure.traceback for failure in outcome.failed if failure.task == case.task), "")
        samples[case] = Sample(traceback, await _log(objects, outcome, case.task))
    return samples


async def _log(objects: Objects, outcome: Outcome, task: int) -> str:
    try:
        data, before = await log_end(outcome, task, LOG_BYTES, partial(objects.get_range, outcome.log))
    except NotFound:
        return ""
    text = data.decode(errors="replace")
    return f"… {before:,} bytes are left out …\n{text}" if before else text
