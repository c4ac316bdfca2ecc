"""What a scenario says that no run of it would show: told and not refused, for it may be meant."""

from __future__ import annotations

from collections.abc import Iterator

from batchlab.cli import curves
from batchlab.scenario.curve import Curve
from batchlab.scenario.model import Scenario, Schedule


def of(scenario: Scenario, schedule: Schedule, curve: Curve) -> Iterator[str]:
    """One sentence each."""
    arrived = {job.template.name for job in schedule.jobs}
    for name in scenario.jobs:
        if name not in arrived:
            yield f"No job '{name}' arrives."
    used = {stage.pool for name in arrived for stage in scenario.jobs[name].stages}
    for plan in scenario.pools:
        if plan.pool.name not in used:
            yield f"Nothing that arrives runs in the pool '{plan.pool.name}'."
    # What arrives late in a column is worked on in the next one.
    done_s = max((ask.idle_from_s for ask in curve.asks), default=0.0) + curve.width_s
    done = f"comes when all work could be done, after {curves.span(done_s)}"
    for fault in scenario.faults:
        if fault.at_s >= done_s:
            yield f"The fault {fault.name.value} at {curves.span(fault.at_s)} {done}."
    for one in scenario.prewarm:
        if one.at_s >= done_s:
            yield f"The prewarm of '{one.pool}' at {curves.span(one.at_s)} {done}."
