"""A simulated grid without overhead, to compare with queueing theory. Calls take no time, the order is strict, the
fleet is fixed, and periodic work is off."""

from __future__ import annotations

from dataclasses import replace

from batchlab.core.model import Pool
from batchlab.core.service_settings import ManagerSettings, WorkerSettings
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.runtime.factory import Backend
from batchlab.scenarios.forecast.simulate import ForecastOptions
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import Distribution, JobTemplate, PoolPlan, Scenario, Source, StageTemplate

HOUR_S = 3600.0

LIKE: Backend = replace(
    factory.load("aws"),
    name="ideal",
    manager=ManagerSettings(
        control_lease_s=HOUR_S,
        visibility_s=HOUR_S,
        silence_s=1e6,
        lease_ttl_s=1e5,
        tick_s=HOUR_S,
        wait_s=HOUR_S,
        idle_s=1e9,
        window=10**6,
    ),
    worker=WorkerSettings(
        control_lease_s=HOUR_S,
        visibility_s=HOUR_S,
        beat_s=HOUR_S,
        idle_beat_s=1e5,
        beat_gap_s=HOUR_S,
        wait_s=HOUR_S,
        watchdog_s=2 * HOUR_S,
        quick_s=0.0,
    ),
)
NOTHING = Calibration("ideal", call_s=(0.0, 0.0))
IN_ORDER = ForecastOptions(fifo=True, max_wait_s=HOUR_S)


def servers(source: Source, count: int, task_s: Distribution | None = None) -> Scenario:
    """Return a scenario of jobs with one task each and `count` slots, in which the first job in the queue runs
    first."""
    stage = StageTemplate("run", task_s or Constant(1.0), bundle=1)
    template = JobTemplate("job", (stage,), Constant(1))
    pool = Pool("default", 1, 1, count)
    return Scenario("servers", "", {"job": template}, (source,), (PoolPlan(pool),))
