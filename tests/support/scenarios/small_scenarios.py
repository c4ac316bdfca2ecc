"""Small scenarios for the tests of the forecast."""

from __future__ import annotations

from batchlab.core.model import Pool
from batchlab.scenarios.model.arrivals import FixedTimes
from batchlab.scenarios.model.distributions import Constant, Lognormal
from batchlab.scenarios.model.values import Fault, JobTemplate, PoolPlan, Prewarm, Scenario, StageTemplate, WorkKind

PARSE = StageTemplate("parse", Lognormal(4.0, 0.8), kind=WorkKind.IO)
PRICE = StageTemplate("price", Constant(1.0), after=("parse",))
BY_PAYER = StageTemplate("payer", Constant(2.0), after=("price",), gather="key", groups=3)
SUM = StageTemplate("sum", Constant(5.0), after=("price",), gather="*")


def claims(
    *stages: StageTemplate,
    jobs: int = 6,
    gap_s: float = 60.0,
    tasks: int = 30,
    faults: tuple[Fault, ...] = (),
    pool: PoolPlan | None = None,
    prewarm: tuple[Prewarm, ...] = (),
    zones: int = 2,
    first_s: float = 0.0,
) -> Scenario:
    """Return a scenario with `jobs` jobs of these stages. One job arrives every `gap_s` seconds from `first_s` on."""
    template = JobTemplate("claims", stages or (PARSE, PRICE, BY_PAYER, SUM), Constant(tasks))
    moments = tuple((first_s + gap_s * n, 1) for n in range(jobs))
    return Scenario(
        "claims",
        "Claims come one after the other.",
        {"claims": template},
        (FixedTimes(template="claims", moments=moments),),
        (pool or PoolPlan(Pool("default", 0, 6, 2, 90.0, instance_type="m7i.large"), 0.5),),
        zones=zones,
        faults=faults,
        prewarm=prewarm,
    )
