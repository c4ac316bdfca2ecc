"""What moving data costs: out of AWS, through a NAT gateway or VPC endpoints, between zones.

Invariant: only bytes that somebody has counted have a price here, and nothing is derived; what
nobody counts is told.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.costs.money import GB, Item, Usd, shown
from batchlab.costs.prices import PriceBook

ENDPOINTS, NAT, OWN = "endpoints", "nat", "own"
"""How instances reach AWS: by the stack's VPC endpoints, its NAT gateway, or a network of the
user's. S3 is reached free of charge in the first two, by a gateway endpoint."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What is known of a job's data on the move: bytes that were fetched from the bucket to where
    the bill is made, and how the stack's instances reach AWS, "" on no stack."""

    fetched_bytes: int = 0
    egress: str = ""


def out_of_aws(size_bytes: float, prices: PriceBook, how: str) -> Item:
    """The line of so many bytes that leave AWS."""
    usd = size_bytes / GB * prices.of("transfer", "internet_usd_per_gb")
    return Item("data out of AWS", Usd.exactly(usd), f"{size_bytes / GB:,.3f} GB of {how}")


def through(egress: str, size_bytes: float, prices: PriceBook) -> Item | None:
    """The line of so many bytes between instances and SQS; None where nobody bills them, or they
    go through a network that is not the stack's."""
    if egress not in (ENDPOINTS, NAT) or not size_bytes:
        return None
    size_gb = size_bytes / GB
    how = f"{size_gb:,.3f} GB of messages to and from SQS"
    if egress == ENDPOINTS:
        each = prices.of("network", "endpoint_usd_per_gb")
        return Item("data through VPC endpoints", Usd.exactly(size_gb * each), how)
    low, typical, high = (size_gb * each for each in nat_usd_gb(prices))
    how += "; the gateway is in one of two zones, the most is if all came from the other"
    return Item("data through the NAT gateway", Usd(low, typical, high), how)


def nat_usd_gb(prices: PriceBook) -> tuple[float, float, float]:
    """What a GB through the gateway costs: from its own zone, by half from the other, all from the
    other."""
    gateway = prices.of("network", "nat_usd_per_gb")
    crossing = 2 * prices.of("transfer", "zone_usd_per_gb_each_way")
    return gateway, gateway + crossing / 2, gateway + crossing


def not_counted(egress: str) -> list[str]:
    """What a bill on such a stack does not have, as sentences without their full stop."""
    if egress == OWN:
        return ["what goes through your own network's NAT or endpoints is not in it"]
    if egress not in (ENDPOINTS, NAT):
        return []
    what = "of data, messages alone are counted: not HTTP around them, logs, or what tasks fetch"
    return [f"{what} and send by themselves"]


def rates(prices: PriceBook, egress: str) -> str:
    """What a GB costs on its ways, for where bytes are not known."""
    internet = shown(prices.of("transfer", "internet_usd_per_gb"))
    said = f"{internet} per GB out of AWS"
    if egress == ENDPOINTS:
        return f"{said}, {shown(prices.of('network', 'endpoint_usd_per_gb'))} through endpoints"
    if egress == NAT:
        low, _, high = nat_usd_gb(prices)
        return (
            f"{said}, {shown(low)} through NAT and {shown(high)} where it comes from another zone"
        )
    return said
