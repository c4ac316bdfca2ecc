"""From a scenario file's models to the values of model.py: fleet, faults, expectations.

Invariant: nothing here can fail; what is wrong with it the checks have told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from batchlab.costs import money
from batchlab.model import Pool
from batchlab.scenario.measures import MEASURES, Unit
from batchlab.scenario.model import Expectation, Fault, FaultName, Policy, PoolPlan, Prewarm
from batchlab.scenario.schema import FaultSpec, ScenarioSpec

FAULTS: Mapping[str, FaultName] = {name.value: name for name in FaultName}


def pools(spec: ScenarioSpec) -> tuple[PoolPlan, ...]:
    """The fleet, in the order of the file."""
    found = []
    for name, one in spec.pools.items():
        pool = Pool(name, one.min, one.max, one.slots, one.boot, instance_type=one.instance_type)
        found.append(PoolPlan(pool, one.spot))
    return tuple(found)


def policy(spec: ScenarioSpec) -> Policy:
    """The scaling policy."""
    return Policy(spec.policy.drain_target, spec.policy.cooldown_in, spec.policy.idle)


def prewarm(spec: ScenarioSpec) -> tuple[Prewarm, ...]:
    """Scheduled capacity, in the order of the file."""
    return tuple(Prewarm(one.pool, one.min, one.at_s, one.until_s) for one in spec.prewarm)


def faults(spec: ScenarioSpec) -> tuple[Fault, ...]:
    """The faults in order of time."""
    return tuple(sorted(map(fault, spec.faults), key=lambda fault: fault.at_s))


def fault(spec: FaultSpec) -> Fault:
    """One of them."""
    said = {
        "share": spec.share,
        "count": spec.count,
        "rate": spec.rate,
        "notice_s": spec.notice,
        "zone": spec.zone,
        "pool": spec.pool,
    }
    more: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
    return Fault(FAULTS[spec.fault], spec.at_s, spec.for_s, **more)


def expectations(spec: ScenarioSpec) -> tuple[Expectation, ...]:
    """What must hold, those of single templates last."""
    whole: Any = spec.expect
    found = list(_expectations(whole, ""))
    for name, own in whole.jobs.items():
        found += _expectations(own, name)
    return tuple(found)


def _expectations(spec: Any, template: str) -> Iterator[Expectation]:
    for name, measure in MEASURES.items():
        bound = getattr(spec, name, None)
        if bound is not None:
            limits = [bound.least, bound.most]
            if measure.unit is Unit.USD:
                limits = [None if one is None else money.parse(one) for one in limits]
            least, most = limits
            yield Expectation(name, least, most, template)
