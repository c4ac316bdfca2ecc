"""Check of each job's account against the outcomes in its world.

Invariant: no outcome is counted twice, whatever happens to managers. In a world with a single
manager and no rebuild, the account of a job that succeeded without a retry has each outcome, and
the slot seconds of each failed attempt. No account has outcomes that are committed after the end of
the job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from batchlab.jobdef import JobDef
from batchlab.manager.used import Used
from batchlab.model import Outcome
from batchlab.protocol import naming
from batchlab.sim.watch import Violated

if TYPE_CHECKING:
    from batchlab.sim.world import World

MOST_TICKS = 120

CLOSE_S = 0.001
"""Sums of seconds are equal if they differ by less."""


def _require(holds: bool, facts: str) -> None:
    if not holds:
        raise Violated(f"accounts is violated: {facts}")


async def check_account(
    world: World, job: JobDef, outcomes: Sequence[Outcome], *, undisturbed: bool
) -> None:
    """Compare the account that is stored at the end of a job with the job's outcomes."""
    if not outcomes:
        return  # the job may have begun and ended between two ticks
    for _ in range(MOST_TICKS):
        # The manager writes the account at its next tick after the end of the job.
        if not undisturbed or world.objects.content(naming.used(job.id)):
            break
        await asyncio.sleep(1.0)
    data = world.objects.content(naming.used(job.id))
    _require(data is not None or not undisturbed, f"{job.id} has no account")
    if data is None:
        return
    account = Used.from_bytes(data).account
    failed_s = sum(
        max(0.0, one.ended_s - one.started_s - sum(one.run_s)) * job.stage(one.bundle.stage).slots
        for one in outcomes
        if one.failed
    )
    told_s = sum(account.failed_s.values())
    told = f"{account.bundles} outcomes and {told_s:.3f} s of failed attempts"
    facts = f"{job.id} has {told} in its account, and {len(outcomes)} and {failed_s:.3f} s happened"
    _require(account.bundles <= len(outcomes) and told_s <= failed_s + CLOSE_S, facts)
    exact = account.bundles == len(outcomes) and told_s >= failed_s - CLOSE_S
    _require(exact or not undisturbed, facts)
    used_s = [*account.billed_s.values(), *account.failed_s.values(), *account.lost_s.values()]
    _require(all(seconds >= 0.0 for seconds in used_s), f"{job.id} has used less than nothing")
