"""Price book (`prices.toml`), and amounts in US dollars.

The price book contains AWS's list prices with their region, date, and source.

Invariants: a loaded price book has every price, and each price is a number of at least 0. A price book only returns
prices for its own region. An amount is always shown with its currency.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from batchlab.core import installation
from batchlab.core.errors import UsageError
from batchlab.core.model import Market
from batchlab.core.text import significant

CURRENCY = "USD"
DIGITS = 12
"""Number of decimal places of the amounts of a bill. Smaller parts of an amount are rounding errors."""
HOURS_A_MONTH = 730.0
"""Number of hours that a month has in AWS's monthly prices."""
GB = 1024.0**3
"""Number of bytes that a GB has in AWS's storage prices."""
MIN_BILLED_S = 60.0
"""Minimum billed time of an instance in seconds.

AWS bills Linux instances by the second, both on-demand and Spot (aws.amazon.com/ec2/pricing).
"""
WORKER_DISK_GB = 50.0
"""Default size of a worker's gp3 disk in the stack. The stack's parameter PoolDiskGiB overrides WORKER_DISK_GB."""

PATTERN = r"^\s*(\d+(\.\d+)?|\.\d+)\s*[Uu][Ss][Dd]\s*$"
"""Regular expression for the texts that `parse` accepts. A JSON Schema uses PATTERN."""
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*|\$)")


@dataclass(frozen=True, slots=True)
class Usd:
    """A range in US dollars: the lowest, typical, and highest amount. The three values of an exact amount are equal."""

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
    """Return the sum of the lines of a bill."""
    usd = NOTHING
    for item in items:
        usd += item.usd
    return usd


def range_json(usd: Usd) -> dict[str, float]:
    """Return the range as JSON. The name of the JSON member that contains the range must contain the currency."""
    return {"low": usd.low, "typical": usd.typical, "high": usd.high}


def _digits(usd: float) -> str:
    if abs(usd) >= 0.995:
        return f"{usd:,.2f}"
    return significant(round(usd, DIGITS), 3)


def shown(usd: float) -> str:
    """Return an amount as a text for a person, such as `1.25 USD` or `0.00432 USD`."""
    return f"{_digits(usd)} {CURRENCY}"


def decimals(total: float, least: int = 6) -> int:
    """Return the number of decimals of a table whose amounts add up to `total`.

    The table shows at least three significant digits of the total, and at least `least` decimals.
    """
    return max(least, min(DIGITS, 2 - math.floor(math.log10(total)))) if total > 0 else least


