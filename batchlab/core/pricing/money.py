"""Amounts of money and ranges of them, in US dollars.

Invariant: an amount is never shown without its currency.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from batchlab.core.errors import UsageError

CURRENCY = "USD"
HOURS_A_MONTH = 730.0
"""Hours of a month in AWS's monthly prices."""
GB = 1024.0**3
"""Bytes of a GB in AWS's storage prices."""
BILLED_LEAST_S = 60.0
"""Minimum billed time of an instance. AWS bills Linux instances by the second, both on-demand and
Spot (aws.amazon.com/ec2/pricing)."""
WORKER_DISK_GB = 50.0
"""Size of a worker's gp3 disk in the stack. The parameter PoolDiskGiB overrides it."""

PATTERN = r"^\s*(\d+(\.\d+)?|\.\d+)\s*[Uu][Ss][Dd]\s*$"
"""Texts that `parse` accepts, for a JSON Schema."""
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*|\$)")


@dataclass(frozen=True, slots=True)
class Usd:
    """A range in US dollars. It is an amount if its three values are equal."""

    low: float
    typical: float
    high: float

    @classmethod
    def exactly(cls, usd: float) -> Usd:
        return cls(usd, usd, usd)

    def __add__(self, other: Usd) -> Usd:
        return Usd(self.low + other.low, self.typical + other.typical, self.high + other.high)

    def times(self, factor: float) -> Usd:
        return Usd(self.low * factor, self.typical * factor, self.high * factor)

    def __str__(self) -> str:
        if self.low == self.typical == self.high:
            return shown(self.typical)
        return f"{shown(self.typical)} ({_digits(self.low)} to {_digits(self.high)})"


NOTHING = Usd(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Item:
    """A line of a bill: its purpose, its cost, and how the cost was calculated."""

    what: str
    usd: Usd
    how: str = ""

    def to_json(self) -> dict[str, object]:
        return {"what": self.what, "how": self.how, "usd": range_json(self.usd)}


def total(items: Iterable[Item]) -> Usd:
    """Return the sum of the lines."""
    found = NOTHING
    for item in items:
        found += item.usd
    return found


def range_json(usd: Usd) -> dict[str, float]:
    """Return the range for a program. The name of the member that contains it has the currency."""
    return {"low": usd.low, "typical": usd.typical, "high": usd.high}


def _digits(usd: float) -> str:
    if abs(usd) >= 0.995:
        return f"{usd:,.2f}"
    # Three significant digits, down to amounts that are too small to matter.
    text = f"{usd:.3g}" if abs(usd) >= 0.0001 else f"{usd:.6f}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def shown(usd: float) -> str:
    """Return an amount as a text for a person: `1.25 USD`, `0.00432 USD`."""
    return f"{_digits(usd)} {CURRENCY}"


def parse(text: str) -> float:
    """Return the dollars in a text such as "5USD", "5 USD", or "0.50 usd".

    Raise UsageError if the text is not such an amount.
    """
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[2].upper() != CURRENCY:
        why = "" if found and not found[2] else f"Prices are in {CURRENCY}, nothing is converted: "
        raise UsageError(
            f"{text!r} is not an amount in {CURRENCY}.",
            remedy=f"{why}{'w' if why else 'W'}rite for example 5{CURRENCY} or 0.50{CURRENCY}.",
        )
    return float(found[1])
