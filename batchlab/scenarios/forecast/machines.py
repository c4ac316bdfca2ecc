"""Machines of simulated instances: market, zone, and lifetime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from batchlab.core.errors import UsageError
from batchlab.core.model import Machine, Market, Pool
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.model.values import PoolPlan
from batchlab.scenarios.record import InstanceRun

NO_CAPACITY = "InsufficientInstanceCapacity"

_EXACT = 1e-9


def zone_names(count: int) -> tuple[str, ...]:
    """Return the names of `count` availability zones."""
    return tuple(f"us-east-1{chr(ord('a') + n)}" for n in range(count))


@dataclass(slots=True)
class SimulatedInstance:
    """Simulated instance. Times are in run seconds."""

    pool: str
    machine: Machine
    launched_s: float
    ready_s: float | None = None
    ended_s: float | None = None
    note: str = ""


class Machines:
    """Machines of all pools.

    A launch gets a Spot Instance according to the pool's share, in the zone with the fewest instances of the pool.
    `now_s` returns the run's time.
    """

    def __init__(self, plans: Sequence[PoolPlan], zones: Sequence[str], now_s: Callable[[], float]) -> None:
        self.lives: dict[str, SimulatedInstance] = {}
        """Instances in launch order."""
        self.lost_zones: list[str] = []
        self.refused = 0
        """Number of launches without an available zone."""
        self._spot = {plan.pool.name: plan.spot for plan in plans}
        self._zones = zones
        self._now_s = now_s
        self._alive: dict[str, dict[str, None]] = {plan.pool.name: {} for plan in plans}

    def refuse(self, _pool: Pool, _instance: str) -> str | None:
        """Return why no launch is possible, or None."""
        if all(zone in self.lost_zones for zone in self._zones):
            self.refused += 1
            return f"{NO_CAPACITY}: no zone has capacity."
        return None

    def launched(self, pool: Pool, instance: str) -> None:
        """Record a launch and choose its machine."""
        alive = self._alive[pool.name]
        machines = [self.lives[name].machine for name in alive]
        spot = sum(machine.market is Market.SPOT for machine in machines)
        # Rounding favors On-Demand, as in a mixed group of EC2 Auto Scaling.
        is_spot = spot + 1 <= self._spot[pool.name] * (len(machines) + 1) + _EXACT
        open_zones = [zone for zone in self._zones if zone not in self.lost_zones]
        zone = min(open_zones, key=lambda name: sum(machine.zone == name for machine in machines))
        machine = Machine(pool.instance_type, zone, Market.SPOT if is_spot else Market.ON_DEMAND)
        self.lives[instance] = SimulatedInstance(pool.name, machine, self._now_s())
        alive[instance] = None

    def ended(self, instance: str, how: str) -> None:
        """Record the end of an instance."""
        life = self.lives[instance]
        life.ended_s, life.note = self._now_s(), how
        del self._alive[life.pool][instance]

    def alive(self, pool: str = "") -> Mapping[str, SimulatedInstance]:
        """Return the ready instances of one pool or of all pools."""
        pools = [pool] if pool else list(self._alive)
        names = (name for pool_name in pools for name in self._alive.get(pool_name, ()))
        return {name: self.lives[name] for name in names if self.lives[name].ready_s is not None}

    def living(self, pool: str) -> int:
        """Count the living instances of a pool."""
        return len(self._alive[pool])

    def begin(self, ready: Sequence[str], *, on_demand: bool = False) -> None:
        """Start the run: living instances count from second 0, and those in `ready` are ready. With `on_demand`, none
        of them is a Spot Instance.
        """
        self.lives = {name: life for name, life in self.lives.items() if life.ended_s is None}
        for life in self.lives.values():
            life.launched_s = 0.0
            if on_demand:
                life.machine = replace(life.machine, market=Market.ON_DEMAND)
        for name in ready:
            self.lives[name].ready_s = 0.0

    def zone(self, name: str) -> str:
        """Return the zone by its name or last letter; the first zone for an empty name. Raise UsageError for an unknown
        zone.
        """
        if not name:
            return self._zones[0]
        for zone in self._zones:
            if name in (zone, zone[-1]):
                return zone
        raise UsageError(f"There is no zone {name!r}.", remedy=f"The zones are {', '.join(self._zones)}.")

    def booting(self, zone: str) -> list[str]:
        """Return the instances of a zone that are not ready."""
        lives = ((name, self.lives[name]) for names in self._alive.values() for name in names)
        return [name for name, life in lives if life.ready_s is None and life.machine.zone == zone]

    def oldest_first(self, names: Iterable[str]) -> list[str]:
        """Sort instances by launch."""
        chosen = set(names)
        return [name for name in self.lives if name in chosen]

    def since(self, at_s: float) -> list[SimulatedInstance]:
        """Return the instances launched since then."""
        return [life for life in self.lives.values() if life.launched_s >= at_s]

    def runs(self) -> tuple[InstanceRun, ...]:
        """Return all instances for the record."""
        runs = []
        for name, life in self.lives.items():
            kind, zone, market = life.machine.type, life.machine.zone, life.machine.market.value
            times = life.launched_s, life.ready_s, life.ended_s
            runs.append(InstanceRun(name, life.pool, kind, market, zone, *times, life.note))
        return tuple(runs)


def calibrated_pool(plan: PoolPlan, calibration: Calibration) -> Pool:
    """Return the plan's pool with the measured boot time, if there is one."""
    pool = plan.pool
    boot_s = pool.boot_s if calibration.other_boot_s is None else calibration.other_boot_s
    return replace(pool, boot_s=calibration.boot_s.get(pool.name, boot_s))
