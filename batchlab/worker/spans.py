"""The tasks of a bundle in its trace: a span for some of them, numbers for all.

Invariant: a bundle has so many spans at the most, however many tasks it has. Those that failed
come first, then those that took longest.

What a worker's log tells of a bundle: the ids in every line, and the attempts that failed.

Invariant: nothing of what users' code said gets into the log; that is in the outcome.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence

from batchlab.core import logs
from batchlab.core.model import Bundle, Outcome, Ran
from batchlab.core.ports import Clock
from batchlab.core.tracing import Span, Tracer, trace_of
from batchlab.worker.inflight_message import Hand

TASK_SPANS = 16

Ended = tuple[Ran, float]
"""A task, and when it has ended (seconds of the epoch)."""


async def noted(runs: AsyncIterator[Ran], ended: list[Ended], clock: Clock) -> AsyncIterator[Ran]:
    """The same, with the time of each noted in `ended`."""
    async for ran in runs:
        ended.append((ran, clock.now_s()))
        yield ran


def tell(
    tracer: Tracer, running: Span, bundle: Bundle, ended: Sequence[Ended], started_s: float
) -> None:
    """Say below `running`, which began at `started_s`, what its tasks came to."""
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
            # Its process measured it, by a watch of its own.
            start_s=max(started_s, end_s - ran.run_s),
            end_s=end_s,
            error=ran.failure.kind.value if ran.failure else "",
            task=ran.task,
        )


log = logging.getLogger(__name__)

FAILURES_LOGGED = 10
"""Failed tasks of a bundle that get a line each."""


def about(hand: Hand) -> None:
    """Every further line of this asyncio task is about the bundle in hand."""
    bundle = hand.bundle
    alone = {"task": bundle.tasks.first} if len(bundle.tasks) == 1 else {}
    logs.note(
        job=bundle.job,
        stage=bundle.stage,
        bundle=bundle.id,
        attempt=bundle.attempt,
        execution=hand.execution,
        trace=trace_of(hand.task.trace),
        **alone,
    )


def failures(outcome: Outcome) -> None:
    """The attempts in it that failed."""
    for one in outcome.failed[:FAILURES_LOGGED]:
        what = f"{one.kind}: {one.error}" if one.error else one.kind
        follows = "for good" if one.final else "and is tried again"
        log.info("the task failed (%s) %s", what, follows, extra={"task": one.task})
    more = len(outcome.failed) - FAILURES_LOGGED
    if more > 0:
        log.info("and %d tasks more failed", more)