def parse(text: str) -> float:
    """Return the amount in US dollars in a text such as "5USD", "5 USD", or "0.50 usd".

    Raise UsageError if the text is not an amount in US dollars.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or match[2].upper() != CURRENCY:
        remedy = f"Prices are in {CURRENCY}, nothing is converted: write for example 5{CURRENCY} or 0.50{CURRENCY}."
        if match and not match[2]:
            remedy = f"Did you mean {match[1]}{CURRENCY}?"
        raise UsageError(f"{text!r} is not an amount in {CURRENCY}.", remedy=remedy)
    return float(match[1])


NAME = "prices.toml"

BLOCKS: Mapping[str, Sequence[str]] = {
    "on_demand": (),
    "spot": ("smallest_discount", "typical_discount", "largest_discount"),
    "sqs": ("usd_per_million_requests",),
    "s3": ("usd_per_1000_puts", "usd_per_1000_gets", "usd_per_gb_month"),
    "ebs": ("gp3_usd_per_gb_month",),
    "rds": ("usd_per_gb_month", "usd_per_backup_gb_month"),
    "network": (
        "nat_usd_per_hour",
        "nat_usd_per_gb",
        "endpoint_usd_per_hour",
        "endpoint_usd_per_gb",
        "public_ipv4_usd_per_hour",
    ),
    "transfer": ("internet_usd_per_gb", "zone_usd_per_gb_each_way"),
    "secrets": ("usd_per_secret_month", "usd_per_10000_calls"),
    "cloudwatch": ("logs_usd_per_gb", "logs_usd_per_gb_month", "usd_per_alarm_month"),
    "simpledb": ("usd_per_machine_hour", "usd_per_gb_month"),
}
"""Names of the prices in each block of a price book."""

TABLES: Mapping[str, str] = {"on_demand": "usd_per_hour", "rds": "usd_per_hour", "spot": "usd_per_hour"}
"""Blocks of a price book that have a table of prices by instance type or database class. The block `spot` may lack its
table.
"""

AS_IF = "m7i.large"
"""Instance type whose price applies to pools without an instance type."""

HOW = "`batchlab cost refresh-prices --from FILE` takes prices from a file; see docs/costs.md."


@dataclass(frozen=True, slots=True)
class Block:
    """Block of prices with the same region, date, and source. Prices are in USD, and discounts are shares of 1."""

    name: str
    region: str
    date: date
    source: str
    prices: Mapping[str, float]
    table: Mapping[str, Any]
    """USD per hour by type. The value of a Spot type is a list of the lowest, typical, and highest observed price."""


@dataclass(frozen=True, slots=True)
class PriceBook:
    """Price book, which consists of named blocks of prices."""

    blocks: Mapping[str, Block]
    path: Path | None = None
    grid_region: str = ""
    """Region of the grid's stack, or "" if the grid is not on AWS."""

    @property
    def mismatch(self) -> str:
        """Return a note without a period if the price book lacks prices for the region of the grid, or else ""."""
        others = [block for block in self.blocks.values() if block.region != self.grid_region]
        if not self.grid_region or not others:
            return ""
        return (
            f"prices are of {', '.join(sorted({block.region for block in others}))}, because the price book lacks "
            f"{', '.join(block.name for block in others)} for {self.grid_region}: `batchlab cost refresh-prices --from "
            f"FILE --region {self.grid_region}` reads prices of instances, and docs/costs.md describes the others"
        )

    @property
    def region(self) -> str:
        """Return the region of the price book's instance prices."""
        return self.blocks["on_demand"].region

    @property
    def source(self) -> str:
        """Return the region and the newest date of the prices in the price book, as a part of a sentence."""
        day = max(block.date for block in self.blocks.values())
        return f"AWS's list prices of {self.region} in USD, as of {day.isoformat()}"

    def price(self, block: str, price: str) -> float:
        """Return one price of a block. Raise KeyError if the block does not have the price."""
        return self.blocks[block].prices[price]

    def at(self, region: str) -> PriceBook:
        """Return the price book itself. Raise UsageError if the price book is for another region than `region`."""
        others = sorted({b.region for b in self.blocks.values() if b.region != region})
        if others:
            names = ", ".join(n for n, b in self.blocks.items() if b.region != region)
            raise UsageError(
                f"The price book does not contain prices for {region}: its blocks {names} are of {', '.join(others)}.",
                remedy=f"Write those of {region} into a {NAME} in the grid's folder. {HOW}",
            )
        return self

    def instance_usd_h(self, name: str, market: Market = Market.ON_DEMAND) -> Usd:
        """Return the price per hour of an instance with the instance type `name`.

        A Spot price is a range. Raise UsageError if the instance type is not in the price book.
        """
        on_demand = self._of_type("on_demand", name, "instance type")
        if market is Market.ON_DEMAND:
            return Usd.exactly(on_demand)
        if seen := self.blocks["spot"].table.get(name):
            return Usd(*seen)
        discounts = self.blocks["spot"].prices
        return Usd(
            on_demand * (1 - discounts["largest_discount"]),
            on_demand * (1 - discounts["typical_discount"]),
            on_demand * (1 - discounts["smallest_discount"]),
        )

    def rate(self, type_: str, market: Market, otherwise: str = "") -> Usd:
        """Return the price per hour of an instance type that may not be in the price book.

        If the price book does not have `type_`, return the price of the type `otherwise`, or else of AS_IF.
        """
        table = self.blocks["on_demand"].table
        name = next((candidate for candidate in (type_, otherwise) if candidate in table), AS_IF)
        return self.instance_usd_h(name, market)

    def database_usd_h(self, name: str) -> float:
        """Return the price per hour of a database instance of the class `name` in one zone.

        Raise UsageError if the class is not in the price book.
        """
        return self._of_type("rds", name, "database instance class")

    def _of_type(self, block: str, name: str, kind: str) -> float:
        known = self.blocks[block]
        if name in known.table:
            return float(known.table[name])
        near = difflib.get_close_matches(name, known.table, n=3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"The price book of {known.region} has no {kind} {name!r}.", remedy=f"{hint}{HOW}")


def load(home: Path | None = None) -> PriceBook:
    """Return the price book in the folder `home` of a grid, by default the price book that ships with batchlab.

    Raise UsageError if the price book is not valid.
    """
    if home is not None and (home / NAME).exists():
        return read(home / NAME)
    return read(_shipped_path())


def _shipped_path() -> Path:
    return installation.folder("backends") / "aws" / NAME


def read(path: Path) -> PriceBook:
    """Return the price book that the file `path` contains. Raise UsageError if the price book is not valid."""
    return from_doc(installation.read_toml(path), path)


