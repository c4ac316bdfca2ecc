"""Metrics of a run without problems. A test changes one of them at a time."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

from batchlab.reports.html.metrics import RunFigures, StageFigures

STAGE = StageFigures(
    name="parse",
    pool="default",
    tasks=1000,
    median_s=2.0,
    longest_s=5.0,
    tiny=0,
    too_long=0,
    long_on_spot=0,
    longest_on_spot_s=0.0,
    bundles=1000,
    took_s=2100.0,
    overhead_s=100.0,
)
SIGNS = RunFigures(
    span_s=600.0,
    stages=(STAGE,),
    slot_s=2400.0,
    busy_s=2100.0,
    starved_s=10.0,
    full_s=60.0,
    tail_s=6.0,
    peak_slots=8.0,
    filled=0.9,
    slots_each=2,
    instances=4,
    noun="instance",
    unused=0,
    boots=4,
    boot_s=20.0,
    longest_boot_s=30.0,
    first_wait_s=20.0,
    failed_s=0.0,
    lost_s=0.0,
    repeated_s=0.0,
    harmful=0,
    compute=Decimal("0.70"),
    idle=Decimal("0.10"),
    requests=Decimal("0.20"),
    total=Decimal("1.00"),
)


def signs(**changed: Any) -> RunFigures:
    """Return good metrics, with these changes."""
    return replace(SIGNS, **changed)


def of_stage(**changed: Any) -> RunFigures:
    """Return good metrics with another stage."""
    return replace(SIGNS, stages=(replace(STAGE, **changed),))
