"""Trace spans and log lines of a bundle.

Invariants: a bundle has at most TASK_SPANS task spans, for failed tasks first and then for the
longest ones. Totals cover all tasks. The worker's log contains no text from user code; the outcome
has it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence

from batchlab.core import logs
from batchlab.core.model import Bundle, Outcome, Ran
from batchlab.core.ports import Clock
from batchlab.core.tracing import Span, Tracer, trace_of
from batchlab.worker.inflight_message import InflightMessage

TASK_SPANS = 16

Ended = tuple[Ran, float]
"""A result and its end time in seconds since the epoch."""


async def with_end_times(
    runs: AsyncIterator[Ran], ended: list[Ended], clock: Clock
) -> AsyncIterator[Ran]:
    """Yield the results, and append each with its end time to `ended`."""
    async for ran in runs:
        ended.append((ran, clock.now_s()))
        yield ran


def record_task_spans(
    tracer: Tracer, running: Span, bundle: Bundle, ended: Sequence[Ended], started_s: float
) -> None:
    """Record totals in the span `running`, which began at `started_s`, and spans of tasks."""
    failed = sum(ran.failure is not None for ran, _ in ended)
    running.note(
        succeeded=len(ended) - failed,
        failed=failed,
        run_s=sum(ran.run_s for ran, _ in ended),
        longest_s=max((ran.run_s for ran, _ in ended), default=0.0),
    )
    first = sorted(ended, key=lambda one: (one[0].failure is None, -one[0].run_s))[:TASK_SPANS]
    for ran, end_s in sorted(first, key=lambda one: one[1]):
        tracer.record(
            "task",
            running.context,
            bundle,
            # The child measured `run_s` with its own clock.
            start_s=max(started_s, end_s - ran.run_s),
            end_s=end_s,
            error=ran.failure.kind.value if ran.failure else "",
            task=ran.task,
        )


log = logging.getLogger(__name__)

FAILURES_LOGGED = 10
"""Most failed tasks of a bundle that get their own log line."""


def set_log_fields(inflight: InflightMessage) -> None:
    """Add the bundle's ids to all further log lines of this asyncio task."""
    bundle = inflight.bundle
    alone = {"task": bundle.tasks.first} if len(bundle.tasks) == 1 else {}
    logs.note(
        job=bundle.job,
        stage=bundle.stage,
        bundle=bundle.id,
        attempt=bundle.attempt,
        execution=inflight.execution,
        trace=trace_of(inflight.task.trace),
        **alone,
    )


def log_failures(outcome: Outcome) -> None:
    """Log the failed attempts of an outcome."""
    for one in outcome.failed[:FAILURES_LOGGED]:
        what = f"{one.kind}: {one.error}" if one.error else one.kind
        follows = "for good" if one.final else "and is tried again"
        log.info("the task failed (%s) %s", what, follows, extra={"task": one.task})
    more = len(outcome.failed) - FAILURES_LOGGED
    if more > 0:
        log.info("%d more tasks failed", more)