def from_doc(doc: Mapping[str, Any], path: Path) -> PriceBook:
    """Return the price book in a TOML document.

    Raise UsageError, with `path` in its message, if the document is not a valid price book.
    """
    if doc.get("currency") != CURRENCY:
        raise UsageError(
            f"{path}: currency is {doc.get('currency')!r}, not {CURRENCY!r}.",
            remedy="AWS's list prices are in USD; convert what is shown, not the book.",
        )
    expected = {"currency", *BLOCKS}
    if lacking := sorted(expected - set(doc)):
        raise UsageError(
            f"{path} lacks block [{lacking[0]}].",
            remedy=f"Take it from {_shipped_path()}, with prices of your region. {HOW}",
        )
    if unknown := sorted(set(doc) - expected):
        raise UsageError(f"{path} has an unknown block [{unknown[0]}].", remedy=HOW)
    return PriceBook({name: _block(path, name, doc[name]) for name in BLOCKS}, path)


def _block(path: Path, name: str, doc: Any) -> Block:
    if not isinstance(doc, dict):
        raise UsageError(f"{path}: [{name}] is not a table.", remedy=HOW)
    for key in ("region", "source"):
        if not isinstance(doc.get(key), str) or not doc[key].strip():
            raise UsageError(f"{path}: [{name}] lacks its {key}.", remedy=HOW)
    # Compare the exact type, because datetime is a subclass of date in Python.
    if type(doc.get("date")) is not date:
        raise UsageError(f"{path}: [{name}] lacks the date of its prices.", remedy="Write date = 2026-07-20.")
    table_name = TABLES.get(name)
    table = doc.get(table_name, {} if name == "spot" else None) if table_name else {}
    if not isinstance(table, dict):
        raise UsageError(f"{path}: [{name}] lacks its table {table_name}.", remedy=HOW)
    known = {"region", "date", "source", *BLOCKS[name], *([table_name] if table_name else [])}
    if unknown := sorted(set(doc) - known):
        raise UsageError(f"{path}: [{name}] has an unknown key {unknown[0]!r}.", remedy=HOW)
    prices = {key: _number(path, name, key, doc.get(key)) for key in BLOCKS[name]}
    if name == "spot":
        _check_spot(path, prices)
        entry = _range
    else:
        entry = _number
    entries = {key: entry(path, name, key, value) for key, value in table.items()}
    return Block(name, doc["region"], doc["date"], doc["source"], prices, entries)


def _number(path: Path, block: str, key: str, value: Any) -> Any:
    # Compare the exact type, because bool is a subclass of int in Python.
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise UsageError(f"{path}: {key} of [{block}] is {value!r}, not a price at or above 0.", remedy=HOW)
    return float(value)


def _range(path: Path, block: str, key: str, value: Any) -> Any:
    if not isinstance(value, list) or len(value) != 3:
        raise UsageError(
            f"{path}: {key} of [{block}] is {value!r}, not the lowest, typical and highest price.", remedy=HOW
        )
    prices = tuple(_number(path, block, key, price) for price in value)
    if list(prices) != sorted(prices):
        raise UsageError(
            f"{path}: the three prices of {key} in [{block}] are not in order.",
            remedy="Write the lowest first, the highest last.",
        )
    return prices


def _check_spot(path: Path, prices: Mapping[str, float]) -> None:
    discounts = [prices[key] for key in BLOCKS["spot"]]
    if discounts != sorted(discounts) or discounts[-1] > 1:
        raise UsageError(
            f"{path}: the discounts of [spot] must be shares of 1, from the smallest to the largest.", remedy=HOW
        )


def write(book: PriceBook) -> str:
    """Return the price book as TOML. `from_doc` reads an equal price book from the TOML document."""
    lines = [f'currency = "{CURRENCY}"']
    for name, block in book.blocks.items():
        lines += ["", f"[{name}]", f"region = {_text(block.region)}"]
        lines += [f"date = {block.date.isoformat()}", f"source = {_text(block.source)}"]
        lines += [f"{key} = {value!r}" for key, value in block.prices.items()]
        if block.table:
            lines += ["", f"[{name}.{TABLES[name]}]"]
            lines += [f"{_text(k)} = {_value(v)}" for k, v in block.table.items()]
        elif name in TABLES and name != "spot":
            lines += ["", f"[{name}.{TABLES[name]}]"]
    return "\n".join(lines) + "\n"


def _value(value: float | tuple[float, ...]) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else " " for c in escaped) + '"'
