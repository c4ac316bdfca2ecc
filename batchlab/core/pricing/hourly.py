"""Hourly cost of an idle stack, and hourly cost of each additional worker.

Invariant: the hourly cost is a function of the stack's parameters and the price book. The hourly cost does not include
charges by use (requests, data, logs), which are listed separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchlab.core.errors import UsageError
from batchlab.core.model import Market
from batchlab.core.pricing import request_costs
from batchlab.core.pricing.price_book import HOURS_A_MONTH, WORKER_DISK_GB, Item, PriceBook, Usd, range_json, total

EGRESS = (request_costs.ENDPOINTS, request_costs.NAT)
LEDGERS = ("sqlite", "postgres", "simpledb")
"""Values of the stack's parameter Ledger. The first value is the default."""
ZONES = {"one": 1, "two": 2}
_LIST = (
    "before tax, free tiers and discounts; Spot by an assumed range of discounts, unless the price "
    "book has Spot's own prices"
)


@dataclass(frozen=True, slots=True)
class StackShape:
    """Numbers of those resources in the stack's template that do not depend on parameters.

    AWS bills interface endpoints for each zone. The gateway endpoint of S3 is free. `alarms` is the number of the
    stack's own alarms, and `pool_alarms` is the number of alarms of each pool. `secrets` is the number of secrets
    without the database's own secret.
    """

    zones: int = 2
    interface_endpoints: int = 6
    nat_gateways: int = 1
    alarms: int = 2
    pool_alarms: int = 2
    secrets: int = 1


@dataclass(frozen=True, slots=True)
class Worker:
    """Hourly cost of one additional worker of a pool.

    `mixed` is the average hourly cost of a worker beyond the first `on_demand_base` instances, with the pool's share of
    on-demand instances.
    """

    pool: str
    instance_type: str
    on_demand: Usd
    spot: Usd
    mixed: Usd
    on_demand_percent: float
    on_demand_base: int

    def to_json(self) -> dict[str, object]:
        return {
            "pool": self.pool,
            "instance_type": self.instance_type,
            "on_demand_percent": self.on_demand_percent,
            "on_demand_base": self.on_demand_base,
            "on_demand_usd_per_hour": range_json(self.on_demand),
            "spot_usd_per_hour": range_json(self.spot),
            "mixed_usd_per_hour": range_json(self.mixed),
        }


@dataclass(frozen=True, slots=True)
class Hourly:
    """Hourly cost of a stack.

    `idle` has the cost lines of the idle stack, including the minimum number of workers. `workers` has the cost of each
    additional worker by pool. `prices` is a text with the region and the day of the prices.
    """

    idle: tuple[Item, ...]
    workers: tuple[Worker, ...]
    prices: str
    by_use: str
    """Sentence about the charges that depend on use, such as requests and data."""

    @property
    def idle_usd_h(self) -> Usd:
        return total(self.idle)

    def to_json(self) -> dict[str, object]:
        return {
            "idle": [item.to_json() for item in self.idle],
            "idle_usd_per_hour": range_json(self.idle_usd_h),
            "idle_usd_per_month": range_json(self.idle_usd_h.times(HOURS_A_MONTH)),
            "workers": [worker.to_json() for worker in self.workers],
            "prices": self.prices,
            "by_use": self.by_use,
        }

    def text(self) -> str:
        """Return the hourly cost of a stack as text. The text is shown before the stack is created."""
        width = max(len(item.what) for item in self.idle)
        lines = ["While nothing runs, per hour:"]
        lines += [f"{item.what:<{width}}  {item.usd}" for item in self.idle]
        month = self.idle_usd_h.times(HOURS_A_MONTH)
        lines.append(f"{'idle, per hour':<{width}}  {self.idle_usd_h}; {month} a month")
        lines += [
            f"each worker of pool {worker.pool} ({worker.instance_type}), per hour: on-demand "
            f"{worker.on_demand}, Spot {worker.spot}"
            for worker in self.workers
        ]
        return "\n".join([*lines, f"Prices: {self.prices}, {_LIST}. {self.by_use}"])


