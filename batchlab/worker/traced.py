"""The tasks of a bundle in its trace: a span for some of them, numbers for all.

Invariant: a bundle has so many spans at the most, however many tasks it has. Those that failed
come first, then those that took longest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from batchlab.model import Bundle, Ran
from batchlab.ports import Clock
from batchlab.tracing import Span, Tracer

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
