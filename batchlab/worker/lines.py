"""What a worker's log tells of a bundle: the ids in every line, and the attempts that failed.

Invariant: nothing of what users' code said gets into the log; that is in the outcome.
"""

from __future__ import annotations

import logging

from batchlab import logs
from batchlab.model import Outcome
from batchlab.tracing import trace_of
from batchlab.worker.hand import Hand

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