def hourly_cost(
    parameters: Mapping[str, object], prices: PriceBook, *, region: str = "", shape: StackShape | None = None
) -> Hourly:
    """Return the hourly cost of a stack with the given parameters in `region`.

    The default of `region` is the region of the price book. `parameters` maps parameter names of
    `backends/aws/stack.yaml` to texts or numbers. A missing parameter has the default value of the template. Each
    parameter `Pool…InstanceTypes` defines one pool. The first instance type of a pool determines the on-demand price,
    and all of its instance types determine the range of the Spot price. Raise UsageError for an instance type, a
    database class, or a region without a price.
    """
    if region:
        prices = prices.at(region)
    shape = shape or StackShape()
    workers = tuple(_workers(parameters, prices))
    idle = [
        *_manager(parameters, prices),
        *_ledger(parameters, prices),
        *_network(parameters, prices, shape),
        *_monthly(parameters, prices, shape, len(workers)),
    ]
    for worker in workers:
        least = int(_number(parameters, f"{_prefix(parameters, worker.pool)}Min", 0))
        if least:
            base = min(least, worker.on_demand_base)
            usd = worker.on_demand.times(base) + worker.mixed.times(least - base)
            how = f"{least} × {worker.instance_type} that always run"
            idle.append(Item(f"least workers of pool {worker.pool}", usd, how))
    return Hourly(tuple(idle), workers, prices.source, _by_use(parameters, prices))


def _by_use(p: Mapping[str, object], prices: PriceBook) -> str:
    egress = request_costs.OWN if p.get("VpcId") else _one_of(p, "Egress", EGRESS)
    return (
        "SQS and S3 requests, stored objects, log data, SimpleDB's machine hours and data on the "
        f"move ({request_costs.rates(prices, egress)}) are billed by use, on top."
    )


def _manager(p: Mapping[str, object], prices: PriceBook) -> list[Item]:
    name = str(p.get("ManagerInstanceType") or "t3.small")
    size_gb = _number(p, "ManagerDiskGiB", 20.0)
    disk = _disk_usd_h(prices, size_gb)
    return [
        Item(f"manager ({name})", prices.instance_usd_h(name), "on-demand, always running"),
        Item("manager's disk", Usd.exactly(disk), f"{size_gb:g} GB gp3"),
    ]


def _ledger(p: Mapping[str, object], prices: PriceBook) -> list[Item]:
    kind = _one_of(p, "Ledger", LEDGERS)
    if kind == "sqlite":
        return [Item("ledger (SQLite)", Usd.exactly(0.0), "on the manager's disk")]
    if kind == "simpledb":
        return [Item("ledger (SimpleDB)", Usd.exactly(0.0), "billed by use alone")]
    name = str(p.get("DatabaseClass") or "db.t4g.micro")
    zones = ZONES[_one_of(p, "DatabaseZones", tuple(ZONES))]
    size_gb = _number(p, "DatabaseGiB", 20.0)
    instance = prices.database_usd_h(name) * zones
    storage = prices.price("rds", "usd_per_gb_month") * size_gb * zones / HOURS_A_MONTH
    where = "in one zone" if zones == 1 else "in two zones"
    return [
        Item(f"ledger (RDS PostgreSQL, {name})", Usd.exactly(instance), where),
        Item("ledger's storage", Usd.exactly(storage), f"{size_gb:g} GB gp3 {where}"),
    ]


