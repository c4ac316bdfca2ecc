"""What to change next: each check looks at a run's signs and says what it has found.

Invariant: a check that finds nothing says what it has looked at, so that a page without anything to
change is no page without checks.
"""

from __future__ import annotations

from batchlab.report.html import fleet_checks, task_checks
from batchlab.report.html.findings import Check, Finding
from batchlab.report.html.signs import Signs

CHECKS: tuple[Check, ...] = (
    fleet_checks.wasted,
    task_checks.tiny,
    task_checks.overhead,
    task_checks.long_on_spot,
    task_checks.too_long,
    task_checks.crowding,
    fleet_checks.idle_slots,
    fleet_checks.lag,
    fleet_checks.too_small,
    fleet_checks.too_large,
    fleet_checks.idle_cost,
    fleet_checks.starved,
    fleet_checks.tail,
    fleet_checks.requests,
)
"""What matters as much as another stands in this order."""


def findings(signs: Signs) -> tuple[Finding, ...]:
    """Of all checks, what matters most first; each check has at least one, good or not."""
    found = [finding for check in CHECKS for finding in check(signs)]
    return tuple(sorted(found, key=lambda one: -one.level))
