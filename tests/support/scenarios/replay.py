"""Small scenarios, and a real grid on `local` to replay them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchlab.core.model import Pool
from batchlab.core.retry_rule import RetryRule
from batchlab.runtime import factory, manager_process, settings
from batchlab.runtime.home import Home
from batchlab.scenarios.model.arrivals import FixedTimes
from batchlab.scenarios.model.distributions import Constant, Lognormal
from batchlab.scenarios.model.values import JobTemplate, Policy, PoolPlan, Scenario, StageTemplate, WorkKind
from batchlab.scenarios.record import Record
from batchlab.scenarios.replay import driver

QUICK = RetryRule(backoff_s=0.2)


def stage(name: str, seconds: float, **fields: Any) -> StageTemplate:
    """Return a stage whose tasks all take `seconds`."""
    return StageTemplate(name, Constant(seconds), **{"retry": QUICK, **fields})


def claims(tasks: int = 12, **fields: Any) -> JobTemplate:
    """Return a job with every kind of stage and of work."""
    return JobTemplate(
        "claims",
        (
            StageTemplate("parse", Lognormal(0.1, 0.5), kind=WorkKind.CPU, retry=QUICK),
            stage("price", 0.1, after=("parse",)),
            stage("by", 0.2, after=("price",), gather="key", groups=3, kind=WorkKind.IO),
            stage("sum", 0.2, after=("by",), gather="*", kind=WorkKind.MEMORY),
            stage("last", 0.1, after=("sum",)),
        ),
        Constant(tasks),
        tenant="payer-a",
        deadline_s=30.0,
        **fields,
    )


def scenario(*jobs: JobTemplate, at: tuple[tuple[float, int], ...] = ((0.0, 1),), **fields: Any) -> Scenario:
    """Return a scenario in which each job arrives at all of the times in `at`."""
    return Scenario(
        "small",
        "A few jobs.",
        {job.name: job for job in jobs},
        tuple(FixedTimes(template=job.name, moments=at) for job in jobs),
        **{
            "pools": (PoolPlan(Pool("default", 0, 2, 2)),),
            "policy": Policy(drain_target_s=3.0, cooldown_in_s=2.0, idle_s=1.0),
            **fields,
        },
    )


@contextmanager
def up(home: Home, wanted: Scenario) -> Iterator[factory.Backend]:
    """Start a grid on `local` with the scenario's pools and policy."""
    backend = factory.load("local")
    with settings.temporary_settings(home, wanted.policy.settings(), why="For a test."):
        pools = [plan.pool for plan in wanted.pools]
        manager_process.start_manager(home, backend, pools=pools, parent=True)
        try:
            yield backend
        finally:
            manager_process.stop_manager(home)


def replay(folder: Path, wanted: Scenario, **options: Any) -> Record:
    """Replay a scenario on its own grid."""
    home = Home(folder)
    with up(home, wanted) as backend:
        patience = factory.patience()
        return asyncio.run(driver.replay(wanted, home, backend, patience=patience, **options))