def _network(p: Mapping[str, object], prices: PriceBook, shape: StackShape) -> list[Item]:
    egress = _one_of(p, "Egress", EGRESS)
    if p.get("VpcId"):
        return [Item("network", Usd.exactly(0.0), "your own network, and you pay for its endpoints or NAT")]
    if egress == "nat":
        each = prices.price("network", "nat_usd_per_hour")
        address = prices.price("network", "public_ipv4_usd_per_hour")
        usd = (each + address) * shape.nat_gateways
        how = f"{shape.nat_gateways} with a public IPv4 address each"
        return [Item("NAT gateways", Usd.exactly(usd), how)]
    count, zones = shape.interface_endpoints, shape.zones
    usd = prices.price("network", "endpoint_usd_per_hour") * count * zones
    return [Item("VPC endpoints", Usd.exactly(usd), f"{count} in each of {zones} zones")]


def _monthly(p: Mapping[str, object], prices: PriceBook, shape: StackShape, pools: int) -> list[Item]:
    secrets = shape.secrets + (p.get("Ledger") == "postgres")
    alarms = shape.alarms + shape.pool_alarms * max(1, pools)
    of_secrets = prices.price("secrets", "usd_per_secret_month") * secrets / HOURS_A_MONTH
    of_alarms = prices.price("cloudwatch", "usd_per_alarm_month") * alarms / HOURS_A_MONTH
    return [Item("secrets", Usd.exactly(of_secrets), f"{secrets}"), Item("alarms", Usd.exactly(of_alarms), f"{alarms}")]


def _disk_usd_h(prices: PriceBook, size_gb: float) -> float:
    return prices.price("ebs", "gp3_usd_per_gb_month") * size_gb / HOURS_A_MONTH


# --- Workers -------------------------------------------------------------------------------------


def _workers(p: Mapping[str, object], prices: PriceBook) -> list[Worker]:
    workers: list[Worker] = []
    for key in p:
        if not (key.startswith("Pool") and key.endswith("InstanceTypes")):
            continue
        prefix = key.removesuffix("InstanceTypes")
        names = [price.strip() for price in str(p[key]).split(",") if price.strip()]
        if not names:
            raise UsageError(f"{key} does not name an instance type.", remedy="Write for example m7i.large.")
        # By default, the template uses only Spot Instances.
        percent = _number(p, f"{prefix}OnDemandPercent", 0.0)
        disk = Usd.exactly(_disk_usd_h(prices, _number(p, f"{prefix}DiskGiB", WORKER_DISK_GB)))
        on_demand = prices.instance_usd_h(names[0])
        ranges = [prices.instance_usd_h(name, Market.SPOT) for name in names]
        spot = Usd(
            min(price.low for price in ranges),
            sum(price.typical for price in ranges) / len(ranges),
            max(price.high for price in ranges),
        )
        mixed = on_demand.times(percent / 100) + spot.times(1 - percent / 100)
        workers.append(
            Worker(
                _pool_name(p, prefix),
                names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more",
                on_demand + disk,
                spot + disk,
                mixed + disk,
                percent,
                int(_number(p, f"{prefix}OnDemandBase", 0)),
            )
        )
    return workers


def _pool_name(p: Mapping[str, object], prefix: str) -> str:
    named = p.get(f"{prefix}Name")
    return str(named) if named else prefix.removeprefix("Pool").lower() or "default"


def _prefix(p: Mapping[str, object], pool: str) -> str:
    prefixes = (key.removesuffix("InstanceTypes") for key in p if key.endswith("InstanceTypes"))
    return next(prefix for prefix in prefixes if _pool_name(p, prefix) == pool)


def _number(p: Mapping[str, object], key: str, default: float) -> float:
    value = p.get(key)
    if value is None or value == "":
        return default
    try:
        return float(str(value))
    except ValueError:
        raise UsageError(f"{key} is {value!r}, not a number.", remedy="Write a number.") from None


def _one_of(p: Mapping[str, object], key: str, choices: tuple[str, ...]) -> str:
    """Return the value of a parameter, by default the first value in `choices`."""
    value = str(p.get(key) or choices[0])
    if value not in choices:
        raise UsageError(f"{key} is {value!r}.", remedy=f"Write {', '.join(choices)}.")
    return value
